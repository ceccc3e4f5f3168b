"""Autograd over the operators: ``batch_norm_act``, ``add_act`` and, by :mod:`vgkern.double_batch_norm`, its double.

The backward pass hands the gradient record (``vgkern.gradients.record``) out as the "gradient" of a probe, an input
that the forward pass ignores. Nothing is stored on the side, so ``torch.compile``, checkpointing and gradient
accumulation treat the record as they treat any gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import activations, backends, double_batch_norm, ops, synchronised
from .activations import ActivationSpec
from .backends import cpu, reference

__all__ = ["add_act", "batch_norm_act", "double_batch_norm_act"]

Bounds = tuple[float | None, float | None]


class _Config(NamedTuple):
    """What of a call is not a tensor. Its order is known to ``csrc/node.cpp``."""

    training: bool
    eps: float
    activation: str
    args: tuple[float, ...]
    min_norm: float
    max_norm: float
    save_mask: bool
    memory_format: torch.memory_format


_config = functools.partial(tuple.__new__, _Config)  # its own constructor is a function in Python


class _BatchNormAct(torch.autograd.Function):
    """In the form that ``torch.compile`` and ``torch.func`` ask for: all that the forward makes is an output."""

    @staticmethod
    def forward(x, residual, weight, bias, activation_weight, probe, running_mean, running_var, config):
        return ops.batch_norm_act_forward(
            x, residual, weight, bias, running_mean, running_var, activation_weight,
            config.training, config.eps, config.activation, config.args, config.save_mask,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, statistics, mask = output
        ctx.mark_non_differentiable(statistics, mask)
        _save(ctx, inputs, statistics, mask)

    @staticmethod
    def backward(ctx, dy, *_):
        return *_backward(ctx, dy), None, None, None


class _BatchNormActDirect(torch.autograd.Function):
    """The same past the dispatcher and Python, for calls that are ``ops.unwatched`` on tensors of the C++ backend."""

    forward = cpu.node_forward

    @staticmethod
    def backward(ctx, dy):
        """What ``cpu.node_backward`` leaves: it asks anew, for this pass may be watched where the forward was not."""
        return *_backward(ctx, dy), None


# Function.apply inspects the signature of forward at every call, which takes 40 µs, and looks for torch.func, of which
# there is nothing in an unwatched call; the method of its base class is what it calls in the end.
_apply_direct = super(torch.autograd.Function, _BatchNormActDirect).apply
if cpu.node_step is not None:
    node: Any = _BatchNormActDirect._backward_cls
    node.apply = cpu.node_backward
    cpu.set_up_node(_Config, _apply_direct)


def _save(ctx, inputs, statistics, mask):
    x, residual, weight, bias, activation_weight, _, running_mean, running_var, config = inputs
    ctx.set_materialize_grads(False)
    ctx.config = config
    reads = activations.TABLE[config.activation].backward_reads
    has_mask = residual is not None and config.save_mask and reads == "mask"
    has_statistics = config.training or running_mean is not None
    # For x̂, or for z; a sum under a mask, or under no activation at all, needs neither of its terms.
    reads_x = has_statistics or not (has_mask or reads == "nothing")
    # The running statistics are saved, though their values are in `statistics`, so that autograd notices when a
    # training step changes them between an eval-mode forward and its backward.
    frozen = (None, None) if config.training else (running_mean, running_var)
    ctx.save_for_backward(
        x if reads_x else None, residual if reads == "z" else None, mask if has_mask else None,
        statistics if has_statistics else None, weight, bias, activation_weight, *frozen,
    )  # fmt: skip


def _backward(ctx, dy):
    """The gradients of all inputs up to the probe, by the operator."""
    if dy is None:
        return (None,) * 6
    x, residual, mask, statistics, weight, bias, activation_weight, running_mean, running_var = ctx.saved_tensors
    training, eps, activation, args, min_norm, max_norm, _, memory_format = ctx.config
    dy = dy.contiguous(memory_format=memory_format)
    if x is None:
        x = dy  # for its shape, dtype and format
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _second_order(ctx, dy, x, residual, mask, weight, bias, activation_weight, running_mean, running_var)
    need_x, need_residual, need_weight, need_bias, need_activation_weight, need_record, *_ = ctx.needs_input_grad
    # One tensor serves both: without normalisation, and so without bounds, dz is dx; without an activation it is dy.
    shared = statistics is None
    need_dx = need_x or (shared and need_residual)
    passed_on = activation == "identity" and not shared
    want_dresidual = need_residual and not (shared or passed_on)
    dx, dresidual, dweight, dbias, dactivation_weight, record = ops.batch_norm_act_backward(
        dy, x, residual, mask, statistics, weight, bias, activation_weight,
        training, eps, activation, args, min_norm, max_norm,
        [need_dx, want_dresidual, need_weight, need_bias, need_activation_weight, need_record],
    )  # fmt: skip
    return (
        dx if need_x else None,
        (dx if shared else dy if passed_on else dresidual) if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dactivation_weight.view_as(activation_weight) if need_activation_weight else None,
        record if need_record else None,
    )


def _second_order(ctx, dy, x, residual, mask, weight, bias, activation_weight, running_mean, running_var):
    """The backward pass with a graph of its own, from differentiable operations (``create_graph=True``)."""
    config = ctx.config
    mean = rstd = None
    if config.training:
        mean, rstd, _ = reference.batch_statistics(x, config.eps)
    elif running_mean is not None:
        mean, rstd = reference.running_statistics(running_mean, running_var, config.eps)
    dx, dz, dweight, dbias, dactivation_weight, record = reference.differentiate(
        dy, x, residual, mask, mean, rstd, weight, bias, activation_weight,
        config.training, config.activation, config.args, config.min_norm, config.max_norm,
    )  # fmt: skip
    need_x, need_residual, need_weight, need_bias, need_activation_weight, need_record, *_ = ctx.needs_input_grad
    dactivation_weight = None if dactivation_weight is None else dactivation_weight.to(activation_weight.dtype)
    return (
        dx.to(x.dtype) if need_x else None,
        dz.to(x.dtype) if need_residual else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(bias.dtype) if need_bias else None,
        dactivation_weight if need_activation_weight else None,
        record if need_record else None,
    )


def _memory_format(x: Tensor) -> torch.memory_format:
    """The format in which the kernels take x: its own where it is dense, PyTorch's suggestion where it is not."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last  # PyTorch's suggestion takes 2 µs
    return torch._prims_common.suggest_memory_format(x)


