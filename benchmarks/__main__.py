"""Benchmarks, run from a checkout: ``python -m benchmarks --help``."""

import argparse
import importlib.util
import sys

# What the benchmarks need beyond vgkern itself; `vgkern[demo]` brings it.
NEEDS = ("rich", "matplotlib")


def main() -> int:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"benchmarks: error: they need {', '.join(missing)}: pip install -e '.[demo]'", file=sys.stderr)
        return 2
    from . import audit, clip, micro, monitor, resnet50

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of vgkern, from a checkout.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (micro, resnet50, clip, monitor, audit):
        command.add_parser(commands)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
