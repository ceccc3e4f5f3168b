"""What the fused layers replace, written with ``torch.nn`` as torchvision's ResNets write it: for comparison.

``state_dict`` keys, calls and results are those of ``vgkern.nn``'s layers; there is no gradient record and no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._activation import ActivationMixin

__all__ = ["PlainAddAct", "PlainBatchNormAct2d"]

# ReLU's backward reads its output, so its input may be overwritten; torchvision does.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_}


def _activate(layer: ActivationMixin, z: Tensor) -> Tensor:
    """φ(z), in place where PyTorch can."""
    spec = layer.activation
    if spec.name in _IN_PLACE:
        return _IN_PLACE[spec.name](z)
    return spec.row.reference(z, *(spec.args if layer.activation_weight is None else (layer.activation_weight,)))


class PlainBatchNormAct2d(ActivationMixin, nn.BatchNorm2d):
    """``act(batch_norm(input) + residual)`` in three operations: :class:`vgkern.nn.BatchNormAct2d` on ``torch.nn``."""

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
        z = super().forward(input)
        if residual is not None:
            z += residual
        return _activate(self, z)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class PlainAddAct(ActivationMixin):
    """``act(input + residual)`` in two operations, or ``act(input)``: :class:`vgkern.nn.AddAct` on ``torch.nn``.

    Without a residual ``input`` itself is overwritten where PyTorch can, as by ``nn.ReLU(inplace=True)``.
    """

    def __init__(
        self, *, activation: str | nn.Module | None = "relu", activation_args: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._init_activation(activation, activation_args, None, None)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _activate(self, input if residual is None else input + residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
