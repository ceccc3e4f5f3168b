"""Gradient health: what the backward kernels record, and clipping."""

from .clipper import GradientClipper
from .clipping import adaptive_clip_grad_, clip_grad_norm_, clip_grad_value_, get_grad_norms
from .record import GradStats

__all__ = [
    "GradStats",
    "GradientClipper",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_grad_norms",
]
