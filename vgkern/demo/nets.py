"""The four nets of the demo: one body, four rows of a table.

Each net has ``depth`` weight layers: a stem convolution, three stages of ``(depth - 2) / 3`` convolutions of 3×3 (at
full, half and a quarter of the resolution; ``width``, twice and four times as many channels), and a linear head.
Shortcuts carry no weights (option A of the source): the nets differ in nothing but what the table says.

Source: He et al. 2016, arXiv 1512.03385, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as fused
from ..models.resnet import check_depth
from ..nn.plain import PlainAddAct, PlainBatchNormAct2d

__all__ = ["NETS", "DeepNet", "NetSpec"]


@dataclass(frozen=True)
class NetSpec:
    """What distinguishes one net from the others.

    Attributes:
        key, label: its name in the numbers and in the table and figure.
        activation: of every hidden layer.
        batch_norm: each convolution is followed by a batch norm (and then has no bias).
        residual: every second activation adds the input of the two layers before it.
        initialise: fills a weight in place.
    """

    key: str
    label: str
    activation: str
    batch_norm: bool
    residual: bool
    initialise: Callable[[Tensor], Tensor]


def _xavier(weight: Tensor) -> Tensor:
    """Glorot & Bengio 2010: variance 2 / (fan_in + fan_out), for activations that are linear around 0."""
    return nn.init.xavier_normal_(weight)


def _kaiming(weight: Tensor) -> Tensor:
    """He et al. 2015, arXiv 1502.01852: variance 2 / fan, because a ReLU halves the second moment."""
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


NETS: tuple[NetSpec, ...] = (
    NetSpec("sigmoid", "plain sigmoid", "sigmoid", batch_norm=False, residual=False, initialise=_xavier),
    NetSpec("relu", "plain ReLU", "relu", batch_norm=False, residual=False, initialise=_kaiming),
    NetSpec("batch_norm", "batch norm", "relu", batch_norm=True, residual=False, initialise=_kaiming),
    NetSpec("residual", "batch norm + residual", "relu", batch_norm=True, residual=True, initialise=_kaiming),
)


def _activation_layer(spec: NetSpec, channels: int, plain_torch: bool) -> nn.Module:
    batch_norm: Callable[..., nn.Module] = PlainBatchNormAct2d if plain_torch else fused.BatchNormAct2d
    # What it is applied to is a convolution's output, which nobody else sees.
    add_act: Callable[..., nn.Module] = partial(PlainAddAct, inplace=True) if plain_torch else fused.AddAct
    if spec.batch_norm:
        return batch_norm(channels, activation=spec.activation)
    return add_act(activation=spec.activation)


class DeepNet(nn.Module):
    """A net of the table, on vgkern's fused layers or, with ``plain_torch``, on those of ``torch.nn``.

    Both variants have the same ``state_dict`` keys and compute the same function.

    Args:
        spec: a row of ``NETS``.
        depth: weight layers, 6n + 2.
        width: channels of the first stage.
        num_classes: outputs.
        plain_torch: build it of ``torch.nn`` layers only.

    Shape:
        input: (N, 1, H, W); output: (N, num_classes).
    """

    def __init__(
        self, spec: NetSpec, depth: int, width: int = 16, num_classes: int = 10, *, plain_torch: bool = False
    ) -> None:
        super().__init__()
        self.residual = spec.residual
        layers_per_stage = (check_depth(depth) - 2) // 3
        channels = [width] + [width << stage for stage in range(3) for _ in range(layers_per_stage)]
        # The first layer of the second and third stage halves the resolution.
        strides = [2 if wider > narrower else 1 for narrower, wider in pairwise(channels)]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=not spec.batch_norm)
            for c_in, c_out, stride in zip([1, *channels[:-1]], channels, [1, *strides], strict=True)
        )
        self.acts = nn.ModuleList(_activation_layer(spec, c, plain_torch) for c in channels)
        self.head = nn.Linear(channels[-1], num_classes)
        for layer in self.weight_layers():
            spec.initialise(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def weight_layers(self) -> list[nn.Conv2d | nn.Linear]:
        """The ``depth`` layers that are counted, from the input to the output."""
        return [*self.convs, self.head]

    def recording_layers(self) -> list[Any]:
        """The ``depth - 1`` fused layers, which have ``grad_stats()``, in the same order."""
        return list(self.acts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.acts[0](self.convs[0](x))
        for i in range(1, len(self.convs), 2):
            z = self.convs[i + 1](self.acts[i](self.convs[i](x)))
            x = self.acts[i + 1](z, _shortcut(x, z)) if self.residual else self.acts[i + 1](z)
        return self.head(x.mean((2, 3)))


def _shortcut(x: Tensor, z: Tensor) -> Tensor:
    """x, with every second row and column, and zeros for the channels that z has more."""
    if x.shape == z.shape:
        return x
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, z.shape[1] - x.shape[1]))
