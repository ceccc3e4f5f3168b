"""Fused layers: ``act(batch_norm(x) + residual)`` and ``act(x + residual)``."""

from .add_act import AddAct
from .batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .sync_batch_norm_act import SyncBatchNormAct

__all__ = ["AddAct", "BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "SyncBatchNormAct"]
