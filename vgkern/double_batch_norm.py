"""Autograd over the operators of :mod:`vgkern.double_ops`: ``act(batch_norm(x) + batch_norm(residual))``.

The shortcut with a projection of a ResNet (He et al. 2016, arXiv 1512.03385). In units of x, training with ReLU,
where a channel stays in cache and where it does not, beside two operations, of which one writes what the other reads:

=========  ================  ===========================  ==============  ===========================
pass       in cache                                       not in cache
---------  ---------------------------------------------  -------------------------------------------
           one operation     two                          one operation   two
=========  ================  ===========================  ==============  ===========================
forward    3                 5                            5               7
backward   5 + mask          7 + mask                     8 + 2 masks     11 + 2 masks
=========  ================  ===========================  ==============  ===========================
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import activations, double_ops, ops
from .activations import ActivationSpec
from .backends import reference

__all__ = ["Norm", "apply", "check"]


class Norm(NamedTuple):
    """One of the two batch norms."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float

    def to(self, dtype: torch.dtype) -> Norm:
        tensors = (None if t is None else t.to(dtype) for t in self[:4])
        return Norm._make((*tensors, self.momentum, self.eps))


class _Config(NamedTuple):
    """What of a call is not a tensor. The first five are the operators' settings.

    (A slice, no property: torch.compile of PyTorch 2.9 does not trace a named tuple's properties.)
    """

    training: bool
    eps: float
    residual_eps: float
    activation: str
    args: tuple[float, ...]
    save_mask: bool
    memory_format: torch.memory_format


def check(
    input: Tensor, residual: Tensor, spec: ActivationSpec, activation_weight: Tensor | None,
    norm: Norm, residual_norm: Norm, training: bool,
) -> bool:  # fmt: skip
    """Refuse what either batch norm refuses; returns whether the call is ``ops.unwatched``."""
    of_x, of_residual = norm[2:4] + norm[:2], residual_norm[2:4] + residual_norm[:2]  # the running statistics first
    direct, common = ops.look(training, (input, residual, *of_x, activation_weight))
    if residual is None or spec.row.learnable or not all(ops.are_plain_numbers(*n[4:]) for n in (norm, residual_norm)):
        common = False
    if direct and residual is not None:
        direct, plain = ops.look(training, (residual, None, *of_residual, None))
        common = common and plain
    if not common:
        if not isinstance(residual, Tensor):
            raise TypeError(f"residual: expected a Tensor, got {type(residual).__name__}")
        ops.check(input, residual, spec, activation_weight)
        ops.check_batch_norm(input, *of_x, training, norm.momentum, norm.eps)
        ops.check_batch_norm(
            residual, *of_residual, training, residual_norm.momentum, residual_norm.eps, prefix="residual_"
        )
    return direct


