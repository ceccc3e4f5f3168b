"""``act(batch_norm(x) + residual)`` over statistics that the processes of ``torch.distributed`` share.

Forward: each process measures its part of the batch (count, mean and Σ(x − mean)² of every channel, float64); one
all-gather; every process merges all parts in the same order (Chan, Golub & LeVeque 1979), so the statistics are the
same bits everywhere; one pass over x and residual. Sums would need an all-reduce only, but lose the variance where the
mean is large. Backward: Σdz, Σdz·x̂ and one number for the norm; one all-reduce; then dx. In units of x, training with
residual and ReLU, one process:

=========  ==========================================  =====================================  =====
forward    x | all-gather | x r·y                                                             4
backward   dy x mask·dr | all-reduce | dy x mask·dx                                           6
=========  ==========================================  =====================================  =====

Every process takes part in both collectives whatever it needs itself, one with an empty batch or with an x that needs
no gradient too: a collective that some leave out never ends. The functional collectives are operators, which
``torch.compile`` keeps in its graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import activations, ops
from .activations import ActivationSpec

__all__ = ["Group", "agree_on_channels", "apply"]


class Group(NamedTuple):
    """A process group as the functional collectives know it."""

    name: str
    size: int


def group_of(name: str | None) -> Group | None:
    """The group of that name, or the default one; None where this process has nobody to share statistics with."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if name is None:
        assert dist.group.WORLD is not None  # that it is initialised
        name = dist.group.WORLD.group_name
    size = dist.distributed_c10d._get_group_size_by_name(name)  # type: ignore[arg-type]
    return Group(name, size) if size > 1 else None


