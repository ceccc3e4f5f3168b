"""A ResNet-50 of ``nn.Conv2d`` and batch norms that are chosen by the caller, so that nothing else differs.

He et al. 2016, arXiv 1512.03385, with torchvision's place for the stride (the 3 × 3 convolution) and its names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vgkern

from .shapes import RESNET50_STAGES

#: A layer that computes ``act(batch_norm(x) + residual)`` with (input, residual=None), made of (channels, activated).
MakeNorm = Callable[[int, bool], nn.Module]


class PlainNorm(nn.BatchNorm2d):
    """The three operations, the last two in place, as torchvision's ResNet has them."""

    def __init__(self, channels: int, activated: bool) -> None:
        super().__init__(channels)
        self.activated = activated

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        if residual is not None:
            y.add_(residual)
        return y.relu_() if self.activated else y


def fused_norm(channels: int, activated: bool) -> nn.Module:
    return vgkern.nn.BatchNormAct2d(channels, activation="relu" if activated else None)


NORMS: dict[str, MakeNorm] = {"vgkern": fused_norm, "torch.nn": PlainNorm}


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions around a shortcut, which has one of its own where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, norm: MakeNorm) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = _convolution(inputs, width, 1), norm(width, True)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), norm(width, True)
        self.conv3, self.bn3 = _convolution(width, outputs, 1), norm(outputs, True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), norm(outputs, False))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return self.bn3(self.conv3(y), shortcut)


class ResNet50(nn.Module):
    """Its ``state_dict`` has torchvision's keys, whichever layers it is made of."""

    def __init__(self, norm: MakeNorm, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(3, 64, 7, 2), norm(64, True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for stage, (blocks, width) in enumerate(RESNET50_STAGES):
            made = []
            for block in range(blocks):
                made.append(Bottleneck(channels, width, 2 if block == 0 and stage > 0 else 1, norm))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))
        for stage in range(len(RESNET50_STAGES)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


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


def convolutions_only(net: ResNet50) -> ResNet50:
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
