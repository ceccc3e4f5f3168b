"""``python -m benchmarks clip``: clipping against PyTorch's, and a training step with clipping against one without.

Each clipping is first checked against PyTorch's result in float64; a wrong one is reported and not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from vgkern.gradients import GradientClipper, adaptive_clip_grad_, clip_grad_norm_
from vgkern.models import resnet50

from . import environment
from .console import console, progress, rounds
from .floor import FORMATS
from .report import write_csv
from .timing import Timing, interleave

#: Far above any norm here, and below: nothing is scaled, and everything.
LOOSE, TIGHT = 1e9, 1e-3


@dataclass(frozen=True)
class Variant:
    """What is timed, and what has to be done before, outside of the clock."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contest:
    """Variants that do the same, the first of which is vgkern's; ``wrong`` says why they may not be timed."""

    name: str
    variants: Mapping[str, Variant]
    wrong: str = ""


def unit_by_unit(parameters: list[Tensor], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Adaptive clipping as it is written in Python, parameter by parameter, by PyTorch's operations."""

    def norm(x: Tensor) -> Tensor:
        return x.norm(2.0) if x.dim() < 2 else x.norm(2.0, dim=tuple(range(1, x.dim())), keepdim=True)

    for p in parameters:
        weight, gradient = p.detach(), p.grad.detach()
        limit = norm(weight).clamp_(min=eps).mul_(clip_factor)
        found = norm(gradient)
        clipped = gradient * (limit / found.clamp(min=1e-6))
        gradient.copy_(torch.where(found < limit, gradient, clipped))


def with_gradients(tensors: list[Tensor]) -> list[nn.Parameter]:
    made = []
    for t in tensors:
        p = nn.Parameter(t.detach().clone())
        p.grad = torch.randn_like(p)
        made.append(p)
    return made


def error(mine: Callable[[list], object], theirs: Callable[[list], object], tensors: list[Tensor]) -> float:
    """The relative error in the L2 norm of my gradients against theirs in float64."""
    ours = with_gradients(tensors)
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    for p, q in zip(ours, exact, strict=True):
        q.grad = p.grad.double()
    mine(ours)
    theirs(exact)
    difference = sum((p.grad.double() - q.grad).square().sum() for p, q in zip(ours, exact, strict=True))
    return (difference / sum(q.grad.square().sum() for q in exact)).sqrt().item()


def clipping(what: str, tensors: list[Tensor]) -> list[Contest]:
    """By norm, of a list of tensors, with nothing to scale and with everything."""
    contests = []
    for name, max_norm in (("nothing to clip", LOOSE), ("clipped", TIGHT)):
        ours, theirs = (_clipper(function, max_norm) for function in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_))
        variants = {"vgkern": _variant(ours, tensors), "torch": _variant(theirs, tensors)}
        contests.append(Contest(f"clip_grad_norm_, {what}, {name}", variants, verdict(error(ours, theirs, tensors))))
    return contests


def adaptive(what: str, tensors: list[Tensor]) -> list[Contest]:
    contests = []
    for name, factor in (("nothing to clip", LOOSE), ("clipped", 0.01)):
        ours, theirs = (_clipper(function, factor) for function in (adaptive_clip_grad_, unit_by_unit))
        variants = {"vgkern": _variant(ours, tensors), "Python": _variant(theirs, tensors)}
        contests.append(
            Contest(f"adaptive_clip_grad_, {what}, {name}", variants, verdict(error(ours, theirs, tensors)))
        )
    return contests


def _clipper(function: Callable, limit: float) -> Callable[[list], object]:
    return lambda parameters: function(parameters, limit)


def _variant(clip: Callable[[list], object], tensors: list[Tensor]) -> Variant:
    """On gradients that are made anew each time: those that were clipped need no clipping."""
    parameters = with_gradients(tensors)
    gradients = [p.grad for p in parameters]
    fresh = [g.clone() for g in gradients]
    return Variant(lambda: clip(parameters), lambda: torch._foreach_copy_(gradients, fresh))


