"""Layers that were built fused into the plain twins of :mod:`vgkern.nn.plain`, and back: the same objects and keys."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import AddAct, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct
from ..nn.plain import (
    PlainAddAct,
    PlainBatchNormAct1d,
    PlainBatchNormAct2d,
    PlainBatchNormAct3d,
    PlainSyncBatchNormAct,
)
from .layers import record_anew, record_no_more

__all__ = ["TWINS", "from_plain", "to_plain"]

#: Fused layer -> plain twin.
_TWIN_OF: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct1d: PlainBatchNormAct1d,
    BatchNormAct2d: PlainBatchNormAct2d,
    BatchNormAct3d: PlainBatchNormAct3d,
    SyncBatchNormAct: PlainSyncBatchNormAct,
    AddAct: PlainAddAct,
}
#: Plain twin -> fused layer.
TWINS: dict[type[nn.Module], type[nn.Module]] = {twin: fused for fused, twin in _TWIN_OF.items()}


def to_plain(root: nn.Module) -> None:
    """Fused layers into their plain twins, which keep neither the gradient record nor bounds."""
    for module in root.modules():
        if (twin := _TWIN_OF.get(type(module))) is not None:
            recorded = record_no_more(module)
            for name in ("_bounds", "_grad_norm_bounds"):
                vars(module).pop(name, None)
            module.__dict__["track_grad_stats"] = recorded
            module.__class__ = twin


def from_plain(root: nn.Module) -> None:
    """Plain twins into fused layers."""
    for module in root.modules():
        if (fused := TWINS.get(type(module))) is not None:
            layer: Any = module
            layer.__class__ = fused
            vars(layer).pop("inplace", None)
            record_anew(layer, vars(layer).pop("track_grad_stats", True))
            if fused is not AddAct:
                layer.grad_norm_bounds = None
