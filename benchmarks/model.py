"""The ResNet-50 that is timed: vgkern.models' on fused layers, on ``torch.nn``'s, and with its convolutions alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vgkern.models import ResNet, resnet50
from vgkern.nn import Bottleneck

#: Nets that differ in their batch norms, additions and activations and in nothing else, made of (classes).
NETS: dict[str, Callable[..., ResNet]] = {"vgkern": resnet50, "torch.nn": functools.partial(resnet50, fused=False)}


class _Join(torch.autograd.Function):
    """x, whose gradient also goes to the shortcut: the convolution there keeps its backward pass, nothing is added."""

    @staticmethod
    def forward(ctx, x: Tensor, shortcut: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy


class Removed(nn.Module):
    """Nothing, in the place of a batch norm with its addition and activation."""

    def __init__(self, *, joins: bool = False) -> None:
        super().__init__()
        self.joins = joins

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _Join.apply(input, residual) if self.joins else input


def convolutions_only(net: ResNet) -> ResNet:
    """A copy in which every batch norm, addition and activation is removed, and every convolution runs as before.

    Pooling, the linear layer and the loss stay: they are the same whatever the batch norms are.
    """
    net = copy.deepcopy(net)
    net.bn1 = Removed()
    for block in [module for module in net.modules() if isinstance(module, Bottleneck)]:
        block.bn1 = block.bn2 = Removed()
        block.bn3 = Removed(joins=block.downsample is not None)
        if block.downsample is not None:
            block.downsample[1] = Removed()
    return net
