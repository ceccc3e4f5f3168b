"""Fused layers: ``act(batch_norm(x) + residual)`` and ``act(x + residual)``; residual blocks made of them."""

from .add_act import AddAct
from .batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .blocks import BasicBlock, Bottleneck, DropPath, PreActBasicBlock, PreActBottleneck

__all__ = [
    "AddAct",
    "BasicBlock",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Bottleneck",
    "DropPath",
    "PreActBasicBlock",
    "PreActBottleneck",
]
