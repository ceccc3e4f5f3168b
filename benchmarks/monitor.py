"""``python -m benchmarks monitor``: what a GradientMonitor costs in a training step, and what Python hooks would.

Copies of one fused net train by turns, on one batch: without a monitor, with one (its ``step()`` after each backward
pass), and with hooks in Python that take the same norms. Timed beside them: ``step()`` alone, for where the difference
of two long steps is lost in the noise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgkern.demo.nets import NETS, DeepNet
from vgkern.gradients import GradientMonitor
from vgkern.gradients.record import GradRecordMixin
from vgkern.models.resnet import check_depth

from . import environment
from .console import console, rounds
from .timing import Timing, interleave

VARIANTS = {
    "without": "",
    "monitor": "GradientMonitor, step() after each backward pass",
    "hooks": "hooks in Python: norms of dy and dx of each fused layer, and of each parameter's gradient",
}


class PythonHooks:
    """The norms that the monitor records, by PyTorch's hooks and ``linalg.vector_norm``; they stay on the device."""

    def __init__(self, net: nn.Module) -> None:
        self.norms: list[Tensor] = []
        for module in net.modules():
            if isinstance(module, GradRecordMixin):
                module.register_full_backward_hook(self._of_layer)
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(self._of_parameter)

    def _of_layer(self, module: nn.Module, dx: tuple[Tensor | None, ...], dy: tuple[Tensor | None, ...]) -> None:
        self.norms += [torch.linalg.vector_norm(g) for g in (*dx[:1], *dy[:1]) if g is not None]

    def _of_parameter(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.norms.append(torch.linalg.vector_norm(parameter.grad))

    def step(self) -> None:
        self.last = torch.stack(self.norms)
        self.norms.clear()


class Contender:
    """One copy of the net, and its training step."""

    def __init__(self, variant: str, net: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.net = copy.deepcopy(net)
        self.images, self.labels = images, labels
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        watch: dict[str, Callable[[nn.Module], Any]] = {"monitor": GradientMonitor, "hooks": PythonHooks}
        self.watcher = watch[variant](self.net) if variant in watch else None
        self.step_seconds: list[float] = []

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.images), self.labels).backward()
        if self.watcher is not None:
            start = time.perf_counter()
            self.watcher.step()
            self.step_seconds.append(time.perf_counter() - start)
        self.optimizer.step()


def measure(depth: int, width: int, batch: int, count: int, device: str) -> tuple[dict[str, Timing], float]:
    """Timings of a training step by variant, and the median seconds of ``step()`` itself (on the host)."""
    torch.manual_seed(0)
    net = DeepNet(NETS[3], depth, width).to(device)
    images = torch.randn(batch, 1, 8, 8, device=device)
    labels = torch.randint(10, (batch,), device=device)
    contenders = {variant: Contender(variant, net, images, labels) for variant in VARIANTS}
    timings = interleave(contenders, rounds=count, device=device)
    return timings, statistics.median(contenders["monitor"].step_seconds[-count:])


def run(args: argparse.Namespace) -> int:
    try:
        check_depth(args.depth)
    except ValueError as error:
        args.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    out = console(sys.stdout)
    out.print(environment.summary(environment.describe(args.device)))
    timings, step = measure(args.depth, args.width, args.batch, args.rounds, args.device)
    plain = timings["without"]
    out.print(f"{args.depth} layers of width {args.width}, batch {args.batch} of 8 × 8; {args.rounds} rounds by turns")
    for variant, what in VARIANTS.items():
        low, high = timings[variant].quartiles
        ratio = 1 / timings[variant].speedup_over(plain)
        out.print(
            f"{variant:8} {1e3 * timings[variant].median:8.2f} ms  (quartiles {1e3 * low:.2f}, {1e3 * high:.2f})  "
            f"{ratio:.4f} x  {what}"
        )
    out.print(f"step() alone: {1e6 * step:.0f} µs on the host, {100 * step / plain.median:.2f} % of a training step")
    return 0


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "monitor",
        help="time a training step with and without a GradientMonitor, and with hooks in Python",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, error=parser.error)
    parser.add_argument("--depth", type=int, default=50, help="weight layers, 6n + 2")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--rounds", type=rounds, default=40, help="rounds in which each variant runs once")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; PyTorch's own choice if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
