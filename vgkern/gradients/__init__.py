"""Gradient health: what the backward kernels record."""

from .record import GradStats

__all__ = ["GradStats"]