def resolve_bounds(grad_norm_bounds: Bounds | None) -> tuple[float, float]:
    """(low, high) with 0 and inf for "no bound".

    Raises:
        ValueError: not a pair, a negative or NaN bound, or low > high.
    """
    if grad_norm_bounds is None:
        return 0.0, math.inf
    message = (
        f"grad_norm_bounds: expected (low, high) with 0 <= low <= high, either may be None; got {grad_norm_bounds!r}"
    )
    try:
        low, high = grad_norm_bounds
        low, high = 0.0 if low is None else float(low), math.inf if high is None else float(high)
    except (TypeError, ValueError):
        raise ValueError(message) from None
    if not 0 <= low <= high:  # NaN fails too
        raise ValueError(message)
    return low, high


def step(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation_weight: Tensor | None,
    probe: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    spec: ActivationSpec,
    bounds: tuple[float, float],
    follow: bool,
    group: synchronised.Group | None = None,
) -> Tensor:
    """The output, from arguments that nobody has checked: what layers and functions share.

    ``follow``: the running statistics, if there are any, are to follow those of the batch, and ``counter`` is to count
    it. ``group`` says that statistics of the batch are those of the batches of all its processes.
    """
    if group is None and cpu.node_step is not None and not torch.compiler.is_dynamo_compiling():
        # The usual call in one: 3 µs less than what stands below, and more with cold caches.
        y = cpu.node_step(
            input, residual, weight, bias, activation_weight, probe, running_mean, running_var, counter,
            training, momentum, eps, spec.name, spec.args, bounds, follow,
        )  # fmt: skip
        if y is not None:
            return y
    direct = ops.check_all(
        input, residual, spec, activation_weight, running_mean, running_var, weight, bias, training,
        0.0 if momentum is None else momentum, eps, group is not None,
    )  # fmt: skip
    y, statistics = apply(
        input, residual, weight, bias, activation_weight, probe, running_mean, running_var, training, eps, spec, bounds,
        direct, group,
    )  # fmt: skip
    # State changes last: whatever raises above leaves it as it was.
    if follow:
        has_elements = group is not None or input.numel() > 0
        count_batch(running_mean, running_var, counter, statistics if has_elements else None, momentum, direct)
    return y


