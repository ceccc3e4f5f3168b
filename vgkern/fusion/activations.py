"""Which node of a graph applies which activation: a table, and one function that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from ..activations import TABLE, ActivationSpec, resolve
from .tracing import Trace

__all__ = ["Act", "activation_of", "has_hooks"]


class Act(NamedTuple):
    """A node that applies an activation, to one argument."""

    node: fx.Node
    spec: ActivationSpec
    module: nn.Module | None  # that it calls; None for a function


#: The arguments of ``torch.nn.functional``'s activations after the first, in order.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "leaky_relu": ("negative_slope", "inplace"),
    "elu": ("alpha", "inplace"),
    "celu": ("alpha", "inplace"),
    "gelu": ("approximate",),
    "softplus": ("beta", "threshold"),
}


def _functions() -> dict[Callable[..., Any] | str, str]:
    """Function, or name of a method -> name of the activation.

    A clamp is none of them: at its bounds its derivative is not that of relu and relu6. A prelu as a function is none
    either: its weight is no module's.
    """
    found: dict[Callable[..., Any] | str, str] = {}
    for name, row in TABLE.items():
        if row.learnable or name == "identity":
            continue
        for spelling in (name, f"{name}_"):
            for namespace in (F, torch):
                if hasattr(namespace, spelling):
                    found[getattr(namespace, spelling)] = name
            if hasattr(torch.Tensor, spelling):
                found[spelling] = name
    return found


_FUNCTIONS = _functions()
_MODULES = tuple(row.module for row in TABLE.values() if row.name != "identity")


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody watches the calls of a module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in hooks)


def activation_of(trace: Trace, node: fx.Node) -> Act | None:
    """The activation that a node applies; None for anything else, and for arguments that the fused one lacks."""
    if node.op == "call_module":
        module = trace.callee(node)
        if module is None or type(module) not in _MODULES or "forward" in vars(module):
            return None
        if len(node.args) != 1 or node.kwargs or parametrize.is_parametrized(module):
            return None
        try:
            return Act(node, resolve(module), module)
        except (TypeError, ValueError):  # a slope that is no finite number
            return None
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = _FUNCTIONS.get(node.target)
    if name is None:
        return None
    names = _ARGUMENTS.get(name, ("inplace",))
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    given.pop("inplace", None)
    if len(node.args) > 1 + len(names):
        return None
    try:
        return Act(node, resolve(name, given), None)
    except (TypeError, ValueError):  # computed in the forward, or `out=`
        return None
