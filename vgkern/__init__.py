"""vgkern: fused batch norm, residual and activation whose backward pass reports the gradient's norms."""

from __future__ import annotations

from . import activations, backends, functional, gradients, nn, testing
from ._version import __version__
from .verify import verify

__all__ = ["__version__", "activations", "backends", "functional", "gradients", "nn", "testing", "verify"]
