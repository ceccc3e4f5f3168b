"""The operators in plain PyTorch: any device, any dtype, and every backend's double backward.

All arithmetic is float64 (float32 on devices that have none) and rounded once, so it is right to half a unit in the
last place and serves as the tests' second opinion. It makes float64 temporaries of x's size: it is meant for devices
and builds that have no kernels, not for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..activations import TABLE


def unavailable() -> str | None:
    return None


def refuses(x: Tensor) -> str | None:
    return None


def _channel_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _expand(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped so that it broadcasts along x's channels."""
    return per_channel.view(-1, *[1] * (x.dim() - 2)) if x.dim() >= 2 else per_channel


def _sum(t: Tensor) -> Tensor:
    """Sum over each channel, (C,); over everything, (1,), in a tensor without channels."""
    return t.sum(_channel_dims(t)) if t.dim() >= 2 else t.sum().reshape(1)


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, unbiased variance) of each channel, (C,) float64; differentiable."""
    mean, squares = _mean_and_squares(x.to(ops.statistics_dtype(x.device)))
    count = x.numel() // x.shape[1]
    return mean, (squares / count + eps).rsqrt(), squares / (count - 1)


def _mean_and_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and Σ(x − mean)²."""
    count = x.numel() // x.shape[1]
    mean = _sum(x) / count
    # One step of refinement: the rounded sum of 2²⁰ equal values is not that value times 2²⁰. An infinite mean stays.
    rest = _sum(x - _expand(mean, x)) / count
    mean = mean + torch.where(mean.isfinite(), rest, 0.0)
    return mean, _sum((x - _expand(mean, x)).square())


def running_statistics(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd), (C,) float64, from running statistics."""
    dtype = ops.statistics_dtype(running_mean.device)
    return running_mean.to(dtype), (running_var.to(dtype) + eps).rsqrt()


def _pre_activation(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x̂, z) in float64; x̂ is x without normalisation."""
    z = normalised = x.to(ops.statistics_dtype(x.device))
    if mean is not None and rstd is not None:
        z = normalised = (z - _expand(mean, x)) * _expand(rstd, x)
    if weight is not None:
        z = z * _expand(weight, x)
    if bias is not None:
        z = z + _expand(bias, x)
    return normalised, z if residual is None else z + residual


def _activate(z: Tensor, activation: str, args: Sequence[float], weight: Tensor | None) -> Tensor:
    reference = TABLE[activation].reference
    return reference(z, *args) if weight is None else reference(z, *args, weight.to(z.dtype))


def _pullback(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[Tensor], Sequence[Tensor]]:
    """v ↦ v·∂function/∂input for each input, by PyTorch's own formulas; differentiable where grad is enabled."""
    if torch._C._are_functorch_transforms_active():  # torch.func, which knows no leaves
        return torch.func.vjp(function, *inputs)[1]
    create_graph = torch.is_grad_enabled()
    # An operator that was called below autograd (under a TorchDispatchMode: a FLOP counter, say) differentiates too.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [t if create_graph and t.requires_grad else t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
    return lambda v: torch.autograd.grad(y, leaves, v, retain_graph=True, create_graph=create_graph)


def _unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The bits of ``mask`` as a bool tensor of x's shape."""
    outer, inner = ops.mask_geometry(x)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    on = bits.view(outer, -1)[:, :inner].bool()
    if not ops.is_rows(x):
        return on.reshape(x.shape)
    n, c, _ = ops.geometry(x)
    return on.reshape(n, *x.shape[2:], c).movedim(-1, 1)


