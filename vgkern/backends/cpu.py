"""The operators on CPU tensors by the C++ kernels of ``vgkern._C`` (``csrc/``).

One call into the extension for each operator: it gets addresses, sizes and codes, releases the GIL, and runs on up to
``torch.get_num_threads()`` threads. The results are the same bits for any number of threads.

The environment variable ``VGKERN_CPU_ISA`` (``baseline``, ``avx2`` or ``avx512``) overrides the choice of the
instruction set, which is otherwise the best that the machine has.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .. import activations, backends, ops
from . import reference

try:
    from .. import _C  # type: ignore[attr-defined]
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

# The node of vgkern.functional, forward and backward, and a usual step in one; None where this backend is not usable.
node_forward: Any = _C.node_forward if _reason is None else None
node_backward: Any = _C.node_backward if _reason is None else None
node_step: Any = _C.node_step if _reason is None else None


def set_up_node(config: type, apply: Any) -> None:
    """Before the first node of ``vgkern.functional._BatchNormActDirect``, of which these are the config and the way."""
    rows = ((code, activations.TABLE[name]) for name, code in _ACTIVATION.items())
    table = {r.name: (code, r.backward_reads == "mask", r.backward_reads == "z", r.learnable) for code, r in rows}
    _C.set_up_node(backends, table, BackwardCFunction.apply, config, apply)


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


_CPU = torch.device("cpu")  # whatever torch.set_default_device says
_RECORD = torch.empty(len(ops.RECORD_FIELDS), dtype=torch.float64, device=_CPU)


def batch_norm_act_forward(
    x, residual, weight, bias, running_mean, running_var, activation_weight,
    training, eps, activation, activation_args, save_mask,
):  # fmt: skip
    y = _C.new_output(x)
    statistics = mask = None
    if training or running_mean is not None:
        statistics = _C.new_statistics(x)
    if save_mask and ops.needs_mask(activation, residual is not None):
        mask = _C.new_mask(x)
    _C.batch_norm_act_forward(
        x, residual, weight, bias, activation_weight, training, eps, _ACTIVATION[activation], activation_args,
        torch.get_num_threads(), running_mean, running_var, y, statistics, mask,
    )  # fmt: skip
    return y, statistics, mask


def batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    want_dx, want_dresidual, want_dweight, want_dbias, want_dactivation_weight, want_record = output_mask
    dx = _C.new_output(x) if want_dx else None
    dresidual = _C.new_output(x) if want_dresidual else None
    dweight = torch.empty_like(weight) if want_dweight else None
    dbias = torch.empty_like(bias) if want_dbias else None
    dactivation_weight = torch.empty_like(activation_weight) if want_dactivation_weight else None
    record = _C.new_output(_RECORD) if want_record else None
    _C.batch_norm_act_backward(
        x, residual, weight, bias, activation_weight, training, eps, _ACTIVATION[activation], activation_args,
        torch.get_num_threads(), dy, mask, statistics, min_norm, max_norm, dx, dresidual, dweight, dbias,
        dactivation_weight, record,
    )  # fmt: skip
    return dx, dresidual, dweight, dbias, dactivation_weight, record


def double_batch_norm_act_forward(
    x, residual, weight, bias, running_mean, running_var, residual_weight, residual_bias, residual_running_mean,
    residual_running_var, activation_weight, training, eps, residual_eps, activation, activation_args, save_mask,
):  # fmt: skip
    """3 units where a channel of x and residual stays in cache: reads both, writes y (and the mask); 5 else."""
    y = _C.new_output(x)
    statistics = torch.empty(2, 3, x.shape[1], dtype=torch.float64, device=_CPU)
    mask = None
    if save_mask and ops.needs_mask(activation, True):
        mask = _C.new_mask(x)
    shortcut = (residual, residual_eps, residual_weight, residual_bias, residual_running_mean, residual_running_var)
    _C.batch_norm_act_forward(
        x, shortcut, weight, bias, activation_weight, training, eps, _ACTIVATION[activation], activation_args,
        torch.get_num_threads(), running_mean, running_var, y, statistics, mask,
    )  # fmt: skip
    return y, statistics, mask


def double_batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, residual_weight, residual_bias, activation_weight,
    training, eps, residual_eps, activation, activation_args, output_mask,
):  # fmt: skip
    """5 units where a channel stays in cache: reads dy, x, residual (and the mask), writes dx and dresidual; 8 else."""
    want_dx, want_dresidual, *want_parameters, want_dactivation_weight, want_record, want_residual_record = output_mask
    both = training and (want_dx or want_dresidual)  # the pass that writes one writes the other
    dx = _C.new_output(x) if want_dx or both else None
    dresidual = _C.new_output(x) if want_dresidual or both else None
    dweight, dbias, dresidual_weight, dresidual_bias = (
        torch.empty_like(parameter) if wanted else None
        for parameter, wanted in zip((weight, bias, residual_weight, residual_bias), want_parameters, strict=True)
    )
    dactivation_weight = torch.empty_like(activation_weight) if want_dactivation_weight else None
    record = _C.new_output(_RECORD) if want_record else None
    residual_record = _C.new_output(_RECORD) if want_residual_record else None
    shortcut = (
        residual, residual_eps, residual_weight, residual_bias, None, None, dresidual_weight, dresidual_bias,
        residual_record,
    )  # fmt: skip
    _C.batch_norm_act_backward(
        x, shortcut, weight, bias, activation_weight, training, eps, _ACTIVATION[activation], activation_args,
        torch.get_num_threads(), dy, mask, statistics, 0.0, math.inf, dx, dresidual, dweight, dbias,
        dactivation_weight, record,
    )  # fmt: skip
    return (
        dx if want_dx else None, dresidual if want_dresidual else None, dweight, dbias, dresidual_weight,
        dresidual_bias, dactivation_weight, record, residual_record,
    )  # fmt: skip


def batch_norm_moments(x):
    """1 read of x; of float64, 2."""
    n, c, s = ops.geometry(x)
    count = n * s
    statistics = torch.empty(3, c, dtype=torch.float64, device=_CPU)
    _C.batch_norm_act_forward(
        x, None, None, None, None, True, 1.0, _ACTIVATION["identity"], (), torch.get_num_threads(),
        None, None, None, statistics, None,
    )  # fmt: skip
    mean, _, var = statistics
    squares = var * (count - 1) if count > 1 else mean - mean  # of one value 0, or NaN
    return torch.stack([torch.full_like(mean, count), mean, squares])


def batch_norm_act_input_gradient(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    activation, activation_args, means, factor,
):  # fmt: skip
    """2 reads (3 with a residual that z is made from) and 1 write of a tensor of x's size."""
    dx = _C.new_output(x)
    dx_squares = torch.empty_like(factor)
    _C.batch_norm_act_input_gradient(
        x, residual, weight, bias, activation_weight, True, 0.0, _ACTIVATION[activation], activation_args,
        torch.get_num_threads(), dy, mask, statistics, means.contiguous(), factor, dx, dx_squares,
    )  # fmt: skip
    return dx, dx_squares


