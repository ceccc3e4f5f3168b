"""Which node of a graph applies which activation, so that a fused layer may apply it instead."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx, nn
from torch.nn.utils import parametrize

from ..activations import MODULES, TABLE, ActivationSpec, of_call, resolve
from .tracing import Trace

__all__ = ["Act", "activation_of", "has_hooks"]


class Act(NamedTuple):
    """A node that applies an activation, to one argument."""

    node: fx.Node
    spec: ActivationSpec
    module: nn.Module | None  # that it calls; None for a function


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody watches the calls of a module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in hooks)


def activation_of(trace: Trace, node: fx.Node) -> Act | None:
    """The activation that a node applies; None for anything else, and for arguments that the fused one lacks."""
    if node.op == "call_module":
        module = trace.callee(node)
        if module is None or type(module) not in MODULES or "forward" in vars(module):
            return None
        if len(node.args) != 1 or node.kwargs or parametrize.is_parametrized(module):
            return None
        try:
            return Act(node, resolve(module), module)
        except (TypeError, ValueError):  # a slope that is no finite number
            return None
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    found = of_call(node.target, node.args[1:], node.kwargs)
    if found is None or TABLE[found[0]].learnable:  # a prelu as a function: its weight is no module's
        return None
    try:
        return Act(node, resolve(*found), None)
    except (TypeError, ValueError):  # computed in the forward, or `out=`
        return None