class _DoubleBatchNormAct(torch.autograd.Function):
    """In the form that ``torch.compile`` and ``torch.func`` ask for: all that the forward makes is an output."""

    @staticmethod
    def forward(
        x, residual, weight, bias, residual_weight, residual_bias, activation_weight, probe, residual_probe,
        running_mean, running_var, residual_running_mean, residual_running_var, config,
    ):  # fmt: skip
        return double_ops.double_batch_norm_act_forward(
            x, residual, weight, bias, running_mean, running_var, residual_weight, residual_bias,
            residual_running_mean, residual_running_var, activation_weight, *config[:5], config.save_mask,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, statistics, mask = output
        ctx.mark_non_differentiable(statistics, mask)
        _save(ctx, inputs, statistics, mask)

    @staticmethod
    def backward(ctx, dy, *_):
        return *_backward(ctx, dy, double_ops.double_batch_norm_act_backward), *(None,) * 5


class _DoubleBatchNormActDirect(torch.autograd.Function):
    """The same past the dispatcher, for calls that are ``ops.unwatched``, with ``_apply_direct``."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, rest = inputs
        running, residual_running, config, statistics_out = rest
        x, residual, weight, bias, residual_weight, residual_bias, activation_weight, _, _ = tensors
        y, statistics, mask = double_ops.run_forward(
            x, residual, weight, bias, *running, residual_weight, residual_bias, *residual_running, activation_weight,
            *config[:5], config.save_mask,
        )  # fmt: skip
        _save(ctx, (*tensors, *running, *residual_running, config), statistics, mask)
        # What hooks hand back in the backward pass may be any kind of tensor.
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        statistics_out.append(statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        # Asked anew: this pass may be watched where the forward pass was not.
        direct = not ctx.hooked and ops.unwatched(dy)
        run = double_ops.run_backward if direct else double_ops.double_batch_norm_act_backward
        return *_backward(ctx, dy, run), None


_apply_direct = super(torch.autograd.Function, _DoubleBatchNormActDirect).apply  # see vgkern.functional


def _save(ctx, inputs, statistics, mask):
    x, residual = inputs[:2]
    parameters, running, config = inputs[2:7], inputs[9:13], inputs[13]
    ctx.set_materialize_grads(False)
    ctx.config = config
    has_mask = config.save_mask and activations.TABLE[config.activation].backward_reads == "mask"
    # Running statistics too, so that autograd notices when a training step changes them before the backward pass.
    frozen = (None,) * 4 if config.training else running
    ctx.save_for_backward(x, residual, mask if has_mask else None, statistics, *parameters, *frozen)


def _backward(ctx, dy, run):
    """The gradients of all inputs up to the second probe, by ``run``: the operator, or what it would run."""
    if dy is None:
        return (None,) * 9
    x, residual, mask, statistics, *parameters, _, _, _, _ = ctx.saved_tensors
    config = ctx.config
    dy = dy.contiguous(memory_format=config.memory_format)
    needed = list(ctx.needs_input_grad[:9])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradients = _second_order(ctx, dy)
    else:
        gradients = run(dy, x, residual, mask, statistics, *parameters, *config[:5], needed)
    slope = parameters[-1]
    if slope is not None and needed[6]:
        gradients = (*gradients[:6], gradients[6].view_as(slope), *gradients[7:])
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


def _second_order(ctx, dy):
    """The backward pass with a graph of its own, from differentiable operations (``create_graph=True``)."""
    x, residual, mask, _, *parameters, running_mean, running_var, residual_mean, residual_var = ctx.saved_tensors
    config = ctx.config
    statistics: list[tuple[Tensor, ...]]
    if config.training:
        statistics = [
            reference.batch_statistics(x, config.eps),
            reference.batch_statistics(residual, config.residual_eps),
        ]
    else:
        statistics = [
            reference.running_statistics(running_mean, running_var, config.eps),
            reference.running_statistics(residual_mean, residual_var, config.residual_eps),
        ]
    settings: Any = (config.training, config.activation, config.args)
    gradients = reference.double_differentiate(dy, x, residual, mask, statistics, *parameters, *settings)
    inputs = (x, residual, *parameters)
    rounded = [
        gradient if gradient is None or t is None else gradient.to(t.dtype)
        for gradient, t in zip(gradients, inputs, strict=False)
    ]
    return *rounded, *gradients[7:]


def apply(
    input: Tensor, residual: Tensor, norm: Norm, residual_norm: Norm, activation_weight: Tensor | None,
    probes: tuple[Tensor | None, Tensor | None], training: bool, spec: ActivationSpec,
    memory_format: torch.memory_format, direct: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, statistics) of arguments that are checked, of one dtype, and of ``memory_format``.

    ``direct`` says that the call is ``ops.unwatched``.
    """
    if residual is input and not direct:
        residual = input.view_as(input)  # one tensor in two places of an autograd.Function breaks torch.compile's graph
    parameters = (*norm[:2], *residual_norm[:2], activation_weight)
    records = False
    if torch.is_grad_enabled():
        for t in (input, residual, *parameters):
            if t is not None and t.requires_grad:
                records = True
                break
    config = _Config(training, norm.eps, residual_norm.eps, spec.name, spec.args, records, memory_format)
    running, residual_running = norm[2:4], residual_norm[2:4]
    if not direct:
        given = probes if records else (None, None)
        y, statistics, _ = _DoubleBatchNormAct.apply(
            input, residual, *parameters, *given, *running, *residual_running, config
        )
    elif records:
        statistics_out: list[Tensor] = []
        rest = (running, residual_running, config, statistics_out)
        y = _apply_direct(input, residual, *parameters, *probes, rest)
        statistics = statistics_out[0]
    else:
        y, statistics, _ = double_ops.run_forward(
            input, residual, *norm[:2], *running, *residual_norm[:2], *residual_running, activation_weight,
            *config[:5], False,
        )  # fmt: skip
    return y, statistics