def update_running_statistics(running_mean, running_var, num_batches_tracked, statistics, momentum):
    state = running_mean, running_var, num_batches_tracked
    # The average needs the count as a tensor.
    if momentum is None or not _C.update_running_statistics(*state, statistics, momentum):
        reference.update_running_statistics(*state, statistics, momentum)
        return
    # What an operation of PyTorch does by itself: autograd must notice where it saved the values of before.
    torch._C._increment_version(state[:2] if num_batches_tracked is None else state)


class PlainGradients(NamedTuple):
    """Parameters, their gradients, and the latter as the extension takes them, which keeps none of them alive."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    arrays: Any


def plain_gradients(parameters: Sequence[Tensor]) -> PlainGradients | None:
    """Those that have a gradient, each gradient once; None if one is no plain CPU tensor.

    Plain: a ``torch.Tensor`` and no subclass, strided, of the dtypes that the kernels take.
    """
    found = None if _C is None else _C.plain_gradients(parameters)
    return None if found is None else PlainGradients(*found)


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain CPU tensors, as far as C++ finds out."""
    return _C is not None and _C.read_tensors(tensors) is not None


def gradient_norms(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, total, factor), as ``vgkern.backends`` says: 1 read of each tensor, 2 for p other than 1, 2 and inf."""
    out = torch.empty(len(tensors) + 2, dtype=torch.float64, device=_CPU)
    arrays = read(tensors)
    if not arrays.dense:
        tensors = [t if ops.is_dense(t) else t.contiguous() for t in tensors]
        arrays = read(tensors)
    _C.gradient_norms(arrays, norm_type, max_norm, torch.get_num_threads(), out)
    return out[:-2], out[-2], out[-1]


SAMPLED = 1024  # as kSampled of csrc/gradient_norm.h


def sample_norms(arrays: Any, count: int) -> list[float]:
    """The L2 norms of the first SAMPLED elements, in memory, of so many dense tensors."""
    out = torch.empty(count, dtype=torch.float64, device=_CPU)
    _C.sample_norms(arrays, out)
    return out.tolist()


def dense_norms(arrays: Any, count: int) -> tuple[list[float], list[float]]:
    """The L2 norms of so many dense tensors, and of their first SAMPLED elements."""
    out = torch.empty(count + 2, dtype=torch.float64, device=_CPU)
    _C.gradient_norms(arrays, 2.0, math.inf, torch.get_num_threads(), out)
    return out.tolist()[:count], sample_norms(arrays, count)


def scale_gradients_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← x·factor in place, as ``vgkern.backends`` says: one read and one write of each tensor, or nothing."""
    value = factor.item()
    if value == 1:
        return
    arrays = read(tensors)
    if not arrays.dense:
        reference.scale_gradients_([t for t in tensors if not ops.is_dense(t)], factor)
        arrays = read([t for t in tensors if ops.is_dense(t)])
    _C.scale_arrays(arrays, value, torch.get_num_threads())


