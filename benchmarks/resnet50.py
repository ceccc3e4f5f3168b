"""``python -m benchmarks resnet50``: a training step, and how much of it is not convolution.

The share that is not convolution is taken in two ways: as the step's time less that of the same net with every batch
norm, addition and activation removed; and as what PyTorch's profiler counts outside of convolutions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from . import environment
from .console import console, progress, rounds
from .floor import FORMATS
from .model import NETS, ResNet, convolutions_only
from .peak_memory import peak_resident_bytes, saved_bytes
from .report import write_csv
from .timing import Timing, interleave

#: "autocast": float32 parameters, and a forward pass under autocast to bfloat16.
DTYPES = ("float32", "bfloat16", "autocast")

#: In float64 the two nets are one function: the relative error in the L2 norm, which is 1e-10 where all is right.
ALLOWED_FLOAT64 = 1e-6
#: In the dtype that is timed, errors of 53 layers in sequence depend on luck: how much further from float64 than the
#: plain net the fused one may be.
ALLOWED_FACTOR = 4.0
#: Images that the check looks at.
CHECKED_IMAGES = 4


def make_nets(dtype: torch.dtype, layout: str, device: str) -> dict[str, ResNet]:
    """The nets by name, with the same weights."""
    torch.manual_seed(0)
    nets = {name: make() for name, make in NETS.items()}
    for net in nets.values():
        net.load_state_dict(nets["torch.nn"].state_dict())
        net.to(device, dtype, memory_format=FORMATS[layout])
    return nets


def make_forward(net: nn.Module, images: Tensor, labels: Tensor, autocast: bool) -> Callable[[], Tensor]:
    """Forward and loss."""

    def forward() -> Tensor:
        context = torch.autocast(images.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            logits = net(images)
        return F.cross_entropy(logits.float(), labels)

    return forward


def make_step(
    net: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer | None = None,
    *, autocast: bool = False,
) -> Callable[[], Tensor]:  # fmt: skip
    """Forward, loss, backward, and the optimiser's step if there is one. Returns the loss."""
    forward = make_forward(net, images, labels, autocast)

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step


