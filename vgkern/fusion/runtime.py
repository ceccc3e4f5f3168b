"""What rewritten forwards call. Sums that do not fit one fused operation are computed by PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import functional
from ..activations import resolve
from ..nn.batch_norm_act import _BatchNormAct
from ..nn.double_batch_norm import Held, add_held, hold_batch_norm, released
from ..nn.plain import activate

__all__ = ["WAIT", "add", "add_act", "sequential", "unchanged"]

#: In the place of a residual: the batch norm is another's shortcut, and waits for its sum.
WAIT = "wait"

_IDENTITY = resolve(None)


def _fits(x: Any, residual: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and x.device == residual.device
        and x.is_floating_point()
    )


def add(layer: Any, x: Tensor, residual: Any) -> Any:
    """``layer(x, residual)`` for a fused layer, where they fit; its three operations one by one where not.

    The residual may be a batch norm that waits (:mod:`vgkern.nn.double_batch_norm`), or the word for this one to wait.
    """
    fusion = vars(layer).get("_fusion")
    if fusion is None:
        raise RuntimeError(f"the fused layer was replaced by {layer!r}; unfuse the model first, or fuse it anew")
    if residual is x and torch.compiler.is_compiling():
        residual = x.view_as(x)  # one tensor as two arguments of an autograd.Function is more than dynamo takes
    if isinstance(residual, str) and not isinstance(x, fx.Proxy):
        return hold_batch_norm(layer, x)
    if isinstance(residual, Held):
        if _fits(x, residual.input):
            return add_held(layer, x, residual)
        residual = released(residual)
    if residual is None or _fits(x, residual):
        return layer(x, residual)
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", add, (layer, x, residual), {})
    spec, weight = layer.activation, layer.activation_weight
    z = x
    if isinstance(layer, _BatchNormAct):
        given = f"{tuple(residual.shape)} {residual.dtype} beside {tuple(x.shape)} {x.dtype}"
        layer.__dict__["_fusion_broadcast"] = f"its residual does not fit: {given}"
        plain: Any = copy.copy(layer)  # the same parameters and buffers
        plain.activation = _IDENTITY
        plain.__dict__["_prelu"] = None
        z = plain(x)
    return activate(spec, z.add_(residual) if fusion.in_place else z + residual, weight)


def add_act(
    x: Any, residual: Any, in_place: bool, activation: str, arguments: dict[str, Any], weight: Tensor | None
) -> Any:
    """``act(x + residual)`` for an activation that is no module of its own."""
    if _fits(x, residual):
        return functional.add_act(
            x, residual, activation=activation, activation_args=arguments, activation_weight=weight
        )
    if isinstance(x, fx.Proxy):
        given = (x, residual, in_place, activation, arguments, weight)
        return x.tracer.create_proxy("call_function", add_act, given, {})
    return activate(resolve(activation, arguments), x.add_(residual) if in_place else x + residual, weight)


def unchanged(value: Any, expected: Any, name: str) -> None:
    """Raises RuntimeError where an attribute is no longer what it was when the forward was traced."""
    if value != expected and expected == expected:
        raise RuntimeError(
            f"{name} was {expected!r} when vgkern.fuse traced this module, and is {value!r} now: unfuse, then fuse"
        )


def sequential(self: nn.Sequential, input: Any, fused_residual: Any = None) -> Any:
    """The forward of a sequence whose last batch norm takes a residual from outside."""
    takes: Any = self._residual_to
    after = False
    for name, module in self._modules.items():
        if name == takes:
            after = True
            if "_fusion" in vars(module):
                input = add(module, input, fused_residual)
            else:  # a module that ends with the batch norm
                input = module(input, fused_residual=fused_residual)  # type: ignore[misc]
        elif after and type(module) is not nn.Identity:
            raise RuntimeError(f"{name!r} was put behind the batch norm that takes a residual: unfuse, then fuse")
        else:
            input = module(input)  # type: ignore[misc]
    if not after:
        raise RuntimeError(f"the module {takes!r}, which takes a residual, is gone: unfuse, then fuse")
    return input
