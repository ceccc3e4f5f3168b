"""``AddAct``: the end of a residual block that has no batch norm before its sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops
from ..gradients.record import GradRecordMixin
from ._activation import ActivationMixin

__all__ = ["AddAct"]


class AddAct(GradRecordMixin, ActivationMixin):
    """``act(input + residual)``, or ``act(input)``, in one pass forward and one backward.

    Args:
        activation, activation_args: as :class:`vgkern.nn.BatchNormAct2d`.
        track_grad_stats: whether the backward kernels report (``grad_stats()``).
        device, dtype: of a learnable activation's weight and of the record.

    Shape:
        input, residual, output: any one shape. There is no broadcasting.

    Example:
        >>> import torch, vgkern
        >>> vgkern.nn.AddAct()(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -5.0]))
        tensor([2., 0.])
    """

    def __init__(
        self,
        *,
        activation: str | nn.Module | None = "relu",
        activation_args: Mapping[str, Any] | None = None,
        track_grad_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._init_activation(activation, activation_args, device, dtype)
        self._init_grad_record(track_grad_stats, device)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        ops.check(input, residual, self.activation, self.activation_weight)
        direct = ops.unwatched(input, residual, self.activation_weight)
        y, _ = functional.apply(
            input, residual, None, None, self.activation_weight, self._probe_on(input.device),
            None, None, False, 0.0, self.activation, (0.0, math.inf), direct,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
