"""vgkern: fused batch norm, residual and activation whose backward pass reports the gradient's norms."""

from __future__ import annotations

import warnings

from . import activations, backends, functional, gradients, init, memory, models, nn, testing
from ._version import __version__
from .backends import cpu as _cpu
from .verify import verify

__all__ = [
    "__version__",
    "activations",
    "backends",
    "functional",
    "gradients",
    "init",
    "memory",
    "models",
    "nn",
    "testing",
    "verify",
]

if _reason := _cpu.unavailable():
    warnings.warn(
        f"vgkern computes on CPU tensors with plain PyTorch operations, which is slow: {_reason}",
        RuntimeWarning,
        stacklevel=2,
    )