def known_norms() -> Any:
    """An empty ``KnownNorms`` of the extension, which measures and remembers; None without the extension."""
    return None if _C is None else _C.KnownNorms()


def clip_norm_(
    gradients: PlainGradients, norm_type: float, max_norm: float, only_if_finite: bool
) -> tuple[Tensor, float]:
    """Of dense gradients, ``gradient_norms`` and ``scale_gradients_`` by its factor in one call: (total, factor).

    ``only_if_finite``: nothing is written where the total is inf or NaN, and the factor is then 1.
    """
    total, factor = _C.clip_arrays(gradients.arrays, norm_type, max_norm, only_if_finite, torch.get_num_threads())
    return torch.tensor(total, dtype=torch.float64, device=_CPU), factor


def clip_units_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float
) -> list[Tensor]:
    """As ``vgkern.backends`` says: one read of each tensor, and a write of the units that are clipped."""
    weights, arrays = read(parameters), read(gradients)
    if weights.unit_wise and arrays.unit_wise:
        written = _C.clip_units(weights, arrays, clip_factor, eps, norm_type, torch.get_num_threads())
        return list(itertools.compress(gradients, written))
    if len(gradients) == 1:
        return reference.clip_units_(parameters, gradients, clip_factor, eps, norm_type)
    pairs = zip(parameters, gradients, strict=True)
    return [g for pair in pairs for g in clip_units_([pair[0]], [pair[1]], clip_factor, eps, norm_type)]


def read(tensors: Sequence[Tensor]) -> Any:
    """Plain tensors as the extension takes them; it does not keep them alive."""
    return _C.read_tensors(tensors) or _C.Arrays(
        [(t.data_ptr(), list(t.shape), list(t.stride()), _DTYPE[t.dtype]) for t in tensors]
    )
