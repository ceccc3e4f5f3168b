"""Which implementation of the operators runs: an ordered list of preferences that ends in the reference.

A backend is a module with ``batch_norm_act_forward`` and ``batch_norm_act_backward`` (the signatures of ``vgkern.ops``;
what is not made or not wanted is an empty tensor or None), ``batch_norm_moments`` and ``batch_norm_act_input_gradient``
(the same), ``double_batch_norm_act_forward`` and ``double_batch_norm_act_backward`` (of ``vgkern.double_ops``),
``unavailable() -> str | None`` (why this process cannot use it), ``refuses(x) -> str | None`` (why it cannot take this
tensor), and

* ``update_running_statistics(running_mean, running_var, num_batches_tracked, statistics, momentum) -> None``, in place:
  ``running ← (1 − momentum)·running + momentum·batch`` with the unbiased variance, and ``num_batches_tracked``, which
  may be None, counts up; momentum None stands for the cumulative average, 1/num_batches_tracked.

and three functions over lists of tensors of one device, of any dtypes that it takes:

* ``gradient_norms(tensors, norm_type, max_norm=inf) -> (norms, total, factor)``, float64: (T,) and (),
  ``(Σ|x|ᵖ)^(1/p)`` of each tensor and of all together, p > 0 or inf; and ``min(1, max_norm / (total + 1e-6))``, (). A
  tensor without elements has norm 0. The norm of finite elements is finite, and 0 only if they are; inf and NaN
  propagate. The host does not wait for the device.
* ``scale_gradients_(tensors, factor) -> None``: x ← x·factor, factor a float64 scalar on the tensors' device, rounded
  once; in half precision towards 0, so that a factor below 1 brings a norm down to what it is meant to. Where it is 1
  nothing is written. Autograd does not hear of the change: the caller counts up the tensors' versions.
* ``clip_units_(parameters, gradients, clip_factor, eps, norm_type) -> list[Tensor]``: a gradient of rank 2 or more is
  one unit for each index of its first axis, any other is one. A unit g whose norm exceeds clip_factor·max(‖w‖, eps), w
  being the same unit of the parameter, is scaled down to that norm; NaN where a norm is; others are not written.
  Returns the gradients that may have changed without autograd's hearing of it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["available", "use"]

_NAMES = ("cpu", "triton", "reference")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

# Process-wide, not thread-local: autograd runs the backward of a CUDA tensor in a thread of its own.
_forced: str | None = None


def _load(name: str) -> ModuleType:
    # At first use: triton takes a second to import and the extension must come after torch.
    return importlib.import_module(f"{__name__}.{name}")


def available() -> dict[str, str]:
    """Each backend's name with ``"usable"``, or the reason why it is not.

    Example:
        >>> import vgkern
        >>> vgkern.backends.available()["reference"]
        'usable'
    """
    return {name: _load(name).unavailable() or "usable" for name in _NAMES}


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block, in the whole process.

    Args:
        name: ``"cpu"``, ``"triton"`` or ``"reference"``. ``"triton"`` takes CPU tensors only under
            ``TRITON_INTERPRET=1``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not usable here; the message says why. Inside the block, a tensor that the
            backend cannot take raises as well.

    Example:
        >>> import torch, vgkern
        >>> with vgkern.backends.use("reference"):
        ...     vgkern.functional.add_act(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    global _forced
    if name not in _NAMES:
        raise ValueError(f"backend: expected one of {', '.join(_NAMES)}, got {name!r}")
    reason = _load(name).unavailable()
    if reason:
        raise RuntimeError(f"backend {name!r} is not usable here: {reason}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def of(x: Tensor) -> ModuleType:
    """The backend that computes on x."""
    if _forced is not None:
        backend = _load(_forced)
        reason = backend.refuses(x)
        if reason:
            raise RuntimeError(f"backend {_forced!r} cannot take this tensor: {reason}")
        return backend
    device_type = "cpu" if x.is_cpu else x.device.type  # which makes a string: that takes 0.3 µs
    return _defaults.get(device_type) or _default(device_type)


_defaults: dict[str, ModuleType] = {}


def _default(device_type: str) -> ModuleType:
    if device_type not in _defaults:
        names = _PREFERENCE.get(device_type, ("reference",))
        _defaults[device_type] = next(_load(name) for name in names if _load(name).unavailable() is None)
    return _defaults[device_type]


def name_of(device: torch.device | str) -> str:
    """The name of the backend that tensors of this device get, when none is forced."""
    return _forced or _default(torch.device(device).type).__name__.rpartition(".")[2]
