"""Gradient health: what the backward kernels record, how it develops, and what is wrong with it."""

from .findings import Finding, Thresholds
from .history import GradRecord
from .monitor import GradientMonitor
from .record import GradStats
from .report import GradReport, LayerSummary

__all__ = ["Finding", "GradRecord", "GradReport", "GradStats", "GradientMonitor", "LayerSummary", "Thresholds"]
