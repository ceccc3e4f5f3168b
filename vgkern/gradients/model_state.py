"""What the model itself says at the time of a report: how large its weights are, which batch norms stand still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import backends, ops

__all__ = ["ModelState"]


@dataclass(frozen=True)
class ModelState:
    """Facts that no gradient shows.

    Attributes:
        weight_scales: by layer, rms(weight)·√fan_in: 1.41 in the initialisation of He et al. 2015 (arXiv 1502.01852)
            for ReLU, 1 in that of LeCun et al. 1998 and, for square weights, of Glorot & Bengio 2010.
        frozen_norms: batch norms in eval mode, in a model in training mode, whose running statistics were never
            estimated: they do not normalise.
        nonfinite_parameters: layers with a parameter that holds inf or NaN.
        half_precision: whether a parameter is float16.
    """

    weight_scales: dict[str, float]
    frozen_norms: tuple[str, ...] = ()
    nonfinite_parameters: tuple[str, ...] = ()
    half_precision: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> ModelState:
        """Of a model with these layers. Reads every parameter once, and waits for the device."""
        scales: dict[str, float] = {}
        frozen, nonfinite = [], []
        for name, module in layers:
            parameters = [p for p in module.parameters(recurse=False) if type(p.data) is torch.Tensor]
            if not all(bool(p.isfinite().all()) for p in parameters):
                nonfinite.append(name)
            if (scale := _weight_scale(module)) is not None:
                scales[name] = scale
            if model.training and _stands_still(module):
                frozen.append(name)
        half = any(p.dtype is torch.float16 for p in model.parameters())
        return cls(scales, tuple(frozen), tuple(nonfinite), half)


def _weight_scale(module: nn.Module) -> float | None:
    weight = getattr(module, "weight", None)
    is_map = isinstance(module, nn.Linear) or hasattr(module, "kernel_size")  # a convolution of whatever kind
    if (
        not is_map
        or not isinstance(weight, torch.Tensor)
        or weight.dim() < 2
        or weight.dtype not in ops.FLOATING_DTYPES
    ):
        return None
    fan_in = weight[0].numel()
    norm = backends.of(weight).gradient_norms([weight.detach()], 2.0)[0].item()
    return norm / math.sqrt(weight.numel()) * math.sqrt(fan_in)


def _stands_still(module: nn.Module) -> bool:
    seen = getattr(module, "num_batches_tracked", None)
    return not module.training and isinstance(seen, torch.Tensor) and not seen.is_meta and seen.item() == 0
