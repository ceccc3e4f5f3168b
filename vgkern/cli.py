"""The command ``vgkern``.

Standard library only, so that ``info`` and ``verify`` work in a plain installation. Exit status: 0, 1 for a failed
check, 2 for an error (on stderr), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import CommandError

__all__ = ["main"]

# What `vgkern[demo]` brings: module → package.
_DEMO_NEEDS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own) and return the exit status."""
    options = vars(_parser().parse_args(argv))
    command: Callable[..., int] = options.pop("command")
    try:
        status = command(**options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vgkern: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vgkern info | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CommandError, OSError) as error:
        print(f"vgkern: error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vgkern",
        description="Fused batch norm + residual + activation for PyTorch; its backward reports the gradient's norms.",
        epilog="Exit status: 0 fine, 1 a check failed, 2 an error, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"vgkern {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    added = {
        "info": _add_info, "demo": _add_demo, "verify": _add_verify, "doctor": _add_doctor, "tune": _add_tune,
    }  # fmt: skip
    for name, add in added.items():
        add(commands, name)
    return parser


def _add(commands: Any, name: str, command: Callable[..., int], summary: str, details: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=command)
    return parser


def _add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--json", dest="json_path", nargs="?", const="-", metavar="FILE", default=argparse.SUPPRESS,
        help=f"write {what} as JSON to FILE, or to stdout without FILE or with -",
    )  # fmt: skip


def _add_info(commands: Any, name: str) -> None:
    parser = _add(
        commands, name, _info, "show versions, backends, instruction set, threads and GPUs",
        "A backend that cannot be used here says why.",
    )  # fmt: skip
    _add_json(parser, "the same")


def _add_demo(commands: Any, name: str) -> None:
    parser = _add(
        commands, name, _demo, "train four deep nets on real digits and show what their gradients do",
        "Plain with sigmoid, plain with ReLU, with batch norm, with batch norm and residuals: the same depth, data and "
        "optimiser. Prints a table, draws a figure and says what it shows. Takes minutes; Ctrl-C ends it early and "
        "keeps what is done. Needs the extra: pip install 'vgkern[demo]'.",
    )  # fmt: skip
    from .demo.results import Config  # needs nothing of the extra

    parser.add_argument(
        "--depth", type=int, default=Config.depth, help="weight layers of each net, 6n + 2: 8, 14, 20, ..."
    )
    parser.add_argument("--epochs", type=int, default=Config.epochs, help="passes over the training images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=Config.seed, help="of the weights and the order of the images")
    parser.add_argument("--out", default=".", metavar="PATH", help="a folder for vgkern-demo.png, or a .png file")
    _add_json(parser, "the raw numbers")


def _add_verify(commands: Any, name: str) -> None:
    parser = _add(
        commands, name, _verify, "check the fused layers on this machine against float64 autograd",
        "The cases that vgkern's own tests run; a case fails where the error exceeds PyTorch's own in the same dtype. "
        "In Triton's interpreter (TRITON_INTERPRET=1) float16 is left out unless --full is given.",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("cpu", "triton", "reference"), default=argparse.SUPPRESS,
        help="only this one (default: all that can be used here)",
    )  # fmt: skip
    parser.add_argument(
        "--activation", dest="activations", action="append", metavar="NAME", default=argparse.SUPPRESS,
        help="only this one; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="more shapes, dtypes and arguments; takes minutes")
    _add_json(parser, "the result of each case")


def _add_doctor(commands: Any, name: str) -> None:
    parser = _add(
        commands, name, _doctor, "train a model for a few steps and say what is wrong with its gradients",
        "FACTORY is called without arguments and returns a torch.nn.Module, or (module, data), or (module, data, "
        "loss): data is an input, an (input, target) pair or an iterable of either; loss takes (output, target), or "
        "the output alone if there is no target. Without data, --input says the shape of a random one, and without a "
        "target it is random too. MODULE is looked for in the working directory as well. Exit status 1 if there are "
        "findings; those of --demo do not count.",
    )  # fmt: skip
    parser.add_argument("factory", nargs="?", metavar="MODULE:FACTORY", default=None, help="what makes the model")
    parser.add_argument("--demo", action="store_true", help="a sick net and its cure side by side instead")
    parser.add_argument("--input", type=_shape, metavar="32,3,224,224", default=None, help="shape of a random input")
    parser.add_argument("--steps", type=int, default=5, help="training steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="set before the model is made")
    parser.add_argument("--out", default=".", metavar="PATH", help="a folder for vgkern-doctor.png, or a .png file")
    parser.add_argument("--dark", action="store_true", help="a dark figure")
    _add_json(parser, "the report")


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
        if min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 32,3,224,224, got {text!r}") from None
    return sizes


def _add_tune(commands: Any, name: str) -> None:
    parser = _add(
        commands, name, _tune, "time the Triton kernels' block sizes on this GPU",
        "Prints rows in the form of the table in kernels/tuning.py, each with its reason; a row that no candidate "
        "beats by 2 % stays as it is. Takes minutes and changes nothing: a pinned table is what makes a result's bits "
        "independent of the GPU's size.",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--out", metavar="FILE", default=argparse.SUPPRESS, help="write the rows to FILE")


def _info(json_path: str | None = None) -> int:
    from . import info

    collected = info.collect()
    if json_path is None:
        print(info.render(collected))
    else:
        _write_json(collected, json_path)
    return 0


def _demo(json_path: str | None = None, **options: Any) -> int:
    missing = [package for module, package in _DEMO_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}: pip install 'vgkern[demo]'")
    from .demo import command

    return command.main(json_path=json_path, **options)


def _verify(
    full: bool, backend: str | None = None, activations: list[str] | None = None, json_path: str | None = None
) -> int:
    from .verify import verify

    try:
        report = verify(backend, full, activations=activations, progress=_bar if sys.stderr.isatty() else None)
    except (ValueError, RuntimeError) as error:  # an unknown activation; a backend that cannot be used here
        raise CommandError(str(error)) from None
    if json_path is not None:
        _write_json(report.to_dict(), json_path)
    print(report, file=sys.stderr if json_path == "-" else sys.stdout)
    for failure in report.failures:
        print(f"\n{failure}", file=sys.stderr)
    return 0 if report.ok else 1


def _doctor(json_path: str | None = None, **options: Any) -> int:
    from .doctor import command

    progress = functools.partial(_bar, noun="steps") if sys.stderr.isatty() else None
    return command.main(json_path=json_path, progress=progress, **options)


def _tune(device: str, out: str | None = None) -> int:
    from . import tune

    tune.check_device(device)
    rows = tune.render(tune.tune(device, progress=lambda line: print(line, file=sys.stderr, flush=True)))
    if out is None:
        print(rows)
    else:
        Path(out).write_text(rows + "\n")
    return 0


def _bar(done: int, total: int, noun: str = "cases") -> None:
    """A bar on stderr that is wiped when it is full."""
    width = 40
    filled = width * done // total
    line = f"[{'#' * filled}{'.' * (width - filled)}] {done}/{total} {noun}"
    print(f"\r{line}" if done < total else f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


def _write_json(value: Any, path: str) -> None:
    text = json.dumps(value, indent=1)
    if path == "-":
        print(text)
        return
    Path(path).write_text(text + "\n")
