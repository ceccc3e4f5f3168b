"""The operators on CPU tensors by the C++ kernels of ``vgkern._C`` (``csrc/``).

One call into the extension for each operator: it gets addresses, sizes and codes, releases the GIL, and runs on up to
``torch.get_num_threads()`` threads. The results are the same bits for any number of threads.

The environment variable ``VGKERN_CPU_ISA`` (``baseline``, ``avx2`` or ``avx512``) overrides the choice of the
instruction set, which is otherwise the best that the machine has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import memory, ops

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
    # An empty tensor, which stands for an output that is not wanted, has the address 0.
    return 0 if t is None else t.data_ptr()


def _code(*tensors: Tensor | None) -> int:
    """The code of the dtype that the given tensors share; 0, which nobody reads, where there are none."""
    return next((_DTYPE[t.dtype] for t in tensors if t is not None), 0)


def _common(x, residual, weight, bias, activation_weight, training, eps, activation, activation_args):
    """The arguments with which both functions of the extension begin."""
    return (
        ops.is_rows(x), *ops.geometry(x), _DTYPE[x.dtype], torch.get_num_threads(),
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
    y = memory.empty_like(x)
    has_statistics = training or running_mean is not None
    statistics = x.new_empty((3, x.shape[1]) if has_statistics else (0,), dtype=torch.float64)
    mask_shape = (0,)
    if save_mask and ops.needs_mask(activation, residual is not None):
        outer, inner = ops.mask_geometry(x)
        mask_shape = (outer, (inner + 7) // 8)
    mask = x.new_empty(mask_shape, dtype=torch.uint8)
    weight, bias, running_mean, running_var, activation_weight = _contiguous(
        weight, bias, running_mean, running_var, activation_weight
    )
    _C.batch_norm_act_forward(
        *_common(x, residual, weight, bias, activation_weight, training, eps, activation, activation_args),
        _address(running_mean), _address(running_var), _code(running_mean, running_var),
        y.data_ptr(), statistics.data_ptr(), mask.data_ptr(),
    )  # fmt: skip
    return y, statistics, mask


def batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    want_dx, want_dresidual, want_dweight, want_dbias, want_dactivation_weight, want_record = output_mask

    def none() -> Tensor:  # each its own: outputs of an operator must not alias
        return x.new_empty((0,))

    parameter = weight if weight is not None else bias if bias is not None else x
    channels = ops.geometry(x)[1]
    dx = memory.empty_like(x) if want_dx else none()
    dresidual = memory.empty_like(x) if want_dresidual else none()
    dweight = parameter.new_empty((channels,)) if want_dweight else none()
    dbias = parameter.new_empty((channels,)) if want_dbias else none()
    dactivation_weight = torch.empty_like(activation_weight) if want_dactivation_weight else none()
    record = x.new_empty((len(ops.RECORD_FIELDS),), dtype=torch.float64) if want_record else none()
    weight, bias, activation_weight, statistics = _contiguous(weight, bias, activation_weight, statistics)
    _C.batch_norm_act_backward(
        *_common(x, residual, weight, bias, activation_weight, training, eps, activation, activation_args),
        dy.data_ptr(), _address(mask), _address(statistics), min_norm, max_norm,
        dx.data_ptr(), dresidual.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), dactivation_weight.data_ptr(),
        _DTYPE[parameter.dtype], record.data_ptr(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias, dactivation_weight, record


def gradient_norms(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, total, factor), as ``vgkern.backends`` says: 1 read of each tensor, 2 for p other than 1, 2 and inf."""
    out = torch.empty(len(tensors) + 1, dtype=torch.float64)
    norms, total = out[:-1], out[-1]
    tensors = [t if t.is_contiguous() or ops.is_dense(t) else t.contiguous() for t in tensors]
    _C.gradient_norms(*_list(tensors), norm_type, torch.get_num_threads(), norms.data_ptr(), total.data_ptr())
    return norms, total, ops.clip_factor(total, max_norm)


def scale_gradients_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← x·factor in place, as ``vgkern.backends`` says: one read and one write of each tensor, or nothing."""
    value = factor.item()
    if value == 1:
        return
    _C.scale_arrays(*_list([t for t in tensors if ops.is_dense(t)]), value, torch.get_num_threads())
    for t in tensors:
        if not ops.is_dense(t):
            t.mul_(value)


def _list(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    return (
        [t.data_ptr() for t in tensors],
        [t.numel() for t in tensors],
        [_DTYPE[t.dtype] for t in tensors],
    )


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of channels may be slices of others; a contiguous one is handed on as it is."""
    return tuple(t if t is None or t.is_contiguous() else t.contiguous() for t in tensors)