def errors(nets: dict[str, ResNet], images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """{net: {"logits" | "gradients": relative error in the L2 norm against the plain net in float64}}

    Of both nets in their dtype, and, as "vgkern, float64", of the fused net in float64.
    """
    expected = _logits_and_gradients(_copy(nets["torch.nn"], "torch.nn", torch.float64), images.double(), labels)
    got = {name: _logits_and_gradients(_copy(net, name, images.dtype), images, labels) for name, net in nets.items()}
    fused = _copy(nets["vgkern"], "vgkern", torch.float64)
    got["vgkern, float64"] = _logits_and_gradients(fused, images.double(), labels)
    return {
        name: {what: ((values[what] - right).norm() / right.norm()).item() for what, right in expected.items()}
        for name, values in got.items()
    }


def _copy(net: ResNet, name: str, dtype: torch.dtype) -> ResNet:
    """In another dtype; a net of its own, so that a check leaves the running statistics as they are."""
    made = NETS[name](net.fc.out_features).to(net.fc.weight.device, dtype)
    made.load_state_dict(net.state_dict())
    return made


def _logits_and_gradients(net: ResNet, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = net(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(net.parameters()))
    return {
        "logits": logits.detach().double().flatten(),
        "gradients": torch.cat([gradient.double().flatten() for gradient in gradients]),
    }


def is_right(found: dict[str, dict[str, float]]) -> bool:
    """Whether the fused net is the plain one's function, and in its dtype as exact; NaN is neither."""
    return all(
        error <= ALLOWED_FACTOR * found["torch.nn"][what] and found["vgkern, float64"][what] <= ALLOWED_FLOAT64
        for what, error in found["vgkern"].items()
    )


@dataclass(frozen=True)
class Profile:
    """Seconds of a step inside convolutions, forward and backward, and outside; operators' own times."""

    convolution: float
    other: float

    @property
    def share(self) -> float:
        return self.other / (self.convolution + self.other)


def profile(step: Callable[[], object], repeats: int = 3) -> Profile:
    """By PyTorch's profiler, the mean of some steps."""
    from torch.profiler import ProfilerActivity

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write a line whenever it starts and stops
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    step()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
    convolution = other = 0.0
    for event in profiler.key_averages():
        seconds = max(event.self_cpu_time_total, event.self_device_time_total) / repeats / 1e6
        if "convolution" in event.key.lower() or "conv2d" in event.key:
            convolution += seconds
        else:
            other += seconds
    return Profile(convolution, other)


@dataclass(frozen=True)
class Memory:
    """Bytes that autograd keeps for the backward pass, and of a process of its own at its largest, if that is known."""

    saved: int
    resident: int | None


@dataclass(frozen=True)
class Outcome:
    """All that was measured."""

    timings: dict[str, Timing]
    profiles: dict[str, Profile]
    memory: dict[str, Memory]

    def other_seconds(self, name: str) -> float:
        """What the batch norms, additions and activations add to a step: median of the rounds' differences."""
        rounds = zip(self.timings[name].seconds, self.timings["convolution only"].seconds, strict=True)
        differences = Timing(tuple(step - convolution for step, convolution in rounds))
        return differences.median

    def other_share(self, name: str) -> float:
        return self.other_seconds(name) / self.timings[name].median

    @property
    def cut(self) -> float:
        """By what factor the time that is not convolution shrinks."""
        return self.other_seconds("torch.nn") / self.other_seconds("vgkern")

    @property
    def profiled_cut(self) -> float:
        return self.profiles["torch.nn"].other / self.profiles["vgkern"].other


def measure(nets: dict[str, ResNet], images: Tensor, labels: Tensor, args: argparse.Namespace) -> Outcome:
    """Steps of both nets and of the convolutions alone, interleaved; then the profiles."""
    everything = {**nets, "convolution only": convolutions_only(nets["torch.nn"])}
    autocast = args.dtype == "autocast"
    steps = {
        name: make_step(net, images, labels, _sgd(net) if args.sgd else None, autocast=autocast)
        for name, net in everything.items()
    }
    timings = interleave(steps, rounds=args.rounds, warmup=1, device=args.device)
    profiles = {name: profile(steps[name]) for name in nets}
    memory = {
        name: Memory(
            saved_bytes(net, make_forward(net, images, labels, autocast)),
            peak_resident_bytes(take_steps, name, args.batch, args.size, args.dtype, args.layout, args.threads)
            if args.device == "cpu"
            else None,
        )
        for name, net in nets.items()
    }
    return Outcome(timings, profiles, memory)


def take_steps(name: str, batch: int, size: int, dtype: str, layout: str, threads: int | None) -> None:
    """Two steps of one of the nets on the CPU: for a process whose memory is measured."""
    if threads:
        torch.set_num_threads(threads)
    net = NETS[name]().to(parameter_dtype(dtype), memory_format=FORMATS[layout])
    step = make_step(net, *make_data(batch, size, dtype, layout, "cpu"), autocast=dtype == "autocast")
    for _ in range(2):
        step()


def parameter_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "autocast" else getattr(torch, dtype)


def make_data(batch: int, size: int, dtype: str, layout: str, device: str) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, size, size).to(device, parameter_dtype(dtype), memory_format=FORMATS[layout])
    return images, torch.randint(1000, (batch,)).to(device)


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    # A learning rate of 0: all of the arithmetic, but the nets stay comparable.
    return torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)


def run(args: argparse.Namespace) -> int:
    if args.size % 32:
        args.error("--size: expected a multiple of 32")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    described = environment.describe(args.device)
    out = console(sys.stdout)
    out.print(environment.summary(described))
    nets = make_nets(parameter_dtype(args.dtype), args.layout, args.device)
    images, labels = make_data(args.batch, args.size, args.dtype, args.layout, args.device)

    with progress(2) as bar:
        bar.now("checking both nets against float64")
        found = errors(nets, images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES])
        text = "; ".join(f"{name}: {_both(error)}" for name, error in found.items())
        if not is_right(found):
            print(
                f"the fused net is wrong and is not timed: error against torch.nn in float64: {text}", file=sys.stderr
            )
            return 1
        bar.done()
        bar.now(f"timing {args.rounds} rounds of three steps, then profiling")
        outcome = measure(nets, images, labels, args)
        bar.done()
    out.print(f"error against torch.nn in float64: {text}")
    out.print(_table(outcome, args))
    for line in conclusions(outcome):
        out.print(line)
    path = args.out / "resnet50.csv"
    _write_csv(outcome, described, args, path)
    out.print(f"wrote {path}")
    return 0


