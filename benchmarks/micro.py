"""``python -m benchmarks micro``: the fused layer against PyTorch's three operations, forward and backward.

Each configuration is first checked against float64 autograd; a wrong one is reported and not timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vgkern
from vgkern.testing import compare, format_rows

from .timing import Timing, interleave

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("float32", "float64", "bfloat16", "float16")


class Configuration:
    """One row: a layer with its input, as vgkern and as eager PyTorch."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        layout: str,
        activation: str,
        residual: bool,
        training: bool,
        device: str,
    ) -> None:
        self.labels = {
            "shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout, "activation": activation,
            "residual": residual, "training": training,
        }  # fmt: skip
        self.training = training
        generator = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            x = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
            return x.contiguous(memory_format=FORMATS[layout])

        self.layer = vgkern.nn.BatchNormAct2d(shape[1], activation=activation).to(device, getattr(torch, dtype))
        self.layer.train(training)
        self.x = normal().requires_grad_()
        self.residual = normal().requires_grad_() if residual else None
        self.dy = normal()

    def fused(self) -> Tensor:
        return self.layer(self.x, self.residual)

    def eager(self) -> Tensor:
        layer = self.layer
        y = F.batch_norm(
            self.x, layer.running_mean, layer.running_var, layer.weight, layer.bias, self.training, 0.1, layer.eps
        )
        if self.residual is not None:
            y = y + self.residual
        spec, weight = layer.activation, layer.activation_weight
        return spec.row.reference(y, *spec.args, *(() if weight is None else (weight,)))

    def inputs(self) -> list[Tensor]:
        candidates = (self.x, self.residual, *self.layer.parameters())
        return [tensor for tensor in candidates if tensor is not None]

    def backward(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        y, inputs = forward(), self.inputs()
        return lambda: torch.autograd.grad(y, inputs, self.dy, retain_graph=True)

    def wrong(self) -> str:
        """Empty if the layer is right on this input, else the rows that say why not."""
        rows = compare(self.layer, self.x.detach(), None if self.residual is None else self.residual.detach())
        return "" if all(row.ok for row in rows) else format_rows(rows)


def time_configuration(configuration: Configuration, rounds: int, device: str) -> dict[str, dict[str, Timing]]:
    """{"forward" | "backward": {"vgkern" | "eager": Timing}}"""
    variants = {"vgkern": configuration.fused, "eager": configuration.eager}
    forward = interleave(variants, rounds=rounds, device=device)
    backward = interleave(
        {name: configuration.backward(run) for name, run in variants.items()}, rounds=rounds, device=device
    )
    return {"forward": forward, "backward": backward}


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, vgkern {vgkern.__version__} ({vgkern.backends.name_of(args.device)}), "
        f"{torch.get_num_threads()} threads, {platform.machine()}; medians of {args.rounds} interleaved rounds, in ms"
    )
    header = (
        f"{'shape':>16} {'dtype':9}{'layout':14}{'activation':12}{'pass':9}{'eager':>9}{'vgkern':>9}{'speed-up':>9}"
    )
    print(header)
    rows: list[dict[str, Any]] = []
    failed = False
    for dtype, layout, activation in itertools.product(args.dtype, args.layout, args.activation):
        configuration = Configuration(
            args.shape, dtype, layout, activation, not args.no_residual, not args.eval, args.device
        )
        wrong = configuration.wrong()
        if wrong:
            failed = True
            print(f"{configuration.labels} is wrong and is not timed:\n{wrong}", file=sys.stderr)
            continue
        for direction, timings in time_configuration(configuration, args.rounds, args.device).items():
            rows.append(_row(configuration, direction, timings, args))
            row = rows[-1]
            print(
                f"{row['shape']:>16} {dtype:9}{layout:14}{activation:12}{direction:9}"
                f"{row['eager_ms']:9.2f}{row['vgkern_ms']:9.2f}{row['speedup']:8.2f}x",
                flush=True,
            )
    for direction in ("forward", "backward"):
        speedups = [row["speedup"] for row in rows if row["pass"] == direction]
        if speedups:
            mean = math.exp(math.fsum(map(math.log, speedups)) / len(speedups))
            print(f"{direction}: geometric mean {mean:.2f}x, lowest {min(speedups):.2f}x over {len(speedups)} rows")
    if args.csv and rows:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {args.csv}")
    return 1 if failed else 0


def _row(
    configuration: Configuration, direction: str, timings: dict[str, Timing], args: argparse.Namespace
) -> dict[str, Any]:
    """A row that says all about itself: read alone, it still means something."""
    row: dict[str, Any] = {**configuration.labels, "pass": direction}
    for name, timing in timings.items():
        first, third = timing.quartiles
        row |= {f"{name}_ms": timing.median * 1e3, f"{name}_q1_ms": first * 1e3, f"{name}_q3_ms": third * 1e3}
    row["speedup"] = timings["vgkern"].speedup_over(timings["eager"])
    return row | {
        "device": args.device, "backend": vgkern.backends.name_of(args.device), "threads": torch.get_num_threads(),
        "rounds": args.rounds, "torch": torch.__version__, "vgkern": vgkern.__version__,
    }  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected N,C,H,W, got {text!r}")
    return sizes


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "micro",
        help="time the fused layer against eager PyTorch",
        description="Time act(batch_norm(x) + residual), fused against eager PyTorch: checked first, then interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--shape", type=_shape, default=(32, 64, 56, 56), metavar="N,C,H,W", help="of the input")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="data and parameters")
    parser.add_argument("--layout", nargs="+", choices=tuple(FORMATS), default=["contiguous"], help="memory format")
    parser.add_argument(
        "--activation", nargs="+", choices=vgkern.activations.names(), default=["relu"], metavar="NAME",
        help=f"among {', '.join(vgkern.activations.names())}",
    )  # fmt: skip
    parser.add_argument("--no-residual", action="store_true", help="act(batch_norm(x)) alone")
    parser.add_argument("--eval", action="store_true", help="running statistics instead of the batch's")
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which each variant runs once")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--csv", type=Path, help="write the rows, with quartiles and versions, to this file")
