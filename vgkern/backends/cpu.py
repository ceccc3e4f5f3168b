"""The operators on CPU tensors by the C++ kernels of ``vgkern._C`` (``csrc/``).

One call into the extension for each operator: it gets addresses, sizes and codes, releases the GIL, and runs on up to
``torch.get_num_threads()`` threads. The results are the same bits for any number of threads.

The environment variable ``VGKERN_CPU_ISA`` (``baseline``, ``avx2`` or ``avx512``) overrides the choice of the
instruction set, which is otherwise the best that the machine has.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import ops
from . import reference

try:
    from .. import _C
except ImportError as error:
    _C = None
    _reason: str | None = f"the extension vgkern._C is not built, or cannot be loaded ({error})"
    _DTYPE: dict[torch.dtype, int] = {}
    _ACTIVATION: dict[str, int] = {}
else:
    _reason = None
    _DTYPE = {getattr(torch, name): code for code, name in enumerate(_C.dtype_names())}
    _ACTIVATION = {name: code for code, name in enumerate(_C.activation_names())}
    _forced_isa = os.environ.get("VGKERN_CPU_ISA")
    if _forced_isa:
        try:
            _C.use_isa(_forced_isa)
        except ValueError as error:
            _reason = f"VGKERN_CPU_ISA: {error}"


def unavailable() -> str | None:
    return _reason


def refuses(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it takes CPU tensors, got one on {x.device}"
    if x.dtype not in _DTYPE:
        return f"it takes {', '.join(map(str, _DTYPE))}, got {x.dtype}"
    return None


def isa() -> str:
    """The instruction set in use: ``"baseline"``, ``"avx2"`` or ``"avx512"``."""
    return _C.isa()


def available_isas() -> list[str]:
    """The instruction sets that this machine runs, the best first."""
    return _C.available_isas()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _code(*tensors: Tensor | None) -> int:
    """The code of the dtype that the given tensors share; 0, which nobody reads, where there are none."""
    return next((_DTYPE[t.dtype] for t in tensors if t is not None), 0)


def _common(layout, x, residual, weight, bias, activation_weight, training, eps, activation, activation_args):
    """The arguments with which both functions of the extension begin."""
    return (
        *layout, _DTYPE[x.dtype], torch.get_num_threads(),
        training, eps, _ACTIVATION[activation], activation_args,
        x.data_ptr(), _address(residual),
        _address(weight), _address(bias), _code(weight, bias),
        _address(activation_weight), _code(activation_weight),
        1 if activation_weight is None else activation_weight.numel(),
    )  # fmt: skip


def batch_norm_act_forward(
    x, residual, weight, bias, running_mean, running_var, activation_weight,
    training, eps, activation, activation_args, save_mask,
):  # fmt: skip
    layout = rows, n, c, s = ops.layout(x)
    y = torch.empty_like(x)
    statistics = mask = None
    if training or running_mean is not None:
        statistics = x.new_empty((3, c), dtype=torch.float64)
    if save_mask and ops.needs_mask(activation, residual is not None):
        outer, inner = (n * s, c) if rows else (n * c, s)
        mask = x.new_empty((outer, (inner + 7) // 8), dtype=torch.uint8)
    weight, bias, running_mean, running_var, activation_weight = _contiguous(
        weight, bias, running_mean, running_var, activation_weight
    )
    _C.batch_norm_act_forward(
        *_common(layout, x, residual, weight, bias, activation_weight, training, eps, activation, activation_args),
        _address(running_mean), _address(running_var), _code(running_mean, running_var),
        y.data_ptr(), _address(statistics), _address(mask),
    )  # fmt: skip
    return y, statistics, mask


def batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    want_dx, want_dresidual, want_dweight, want_dbias, want_dactivation_weight, want_record = output_mask
    layout = _, _, channels, _ = ops.layout(x)
    parameter = weight if weight is not None else bias if bias is not None else x
    dx = torch.empty_like(x) if want_dx else None
    dresidual = torch.empty_like(x) if want_dresidual else None
    dweight = parameter.new_empty((channels,)) if want_dweight else None
    dbias = parameter.new_empty((channels,)) if want_dbias else None
    dactivation_weight = torch.empty_like(activation_weight) if want_dactivation_weight else None
    record = x.new_empty((len(ops.RECORD_FIELDS),), dtype=torch.float64) if want_record else None
    weight, bias, activation_weight, statistics = _contiguous(weight, bias, activation_weight, statistics)
    _C.batch_norm_act_backward(
        *_common(layout, x, residual, weight, bias, activation_weight, training, eps, activation, activation_args),
        dy.data_ptr(), _address(mask), _address(statistics), min_norm, max_norm,
        _address(dx), _address(dresidual), _address(dweight), _address(dbias), _address(dactivation_weight),
        _DTYPE[parameter.dtype], _address(record),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias, dactivation_weight, record


def update_running_statistics(running_mean, running_var, statistics, momentum):
    if isinstance(momentum, Tensor) or not (running_mean.is_contiguous() and running_var.is_contiguous()):
        return reference.update_running_statistics(running_mean, running_var, statistics, momentum)
    _C.update_running_statistics(
        statistics.data_ptr(), running_mean.numel(), momentum, _DTYPE[running_mean.dtype],
        running_mean.data_ptr(), running_var.data_ptr(),
    )  # fmt: skip
    # What an operation of PyTorch does by itself: autograd must notice where it saved the values of before.
    torch.autograd.graph.increment_version((running_mean, running_var))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of channels may be slices of others; a contiguous one is handed on as it is."""
    return tuple(t if t is None or t.is_contiguous() else t.contiguous() for t in tensors)
