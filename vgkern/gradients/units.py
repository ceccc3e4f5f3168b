"""Adaptive clipping of any list of gradients, unit by unit: see ``vgkern.gradients.adaptive_clip_grad_``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from . import lists

__all__ = ["clip_", "clip_plain_"]


def clip_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float
) -> None:
    """As ``clip_units_`` of ``vgkern.backends`` for gradients of any kind; autograd hears of it."""
    groups: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for p, g in zip(parameters, gradients, strict=True):
        if lists.is_plain(g) and lists.is_plain(p) and p.device == g.device:
            groups.setdefault(g.device, []).append((p, g))
        elif _has_whole_units(p, g):
            clip_([p.to_local()], [g.to_local()], clip_factor, eps, norm_type)  # type: ignore[attr-defined]
            torch.autograd.graph.increment_version([g])
        else:
            _scale_units_(g, reference.unit_factors(_whole(p), _whole(g), clip_factor, eps, norm_type))
    for pairs in groups.values():
        weights, members = map(list, zip(*pairs, strict=True))
        clip_plain_(weights, members, clip_factor, eps, norm_type)


def clip_plain_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float
) -> None:
    """The same for at least one ordinary gradient, all on one device."""
    written = backends.of(gradients[0]).clip_units_(parameters, gradients, clip_factor, eps, norm_type)
    if written:
        torch.autograd.graph.increment_version(written)


def _has_whole_units(p: Any, g: Any) -> bool:
    """Whether both are DTensors, and each rank's part is made of whole units."""
    return (
        lists.is_dtensor(p)
        and lists.is_dtensor(g)
        and p.placements == g.placements
        and all(q.is_replicate() or (q.is_shard() and q.dim == 0 and g.dim() > 1) for q in g.placements)
    )


def _whole(x: Any) -> Tensor:
    """An ordinary tensor of the same values."""
    if lists.is_dtensor(x):
        x = x.full_tensor()
    return x if x.layout is torch.strided else x.to_dense()


def _scale_units_(g: Any, factors: Tensor) -> None:
    """g ← g·factors in place, these being () or of g's rank, and of size 1 along all axes but the first."""
    if lists.is_dtensor(g):
        from torch.distributed.tensor import Replicate, distribute_tensor

        placements = [q if q.is_shard() else Replicate() for q in g.placements]
        everywhere = factors.expand(g.shape).contiguous()
        part = distribute_tensor(everywhere, g.device_mesh, placements, src_data_rank=None)
        lists.memory(g).mul_(part.to_local())
        torch.autograd.graph.increment_version([g])
    elif g.layout is torch.sparse_coo and factors.dim():
        of_values = factors.flatten()[g._indices()[0]]
        values = lists.memory(g)
        values.mul_(of_values.view(-1, *[1] * (values.dim() - 1)))
    else:
        lists.memory(g).mul_(factors) if factors.dim() == 0 else g.mul_(factors)
