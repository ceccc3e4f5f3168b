"""Norms and scaling of any list of gradients: of several devices and dtypes, sharded, sparse, complex.

Plain gradients of one device go to its backend in one call. Of others, the memory behind them does: the local part of a
DTensor, the values of a sparse tensor, the real and imaginary parts of a complex one. What is none of these is left to
PyTorch's own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, ops
from ..backends import cpu

__all__ = [
    "Measured",
    "clip_norm_",
    "is_dtensor",
    "is_plain",
    "measure",
    "memory",
    "plain_cpu_gradients",
    "scale_",
    "without_gradientless",
]


class Measured(NamedTuple):
    """(T,), () and (), float64, on the first gradient's device; see ``vgkern.backends``."""

    norms: Tensor
    total: Tensor
    factor: Tensor


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor, without importing those who define them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def plain_cpu_gradients(parameters: Sequence[Tensor]) -> cpu.PlainGradients | None:
    """The gradients where all are ordinary CPU tensors, which C++ finds out fastest; else None."""
    return cpu.plain_gradients(parameters)


def without_gradientless(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters, gradients) of those that have a gradient, each gradient once."""
    pairs = {id(g): (p, g) for p in parameters if (g := p.grad) is not None}
    return [p for p, _ in pairs.values()], [g for _, g in pairs.values()]


def measure(gradients: Sequence[Tensor], norm_type: float, max_norm: float) -> Measured:
    """Norms of at least one gradient, that of all together, and the factor that clips it to ``max_norm``.

    The host does not wait for a device, except where gradients of several devices meet on the CPU. Sharded gradients
    take a collective operation for each mesh and axis of it that they are sharded over.
    """
    if cpu.are_plain(gradients):  # one call tells, where asking each takes as long as its norm
        return Measured(*backends.of(gradients[0]).gradient_norms(gradients, norm_type, max_norm))
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, g in enumerate(gradients):
        groups.setdefault(_kind(g), []).append(i)
    if len(groups) == 1:
        (kind,) = groups
        if isinstance(kind[0], torch.device):
            return Measured(*backends.of(gradients[0]).gradient_norms(gradients, norm_type, max_norm))
        norms = _NORMS[kind[0]](gradients, norm_type)
    else:
        device = memory(gradients[0]).device
        single: list[Tensor] = [gradients[0]] * len(gradients)
        for kind, members in groups.items():
            norms_of = _NORMS.get(kind[0], _plain_norms)
            for i, norm in zip(members, norms_of([gradients[i] for i in members], norm_type).unbind(), strict=True):
                single[i] = norm.to(device, ops.statistics_dtype(device))
        norms = torch.stack(single)
    _, total, factor = backends.of(norms).gradient_norms([norms], norm_type, max_norm)
    return Measured(norms, total, factor)


def clip_norm_(gradients: Sequence[Tensor], norm_type: float, max_norm: float, only_if_finite: bool) -> Tensor:
    """Both: ``measure``, and ``scale_`` by its factor; with ``only_if_finite``, not where the total is inf or NaN.

    Returns the total.
    """
    _, total, factor = measure(gradients, norm_type, max_norm)
    if not only_if_finite or total.isfinite():
        scale_(gradients, factor)
    return total.clone()  # a view would keep the norms of all gradients alive


def scale_(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """g ← g·factor in place, factor a float64 scalar; autograd hears of it.

    On the CPU nothing is written where the factor is 1. On another device that is decided there.
    """
    gradients = list(gradients)
    if factor.is_cpu and factor.item() == 1:
        return
    plain: dict[torch.device, list[Tensor]] = {}
    for g in gradients:
        target = memory(g)
        if is_plain(target):
            plain.setdefault(target.device, []).append(target)
        else:
            target.mul_(factor.to(target.device))
    for device, members in plain.items():
        backends.of(members[0]).scale_gradients_(members, factor.to(device))
        torch.autograd.graph.increment_version(members)
    wrappers = [g for g in gradients if is_dtensor(g)]
    if wrappers:
        torch.autograd.graph.increment_version(wrappers)


def memory(g: Tensor) -> Tensor:
    """What to multiply so that g is multiplied: an ordinary tensor over g's memory, or g itself."""
    if is_dtensor(g):
        return memory(g.to_local())  # type: ignore[attr-defined]
    if g.layout is torch.sparse_coo:
        return memory(g._values())
    if g.is_complex() and not g.is_conj():
        return torch.view_as_real(g)
    return g.detach()


def is_plain(g: Tensor) -> bool:
    """Whether g is an ordinary tensor of a dtype that the backends take."""
    return (
        type(g) in (Tensor, torch.nn.Parameter)
        and g.layout is torch.strided
        and g.dtype in ops.FLOATING_DTYPES
        and not g.is_meta
    )


def _kind(g: Tensor) -> tuple[Any, ...]:
    """Gradients of one kind are measured together."""
    if is_plain(g):
        return (g.device,)
    if is_dtensor(g):
        placements = g.placements  # type: ignore[attr-defined]
        if all(p.is_shard() or p.is_replicate() for p in placements) and is_plain(g.to_local()):  # type: ignore[attr-defined]
            return ("sharded", g.device_mesh, tuple(i for i, p in enumerate(placements) if p.is_shard()))  # type: ignore[attr-defined]
    return ("other",)


def _plain_norms(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    return backends.of(gradients[0]).gradient_norms(gradients, norm_type)[0]


def _sharded_norms(gradients: Sequence[Any], norm_type: float) -> Tensor:
    """Norms of the whole of DTensors, from those of the parts: gathered over each axis of the mesh."""
    norms = _plain_norms([g.to_local() for g in gradients], norm_type)
    mesh = gradients[0].device_mesh
    for axis, placement in enumerate(gradients[0].placements):
        if placement.is_shard():
            parts = norms.new_empty(mesh.size(axis) * len(norms))
            dist.all_gather_into_tensor(parts, norms.contiguous(), group=mesh.get_group(axis))
            norms = _plain_norms(parts.view(-1, len(norms)).t().contiguous().unbind(), norm_type)
    return norms


def _other_norms(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    return torch.stack([_other_norm(g.detach(), norm_type) for g in gradients])


def _other_norm(g: Any, norm_type: float) -> Tensor:
    if is_dtensor(g):  # partial sums, say: the norm of what they amount to
        g = g.full_tensor()
    if g.layout is torch.sparse_coo:
        g = g.coalesce().values()  # an index may stand more than once
    if g.is_complex():
        g = g.abs()
    if is_plain(g):
        return _plain_norms([g], norm_type)[0]
    return torch.linalg.vector_norm(g, norm_type).to(ops.statistics_dtype(g.device))


_NORMS: dict[str, Callable[[Sequence[Any], float], Tensor]] = {"sharded": _sharded_norms, "other": _other_norms}
