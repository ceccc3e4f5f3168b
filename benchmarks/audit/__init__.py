"""``python -m benchmarks audit``: what can be said of the GPU kernels without a GPU.

Three questions, each answered in processes of their own: what machine code the kernels become (``compiled``), which
bytes they move (``traffic``, in Triton's interpreter), and what torch.compile would make of the same functions
(``inductor``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .targets import TARGETS


class Failed(RuntimeError):
    """A process of the audit ended with an error; the message is what it wrote last."""


def _lines_of(module: str, *arguments: str, interpret: bool = False) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", f"{__name__}.{module}", *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{module} {' '.join(arguments)}, exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def gather(which: str, targets: Sequence[str]) -> dict[str, Any]:
    """{"code", "traffic", "inductor": rows, "why_no_inductor": str}; two processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        traffic = pool.submit(_lines_of, "traffic", which, interpret=True)  # the longest first
        code = [pool.submit(_lines_of, "compiled", target, which) for target in targets]
        inductor = pool.submit(_lines_of, "inductor", which)
        rows = [row for job in code for row in job.result()]
        why = ""
        try:
            lowered = inductor.result()
        except Failed as error:  # it leans on Inductor's insides, which another version of torch may have moved
            lowered, why = [], str(error).splitlines()[-1]
        return {"code": rows, "traffic": traffic.result(), "inductor": lowered, "why_no_inductor": why}


def run(args: argparse.Namespace) -> int:
    import torch
    import triton
    from rich.console import Console

    from . import findings, layers, predict, report

    begin = time.monotonic()
    which = "small" if args.small else "full"
    try:
        gathered = gather(which, args.target)
    except Failed as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    code, traffic = gathered["code"], gathered["traffic"]
    times = predict.times(layers.SELECTIONS[which], gathered["inductor"])
    totals = predict.totals(times)
    found = [*findings.of_code(code), *findings.of_traffic(traffic), *findings.of_launches(times)]

    console = Console()
    console.width = max(console.width, 165)  # a line of a table stays a line, in a file too
    report.print_tables(console, code, traffic, totals)
    inductor = (
        f"Inductor's kernels could not be had here ({gathered['why_no_inductor']}) and are left out. "
        if gathered["why_no_inductor"]
        else "Inductor's passes are those of the code that it generates for an H100, lowered without one. "
    )
    notes = (
        f"{len(code)} specialisations, {', '.join(args.target)}; "
        f"torch {torch.__version__}, triton {triton.__version__}. "
        f"{inductor}Eager's passes are by the operations' definitions."
    )
    console.print(notes, highlight=False)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, rows in (("kernels", code), ("traffic", traffic), ("times", times)):
            report.write_csv(args.output / f"audit-{name}.csv", rows)
        report.write_html(args.output / "audit.html", code, traffic, times, totals, found, notes)
        console.print(f"wrote {args.output / 'audit.html'} and three CSV files beside it", highlight=False)
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(found)} findings, {time.monotonic() - begin:.0f} s")
    return 1 if found else 0


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="machine code, memory traffic and predicted times of the GPU kernels, without a GPU",
        description=(
            "Compile every specialisation of the GPU kernels that a ResNet-50 and a CIFAR ResNet reach for four GPUs, "
            "read the machine code, count the bytes they move in Triton's interpreter, and predict times. Exits 1 if a "
            "kernel spills, reads or writes narrower than alignment allows, leaves a multiprocessor half empty without "
            "a reason, moves other bytes than it states, or a pass takes more than two launches."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=list(TARGETS), metavar="TARGET",
                        help=f"among {', '.join(TARGETS)}")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a few layers that reach every kernel")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write audit.html and CSV files there")
