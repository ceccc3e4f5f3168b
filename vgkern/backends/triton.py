"""The operators on GPUs, by the Triton kernels of ``kernels/``; on CPU tensors under Triton's interpreter.

To ``torch.compile`` they are opaque: the contract's schemas and fakes, and no ``torch.library.triton_op`` with
``wrap_triton``. Under fake tensors, on which Inductor runs every operator several times, a forward takes 1.1 ms here,
and 2.7 ms there, where the launcher itself runs on fakes (medians of 100 interleaved calls on a busy CPU, torch 2.13.0,
x of (32, 64, 56, 56)); and Inductor fuses nothing into a kernel that it did not write. CUDA graphs capture both alike.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .reference import clip_units_ as clip_units_  # no kernel yet: PyTorch's operations, one gradient at a time
from .reference import update_running_statistics as update_running_statistics


@functools.cache
def _kernels() -> ModuleType:
    # At first use: importing triton takes about a second, and a process without a GPU never needs it.
    from ..kernels import batch_norm

    return batch_norm


def unavailable() -> str | None:
    """Why this process cannot use the backend, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _kernels().INTERPRETED:
        return "no CUDA or ROCm device (TRITON_INTERPRET=1, set before triton is imported, runs it on CPU tensors)"
    return None


def refuses(x: Tensor) -> str | None:
    """Why the backend cannot take x, or None."""
    if x.dtype not in ops.FLOATING_DTYPES:
        return f"dtype {x.dtype}; it takes {', '.join(map(str, ops.FLOATING_DTYPES))}"
    if _kernels().INTERPRETED:
        return None if x.device.type in ("cpu", "cuda") else f"a {x.device.type} tensor under TRITON_INTERPRET=1"
    if x.device.type == "cpu":
        return "a CPU tensor; Triton takes those only under TRITON_INTERPRET=1, set before triton is imported"
    return None if x.device.type == "cuda" else f"a {x.device.type} tensor; it takes CUDA and ROCm tensors"


def _shape(x: Tensor, *, per_channel: bool, has_mask: bool) -> Any:
    """x as the kernels see it: one plane where nothing depends on the channel, if the bytes of the mask allow that."""
    n, c, s = ops.geometry(x)
    rows = ops.is_rows(x)
    inner = c if rows else s
    if not per_channel and (not has_mask or inner % 8 == 0):
        return _kernels().Shape(False, 1, 1, x.numel())
    return _kernels().Shape(True, n * s, c, c) if rows else _kernels().Shape(False, n, c, s)


