"""What a model's initialisation depends on: the activation after each weight layer, and the residual branches.

Read from the graph that ``torch.fx`` traces; a model that it cannot trace is read submodule by submodule.
"""

from __future__ import annotations

import heapq
import operator
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .. import activations
from ..activations import ActivationSpec
from ..nn._activation import ActivationMixin
from ..nn.blocks import DropPath
from .gains import leaky

__all__ = ["NORMS", "WEIGHTED", "Branch", "Structure", "read"]

WEIGHTED = (nn.Linear, _ConvNd)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# What may stand between the end of a branch and its sum.
_PASSED = (nn.Identity, _DropoutNd, DropPath)

_IDENTITY = ActivationSpec("identity")
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Branch:
    """A residual branch: what is added to a shortcut.

    Attributes:
        layers: its weight layers, in the order of computation.
        end: the weight layer or norm whose output is what is added; None if something else comes after them.
        normalised: whether it has a norm anywhere.
    """

    layers: tuple[nn.Module, ...]
    end: nn.Module | None
    normalised: bool


@dataclass
class Structure:
    """``follows``: the activation that the output of a weight layer goes to. ``last``: the last weight layer."""

    follows: dict[nn.Module, ActivationSpec] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    last: nn.Module | None = None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (ActivationMixin, DropPath)) or super().is_leaf_module(m, module_qualified_name)


def read(model: nn.Module) -> Structure:
    """The structure of ``model``, which stays as it is."""
    structure = Structure()
    traced = _read(model, structure)
    weighted = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    if not traced:
        _read_order(model, structure)
        structure.last = weighted[-1] if weighted else None
    for layer in weighted:
        structure.follows.setdefault(layer, _IDENTITY)
    return structure


def _read(module: nn.Module, structure: Structure) -> bool:
    """Whether ``module`` itself could be traced; if not, its children have been, as far as they can be."""
    if isinstance(module, WEIGHTED) or next(module.children(), None) is None:
        return False
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a forward written for tensors does with a proxy
        for child in module.children():
            _read(child, structure)
        return False
    _Graph(module, graph).enter_in(structure)
    return True


def _read_order(model: nn.Module, structure: Structure) -> None:
    """For layers whose graph does not say it: the next activation in the order in which modules were registered."""
    waiting: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, WEIGHTED) and module not in structure.follows:
            waiting.append(module)
        elif (spec := _spec_of_module(module)) is not None:
            structure.follows.update(dict.fromkeys(waiting, spec))
            waiting.clear()


class _Graph:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: place for place, node in enumerate(self.nodes)}
        modules = dict(root.named_modules(remove_duplicate=False))
        self.module = {node: modules[node.target] for node in self.nodes if node.op == "call_module"}

    def enter_in(self, structure: Structure) -> None:
        for node in self.nodes:
            layer = self.module.get(node)
            if isinstance(layer, WEIGHTED):
                structure.last = layer
                spec = self.what_follows(node)
                if spec is not None:
                    structure.follows.setdefault(layer, spec)
            branch = self.branch(node)
            if branch is not None:
                structure.branches.append(branch)

    def what_follows(self, node: fx.Node) -> ActivationSpec | None:
        """The nearest activation on the way to the next weight layers."""
        waiting, seen = deque(node.users), set(node.users)
        while waiting:
            user = waiting.popleft()
            spec = _spec_of_module(self.module[user]) if user in self.module else _spec_of_call(user)
            if spec is not None:
                return spec
            if not isinstance(self.module.get(user), WEIGHTED):
                waiting.extend(after for after in user.users if after not in seen)
                seen.update(user.users)
        return None

    def branch(self, node: fx.Node) -> Branch | None:
        """The residual branch of a sum: the side with more weight layers, if the other has at most a projection."""
        summands = self.summands(node)
        if summands is None:
            return None
        sides = self.sides(*summands)
        layers = [[self.module[n] for n in side if isinstance(self.module.get(n), WEIGHTED)] for side in sides]
        longer = int(len(layers[1]) > len(layers[0]))
        if len(layers[0]) == len(layers[1]) or len(layers[1 - longer]) > 1:
            return None
        # A fused layer's batch norm is of its first argument.
        fused = isinstance(self.module.get(node), NORMS) and longer == 0
        norms = [n for n in sides[longer] if isinstance(self.module.get(n), NORMS)]
        end = self.module[node] if fused else self.end(summands[longer])
        return Branch(tuple(layers[longer]), end, fused or bool(norms))

    def summands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        given: tuple[Any, ...]
        if node in self.module:
            if not isinstance(self.module[node], ActivationMixin):
                return None
            given = (*node.args, *node.kwargs.values())
        elif node.target in _SUMS:
            given = node.args
        else:
            return None
        nodes = [summand for summand in given if isinstance(summand, fx.Node)]
        return (nodes[0], nodes[1]) if len(given) == len(nodes) == 2 else None

    def sides(self, a: fx.Node, b: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """What only ``a`` and what only ``b`` is computed from, in the order of computation."""
        marks = {a: 1}
        marks[b] = marks.get(b, 0) | 2
        heap = [-self.index[node] for node in marks]
        heapq.heapify(heap)
        only: dict[int, list[fx.Node]] = {1: [], 2: []}
        while any(marks[self.nodes[-place]] != 3 for place in heap):  # until the ways meet
            node = self.nodes[-heapq.heappop(heap)]
            if marks[node] != 3:
                only[marks[node]].insert(0, node)
            for parent in node.all_input_nodes:
                if parent not in marks:
                    marks[parent] = 0
                    heapq.heappush(heap, -self.index[parent])
                marks[parent] |= marks[node]
        return only[1], only[2]

    def end(self, node: fx.Node) -> nn.Module | None:
        module = self.module.get(node)
        while isinstance(module, _PASSED):
            node = node.args[0]  # type: ignore[assignment]
            module = self.module.get(node)
        if isinstance(module, (*WEIGHTED, *NORMS)) and _spec_of_module(module) is None:
            return module
        return None


def _spec_of_module(module: nn.Module) -> ActivationSpec | None:
    """The activation that a module applies; None if it applies none, or one that the table does not have."""
    if isinstance(module, ActivationMixin):
        weight = module.activation_weight
        spec = module.activation if weight is None else leaky(_mean(weight))
        return None if spec == _IDENTITY else spec
    if isinstance(module, nn.PReLU):
        return leaky(_mean(module.weight))
    return activations.resolve(module) if type(module) in activations.MODULES else None


def _mean(weight: torch.Tensor) -> float:
    return 0.25 if weight.is_meta else weight.detach().mean().item()


def _spec_of_call(node: fx.Node) -> ActivationSpec | None:
    """The activation that ``F.relu(x)``, ``torch.tanh(x)``, ``x.sigmoid_()``, ... apply."""
    if node.op not in ("call_function", "call_method"):
        return None
    found = activations.of_call(node.target, node.args[1:], node.kwargs)
    if found is None:
        return None
    name, given = found
    row = activations.TABLE[name]
    if row.learnable:
        return leaky(0.25)
    constants = {key: value for key, value in given.items() if isinstance(value, (int, float, str))}
    return activations.resolve(name, {key: constants[key] for key in row.arguments if key in constants})