def step(args: argparse.Namespace) -> Contest:
    """A training step of a ResNet-50 with fused SGD: with GradientClipper, without clipping, with PyTorch's call.

    One net for all: two of them differ by more than clipping costs, by where their memory lies.
    """
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    images = images.contiguous(memory_format=FORMATS[args.layout])
    labels = torch.randint(1000, (args.batch,), device=args.device)
    net = resnet50(fused=False).to(args.device, memory_format=FORMATS[args.layout])
    # A learning rate of 0: all of the arithmetic, but the steps stay comparable.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, fused=True)
    clippers: list[GradientClipper] = []

    def without_clipper() -> None:
        while clippers:
            clippers.pop().close()

    def with_clipper() -> None:
        without_clipper()
        clippers.append(GradientClipper(optimizer, args.max_norm))

    def once(clip: Callable[[list], object] | None = None) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images), labels).backward()
        if clip is not None:
            clip(list(net.parameters()))
        optimizer.step()

    torchs = _clipper(torch.nn.utils.clip_grad_norm_, args.max_norm)
    variants = {
        "GradientClipper": Variant(once, with_clipper),
        "no clipping": Variant(once, without_clipper),
        "torch": Variant(lambda: once(torchs), without_clipper),
    }
    shape = f"batch {args.batch}, {args.size}², max_norm {args.max_norm:g}"
    return Contest(f"a step of ResNet-50 with fused SGD, {shape}", variants)


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    described = environment.describe(args.device)
    out = console(sys.stdout)
    out.print(environment.summary(described))
    torch.manual_seed(0)
    resnet = [p.detach().to(args.device) for p in resnet50(fused=False).parameters()]
    small = [torch.randn(64, device=args.device) for _ in range(2000)]
    contests = [
        *clipping("ResNet-50", resnet),
        *clipping("2,000 tensors of 64", small),
        *adaptive("ResNet-50", resnet),
        *([] if args.no_step else [step(args)]),
    ]
    results: list[tuple[Contest, dict[str, Timing]]] = []
    wrong = 0
    with progress(len(contests)) as bar:
        for contest in contests:
            bar.now(contest.name)
            if contest.wrong:
                wrong += 1
                print(f"{contest.name} is wrong and is not timed: {contest.wrong}", file=sys.stderr)
            else:
                few = contest.name.startswith("a step")
                results.append((contest, measure(contest, args.step_rounds if few else args.rounds, args.device)))
            bar.done()
    out.print(_table(results))
    path = args.out / "clip.csv"
    _write_csv(results, described, path)
    out.print(f"wrote {path}")
    return 1 if wrong else 0


def measure(contest: Contest, count: int, device: str) -> dict[str, Timing]:
    """Interleaved, each after what comes before it."""
    turns: dict[str, Callable[[], object]] = {}
    for name, variant in contest.variants.items():
        turns[f"before {name}"], turns[name] = variant.before, variant.run
    timings = interleave(turns, rounds=count, warmup=2, device=device)
    return {name: timings[name] for name in contest.variants}


def verdict(wrong: float) -> str:
    """Empty if the error is that of rounding."""
    return "" if wrong <= 1e-6 else f"relative error {wrong:.1e}"


def _table(results: list[tuple[Contest, dict[str, Timing]]]) -> Table:
    title = "Clipping; ms, median and quartiles. N x: that many times the time of the first."
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", "by", "time", "quartiles", ""):
        table.add_column(header, justify="left" if header in ("", "by") else "right")
    for contest, timings in results:
        first = next(iter(timings.values()))
        for name, timing in timings.items():
            low, high = timing.quartiles
            table.add_row(
                contest.name if timing is first else "", name, f"{timing.median * 1e3:.2f}",
                f"{low * 1e3:.2f} – {high * 1e3:.2f}",
                "" if timing is first else f"{first.speedup_over(timing):.3g}x",
            )  # fmt: skip
    return table


def _write_csv(results: list[tuple[Contest, dict[str, Timing]]], described: dict[str, Any], path: Path) -> None:
    rows = []
    for contest, timings in results:
        first = next(iter(timings.values()))
        for name, timing in timings.items():
            low, high = timing.quartiles
            rows.append({
                "contest": contest.name, "variant": name, "rounds": len(timing.seconds), "ms": timing.median * 1e3,
                "q1_ms": low * 1e3, "q3_ms": high * 1e3, "ratio": first.speedup_over(timing), **described,
            })  # fmt: skip
    if rows:
        write_csv(rows, path)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "clip",
        help="time gradient clipping against PyTorch",
        description="Clipping of a ResNet-50's 161 gradients and of 2,000 small ones against PyTorch's, adaptive "
        "clipping against a loop in Python, and a training step with GradientClipper against one without clipping. "
        "Checked first, then interleaved. Writes clip.csv.",
        epilog="Exit status: 0, 1 if a result was wrong, 2 for an error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, error=parser.error)
    parser.add_argument("--rounds", type=rounds, default=30, help="rounds in which each variant runs once")
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--step-rounds", type=rounds, default=15, help="rounds of training steps")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--size", type=int, default=224, help="side of an image, a multiple of 32")
    parser.add_argument("--layout", choices=tuple(FORMATS), default="channels_last", help="memory format of the step")
    parser.add_argument("--max-norm", type=float, default=0.1, help="of the training step")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for what is written")
