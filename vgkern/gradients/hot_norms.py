"""Norms of gradients on the CPU, taken when a gradient has just been produced and is still in the caches.

A norm that was taken is used for a gradient only if nothing shows that the gradient has changed since: the same memory,
the same version as autograd counts them, and the same norm of its first 1024 elements. That last finds what changes a
gradient without autograd's hearing of it: ``GradScaler.unscale_``, ``.data``, an all-reduce. Everything else is
measured when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import backends, ops
from ..backends import cpu
from . import lists

__all__ = ["HotNorms"]

# Elements that are waited for, so that one call serves many gradients: 16 MiB of float32, which a last-level cache
# holds. In steps of a ResNet-50 (two cores of an AMD EPYC, busy) 34 calls of 1 MiB cost 5.0 ms, 6 of 16 MiB 4.2 ms.
_PENDING_ELEMENTS = 1 << 22


class HotNorms:
    """L2 norms of the gradients of parameters, by hooks on these.

    In a process that belongs to a process group the hooks do nothing, since a gradient may be reduced after they have
    run; there :meth:`measuring` makes a communication hook of DistributedDataParallel that takes the norms.
    """

    def __init__(self) -> None:
        self._handles: dict[int, RemovableHandle] = {}
        self._pending: dict[int, Tensor] = {}
        self._pending_elements = 0
        self._known = cpu.known_norms()
        self._reduced: dict[int, tuple[Tensor, float, float]] = {}
        self._backward = -1
        self._closed = False

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Put hooks on those that have none yet."""
        for p in parameters:
            if id(p) not in self._handles and p.requires_grad and p.is_leaf:
                self._handles[id(p)] = p.register_post_accumulate_grad_hook(self._produced)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.forget()
        self._closed = True

    def forget(self) -> None:
        self._pending.clear()
        self._pending_elements = 0
        if self._known:
            self._known.forget()

    def measure(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], max_norm: float, arrays: Any = None
    ) -> lists.Measured:
        """As ``lists.measure``, by what is known and by measuring the rest; the order of the norms is another.

        ``arrays``: the gradients as the extension takes them, where all are ordinary CPU tensors.
        """
        self._flush()
        known, rest = self._unchanged(parameters, gradients, arrays)
        if not known:
            return lists.measure(rest, 2.0, max_norm)
        norms = torch.tensor(known, dtype=torch.float64)
        if rest:
            more = lists.measure(rest, 2.0, max_norm).norms
            norms = torch.cat([norms.to(more), more])
        _, total, factor = backends.of(norms).gradient_norms([norms], 2.0, max_norm)
        return lists.Measured(norms, total, factor)

    def measuring(self, hook: Callable[[Any, Any], torch.futures.Future]) -> Callable[[Any, Any], torch.futures.Future]:
        """The communication hook, and the norms of what it leaves in each bucket."""

        def measured_hook(state, bucket):  # DDP refuses the annotations that it does not know
            parameters = bucket.parameters()
            future = hook(state, bucket)
            if self._closed or not bucket.buffer().is_cpu or not self._in_backward():
                return future

            def take_norms(done: torch.futures.Future) -> Any:
                value = done.value()
                flat = value[0] if isinstance(value, (list, tuple)) else value
                self._take(
                    [(p, g) for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True)]
                )
                return flat

            return future.then(take_norms)

        return measured_hook

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _produced(self, parameter: Tensor) -> None:
        """Once for each parameter in each backward pass: what can wait is done for many at once."""
        self._pending[id(parameter)] = parameter
        self._pending_elements += parameter.numel()
        if self._pending_elements >= _PENDING_ELEMENTS:
            self._flush()

    def _flush(self) -> None:
        parameters = list(self._pending.values())
        self._pending.clear()
        self._pending_elements = 0
        if not parameters or (dist.is_available() and dist.is_initialized()) or not _measures_here():
            return
        plain = cpu.plain_gradients(parameters)
        if plain and plain.arrays.dense:
            parameters, gradients, arrays = plain
        else:
            pairs = [(p, g) for p in parameters if (g := p.grad) is not None and _is_dense(g)]
            parameters, gradients = [p for p, _ in pairs], [g for _, g in pairs]
            if not pairs:
                return
            arrays = cpu.read(gradients)
        self._known.take(parameters, gradients, arrays, torch.get_num_threads())

    def _take(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        watched = [(p, g) for p, g in pairs if id(p) in self._handles and _is_dense(g)]
        if watched and _measures_here():
            arrays = cpu.read([g for _, g in watched])
            for (p, _), norm, sample in zip(watched, *cpu.dense_norms(arrays, len(watched)), strict=True):
                self._reduced[id(p)] = (p, norm, sample)

    def _in_backward(self) -> bool:
        """Whether a backward pass runs; once in each, asks to hear of its end.

        DDP writes the reduced gradients in a callback at the end, which it asks for when the last bucket is ready. One
        that is asked for before, and asks again when it is called, comes after that.
        """
        now = torch._C._current_graph_task_id()
        if now == -1:  # DDP's join: this rank has no data left
            return False
        if now != self._backward:
            self._backward = now
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._backward_ended))
        return True

    def _backward_ended(self) -> None:
        for p, norm, sample in self._reduced.values():
            g = p.grad
            if g is not None and _is_dense(g):
                self._known.add(p, g, norm, sample)
        self._reduced.clear()

    # -- what is known -------------------------------------------------------------------------------------------------

    def _unchanged(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], arrays: Any
    ) -> tuple[list[float], list[Tensor]]:
        """(norms of those that are known, the other gradients)"""
        if not self._known:
            return [], list(gradients)
        if arrays is not None:
            return self._known.unchanged(parameters, gradients, arrays)
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if _is_dense(g)]
        dense = [g for _, g in pairs]
        norms, rest = self._known.unchanged([p for p, _ in pairs], dense, cpu.read(dense))
        return norms, rest + [g for g in gradients if not _is_dense(g)]


def _is_dense(g: Tensor) -> bool:
    """Whether g is a stretch of memory that the C++ kernels are there for."""
    return g.is_cpu and lists.is_plain(g) and ops.is_dense(g)


def _measures_here() -> bool:
    """Whether CPU tensors go to the C++ kernels."""
    return backends.name_of("cpu") == "cpu"
