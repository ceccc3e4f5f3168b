"""The plain twins of the fused layers, written with ``torch.nn`` as torchvision's ResNets write it: to compare with.

``state_dict`` keys, calls and results are those of the fused layers; there is no gradient record and no bound.
``vgkern.unfuse`` makes them, ``vgkern.fuse`` makes fused layers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ActivationSpec
from ._activation import ActivationMixin

__all__ = [
    "PlainAddAct",
    "PlainBatchNormAct1d",
    "PlainBatchNormAct2d",
    "PlainBatchNormAct3d",
    "PlainSyncBatchNormAct",
    "activate",
]

# ReLU's backward reads its output, so its input may be overwritten; torchvision does.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_}


def activate(spec: ActivationSpec, z: Tensor, weight: Tensor | None, *, in_place: bool = False) -> Tensor:
    """φ(z) by PyTorch's own function; ``in_place``: z may be overwritten, and is where PyTorch can."""
    if in_place and spec.name in _IN_PLACE:
        return _IN_PLACE[spec.name](z)
    return spec.row.reference(z, *spec.args) if weight is None else spec.row.reference(z, *spec.args, weight)


class _PlainBatchNormAct(ActivationMixin):
    """``act(batch_norm(input) + residual)`` by three operations of PyTorch: the fused layer's plain twin."""

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | nn.Module | None = "relu",
        activation_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_features)
        self._init_activation(activation, activation_args, None, None)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        z = super().forward(input)  # its own: nobody else sees it
        if residual is not None:
            if residual.dtype == z.dtype:
                z += residual
            else:
                z = z + residual
        return activate(self.activation, z, self.activation_weight, in_place=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class PlainBatchNormAct1d(_PlainBatchNormAct, nn.BatchNorm1d):
    __doc__ = _PlainBatchNormAct.__doc__


class PlainBatchNormAct2d(_PlainBatchNormAct, nn.BatchNorm2d):
    __doc__ = _PlainBatchNormAct.__doc__


class PlainBatchNormAct3d(_PlainBatchNormAct, nn.BatchNorm3d):
    __doc__ = _PlainBatchNormAct.__doc__


class PlainSyncBatchNormAct(_PlainBatchNormAct, nn.SyncBatchNorm):
    __doc__ = _PlainBatchNormAct.__doc__


class PlainAddAct(ActivationMixin):
    """``act(input + residual)`` by two operations of PyTorch, or ``act(input)``: :class:`vgkern.nn.AddAct`'s twin.

    Args:
        activation, activation_args: as :class:`vgkern.nn.AddAct`.
        inplace: without a residual, overwrite ``input`` where PyTorch can, as ``nn.ReLU(inplace=True)``.
    """

    inplace = False

    def __init__(
        self,
        *,
        activation: str | nn.Module | None = "relu",
        activation_args: Mapping[str, Any] | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self._init_activation(activation, activation_args, None, None)
        self.inplace = inplace

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return activate(self.activation, input, self.activation_weight, in_place=self.inplace)
        return activate(self.activation, input + residual, self.activation_weight, in_place=True)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
