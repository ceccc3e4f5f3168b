"""Who is timed: the fused layer and those it is compared with, on the same tensors."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import vgkern
from vgkern.testing import compare, format_rows

from .floor import FLOOR_VARIANTS, FORMATS, floor_variants
from .libraries import LIBRARIES
from .shapes import Configuration
from .timing import Timing, interleave


@dataclass(frozen=True)
class Competitor:
    """Two timed variants to compare: the competitor's own, and vgkern's under the same conditions."""

    label: str
    variant: str
    baseline: str
    help: str


#: What ``--competitors`` chooses from.
COMPETITORS = {
    "eager": Competitor("eager", "eager", "vgkern", "PyTorch's three operations"),
    "tcmalloc": Competitor(
        "eager, tcmalloc", "eager_tcmalloc", "vgkern_tcmalloc", "both in a process that runs under tcmalloc"
    ),
    "compile": Competitor("torch.compile", "compile", "vgkern", "the three operations compiled, compile time excluded"),
    **{
        name: Competitor(name, name, "vgkern", "where it is installed, on a GPU, and takes the configuration")
        for name in LIBRARIES
    },
}

COMPILER = "inductor"

#: All variants that a row of the CSV file has columns for. Recorded, unrecorded: vgkern with the gradient record and
#: without. The last: what the memory needs.
VARIANTS = (
    "vgkern", "eager", "compile", "vgkern_tcmalloc", "eager_tcmalloc", *LIBRARIES, "recorded", "unrecorded",
    *FLOOR_VARIANTS,
)  # fmt: skip


def three_operations(
    x, residual, running_mean, running_var, weight, bias, activation_weight, *, training, eps, activate
):  # fmt: skip
    """``act(batch_norm(x) + residual)`` as a user of PyTorch writes it."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.1, eps)
    if residual is not None:
        y = y + residual
    return activate(y) if activation_weight is None else activate(y, activation_weight)


@contextmanager
def compiler_cache() -> Iterator[None]:
    """Compile into a folder that is gone afterwards: neither read nor left behind what other runs compiled."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="vgkern-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@dataclass(frozen=True)
class Variant:
    """A way to compute the layer, and the leaves that its backward pass is to give gradients of."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    def backward(self, dy: Tensor) -> Callable[[], object]:
        y = self.forward()
        return lambda: torch.autograd.grad(y, self.leaves, dy, retain_graph=True)


class Contest:
    """The tensors of one configuration and the variants that compute on them."""

    def __init__(self, configuration: Configuration, device: str = "cpu", *, record: bool = True) -> None:
        shape, memory_format = configuration.shape, FORMATS[configuration.layout]
        dtype = getattr(torch, configuration.dtype)
        generator = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            x = torch.randn(shape, generator=generator).to(device, dtype)
            return x.contiguous(memory_format=memory_format)

        def layer(track_grad_stats: bool) -> vgkern.nn.BatchNormAct2d:
            made = vgkern.nn.BatchNormAct2d(
                shape[1], activation=configuration.activation, track_grad_stats=track_grad_stats
            )
            return made.to(device, dtype).train(configuration.training)

        self.configuration = configuration
        self.device = device
        self.layer = layer(record)
        self.unrecorded = layer(False)
        self.x = normal().requires_grad_()
        self.residual = normal().requires_grad_() if configuration.residual else None
        self.dy = normal()

    def wrong(self) -> str:
        """Empty if the layer is right on this input, else the rows that say why not."""
        rows = compare(self.layer, self.x.detach(), None if self.residual is None else self.residual.detach())
        return "" if all(row.ok for row in rows) else format_rows(rows)

    def variants(self, competitors: Collection[str]) -> dict[str, Variant]:
        """vgkern, and those of the competitors that run in this process, by name."""
        made = {"vgkern": self._fused(self.layer)}
        if "eager" in competitors:
            made["eager"] = self._plain(three_operations)
        if "compile" in competitors:
            made["compile"] = self._plain(
                torch.compile(three_operations, backend=COMPILER, fullgraph=True, dynamic=False)
            )
        for name in LIBRARIES if self.device != "cpu" else ():
            fused = LIBRARIES[name].fused(self.configuration, self.layer) if name in competitors else None
            if fused:
                made[name] = self._library(*fused)
        return made

    def recording(self) -> dict[str, Variant]:
        """vgkern with the gradient record and without it."""
        return {"recorded": self._fused(self.layer), "unrecorded": self._fused(self.unrecorded)}

    def _leaves(self, layer: vgkern.nn.BatchNormAct2d) -> tuple[Tensor, ...]:
        tensors = (self.x, self.residual, *layer.parameters())
        return tuple(tensor for tensor in tensors if tensor is not None)

    def _fused(self, layer: vgkern.nn.BatchNormAct2d) -> Variant:
        probes = (buffer for buffer in layer.buffers() if buffer.requires_grad)  # the record leaves as their gradient
        return Variant(lambda: layer(self.x, self.residual), (*self._leaves(layer), *probes))

    def _library(self, function: Callable[..., Tensor], parameters: tuple[Tensor, ...]) -> Variant:
        tensors = (self.x, self.residual, *parameters)
        return Variant(lambda: function(self.x, self.residual), tuple(t for t in tensors if t is not None))

    def _plain(self, function: Callable[..., Tensor]) -> Variant:
        layer, spec = self.layer, self.layer.activation

        def activate(z: Tensor, *weight: Tensor) -> Tensor:
            return spec.row.reference(z, *spec.args, *weight)

        # Statistics of its own: a forward pass of another variant must not change those that its graph holds.
        running_mean, running_var = layer.running_mean.clone(), layer.running_var.clone()
        forward = functools.partial(
            function, self.x, self.residual, running_mean, running_var, layer.weight, layer.bias,
            layer.activation_weight, training=self.configuration.training, eps=layer.eps, activate=activate,
        )  # fmt: skip
        return Variant(forward, self._leaves(layer))


def measure(
    contest: Contest, competitors: Collection[str], rounds: int, *, compare_record: bool = False, hot: bool = True
) -> dict[str, dict[str, Timing]]:
    """{"forward" | "backward": {variant: Timing}}, interleaved; compiled first where something is to be compiled.

    On a CPU beside the floor's own variants, ``hot`` as :func:`~benchmarks.timing.interleave` has it.

    The two variants of ``compare_record`` take turns with each other alone: a difference of one per cent does not show
    behind a competitor that leaves other things in the caches than the fused layer does.
    """
    groups = [contest.variants(competitors)] + [contest.recording()] * compare_record
    measured: dict[str, dict[str, Timing]] = {"forward": {}, "backward": {}}
    on_cpu = torch.device(contest.device).type == "cpu"
    hot = hot and on_cpu

    def time(direction: str, variants: dict[str, Callable[[], object]]) -> None:
        if on_cpu and "vgkern" in variants:
            variants |= floor_variants(direction, contest.configuration)
        measured[direction] |= interleave(variants, rounds=rounds, device=contest.device, hot=hot)

    # The graph is kept from round to round, which a backward that overwrites what was saved for it refuses.
    with torch._functorch.config.patch(donated_buffer=False):
        for variants in groups:
            for variant in variants.values():
                variant.backward(contest.dy)()  # compiles
            time("forward", {name: variant.forward for name, variant in variants.items()})
            # After all forward passes, which change the running statistics that the graphs hold.
            time("backward", {name: variant.backward(contest.dy) for name, variant in variants.items()})
    if "compile" in competitors:
        torch._dynamo.reset()  # what was compiled keeps tensors alive, and counts towards a limit
    return measured
