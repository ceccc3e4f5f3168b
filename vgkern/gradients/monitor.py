"""``GradientMonitor``: the gradient of every layer at every step, kept on the device until somebody asks."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from . import lists
from .findings import Thresholds
from .history import NO_GRADIENT, GradRecord, History, LayerInfo
from .hooks import Tap, activation_name, is_tapped
from .model_state import ModelState
from .record import GradRecordMixin
from .report import GradReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientMonitor"]

_NORMALISES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class GradientMonitor:
    """Records the gradient of each layer, step by step, and says what is wrong with it.

    Fused layers report from their backward kernels: no pass over a tensor is added. The gradients of all parameters
    are measured in ``step()``, by one call of the multi-tensor kernels that reads each once: after accumulation over
    micro-batches and after DDP's reduction, which a hook on the parameter would come too early for. Both go into a row
    of a ring buffer on the device; nothing is copied to the host before somebody reads. A model without fused layers
    is watched by hooks on its layers, which cost passes over their gradients, and the report says so.

    Call ``step()`` once a training step, after ``backward()`` and before ``zero_grad()``; with clipping, before it if
    the norms are to be those that it meets. It takes over the record of the fused layers: ``layer.grad_stats()`` then
    begins anew. With a ``GradScaler``, call it before ``scaler.unscale_`` and give the scale to what reads
    (``unscale=``). Steps replayed as a CUDA graph are recorded by a ``step()`` after the replay. The parts of a
    compiled model without fused layers are known by their parameters' gradients alone.

    Args:
        model: any module, also one in ``DistributedDataParallel`` or compiled.
        every: record each so-many-th step. The kernels' records then cover all backward passes since the last row, and
            the parameters' norms are those of that step.
        capacity: rows that are kept; the oldest is overwritten.

    Raises:
        TypeError: ``model`` is no module. ValueError: ``every`` or ``capacity`` below 1.

    Example:
        >>> import torch, vgkern
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), vgkern.nn.BatchNormAct1d(8), torch.nn.Linear(8, 1))
        >>> with vgkern.gradients.GradientMonitor(model) as monitor:
        ...     for _ in range(3):
        ...         model.zero_grad()
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...         monitor.step()
        >>> [(record.step, record.layer, record.source) for record in monitor.records()][:3]
        [(1, '0', 'gradients'), (1, '1', 'kernel'), (1, '2', 'gradients')]
    """

    def __init__(self, model: nn.Module, *, every: int = 1, capacity: int = 1000) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, value in (("every", every), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        self.model = _unwrapped(model)
        self.every, self.capacity = every, capacity
        self._calls = self._written = 0
        self._steps: list[int] = []  # of the rows, in the order of the ring
        self._closed = self._warned = False
        self._layers = _layers(self.model)
        self._parameters = [p for layer in self._layers for _, p in layer.parameters]
        self._sums: Tensor | None = None  # (capacity, watched, len(RECORD_FIELDS)), made at the first row
        self._norms: Tensor | None = None  # (capacity, P)
        self._present: tuple[tuple[int, ...], Tensor] | None = None
        self._watched = [layer for layer in self._layers if layer.recorder is not None]
        self._seen: dict[str, int] = {}
        self._handles = [
            layer.module.register_forward_pre_hook(functools.partial(_note_order, self._seen, layer.name))
            for layer in self._layers
        ]

    @property
    def hooked(self) -> bool:
        """Whether the record is made by hooks, which cost passes, because there are no fused layers."""
        return any(layer.source == "hooks" for layer in self._layers)

    def __enter__(self) -> GradientMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._steps)

    def close(self) -> None:
        """Take all hooks off the model. What was recorded stays readable."""
        self._closed = True
        self._forget_order_hooks()
        for layer in self._layers:
            if isinstance(layer.recorder, Tap):
                layer.recorder.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Enter this training step. The host does not wait for the device.

        Raises:
            RuntimeError: the monitor is closed, or a CUDA graph is being captured.
        """
        if self._closed:
            raise RuntimeError("this GradientMonitor is closed")
        self._calls += 1
        if self._calls % self.every:
            return
        records = [layer.record() for layer in self._watched]
        gradients = [p.grad for p in self._parameters]
        present = [r for r in records if r is not None] + [g for g in gradients if g is not None]
        if not present:
            self._warn_of_nothing()
            return
        if self._handles:
            self._forget_order_hooks()
        if self._norms is None:
            self._allocate(present[0].device)
        elif self._norms.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("GradientMonitor.step() belongs after the replay of a CUDA graph, not into its capture")
        row = self._written % self.capacity
        self._enter_records(row, records)
        self._enter_norms(row, gradients)
        self._steps[row : row + 1] = [self._calls]
        self._written += 1

    def records(self, unscale: float = 1.0) -> list[GradRecord]:
        """Per step, oldest first, and in each step per layer, in forward order; one transfer from the device.

        Args:
            unscale: the loss scale, by which all norms are divided.
        """
        return list(self.history(unscale).records())

    def report(self, thresholds: Thresholds | None = None, *, unscale: float = 1.0) -> GradReport:
        """What is wrong and what helps, with the numbers; ``print`` it, or look into ``.findings``.

        Args:
            thresholds: what counts as a finding; by default :class:`~vgkern.gradients.Thresholds` as it is documented.
            unscale: the loss scale, by which all norms are divided.

        Example:
            >>> import torch, vgkern
            >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
            <torch._C.Generator object at ...>
            >>> layers = [m for _ in range(12) for m in (torch.nn.Linear(16, 16), torch.nn.Sigmoid())]
            >>> model = torch.nn.Sequential(*layers)
            >>> with vgkern.gradients.GradientMonitor(model) as monitor:
            ...     model(torch.randn(8, 16)).sum().backward()
            ...     monitor.step()
            >>> [finding.kind for finding in monitor.report().findings]
            ['vanishing']
        """
        state = ModelState.of(self.model, [(layer.name, layer.module) for layer in self._layers])
        return GradReport.of(self.history(unscale), state, thresholds or Thresholds(), unscale)

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False, unscale: float = 1.0) -> Figure:
        """Norm and gain against depth, layer × step as a heat map, and dead units; saved to ``path`` if one is given.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the message names the extra.
            ValueError: nothing was recorded yet.
        """
        from .plot import draw

        figure = draw(self.history(unscale), dark=dark)
        if path is not None:
            figure.savefig(Path(path))
        return figure

    def write(self, summary_writer: Any, global_step: int) -> None:
        """The latest row as TensorBoard scalars, a layer each, and histograms over the layers.

        Args:
            summary_writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar`` and
                ``add_histogram``.
            global_step: the step under which TensorBoard files them.
        """
        from .tensorboard import write

        if self._steps:
            write(self.history(latest=True), summary_writer, global_step)

    def history(self, unscale: float = 1.0, *, latest: bool = False) -> History:
        """All rows as arrays, steps × layers, or the latest alone; one transfer from the device.

        Raises:
            ValueError: ``unscale`` is no positive number.
        """
        if not 0 < unscale < math.inf:
            raise ValueError(f"unscale: expected a positive number, got {unscale!r}")
        count = len(self._steps)
        oldest = self._steps.index(min(self._steps)) if count else 0
        rows = [(oldest + i) % count for i in range(count)]  # a ring: the oldest follows the latest
        rows = rows[-1:] if latest else rows
        if self._sums is None or self._norms is None:
            watched = torch.zeros(0, len(self._watched), len(ops.RECORD_FIELDS), dtype=torch.float64)
            norms = torch.zeros(0, len(self._parameters), dtype=torch.float64)
        else:
            watched, norms = (ring[:count].cpu()[rows].double() for ring in (self._sums, self._norms))
        sums = watched.new_zeros(len(rows), len(self._layers), len(ops.RECORD_FIELDS))
        sums[:, [i for i, layer in enumerate(self._layers) if layer.recorder is not None]] = watched
        order = self._order()
        columns = iter(range(len(self._parameters)))
        info = [layer.info([next(columns) for _ in layer.parameters]) for layer in self._layers]
        return History.from_sums(
            [info[i] for i in order], [self._steps[r] for r in rows], sums[:, order].numpy(), norms.numpy(), unscale
        )

    def _order(self) -> list[int]:
        """The layers as the first forward pass came through them; one that it did not meet follows its neighbour."""
        places, place = [], -1
        for layer in self._layers:
            place = self._seen.get(layer.name, place)
            places.append(place)
        return sorted(range(len(places)), key=places.__getitem__)

    def _allocate(self, device: torch.device) -> None:
        make = functools.partial(torch.zeros, dtype=ops.statistics_dtype(device), device=device)
        self._sums = make(self.capacity, len(self._watched), len(ops.RECORD_FIELDS))
        self._norms = make(self.capacity, len(self._parameters))
        self._nothing = make(len(ops.RECORD_FIELDS))

    def _enter_records(self, row: int, records: list[Tensor | None]) -> None:
        assert self._sums is not None
        taken = [r for r in records if r is not None]
        if not taken:  # the row's sums may be those of a step long ago
            self._sums[row].zero_()
            return
        device = self._sums.device
        rows = [self._nothing if r is None else r if r.device == device else r.to(device) for r in records]
        torch.stack(rows, out=self._sums[row])
        # In place, so that a CUDA graph goes on adding into the same memory.
        torch._foreach_zero_(taken)

    def _enter_norms(self, row: int, gradients: list[Tensor | None]) -> None:
        assert self._norms is not None
        target = self._norms[row]
        given = [g for g in gradients if g is not None]
        if len(given) < len(gradients):
            target.fill_(NO_GRADIENT)
            present = tuple(i for i, g in enumerate(gradients) if g is not None)
            if self._present is None or self._present[0] != present:
                self._present = present, torch.tensor(present, dtype=torch.int64, device=target.device)
            if given:
                target[self._present[1]] = lists.measure(given, 2.0, math.inf).norms.to(target.device)
        elif given:
            target.copy_(lists.measure(given, 2.0, math.inf).norms)

    def _forget_order_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _warn_of_nothing(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "GradientMonitor.step() found no gradient at all: call it after backward() and before zero_grad()",
                RuntimeWarning,
                stacklevel=4,
            )


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that is watched. ``recorder`` is what holds its sums: a fused layer itself, a tap, or nothing."""

    name: str
    module: nn.Module
    recorder: GradRecordMixin | Tap | None
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def source(self) -> str:
        if self.recorder is None:
            return "gradients"
        return "hooks" if isinstance(self.recorder, Tap) else "kernel"

    def record(self) -> Tensor | None:
        """Its sums since they were last taken, (len(RECORD_FIELDS),), on the device."""
        if isinstance(self.recorder, Tap):
            return self.recorder.sums
        probe = self.recorder._buffers["_probe"]  # type: ignore[union-attr]
        return None if probe is None else probe.grad

    def info(self, columns: Sequence[int]) -> LayerInfo:
        names = [name for name, _ in self.parameters]
        return LayerInfo(
            self.name, type(self.module).__name__, activation_name(self.module), self.source,
            isinstance(self.module, _NORMALISES), not isinstance(self.recorder, Tap) or self.recorder.counts_dead,
            tuple(zip(names, columns, strict=True)),
        )  # fmt: skip


def _unwrapped(model: nn.Module) -> nn.Module:
    """What ``DistributedDataParallel`` and ``torch.compile`` have put themselves around."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _layers(model: nn.Module) -> list[_Layer]:
    """Fused layers, and modules with parameters of their own; taps on leaves and activations if nothing is fused."""
    modules = [(name or type(model).__name__, module) for name, module in model.named_modules()]
    fused = any(isinstance(module, GradRecordMixin) and module._probe is not None for _, module in modules)
    taken: set[nn.Parameter] = set()  # a parameter that several modules share belongs to the first
    layers = []
    for name, module in modules:
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.requires_grad and p not in taken]
        taken.update(p for _, p in own)
        recorder: GradRecordMixin | Tap | None = None
        if isinstance(module, GradRecordMixin):
            recorder = module if module._probe is not None else None
        elif not fused and is_tapped(module):
            recorder = Tap(module)
        if recorder is not None or own:
            layers.append(_Layer(name, module, recorder, tuple(own)))
    return layers


def _note_order(seen: dict[str, int], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        seen.setdefault(name, len(seen))
