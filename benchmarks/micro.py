"""``python -m benchmarks micro``: the fused layer against PyTorch, forward and backward, and against the memory.

Each configuration is first checked against float64 autograd; a wrong one is reported and not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

import vgkern

from . import environment, figure, floor, report, tcmalloc
from .competitors import COMPETITORS, Contest, compiler_cache, measure
from .console import console, progress, rounds
from .floor import FORMATS
from .report import Result
from .shapes import SETS, Configuration, Shape, Site, configurations

DTYPES = ("float32", "float64", "bfloat16", "float16")


def run(args: argparse.Namespace) -> int:
    if bool(args.shapes) != (args.set == "custom"):
        args.error("shapes N,C,H,W follow the set `custom`, which needs at least one, and no other")
    if args.threads:
        torch.set_num_threads(args.threads)
    sites = [Site(shape) for shape in args.shapes] if args.set == "custom" else SETS[args.set]
    todo = list(
        configurations(
            sites, args.dtype, args.layout, args.activation, residual=not args.no_residual, training=not args.eval
        )
    )
    args.out.mkdir(parents=True, exist_ok=True)  # before the minutes of timing, not after them
    described = environment.describe(args.device)
    out = console(sys.stdout)
    out.print(environment.summary(described))

    roof = floor.measure_roof(args.device)
    results, wrong, interrupted = _results(todo, args)
    if roof and not interrupted:
        roof = roof.best_of(floor.measure_roof(args.device))
    if results:
        _write(results, roof, described, args)
    if interrupted:
        return 130
    return 1 if wrong else 0


def _results(todo: list[Configuration], args: argparse.Namespace) -> tuple[list[Result], int, bool]:
    """What was measured, how many configurations were wrong, and whether Ctrl-C ended it early."""
    results: list[Result] = []
    wrong = 0
    here = [name for name in args.competitors if name != "tcmalloc"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiler_cache())
        worker = _worker(args, stack) if "tcmalloc" in args.competitors else None
        bar = stack.enter_context(progress(len(todo)))
        try:
            for configuration in todo:
                bar.now(f"{configuration}: checking")
                contest = Contest(configuration, args.device, record=args.record != "off")
                errors = contest.wrong()
                if errors:
                    wrong += 1
                    print(f"{configuration} is wrong and is not timed:\n{errors}", file=sys.stderr)
                    bar.done()
                    continue
                bar.now(f"{configuration}: timing{', compiling first' if 'compile' in here else ''}")
                timings = measure(
                    contest, here, args.rounds, compare_record=args.record == "compare", hot=not args.cold
                )
                del contest  # its tensors, before the child makes its own
                if worker:
                    bar.now(f"{configuration}: timing under tcmalloc")
                    try:
                        for direction, more in worker.measure(configuration).items():
                            timings[direction] |= more
                    except tcmalloc.WorkerError as error:
                        _say_without_tcmalloc(error)
                        worker = None
                results.append(Result(configuration, timings))
                bar.done()
        except KeyboardInterrupt:
            return results, wrong, True
    return results, wrong, False


def _worker(args: argparse.Namespace, stack: contextlib.ExitStack) -> tcmalloc.Worker | None:
    """The child under tcmalloc, or None and a line that says why there is none."""
    if torch.device(args.device).type != "cpu":
        return None  # it allocates no memory of another device
    library = tcmalloc.find_library()
    if library is None:
        print(tcmalloc.MISSING, file=sys.stderr)
        return None
    try:
        worker = tcmalloc.Worker(
            library,
            threads=torch.get_num_threads(),
            rounds=args.rounds,
            device=args.device,
            record=args.record != "off",
            hot=not args.cold,
        )
    except tcmalloc.WorkerError as error:
        _say_without_tcmalloc(error)
        return None
    return stack.enter_context(worker)


def _say_without_tcmalloc(error: tcmalloc.WorkerError) -> None:
    print(f"eager is not measured under tcmalloc: {error}", file=sys.stderr)


def _write(results: list[Result], roof: floor.Roof | None, described: dict[str, Any], args: argparse.Namespace) -> None:
    out = console(sys.stdout)
    for table in report.tables(results, roof):
        out.print(table)
    out.print(
        f"Medians of {args.rounds} interleaved rounds; N x: that many times vgkern's time (under tcmalloc: vgkern's "
        "there), median of the rounds' ratios." + (_floor_note(roof) if roof else "")
    )  # fmt: skip
    for line in report.conclusions(results, roof):
        out.print(line)
    rows = report.rows(results, roof, record=args.record, environment=described)
    report.write_csv(rows, args.out / "micro.csv")
    figure.save(results, roof, environment.summary(described), args.out / "micro.png")
    out.print(f"wrote {args.out / 'micro.csv'} and {args.out / 'micro.png'}")


def _floor_note(roof: floor.Roof) -> str:
    size, rate = roof.points[-1]
    return (
        " Floor: the share of vgkern's time that the memory needs for one pass: a = b + k·c over as many bytes, timed "
        f"in the same rounds (on a GPU: copies, before and after; {rate / 1e9:.1f} GB/s at {size >> 20} MiB)."
    )


def _shape(text: str) -> Shape:
    try:
        batch, channels, height, width = (int(size) for size in text.split(","))
        if min(batch, channels, height, width) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N,C,H,W, got {text!r}") from None
    return batch, channels, height, width


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "micro",
        help="time the fused layer against PyTorch and against the memory",
        description="Time act(batch_norm(x) + residual), fused and otherwise: checked first, then interleaved. Writes "
        "micro.csv and micro.png, a roofline.",
        epilog="Exit status: 0, 1 if a layer was wrong, 2 for an error, 130 after Ctrl-C, which keeps what is done.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, error=parser.error)
    parser.add_argument(
        "set", nargs="?", choices=(*SETS, "custom"), default="standard",
        help="standard: seven shapes in and out of cache; resnet50: every batch norm of the net at batch 32, with a "
        "step's total; small: a CIFAR ResNet's, and one smaller; custom: those that follow",
    )  # fmt: skip
    parser.add_argument("shapes", nargs="*", type=_shape, metavar="N,C,H,W", help="shapes of a custom set")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="data and parameters")
    parser.add_argument("--layout", nargs="+", choices=tuple(FORMATS), default=["contiguous"], help="memory format")
    parser.add_argument(
        "--activation", nargs="+", choices=vgkern.activations.names(), default=["relu"], metavar="NAME",
        help=f"among {', '.join(vgkern.activations.names())}",
    )  # fmt: skip
    parser.add_argument(
        "--competitors", nargs="*", choices=tuple(COMPETITORS), default=list(COMPETITORS),
        help="; ".join(f"{name}: {competitor.help}" for name, competitor in COMPETITORS.items()),
    )  # fmt: skip
    parser.add_argument("--no-residual", action="store_true", help="act(batch_norm(x)) alone")
    parser.add_argument("--eval", action="store_true", help="running statistics instead of the batch's")
    parser.add_argument(
        "--record", choices=("on", "off", "compare"), default="on",
        help="the gradient record; compare: also time vgkern with it against vgkern without it",
    )  # fmt: skip
    parser.add_argument(
        "--cold", action="store_true",
        help="time each call right after other variants', which leave their own data in the CPU's caches, and not "
        "after untimed calls of its own",
    )  # fmt: skip
    parser.add_argument("--rounds", type=rounds, default=20, help="rounds in which each variant runs once")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for what is written")