def process_group(name: str | None) -> dist.ProcessGroup | None:
    """The group that PyTorch knows under a name; None for None. RuntimeError where this process has no such group."""
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _gather(values: Tensor, group: Group) -> Tensor:
    """The values of all processes, one after the other in a new first dimension."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(values, group.size, group.name)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(group.size, *values.shape)


def _add_up(values: Tensor, group: Group) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(values, "sum", group.name))


def agree_on_channels(input: Tensor, num_features: int, group: Group) -> None:
    """Compare channels with all processes: collectives of unequal sizes would hang, or mix up numbers.

    Raises:
        RuntimeError: on every process, if their inputs differ in channels or one's is not of ``num_features``.
    """
    channels = input.shape[1] if input.dim() > 1 else 0
    everyone = _gather(torch.tensor([channels, num_features], device=input.device), group).tolist()
    if len({number for pair in everyone for number in pair}) > 1:
        given = ", ".join(
            f"{channels} of {features} on rank {rank}" for rank, (channels, features) in enumerate(everyone)
        )
        raise RuntimeError(f"input: expected num_features channels and as many on every rank, got {given}")


class _Config(NamedTuple):
    """What of a call is not a tensor."""

    group: Group
    eps: float
    activation: str
    args: tuple[float, ...]
    min_norm: float
    max_norm: float
    save_mask: bool
    memory_format: torch.memory_format


class _SyncBatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, weight, bias, activation_weight, probe, mean, var, local, total, config):
        return ops.batch_norm_act_forward(
            x, residual, weight, bias, mean, var, activation_weight,
            False, config.eps, config.activation, config.args, config.save_mask,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, statistics, mask = output
        ctx.mark_non_differentiable(statistics, mask)
        ctx.set_materialize_grads(False)
        x, residual, weight, bias, activation_weight, _, _, _, local, total, ctx.config = inputs
        reads = activations.TABLE[ctx.config.activation].backward_reads
        has_mask = residual is not None and ctx.config.save_mask and reads == "mask"
        ctx.save_for_backward(
            x, residual if reads == "z" else None, mask if has_mask else None, statistics, weight, bias,
            activation_weight, local, total,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("SyncBatchNormAct: a backward pass with create_graph=True is not implemented")
        return *_backward(ctx, dy), None, None, None, None, None


def _backward(ctx, dy):
    """The gradients of all inputs up to the probe."""
    x, residual, mask, statistics, weight, bias, activation_weight, local, total = ctx.saved_tensors
    config = ctx.config
    need_x, need_residual, need_weight, need_bias, need_activation_weight, *_ = ctx.needs_input_grad
    # Nothing came, but the others wait for this process's part of the sums.
    dy = torch.zeros_like(x) if dy is None else dy.contiguous(memory_format=config.memory_format)
    ones = torch.ones_like(statistics[0])
    gamma = ones if weight is None else weight.to(ones.dtype)
    beta = torch.zeros_like(ones) if bias is None else bias.to(ones.dtype)
    _, dresidual, dweight, dbias, dactivation_weight, record = ops.batch_norm_act_backward(
        dy, x, residual, mask, statistics, gamma, beta, activation_weight,
        False, config.eps, config.activation, config.args, 0.0, math.inf,
        [False, need_residual and config.activation != "identity", True, True, need_activation_weight, True],
    )  # fmt: skip
    if config.activation == "identity":
        dresidual = dy  # one tensor serves both

    channels = dbias.shape[0]
    scaled_dz_squares = record[2:3]  # what ‖dx‖² would be if the statistics were constants: Σ (γ·r·dz)²
    sums = _add_up(torch.cat([dbias, dweight, scaled_dz_squares]), config.group)
    count, mean, var = total
    means = sums[:-1].view(2, channels) / count.clamp(min=1)
    rstd = (var + config.eps).rsqrt()
    gain_squares = (gamma * rstd).square()
    factor = ones[:1]
    if config.min_norm > 0 or config.max_norm < math.inf:
        explained = means[0].square() + (1 + config.eps * rstd.square()) * means[1].square()
        norm = (sums[-1:] - (gain_squares * count * explained).sum()).clamp(min=0).sqrt()
        bounded = norm.clamp(config.min_norm, config.max_norm) / norm
        factor = bounded.where((norm > 0) & norm.isfinite(), 1.0)

    dx = None
    if need_x:
        source = (
            dy, x, residual, mask, statistics, weight, bias, activation_weight, config.activation, config.args
        )  # fmt: skip
        if need_residual and mask is None:  # dz has been written: no need to make it again
            source = (dresidual, x, None, None, statistics, weight, bias, None, "identity", ())
        dx, dx_squares = ops.batch_norm_act_input_gradient(*source, means, factor)
    else:
        # The norm of a dx that nobody asked for: the sum of squares multiplied out, with this process's own moments.
        n, local_mean, squares = local
        distance = (local_mean - mean) * rstd  # Σx̂/n
        rest = (
            n * means[0].square() - 2 * (means[0] * dbias + means[1] * dweight - means[0] * means[1] * n * distance)
            + means[1].square() * (squares * rstd.square() + n * distance.square())
        )  # fmt: skip
        dx_squares = (scaled_dz_squares + (gain_squares * rest).sum()).clamp(min=0) * factor.square()
    nothing = torch.zeros_like(record[:1])
    record = torch.cat([
        record[:2], dx_squares,
        nothing if weight is None else record[3:4], nothing if bias is None else record[4:5], record[5:],
    ])  # fmt: skip
    return (
        dx,
        dresidual if need_residual else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(bias.dtype) if need_bias else None,
        dactivation_weight.view_as(activation_weight) if need_activation_weight else None,
        record,
    )


def apply(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation_weight: Tensor | None,
    probe: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    spec: ActivationSpec,
    bounds: tuple[float, float],
    memory_format: torch.memory_format,
    group: Group,
) -> tuple[Tensor, Tensor]:
    """(output, statistics) of arguments that are checked, dense and of ``memory_format``; as ``functional.apply``.

    The statistics are the running ones where no process has any element, so that an update with them changes nothing.

    ``probe`` requires grad: so does the output, then, on every process, and every process has a backward pass.
    """
    with torch.no_grad():
        local = ops.batch_norm_moments(input)
        total = ops.merge_moments(_gather(local, group))
        count, mean, squares = total
        var = squares / count.clamp(min=1)
        total = torch.stack([count, mean, var])
    config = _Config(group, eps, spec.name, spec.args, *bounds, torch.is_grad_enabled(), memory_format)
    y, _, _ = _SyncBatchNormAct.apply(
        input, residual, weight, bias, activation_weight, probe, mean, var, local, total, config
    )
    unbiased = squares / (count - 1).clamp(min=1)
    statistics = torch.stack([mean, var, unbiased])
    if running_mean is not None and running_var is not None:
        running = torch.stack([running_mean, running_mean, running_var]).to(statistics.dtype)
        statistics = statistics.where(count > 0, running)
    return y, statistics