def _pack(on: Tensor, x: Tensor) -> Tensor:
    """A bool tensor of x's shape as a bit mask (see ``vgkern.ops``)."""
    outer, inner = ops.mask_geometry(x)
    runs = (on.movedim(1, -1) if ops.is_rows(x) else on).reshape(outer, inner)
    runs = torch.nn.functional.pad(runs, (0, -inner % 8)).view(outer, -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (runs * weights).sum(-1, dtype=torch.uint8)


def differentiate(
    dy: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, activation_weight: Tensor | None,
    training: bool, activation: str, args: Sequence[float], min_norm: float = 0.0, max_norm: float = float("inf"),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The backward pass as PyTorch operations, themselves differentiable: the double backward of every backend.

    Args: as ``vgkern::batch_norm_act_backward``; ``mean`` and ``rstd`` (C,), functions of x where a second derivative
    through the batch statistics is wanted.

    Returns:
        (dx, dz, dweight, dbias, dactivation_weight, record), all in float64. The factor that the norm's bounds put on
        dx counts as a constant.
    """
    on_of, slopes_of = TABLE[activation].on, TABLE[activation].slopes
    dy = dy.to(ops.statistics_dtype(x.device))
    normalised, z = _pre_activation(x, residual, weight, bias, mean, rstd)
    dactivation_weight = None
    if on_of is not None and slopes_of is not None:
        on = on_of(z, *args) if mask is None else _unpack(mask, x)
        slope_on, slope_off = slopes_of(*args)
        dz = torch.where(on, dy * slope_on, dy * slope_off if slope_off else 0.0)
        dead = torch.zeros_like(on) if slope_off else ~on
    else:
        inputs = (z,) if activation_weight is None else (z, activation_weight.to(z.dtype))
        pullback = _pullback(lambda z, weight=None: _activate(z, activation, args, weight), inputs)
        dz, *rest = pullback(dy)
        dactivation_weight = rest[0] if rest else None
        dead = pullback(torch.ones_like(z))[0] == 0

    dbias, dweight = _sum(dz), _sum(dz * normalised)
    dx = dz
    if training:
        count = x.numel() // x.shape[1]
        dx = dx - _expand(dbias / count, x) - normalised * _expand(dweight / count, x)
    if rstd is not None:
        dx = dx * _expand(rstd if weight is None else rstd * weight, x)

    with torch.no_grad():
        norm = dx.norm()
        factor = torch.where((norm > 0) & norm.isfinite(), norm.clamp(min_norm, max_norm) / norm, 1.0)
        record = torch.stack([
            dy.square().sum(), dz.square().sum(), (norm * factor).square(),
            dweight.square().sum() if weight is not None else torch.zeros_like(norm),
            dbias.square().sum() if bias is not None else torch.zeros_like(norm),
            dead.sum(), (~dy.isfinite()).sum(), norm.new_tensor(x.numel()), torch.ones_like(norm),
        ])  # fmt: skip
    if min_norm > 0 or max_norm < float("inf"):
        dx = dx * factor
    return dx, dz, dweight, dbias, dactivation_weight, record


def batch_norm_act_forward(
    x, residual, weight, bias, running_mean, running_var, activation_weight,
    training, eps, activation, activation_args, save_mask,
):  # fmt: skip
    mean = rstd = None
    statistics = x.new_empty((0,), dtype=ops.statistics_dtype(x.device))
    if training:
        mean, rstd, var = batch_statistics(x, eps)
        statistics = torch.stack([mean, rstd, var])
    elif running_mean is not None:
        mean, rstd = running_statistics(running_mean, running_var, eps)
        statistics = torch.stack([mean, rstd, torch.full_like(mean, float("nan"))])
    _, z = _pre_activation(x, residual, weight, bias, mean, rstd)
    y = _activate(z, activation, activation_args, activation_weight)
    wanted = save_mask and ops.needs_mask(activation, residual is not None)
    return torch.empty_like(x).copy_(y), statistics, _mask_of(z, x, activation, activation_args, wanted)


def _mask_of(z, x, activation, activation_args, wanted):
    if not wanted:
        return x.new_empty((0,), dtype=torch.uint8)
    on_of = TABLE[activation].on
    assert on_of is not None, activation  # what "mask" in backward_reads means
    return _pack(on_of(z, *activation_args), x)


def batch_norm_moments(x: Tensor) -> Tensor:
    mean, squares = _mean_and_squares(x.to(ops.statistics_dtype(x.device)))
    return torch.stack([torch.full_like(mean, x.numel() // x.shape[1]), mean, squares])


def batch_norm_act_input_gradient(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    activation, activation_args, means, factor,
):  # fmt: skip
    mean, rstd, _ = statistics
    _, dz, *_ = differentiate(
        dy, x, residual, mask, mean, rstd, weight, bias, activation_weight, False, activation, activation_args
    )
    normalised, _ = _pre_activation(x, None, None, None, mean, rstd)
    dx = dz - _expand(means[0], x) - normalised * _expand(means[1], x)
    dx = dx * _expand(factor * (rstd if weight is None else rstd * weight), x)
    return torch.empty_like(x).copy_(dx), dx.square().sum().reshape(1)


def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, num_batches_tracked: Tensor | None, statistics: Tensor,
    momentum: float | None,
) -> None:  # fmt: skip
    """As ``vgkern.backends`` says; tensor arithmetic, which compiles and runs on meta."""
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = num_batches_tracked.to(statistics.dtype).reciprocal().to(running_mean.dtype)
    mean, _, var = statistics.to(running_mean.dtype).unbind()
    running_mean.lerp_(mean, factor)
    running_var.lerp_(var, factor)


def batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    mean, rstd = (None, None) if statistics is None else (statistics[0], statistics[1])
    dx, dz, dweight, dbias, dactivation_weight, record = differentiate(
        dy, x, residual, mask, mean, rstd, weight, bias, activation_weight,
        training, activation, activation_args, min_norm, max_norm,
    )  # fmt: skip
    param_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    results = (
        lambda: torch.empty_like(x).copy_(dx),
        lambda: torch.empty_like(x).copy_(dz),
        lambda: dweight.to(param_dtype),
        lambda: dbias.to(param_dtype),
        lambda: None if dactivation_weight is None else dactivation_weight.to(activation_weight.dtype),
        lambda: record,
    )
    return tuple(make() if wanted else x.new_empty((0,)) for make, wanted in zip(results, output_mask, strict=True))


def _two_statistics(x, residual, running, training, eps, residual_eps):
    """(mean, rstd, unbiased variance) of x and of the residual, each (C,)."""
    if training:
        return batch_statistics(x, eps), batch_statistics(residual, residual_eps)
    running_mean, running_var, residual_running_mean, residual_running_var = running
    pairs = (running_mean, running_var, eps), (residual_running_mean, residual_running_var, residual_eps)
    return tuple(
        (mean, rstd, torch.full_like(mean, float("nan"))) for mean, rstd in (running_statistics(*p) for p in pairs)
    )


def double_differentiate(
    dy: Tensor, x: Tensor, residual: Tensor, mask: Tensor | None, statistics: Sequence[Sequence[Tensor]],
    weight: Tensor | None, bias: Tensor | None, residual_weight: Tensor | None, residual_bias: Tensor | None,
    activation_weight: Tensor | None, training: bool, activation: str, args: Sequence[float],
) -> tuple[Any, ...]:  # fmt: skip
    """As :func:`differentiate`, which it is twice: of x under the activation, and of the residual, at which dz arrives.

    Returns:
        (dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias, dactivation_weight, record, residual_record).
    """
    (mean, rstd, *_), (residual_mean, residual_rstd, *_) = statistics
    _, normalised = _pre_activation(residual, None, residual_weight, residual_bias, residual_mean, residual_rstd)
    dx, dz, dweight, dbias, dactivation_weight, record = differentiate(
        dy, x, normalised, mask, mean, rstd, weight, bias, activation_weight, training, activation, args
    )
    dresidual, _, dresidual_weight, dresidual_bias, _, residual_record = differentiate(
        dz, residual, None, None, residual_mean, residual_rstd, residual_weight, residual_bias, None, training,
        "identity", (),
    )  # fmt: skip
    return (
        dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias, dactivation_weight, record, residual_record
    )  # fmt: skip


def double_batch_norm_act_forward(
    x, residual, weight, bias, running_mean, running_var, residual_weight, residual_bias, residual_running_mean,
    residual_running_var, activation_weight, training, eps, residual_eps, activation, activation_args, save_mask,
):  # fmt: skip
    running = running_mean, running_var, residual_running_mean, residual_running_var
    of_x, of_residual = _two_statistics(x, residual, running, training, eps, residual_eps)
    _, normalised = _pre_activation(residual, None, residual_weight, residual_bias, *of_residual[:2])
    _, z = _pre_activation(x, normalised, weight, bias, *of_x[:2])
    y = torch.empty_like(x).copy_(_activate(z, activation, activation_args, activation_weight))
    statistics = torch.stack([torch.stack(of_x), torch.stack(of_residual)])
    return y, statistics, _mask_of(z, x, activation, activation_args, save_mask and ops.needs_mask(activation, True))


def double_batch_norm_act_backward(
    dy, x, residual, mask, statistics, weight, bias, residual_weight, residual_bias, activation_weight,
    training, eps, residual_eps, activation, activation_args, output_mask,
):  # fmt: skip
    gradients = double_differentiate(
        dy, x, residual, mask, statistics.unbind(), weight, bias, residual_weight, residual_bias, activation_weight,
        training, activation, activation_args,
    )  # fmt: skip
    of_x, of_residual = (
        next((p.dtype for p in given if p is not None), x.dtype)
        for given in ((weight, bias), (residual_weight, residual_bias))
    )
    slope = None if activation_weight is None else activation_weight.dtype
    dtypes = x.dtype, x.dtype, of_x, of_x, of_residual, of_residual, slope, None, None
    return tuple(
        (torch.empty_like(x).copy_(made) if made.shape == x.shape else made.to(dtype or made.dtype))
        if wanted else x.new_empty((0,))
        for made, dtype, wanted in zip(gradients, dtypes, output_mask, strict=True)
    )  # fmt: skip


def gradient_norms(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """(norms, total, factor), as ``vgkern.backends`` says. Each tensor is divided by its largest magnitude first."""
    dtype = ops.statistics_dtype(tensors[0].device)
    norms = torch.stack([_norm(t.detach().to(dtype), norm_type) for t in tensors])
    total = _norm(norms, norm_type)
    return norms, total, ops.clip_factor(total, max_norm)


def _norm(x: Tensor, p: float, dim: tuple[int, ...] | None = None) -> Tensor:
    """Of all of x, (), or over some axes, which keep a size of 1."""
    keep = dim is not None
    if x.numel() == 0:
        return x.new_zeros((len(x), *[1] * (x.dim() - 1)) if keep else ())
    largest = x.abs().amax(dim or (), keepdim=keep)
    divisor = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(x / divisor, p, dim, keepdim=keep) * divisor


@torch.no_grad()
def scale_gradients_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← x·factor in place, as ``vgkern.backends`` says, except that whether to write is asked of the device."""
    if factor.item() != 1:
        for t in map(ops.without_repeats, tensors):
            t.copy_(_toward_zero(t.to(ops.statistics_dtype(t.device)) * factor, t.dtype))


@torch.no_grad()
def clip_units_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float
) -> list[Tensor]:
    """As ``vgkern.backends`` says; a gradient on another device than the CPU is written in any case."""
    for p, g in zip(parameters, gradients, strict=True):
        factors = unit_factors(p, g, clip_factor, eps, norm_type)
        stays = factors == 1
        if not (g.is_cpu and stays.all()):
            g.copy_(torch.where(stays, g, _toward_zero(g.to(factors.dtype) * factors, g.dtype)))
    return []  # PyTorch's operations tell autograd


def unit_factors(p: Tensor, g: Tensor, clip_factor: float, eps: float, norm_type: float) -> Tensor:
    """What adaptive clipping multiplies the units of a gradient with: (), or (units, 1, …) of g's rank."""
    axes = tuple(range(1, g.dim())) if g.dim() > 1 else None
    dtype = ops.statistics_dtype(g.device)
    weight, found = (_norm((x.abs() if x.is_complex() else x).to(dtype), norm_type, axes) for x in (p, g))
    limit = weight.clamp(min=eps) * clip_factor
    return torch.where(found <= limit, 1.0, limit / found)


def _toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, if that is a half precision not further from 0 than it was: see ``csrc/norm_kernels.h``."""
    rounded = x.to(dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return rounded
    nearer = (rounded.view(torch.int16) - 1).view(dtype)  # one unit less, whatever the sign
    return torch.where(rounded.to(x.dtype).abs() > x.abs(), nearer, rounded)