def _both(error: dict[str, float]) -> str:
    return ", ".join(f"{what} {value:.1e}" for what, value in error.items())


def _table(outcome: Outcome, args: argparse.Namespace) -> Table:
    title = f"ResNet-50, a training step at batch {args.batch}, {args.size}², {args.dtype}, {args.layout}; ms"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("net")
    for header in ("step", "quartiles", "not convolution", "share", "by the profiler", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, timing in outcome.timings.items():
        first, third = timing.quartiles
        cells = [f"{timing.median * 1e3:.0f}", f"{first * 1e3:.0f} – {third * 1e3:.0f}"]
        if name in outcome.profiles:
            profiled = outcome.profiles[name]
            cells += [
                f"{outcome.other_seconds(name) * 1e3:.0f}", f"{outcome.other_share(name):.1%}",
                f"{profiled.other * 1e3:.0f}", f"{profiled.share:.1%}",
            ]  # fmt: skip
        table.add_row(name, *cells)
    return table


def conclusions(outcome: Outcome) -> list[str]:
    step = outcome.timings["vgkern"].speedup_over(outcome.timings["torch.nn"])
    shares = {name: outcome.other_share(name) for name in NETS}
    lines = [
        f"a step: {step:.2f}x; not convolution: {shares['torch.nn']:.1%} before, {shares['vgkern']:.1%} after, "
        f"its time cut by {outcome.cut:.2f}x",
        f"by the profiler, which also counts pooling, the linear layer and the loss: "
        f"{outcome.profiles['torch.nn'].share:.1%} before, {outcome.profiles['vgkern'].share:.1%} after, "
        f"its time cut by {outcome.profiled_cut:.2f}x",
        "kept for the backward pass: " + _megabytes({name: memory.saved for name, memory in outcome.memory.items()}),
    ]
    resident = {name: memory.resident for name, memory in outcome.memory.items() if memory.resident is not None}
    if resident:
        lines.append("a process of its own at its largest: " + _megabytes(resident))
    return lines


def _megabytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())


def _write_csv(outcome: Outcome, described: dict[str, Any], args: argparse.Namespace, path: Path) -> None:
    """A row a net; what a net has no number for is empty."""
    rows = []
    for name, timing in outcome.timings.items():
        first, third = timing.quartiles
        profiled, memory = outcome.profiles.get(name), outcome.memory.get(name)
        rows.append({
            "net": name, "batch": args.batch, "size": args.size, "dtype": args.dtype, "layout": args.layout,
            "optimizer": "sgd" if args.sgd else "", "rounds": args.rounds,
            "step_ms": timing.median * 1e3, "step_q1_ms": first * 1e3, "step_q3_ms": third * 1e3,
            "not_convolution_ms": outcome.other_seconds(name) * 1e3 if profiled else "",
            "not_convolution_share": outcome.other_share(name) if profiled else "",
            "profiled_convolution_ms": profiled.convolution * 1e3 if profiled else "",
            "profiled_other_ms": profiled.other * 1e3 if profiled else "",
            "saved_bytes": memory.saved if memory else "", "peak_resident_bytes": (memory and memory.resident) or "",
            **described,
        })  # fmt: skip
    write_csv(rows, path)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "resnet50",
        help="time a ResNet-50's training step, fused against plain",
        description="One training step (forward, loss, backward) of a ResNet-50 made of nn.Conv2d and vgkern's layers, "
        "against the same with nn.BatchNorm2d, add_ and relu_, and how much of each is not convolution. Checked first, "
        "then interleaved. Writes resnet50.csv.",
        epilog="Exit status: 0, 1 if the fused net was wrong, 2 for an error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, error=parser.error)
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="side of an image, a multiple of 32")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="data and parameters; autocast: bfloat16, of float32 parameters",
    )
    parser.add_argument("--layout", choices=tuple(FORMATS), default="channels_last", help="memory format")
    parser.add_argument("--sgd", action="store_true", help="also a step of SGD with momentum")
    parser.add_argument("--rounds", type=rounds, default=10, help="rounds in which each net runs one step")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for what is written")
