import argparse

from . import audit, micro


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of vgkern, from a checkout.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    micro.add_parser(commands)
    audit.add_parser(commands)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
