"""The contract of the double batch norm, ``act(batch_norm(x) + batch_norm(residual))``, as ``vgkern.ops`` has it.

``vgkern::double_batch_norm_act_forward`` and ``vgkern::double_batch_norm_act_backward`` are functional. Both batch
norms are in one mode: "batch" (training) or "running". What :mod:`vgkern.ops` says of tensors holds here, and::

    z = weight·x̂ + bias + residual_weight·r̂ + residual_bias      y = φ(z)      dz = φ'(z)·dy
    dbias = dresidual_bias = Σ dz      dweight = Σ dz·x̂      dresidual_weight = Σ dz·r̂
    dx = weight·rstd·(dz − dbias/m − x̂·dweight/m)            and of the residual alike; in mode "running" weight·rstd·dz

* ``residual``: of x's shape, dtype and strides.
* ``statistics``: float64 (float32 where the device has none), (2, 3, C): of x and of the residual; mean, rstd and
  unbiased variance (NaN in mode "running").
* ``mask``: made where ``save_mask`` is true and the activation's backward reads a mask, which that backward then needs.
* ``output_mask``: which of dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias, dactivation_weight, record
  and residual_record are wanted. What is not comes back as an empty (0,) tensor.
* ``residual_record``: of the residual's batch norm as of a layer without activation, at which dz arrives.

There are no bounds of norms: a layer that has them is an operation of its own.
"""

from __future__ import annotations

import torch

from . import backends, ops

__all__ = ["run_backward", "run_forward"]

_library = torch.library.Library("vgkern", "FRAGMENT")
_NORM = "Tensor? weight, Tensor? bias"
_RUNNING = "Tensor? running_mean, Tensor? running_var"
_RESIDUAL_NORM = "Tensor? residual_weight, Tensor? residual_bias"
_RESIDUAL_RUNNING = "Tensor? residual_running_mean, Tensor? residual_running_var"
_SETTINGS = "bool training, float eps, float residual_eps, str activation, float[] activation_args"
_library.define(
    f"double_batch_norm_act_forward(Tensor x, Tensor residual, {_NORM}, {_RUNNING}, {_RESIDUAL_NORM},"
    f" {_RESIDUAL_RUNNING}, Tensor? activation_weight, {_SETTINGS}, bool save_mask)"
    " -> (Tensor y, Tensor statistics, Tensor mask)"
)
_library.define(
    f"double_batch_norm_act_backward(Tensor dy, Tensor x, Tensor residual, Tensor? mask, Tensor statistics, {_NORM},"
    f" {_RESIDUAL_NORM}, Tensor? activation_weight, {_SETTINGS}, bool[9] output_mask)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias,"
    " Tensor dactivation_weight, Tensor record, Tensor residual_record)"
)


def _forward_fake(
    x, residual, weight, bias, running_mean, running_var, residual_weight, residual_bias, residual_running_mean,
    residual_running_var, activation_weight, training, eps, residual_eps, activation, activation_args, save_mask,
):  # fmt: skip
    statistics = x.new_empty((2, 3, x.shape[1]), dtype=ops.statistics_dtype(x.device))
    mask = x.new_empty((0,), dtype=torch.uint8)
    if save_mask and ops.needs_mask(activation, True):
        outer, inner = ops.mask_geometry(x)
        mask = mask.new_empty((outer, (inner + 7) // 8))
    return torch.empty_like(x), statistics, mask


def _backward_fake(
    dy, x, residual, mask, statistics, weight, bias, residual_weight, residual_bias, activation_weight,
    training, eps, residual_eps, activation, activation_args, output_mask,
):  # fmt: skip
    def parameter(*given):
        dtype = next((p.dtype for p in given if p is not None), x.dtype)
        return x.new_empty((x.shape[1],), dtype=dtype)

    def record():
        return x.new_empty((len(ops.RECORD_FIELDS),), dtype=ops.statistics_dtype(x.device))

    like = (
        lambda: torch.empty_like(x),
        lambda: torch.empty_like(x),
        lambda: parameter(weight, bias),
        lambda: parameter(weight, bias),
        lambda: parameter(residual_weight, residual_bias),
        lambda: parameter(residual_weight, residual_bias),
        lambda: torch.empty_like(activation_weight),
        record,
        record,
    )
    return tuple(make() if wanted else x.new_empty((0,)) for make, wanted in zip(like, output_mask, strict=True))


def run_forward(x, *args):
    """The forward operator past the dispatcher, for calls that are ``ops.unwatched``. What it does not make is None."""
    if x.numel() == 0:
        y, statistics, mask = _forward_fake(x, *args)
        return y, statistics.zero_(), mask
    return backends.of(x).double_batch_norm_act_forward(x, *args)


def run_backward(dy, *args):
    """The backward operator past the dispatcher, likewise. What is not wanted is None."""
    if dy.numel() == 0:
        *gradients, record, residual_record = _backward_fake(dy, *args)
        for made in (record, residual_record):
            if made.numel():
                made.zero_()[ops.RECORD_FIELDS.index("backwards")] = 1
        return *(gradient.zero_() for gradient in gradients), record, residual_record
    return backends.of(dy).double_batch_norm_act_backward(dy, *args)


def _forward(x, *args):
    y, statistics, mask = run_forward(x, *args)
    return y, statistics, x.new_empty((0,), dtype=torch.uint8) if mask is None else mask


def _backward(dy, *args):
    # Each its own: outputs of an operator must not alias.
    return tuple(dy.new_empty((0,)) if gradient is None else gradient for gradient in run_backward(dy, *args))


for _name, _implementation, _fake in (
    ("double_batch_norm_act_forward", _forward, _forward_fake),
    ("double_batch_norm_act_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vgkern::{_name}", _fake, lib=_library)

double_batch_norm_act_forward = torch.ops.vgkern.double_batch_norm_act_forward.default
double_batch_norm_act_backward = torch.ops.vgkern.double_batch_norm_act_backward.default
