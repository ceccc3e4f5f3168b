"""Two layers as one operation: ``act(batch_norm(x) + batch_norm(residual))``, the shortcut with a projection.

The layers stay where they are, each with its parameters, running statistics and gradient record. What ends with the
residual's batch norm leaves it undone (:func:`hold`), and the layer that adds the residual does both
(:func:`add_held`), or one after the other where that is another thing: hooks, bounds of the gradient's norm, statistics
that processes share, one layer in training and one not, tensors of different shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import double_batch_norm, functional
from .batch_norm_act import _BatchNormAct

__all__ = ["Held", "add_held", "hold", "hold_batch_norm", "released"]


class Held(NamedTuple):
    """A batch norm that is still to be applied to its input."""

    layer: Any
    input: Tensor


def hold(module: nn.Module, input: Tensor) -> Tensor | Held:
    """``module(input)``, or what is left to do of it: the batch norm of a sequence of two that ends with one."""
    if type(module) is nn.Sequential and len(module) == 2 and isinstance(input, Tensor) and not _is_watched(module):
        first, last = module._modules.values()
        if _may_wait(last):
            return Held(last, first(input))  # type: ignore[misc]
    return module(input)


def hold_batch_norm(layer: nn.Module, input: Tensor) -> Tensor | Held:
    """``layer(input)``, undone if it may wait."""
    return Held(layer, input) if isinstance(input, Tensor) and _may_wait(layer) else layer(input)


def released(residual: Any) -> Any:
    """What a residual is when its batch norm waits no longer."""
    return residual.layer(residual.input) if isinstance(residual, Held) else residual


def add_held(layer: Any, input: Tensor, residual: Any) -> Tensor:
    """``layer(input, residual)``, in one operation with the batch norm of the residual if that is held and it fits."""
    if isinstance(residual, Held) and _is_one_operation(layer, input, *residual):
        return _both(layer, input, *residual)
    return layer(input, released(residual))


def _is_watched(module: nn.Module) -> bool:
    """Whether anybody is to see the calls of a module, or does them in its place."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def _may_be_double(layer: Any) -> bool:
    """Whether a layer computes a fused batch norm and nothing else, its gradient as it is."""
    return (
        isinstance(layer, _BatchNormAct)
        and type(layer).forward is _BatchNormAct.forward
        and layer.grad_norm_bounds is None
        and not _is_watched(layer)
    )


def _may_wait(layer: Any) -> bool:
    return _may_be_double(layer) and layer.activation.name == "identity" and not _has_any_global_hook()


def _is_one_operation(layer: Any, input: Any, residual_layer: Any, residual: Any) -> bool:
    return (
        _may_be_double(layer)
        and isinstance(input, Tensor)
        and isinstance(residual, Tensor)
        and layer.training == residual_layer.training
        and (layer.training or (layer.running_mean is None) == (residual_layer.running_mean is None))
        and input.shape == residual.shape
        and input.dtype == residual.dtype
        and input.device == residual.device
        and input.dim() in layer._ranks
        and input.dim() in residual_layer._ranks
    )


def _both(layer: Any, input: Tensor, residual_layer: Any, residual: Tensor) -> Tensor:
    """As ``_BatchNormAct.forward``, of two layers."""
    spec, activation_weight = layer.activation, layer.activation_weight
    *tensors, counter, uses_batch = layer._tensors_in_use()
    *residual_tensors, residual_counter, _ = residual_layer._tensors_in_use()
    norm, residual_norm = (
        double_batch_norm.Norm._make((*given, 0.0 if of.momentum is None else of.momentum, of.eps))
        for of, given in ((layer, tensors), (residual_layer, residual_tensors))
    )
    direct = double_batch_norm.check(input, residual, spec, activation_weight, norm, residual_norm, uses_batch)
    probes = layer._probe_on(input.device), residual_layer._probe_on(input.device)
    y, statistics = functional.apply_double(
        input, residual, norm, residual_norm, activation_weight, probes, uses_batch, spec, direct
    )
    if layer.training:
        measured = statistics.unbind() if input.numel() > 0 else (None, None)
        functional.count_batch(*norm[2:4], counter, measured[0], layer.momentum, direct)
        functional.count_batch(*residual_norm[2:4], residual_counter, measured[1], residual_layer.momentum, direct)
    return y