def _wanted(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def forward_launches(
    x, residual, weight, bias, running_mean, running_var, activation_weight,
    training, eps, activation, activation_args, save_mask,
):  # fmt: skip
    """(results, launches): what the operator of these arguments returns, and what fills it. Meta tensors will do."""
    normalise = training or running_mean is not None
    y = torch.empty_like(x)
    statistics = x.new_empty((3, x.shape[1]) if normalise else (0,), dtype=torch.float64)
    mask = x.new_empty((0,), dtype=torch.uint8)
    if save_mask and ops.needs_mask(activation, residual is not None):
        outer, inner = ops.mask_geometry(x)
        mask = mask.new_empty((outer, (inner + 7) // 8))
    per_channel = normalise or (activation_weight is not None and activation_weight.numel() > 1)
    launches = _kernels().forward_launches(
        x, residual, weight, bias,
        None if training else running_mean, None if training else running_var,
        activation_weight, y, _wanted(statistics), _wanted(mask),
        shape=_shape(x, per_channel=per_channel, has_mask=mask.numel() > 0),
        eps=eps, activation=activation, activation_args=tuple(activation_args),
    )  # fmt: skip
    return (y, statistics, mask), launches


def backward_launches(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    """(results, launches), as ``forward_launches``. dy has x's strides."""
    channels = ops.geometry(x)[1]
    param_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    makers = (
        lambda: torch.empty_like(x),
        lambda: torch.empty_like(x),
        lambda: x.new_empty((channels,), dtype=param_dtype),
        lambda: x.new_empty((channels,), dtype=param_dtype),
        lambda: torch.empty_like(activation_weight),
        lambda: x.new_empty((len(ops.RECORD_FIELDS),), dtype=torch.float64),
    )
    outputs = [make() if wanted else None for make, wanted in zip(makers, output_mask, strict=True)]
    normalise = statistics is not None and statistics.numel() > 0
    shared = activation_weight is None or activation_weight.numel() == 1
    parameters = any(gradient is not None for gradient in outputs[2:4])
    launches = _kernels().backward_launches(
        dy, x, residual, mask, statistics if normalise else None, weight, bias, activation_weight, *outputs,
        shape=_shape(x, per_channel=normalise or parameters or not shared, has_mask=mask is not None),
        over_batch=training and normalise,
        eps=eps, activation=activation, activation_args=tuple(activation_args),
        min_norm=min_norm, max_norm=max_norm,
    )  # fmt: skip
    return tuple(x.new_empty((0,)) if output is None else output for output in outputs), launches


def batch_norm_act_forward(x, *args):
    results, launches = forward_launches(x, *args)
    _launching().launch(launches, x.device)
    return results


def batch_norm_act_backward(dy, x, *args):
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)  # the kernels walk both with one set of offsets
    results, launches = backward_launches(dy, x, *args)
    _launching().launch(launches, x.device)
    return results


@functools.cache
def _double_kernels() -> ModuleType:
    from ..kernels import double_batch_norm

    return double_batch_norm


def double_forward_launches(
    x, residual, weight, bias, running_mean, running_var, residual_weight, residual_bias, residual_running_mean,
    residual_running_var, activation_weight, training, eps, residual_eps, activation, activation_args, save_mask,
):  # fmt: skip
    """(results, launches), as ``forward_launches``."""
    y = torch.empty_like(x)
    statistics = x.new_empty((2, 3, x.shape[1]), dtype=torch.float64)
    mask = x.new_empty((0,), dtype=torch.uint8)
    if save_mask and ops.needs_mask(activation, True):
        outer, inner = ops.mask_geometry(x)
        mask = mask.new_empty((outer, (inner + 7) // 8))
    running = (running_mean, running_var), (residual_running_mean, residual_running_var)
    of_x, of_residual = ((None, None), (None, None)) if training else running
    launches = _double_kernels().forward_launches(
        x, residual, weight, bias, *of_x, residual_weight, residual_bias, *of_residual, activation_weight, y,
        statistics, _wanted(mask), shape=_shape(x, per_channel=True, has_mask=mask.numel() > 0),
        eps=eps, residual_eps=residual_eps, activation=activation, activation_args=tuple(activation_args),
    )  # fmt: skip
    return (y, statistics, mask), launches


def double_backward_launches(
    dy, x, residual, mask, statistics, weight, bias, residual_weight, residual_bias, activation_weight,
    training, eps, residual_eps, activation, activation_args, output_mask,
):  # fmt: skip
    """(results, launches), as ``backward_launches``."""

    def parameter(*given):
        return x.new_empty((x.shape[1],), dtype=next((p.dtype for p in given if p is not None), x.dtype))

    def new_record():
        return x.new_empty((len(ops.RECORD_FIELDS),), dtype=torch.float64)

    makers = (
        lambda: torch.empty_like(x),
        lambda: torch.empty_like(x),
        lambda: parameter(weight, bias),
        lambda: parameter(weight, bias),
        lambda: parameter(residual_weight, residual_bias),
        lambda: parameter(residual_weight, residual_bias),
        lambda: torch.empty_like(activation_weight),
        new_record,
        new_record,
    )
    outputs = [make() if wanted else None for make, wanted in zip(makers, output_mask, strict=True)]
    launches = _double_kernels().backward_launches(
        dy, x, residual, mask, statistics, weight, bias, residual_weight, residual_bias, activation_weight, *outputs,
        shape=_shape(x, per_channel=True, has_mask=mask is not None), over_batch=training,
        eps=eps, residual_eps=residual_eps, activation=activation, activation_args=tuple(activation_args),
    )  # fmt: skip
    return tuple(x.new_empty((0,)) if output is None else output for output in outputs), launches


def double_batch_norm_act_forward(x, *args):
    results, launches = double_forward_launches(x, *args)
    _launching().launch(launches, x.device)
    return results


def double_batch_norm_act_backward(dy, x, *args):
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)  # the kernels walk both with one set of offsets
    results, launches = double_backward_launches(dy, x, *args)
    _launching().launch(launches, x.device)
    return results


def batch_norm_moments(x):
    sums, launches = _kernels().moments_launches(x, shape=_shape(x, per_channel=True, has_mask=False))
    _launching().launch(launches, x.device)
    total, squares = sums.sum(1)
    first = x[(0, slice(None), *[0] * (x.dim() - 2))].double()  # what the kernel measures from
    count = x.numel() // x.shape[1]
    offset = total / count
    mean = first.where(first.isfinite(), 0.0) + offset
    return torch.stack([torch.full_like(mean, count), mean, (squares - total * offset).clamp(min=0.0)])


def input_gradient_launches(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    activation, activation_args, means, factor,
):  # fmt: skip
    """((dx, Σdx² by program), launches), as ``backward_launches``."""
    dx = torch.empty_like(x)
    squares, launches = _kernels().input_gradient_launches(
        dy, x, residual, mask, statistics, weight, bias, activation_weight, means.contiguous(), factor, dx,
        shape=_shape(x, per_channel=True, has_mask=mask is not None),
        activation=activation, activation_args=tuple(activation_args),
    )  # fmt: skip
    return (dx, squares), launches


def batch_norm_act_input_gradient(dy, x, *args):
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)  # the kernels walk both with one set of offsets
    (dx, squares), launches = input_gradient_launches(dy, x, *args)
    _launching().launch(launches, x.device)
    return dx, squares.sum().reshape(1)


def gradient_norms(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, total, factor), as ``vgkern.backends`` says, in two launches: 1 read of each tensor."""
    return _norms().norms([t if ops.is_dense(t) else t.contiguous() for t in tensors], norm_type, max_norm)


def scale_gradients_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← x·factor in place, as ``vgkern.backends`` says, in one launch: one read and one write of each tensor.

    A tensor with gaps between its elements takes a launch of its own, and is written even where the factor is 1.
    """
    dense = [t for t in tensors if ops.is_dense(t)]
    if dense:
        _norms().scale_(dense, factor)
    with torch.no_grad():
        for t in tensors:
            if not ops.is_dense(t):
                ops.without_repeats(t).mul_(factor)


@functools.cache
def _launching() -> ModuleType:
    from ..kernels import launching

    return launching


@functools.cache
def _norms() -> ModuleType:
    from ..kernels import gradient_norm

    return gradient_norm