def apply(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation_weight: Tensor | None,
    probe: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    spec: ActivationSpec,
    bounds: tuple[float, float],
    direct: bool,
    group: synchronised.Group | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, statistics) of arguments that are checked: what layers and functions share.

    ``direct`` says that the call is ``ops.unwatched``; ``group``, that statistics of the batch are those of the batches
    of all its processes.
    """
    direct = direct and backends.of(input) is cpu
    if residual is not None and residual.dtype != input.dtype:
        # As PyTorch promotes `batch_norm(input) + residual`. Parameters follow, which costs C elements.
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
        weight, bias, activation_weight, running_mean, running_var = (
            None if t is None else t.to(dtype) for t in (weight, bias, activation_weight, running_mean, running_var)
        )
    memory_format = torch.contiguous_format
    if not input.is_contiguous():
        memory_format = _memory_format(input)
        input = input.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)

    if residual is input and not direct:
        residual = input.view_as(input)  # one tensor in two places of an autograd.Function breaks torch.compile's graph
    differentiable = (input, residual, weight, bias, activation_weight)
    records = False
    if torch.is_grad_enabled():
        for t in differentiable:
            if t is not None and t.requires_grad:
                records = True
                break
    config = _config((training, eps, spec.name, spec.args, *bounds, records, memory_format))
    if group is not None:
        y, statistics = synchronised.apply(
            *differentiable, probe, running_mean, running_var, eps, spec, bounds, memory_format, group
        )
    elif not direct:
        y, statistics, _ = _BatchNormAct.apply(
            *differentiable, probe if records else None, running_mean, running_var, config
        )
    else:
        statistics_out: list[Tensor] = []
        rest = (running_mean, running_var, config, statistics_out)  # an input or output more costs 0.5 µs
        forward = _apply_direct if records else functools.partial(cpu.node_forward, None)
        y = forward(*differentiable, probe, rest)
        (statistics,) = statistics_out
    return _autocast(y, spec), statistics


def apply_double(
    input: Tensor,
    residual: Tensor,
    norm: double_batch_norm.Norm,
    residual_norm: double_batch_norm.Norm,
    activation_weight: Tensor | None,
    probes: tuple[Tensor | None, Tensor | None],
    training: bool,
    spec: ActivationSpec,
    direct: bool,
) -> tuple[Tensor, Tensor]:
    """(output, statistics), (2, 3, C), of arguments that are checked; as :func:`apply`."""
    if residual.dtype != input.dtype:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
        norm, residual_norm = norm.to(dtype), residual_norm.to(dtype)
        activation_weight = None if activation_weight is None else activation_weight.to(dtype)
    memory_format = _memory_format(input)
    input, residual = (t.contiguous(memory_format=memory_format) for t in (input, residual))
    y, statistics = double_batch_norm.apply(
        input, residual, norm, residual_norm, activation_weight, probes, training, spec, memory_format, direct
    )
    return _autocast(y, spec), statistics


def _autocast(y: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.name not in _AUTOCAST:
        return y
    device_type = y.device.type
    dtypes = _AUTOCAST[spec.name]
    if device_type in dtypes and torch.is_autocast_enabled(device_type) and y.dtype != torch.float64:
        y = y.to(dtypes[device_type] or torch.get_autocast_dtype(device_type))
    return y


# The activations that stand in one of autocast's lists: on which devices, and the dtype that they get there; None for
# autocast's own.
_AUTOCAST: dict[str, dict[str, torch.dtype | None]] = {
    "prelu": {"cpu": None, "cuda": None},
    "softplus": {"cuda": torch.float32},
}


def count_batch(
    running_mean: Tensor | None, running_var: Tensor | None, counter: Tensor | None, statistics: Tensor | None,
    momentum: float | None, direct: bool,
) -> None:  # fmt: skip
    """The running statistics, where there are any, after a batch of these; None for a batch without an element.

    By the backend in a call that is ``ops.unwatched``; the reference's is PyTorch operations, which can be seen.
    """
    if running_mean is not None and running_var is not None and statistics is not None:
        backend = backends.of(running_mean) if direct else reference
        backend.update_running_statistics(running_mean, running_var, counter, statistics, momentum)
    elif counter is not None:
        counter.add_(1)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | nn.Module | None = "relu",
    activation_args: Mapping[str, Any] | None = None,
    activation_weight: Tensor | None = None,
    grad_norm_bounds: Bounds | None = None,
) -> Tensor:
    r"""``act(batch_norm(input) + residual)`` in one fused operation; arguments as ``torch.nn.functional.batch_norm``.

    .. math:: y = \varphi\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta + r\right)

    Args:
        input: (N, C, \*), float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,) or both None; updated in place when ``training``, used when not.
        weight, bias: γ and β, (C,) or None, of input's dtype, or float32 beside a half-precision input.
        training: normalise by the statistics of this batch (over N and \*).
        momentum: share of the batch in the new running statistics; the running variance is unbiased.
        eps: added to the (biased) variance.
        residual: of input's shape and device; its gradient is φ'(z)·dy.
        activation: a name of ``vgkern.activations.names()``, a ``torch.nn`` activation module, or None.
        activation_args: the activation's arguments by name, e.g. ``{"negative_slope": 0.2}``.
        activation_weight: PReLU's slope, (1,) or (C,); taken from the module where one is given.
        grad_norm_bounds: (low, high), either None: the gradient of ``input`` is scaled, direction kept, so that its L2
            norm lies in the bounds. A zero or non-finite gradient is left as it is.

    Returns:
        Of input's shape and memory format; the dtype of ``batch_norm(input) + residual``.

    Raises:
        ValueError, RuntimeError, IndexError, NotImplementedError, TypeError: as ``torch.nn.functional.batch_norm``
            does, naming the argument. Nothing has changed then.

    Example:
        >>> import torch, vgkern
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = vgkern.functional.batch_norm_act(x, None, None, training=True, residual=torch.ones_like(x))
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([8, 3, 4, 4]), True)

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; He et al. 2016, arXiv 1512.03385, for the place of the residual.
    """
    spec = activations.resolve(activation, activation_args)
    if isinstance(activation, nn.PReLU) and activation_weight is None:
        activation_weight = activation.weight
    bounds = resolve_bounds(grad_norm_bounds)
    if momentum is None:  # the average of all batches, to a layer, which counts them
        raise TypeError("momentum: expected a number, got None")
    return step(
        input, residual, weight, bias, activation_weight, None, running_mean, running_var, None, training, momentum,
        eps, spec, bounds, training,
    )  # fmt: skip


def double_batch_norm_act(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
    *,
    activation: str | nn.Module | None = "relu",
    activation_args: Mapping[str, Any] | None = None,
    activation_weight: Tensor | None = None,
) -> Tensor:
    r"""``act(batch_norm(input) + batch_norm(residual))`` in one fused operation: a shortcut with a projection.

    .. math:: y = \varphi\left(\gamma_1\,\hat x + \beta_1 + \gamma_2\,\hat r + \beta_2\right)

    Args:
        input, residual: (N, C, \*), of one shape and device; float32, float64, bfloat16 or float16.
        running_mean, running_var, weight, bias, momentum, eps: of the batch norm of ``input``, as
            :func:`batch_norm_act` takes them.
        residual_running_mean, residual_running_var, residual_weight, residual_bias, residual_momentum, residual_eps:
            of the batch norm of ``residual``.
        training: normalise both by the statistics of this batch.
        activation, activation_args, activation_weight: as :func:`batch_norm_act`.

    Returns:
        Of input's shape and memory format; the dtype of the sum.

    Raises:
        ValueError, RuntimeError, IndexError, NotImplementedError, TypeError: as :func:`batch_norm_act`, of either.

    Example:
        >>> import torch, vgkern
        >>> x, r = torch.randn(2, 8, 3, 4, 4)
        >>> y = vgkern.functional.double_batch_norm_act(x, r, None, None, None, None, training=True)
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([8, 3, 4, 4]), True)

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; He et al. 2016, arXiv 1512.03385, for the projection.
    """
    spec = activations.resolve(activation, activation_args)
    if isinstance(activation, nn.PReLU) and activation_weight is None:
        activation_weight = activation.weight
    norm = double_batch_norm.Norm(weight, bias, running_mean, running_var, momentum, eps)
    residual_norm = double_batch_norm.Norm(
        residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
    )
    direct = double_batch_norm.check(input, residual, spec, activation_weight, norm, residual_norm, training)
    y, statistics = apply_double(
        input, residual, norm, residual_norm, activation_weight, (None, None), training, spec, direct
    )
    if training and input.numel() > 0:
        for given, measured in zip((norm, residual_norm), statistics, strict=True):
            count_batch(given.running_mean, given.running_var, None, measured, given.momentum, direct)
    return y


def add_act(
    input: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str | nn.Module | None = "relu",
    activation_args: Mapping[str, Any] | None = None,
    activation_weight: Tensor | None = None,
) -> Tensor:
    """``act(input + residual)``, or ``act(input)``, in one pass.

    Args:
        input: any shape; channels, for a PReLU with one slope a channel, are dimension 1.
        residual: of input's shape and device. There is no broadcasting.
        activation, activation_args, activation_weight: as :func:`batch_norm_act`.

    Raises:
        RuntimeError, ValueError, NotImplementedError, TypeError: as :func:`batch_norm_act`.

    Example:
        >>> import torch, vgkern
        >>> vgkern.functional.add_act(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -5.0]))
        tensor([2., 0.])
    """
    spec = activations.resolve(activation, activation_args)
    if isinstance(activation, nn.PReLU) and activation_weight is None:
        activation_weight = activation.weight
    ops.check(input, residual, spec, activation_weight)
    direct = ops.unwatched(input, residual, activation_weight)
    y, _ = apply(
        input, residual, None, None, activation_weight, None, None, None, False, 0.0, spec, (0.0, math.inf), direct
    )
    return y
