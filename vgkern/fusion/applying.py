"""A plan carried out, and undone."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from . import runtime
from .layers import to_add_act, to_batch_norm_act, to_passed, to_plain
from .plan import AddActMatch, Match, Plan, is_sequential
from .rewriting import RESIDUAL, is_rewritten, replace_forward, restore_forward, takes_residual
from .tracing import Trace

__all__ = ["apply", "undo"]


class _Changes:
    """The graphs that differ from what the forwards do, and the sequences that hand a residual on."""

    def __init__(self) -> None:
        self.graphs: dict[int, Trace] = {}
        self.sequences: list[tuple[nn.Module, str]] = []

    def graph(self, traced: Trace) -> fx.Graph:
        assert traced.graph is not None
        self.graphs[id(traced)] = traced
        return traced.graph


def apply(plan: Plan, root: nn.Module) -> None:
    """Change the modules and forwards that the plan names."""
    changes = _Changes()
    passed, added = ({id(module) for module in modules} for modules in (plan.passed, plan.added))
    for match in plan.matches:
        if match.waits:
            _rewrite_sum(match, changes)
    for match in plan.matches:
        if match.add is not None and not match.waits:
            _rewrite_sum(match, changes)
        if match.act is not None and id(match.act.module) not in passed:
            node = match.act.node
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            changes.graph(match.trace).erase_node(node)
        if match.guarded:
            changes.graph(match.trace)
    in_place: dict[int, bool] = {}
    for sum_ in plan.add_acts:
        in_place[id(sum_.act.module)] = sum_.in_place
        _rewrite_sum_alone(sum_, id(sum_.act.module) in added, changes)
    for traced in changes.graphs.values():
        _guard(traced)
        replace_forward(traced.module, traced.graph)  # type: ignore[arg-type]
    for module, name in changes.sequences:
        takes_residual(module, name)

    for match in plan.matches:
        spec = match.act.spec if match.act else None
        to_batch_norm_act(match.module, spec, match.prelu, match.operations, match.in_place)
    for module in plan.passed:
        to_passed(module)
    for module in plan.added:
        to_add_act(module, in_place[id(module)])
    modules = dict(root.named_modules())
    for name, reason in plan.left.items():
        modules[name].__dict__.setdefault("_fusion_left", reason)  # fused before: why it was left then


def _rewrite_sum(match: Match, changes: _Changes) -> None:
    add = match.add
    assert add is not None
    end = match.passed[-1] if match.passed else match.path[-1][1]
    arguments = [*add.args, *(value for name, value in add.kwargs.items() if name != "alpha")]
    for depth, (traced, node) in enumerate(match.path):
        outermost = depth == len(match.path) - 1
        if not outermost and is_sequential(traced.module):
            changes.sequences.append((traced.module, str(node.target)))
            continue
        graph = changes.graph(traced)
        residual: Any
        if outermost and match.waits:
            residual, place, replaced = runtime.WAIT, node, end
        elif outermost:
            (residual,) = (argument for argument in arguments if argument is not end)
            place = replaced = add
        else:
            place = replaced = node
            with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
                residual = graph.placeholder(RESIDUAL, default_value=None)
        with graph.inserting_before(place):
            if depth == 0:
                layer = graph.get_attr(str(node.target))
                fused = graph.call_function(runtime.add, (layer, node.args[0], residual))
            else:
                fused = graph.call_module(str(node.target), node.args, {**node.kwargs, RESIDUAL: residual})
        replaced.replace_all_uses_with(fused)
        passed = list(reversed(match.passed)) if outermost else []
        for old in dict.fromkeys([replaced, *passed, node]):
            graph.erase_node(old)


def _rewrite_sum_alone(sum_: AddActMatch, by_module: bool, changes: _Changes) -> None:
    graph, act = changes.graph(sum_.trace), sum_.act
    with graph.inserting_before(sum_.add):
        if by_module:
            fused = graph.call_function(runtime.add, (graph.get_attr(str(act.node.target)), *sum_.add.args))
        else:
            weight = graph.get_attr(f"{act.node.target}.weight") if isinstance(act.module, nn.PReLU) else None
            spec: Any = act.spec
            arguments = (*sum_.add.args, sum_.in_place, spec.name, spec.keywords(), weight)
            fused = graph.call_function(runtime.add_act, arguments)
    act.node.replace_all_uses_with(fused)
    graph.erase_node(act.node)
    graph.erase_node(sum_.add)


def _guard(traced: Trace) -> None:
    """Let the new forward raise where an attribute that the graph has settled is another."""
    graph: Any = traced.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for name, value in traced.read.items():
            where = f"{type(traced.module).__name__}.{name}"
            graph.call_function(runtime.unchanged, (graph.get_attr(name), value, where))


def undo(root: nn.Module) -> None:
    """Make of all that :func:`apply` changed what it was."""
    for module in root.modules():
        vars(module).pop("_fusion_left", None)
        if "_fusion" in vars(module):
            to_plain(module)
        if is_rewritten(module):
            restore_forward(module)
