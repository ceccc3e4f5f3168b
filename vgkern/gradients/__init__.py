"""Gradient health: what the backward kernels record, how it develops, what is wrong with it, and clipping."""

from .clipper import GradientClipper
from .clipping import adaptive_clip_grad_, clip_grad_norm_, clip_grad_value_, get_grad_norms
from .findings import Finding, Thresholds
from .history import GradRecord
from .monitor import GradientMonitor
from .record import GradStats
from .report import GradReport, LayerSummary

__all__ = [
    "Finding",
    "GradRecord",
    "GradReport",
    "GradStats",
    "GradientClipper",
    "GradientMonitor",
    "LayerSummary",
    "Thresholds",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_grad_norms",
]
