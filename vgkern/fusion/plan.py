"""Which batch norms of a model become fused layers, with what, and why the others do not.

Nothing is changed here. Every module's forward is traced by itself, its children being single calls. A batch norm is
followed from its call through the module that it ends, and the module that this one ends, to where its output is used:
a sum, an activation. What a reader of the model could not be sure of is left, with the reason.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from ..ops import FLOATING_DTYPES
from .activations import Act, activation_of, has_hooks
from .layers import FUSED
from .rewriting import is_rewritten
from .tracing import Trace, alternatives, called_outside_forward, opened_attributes, trace, what_is_asked

__all__ = ["AddActMatch", "Analysis", "Match", "Plan", "is_sequential", "make_plan"]

#: What the names of functions that draw random numbers have in them.
_RANDOM = ("drop", "rand", "bernoulli", "normal", "uniform", "multinomial", "poisson", "exponential", "rrelu")

Call = tuple[Trace, fx.Node]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_ADDS = {operator.add: False, operator.iadd: True, torch.add: False, "add": False, "add_": True}


def operations(batch_norm: bool, residual: bool, act: Act | None) -> tuple[str, ...]:
    named = {"batch norm": batch_norm, "residual": residual, str(act.spec) if act else "": act is not None}
    return tuple(name for name, there in named.items() if there)


class Refusal(Exception):
    """Of one batch norm, with the reason."""


@dataclass
class Match:
    """A batch norm and what becomes one operation with it.

    ``path`` is its call and the calls of the modules that end with it, from the inside out; the sum and the activation
    stand in the graph of the last.
    """

    module: nn.Module
    path: list[Call]
    passed: list[fx.Node] = field(default_factory=list)  # identities between the last call and what follows
    add: fx.Node | None = None
    in_place: bool = False
    act: Act | None = None
    guarded: bool = False  # the forward is replaced for the sake of the flags that it has settled
    beside: fx.Node | None = None  # a sum in place of which it is the second operand
    shortcut: Match | None = None  # the other operand of the sum, whose batch norm is computed together with this one
    waits: bool = False  # it is the shortcut of another

    @property
    def trace(self) -> Trace:
        return self.path[-1][0]

    @property
    def operations(self) -> tuple[str, ...]:
        """In words, for the report."""
        if self.waits:
            return ("batch norm", "with the one that it is added to")
        named = operations(True, self.add is not None, self.act)
        return named if self.shortcut is None else ("batch norm", "residual's batch norm", *named[2:])

    @property
    def prelu(self) -> nn.PReLU | None:
        return self.act.module if self.act and isinstance(self.act.module, nn.PReLU) else None


@dataclass
class AddActMatch:
    """A sum and an activation without a batch norm."""

    trace: Trace
    add: fx.Node
    in_place: bool
    act: Act

    @property
    def operations(self) -> tuple[str, ...]:
        return operations(False, True, self.act)


@dataclass
class Plan:
    """What is to be changed, and what is left."""

    matches: list[Match]
    add_acts: list[AddActMatch]
    left: dict[str, str]  # name of a batch norm -> why
    names: dict[int, str]  # id of a module -> its name
    passed: list[nn.Module]  # activation modules all of whose calls are in fused layers
    added: list[nn.Module]  # activation modules that take a sum instead


def is_sequential(module: nn.Module) -> bool:
    """Whether a module calls its members one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", "")).startswith("BatchNorm")
    return isinstance(module, _BatchNorm)


def _has_code_of_its_own(module: nn.Module) -> bool:
    """Whether a module computes by calling others: not a container, not one of torch.nn's operations or of ours."""
    if isinstance(module, _CONTAINERS):
        return type(module).forward is not nn.Module.forward
    package = type(module).__module__
    return isinstance(module, nn.Sequential) or not package.startswith(("torch.nn.modules", "vgkern.nn"))


class Analysis:
    """A model as far as its forwards show it: who calls what, and whose parent is who."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.names = {id(module): name for name, module in root.named_modules()}
        self.parents: dict[int, list[nn.Module]] = defaultdict(list)
        self.paths: dict[int, list[str]] = defaultdict(list)
        self.traces: dict[int, Trace] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(name)
        for module in root.modules():
            for child in module._modules.values():
                if child is not None:
                    self.parents[id(child)].append(module)
            if _has_code_of_its_own(module):
                fused = is_rewritten(module)
                self.traces[id(module)] = Trace(module, reason="it is fused already") if fused else trace(module)
        self.live: set[int] = set()
        self._visit(root)
        self.calls: dict[int, list[Call]] = defaultdict(list)
        for traced in self.live_traces():
            for node in traced.graph.nodes:  # type: ignore[union-attr]
                callee = traced.callee(node)
                if callee is not None:
                    self.calls[id(callee)].append((traced, node))

    def _visit(self, module: nn.Module) -> None:
        """Mark what is called, as far as it can be told: by a graph, or by whatever cannot be traced."""
        if id(module) in self.live:
            return
        self.live.add(id(module))
        traced = self.traces.get(id(module))
        if traced is not None and traced.graph is not None:
            for node in traced.graph.nodes:
                callee = traced.callee(node)
                if callee is not None:
                    self._visit(callee)
            return
        opened = opened_attributes(type(module)) if traced is not None else set()
        for key, child in module.named_children():
            if key in opened and is_sequential(child):
                kind = type(module).__name__
                self.traces[id(child)] = Trace(child, reason=f"{kind} reads its members, and cannot be traced")
            self._visit(child)

    def live_traces(self) -> list[Trace]:
        return [t for key, t in self.traces.items() if key in self.live and t.graph is not None]

    def unseen(self, module: nn.Module) -> Trace | None:
        """Whoever may call a module in a way that no graph shows."""
        for parent in self.parents[id(module)]:
            traced = self.traces.get(id(parent))
            if traced is not None and traced.graph is None and id(parent) in self.live:
                return traced
            if isinstance(parent, _CONTAINERS) and (found := self.unseen(parent)):
                return found
        return None

    # One batch norm.

    def check(self, module: nn.Module) -> Call:
        """The one call of a batch norm that can be fused."""
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise Refusal("it is scripted")
        if parametrize.is_parametrized(module):
            raise Refusal("it is parametrised")
        if isinstance(module, _LazyNormBase):
            raise Refusal("it is lazy: it has no channels before its first call")
        if kind not in FUSED:
            raise Refusal(f"{kind.__name__} is a subclass, which may compute something else")
        if "forward" in vars(module):
            raise Refusal("its forward was replaced on the instance")
        if getattr(module, "qconfig", None) is not None:
            raise Refusal("it is prepared for quantisation")
        state = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        if {*module._parameters, *module._buffers} != state or module._modules:
            raise Refusal("its tensors are not those of a batch norm: pruning, or weight normalisation")
        dtypes = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() or t.is_complex()}
        if not dtypes <= set(FLOATING_DTYPES):
            raise Refusal(f"its dtype is {', '.join(sorted(map(str, dtypes)))}")
        if len(self.parents[id(module)]) > 1:
            raise Refusal(f"it is shared: {', '.join(self.paths[id(module)])} are one module")
        if (traced := self.unseen(module)) is not None:
            raise Refusal(f"the forward of {type(traced.module).__name__} cannot be traced: {traced.reason}")
        calls = self.calls[id(module)]
        if len(calls) != 1:
            raise Refusal(f"it is called {len(calls)} times" if calls else "no forward that can be traced calls it")
        return calls[0]

    def match(self, module: nn.Module) -> Match:
        path = [self.check(module)]
        _, node = path[0]
        if len(node.args) != 1 or node.kwargs:
            raise Refusal("it is called with other arguments than its input")
        while True:
            traced, node = path[-1]
            end, passed = self._through_identities(traced, node)
            match = Match(module, path, passed)
            uses = [user for user in end.users for argument in _nodes_in(user) if argument is end]
            if len(uses) > 1 and len(path) == 1:
                raise Refusal(f"its output is used {len(uses)} times")
            if len(uses) != 1:
                return match
            (user,) = uses
            if user.op != "output":
                break
            if traced.output is not end or (call := self._call_of_end(traced.module)) is None:
                return match
            path = [*path, call]
        self._take_sum(match, end, user)
        if match.add is not None:
            end, _ = self._through_identities(traced, match.add)
            if len(end.users) != 1:
                return self._checked(match)
            (user,) = end.users
        act = activation_of(traced, user)
        if act is not None and user.args[0] is end and end not in _nodes_in(user)[1:]:
            if act.module is not None and has_hooks(act.module):
                raise Refusal(f"a hook on the activation {self.names[id(act.module)]} would not see it any more")
            match.act = act
        return self._checked(match)

    def _checked(self, match: Match) -> Match:
        if (match.add is not None or match.act is not None) and has_hooks(match.module):
            raise Refusal("a hook on it would see the sum or the activation as well")
        return match

    def _through_identities(self, traced: Trace, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        passed: list[fx.Node] = []
        while len(node.users) == 1:
            (user,) = node.users
            callee = traced.callee(user)
            if type(callee) is not nn.Identity or has_hooks(callee) or user.args != (node,) or user.kwargs:
                break
            passed.append(user)
            node = user
        return node, passed

    def _call_of_end(self, module: nn.Module) -> Call | None:
        """The only call of a module whose output is a batch norm's, if what uses it may be looked for out there."""
        calls = self.calls[id(module)]
        once = len(calls) == 1 and len(self.parents[id(module)]) == 1 and self.unseen(module) is None
        return calls[0] if once and module is not self.root and not has_hooks(module) else None

    def _take_sum(self, match: Match, end: fx.Node, user: fx.Node) -> None:
        in_place = _ADDS.get(user.target) if user.op in ("call_function", "call_method") else None  # type: ignore[arg-type]
        if in_place is None:
            return
        deep = len(match.path) > 1
        arguments = [*user.args, *(value for key, value in user.kwargs.items() if key not in ("alpha", "out"))]
        others = [argument for argument in arguments if argument is not end]
        reason = ""
        if len(others) != 1 or user.kwargs.get("out") is not None:
            reason = "the sum that follows writes to a tensor of its own (out=)"
        elif user.kwargs.get("alpha", 1) != 1:
            reason = f"the sum that follows has alpha={user.kwargs['alpha']}"
        elif not isinstance(others[0], fx.Node):
            reason = f"the sum that follows adds the number {others[0]!r}"
        elif others[0].op == "get_attr":
            reason = f"the sum that follows adds {others[0].target}, which broadcasts"
        if reason:
            if deep:
                return
            raise Refusal(reason)
        if in_place and user.args[0] is not end:
            match.beside = user
            return  # it changes the other tensor, which somebody may see
        match.add, match.in_place = user, in_place


def _nodes_in(user: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they occur."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg((user.args, user.kwargs), note)
    return found


def _is_in_place(traced: Trace, node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    callee = traced.callee(node)
    inside = callee.modules() if callee is not None else ()
    return (
        (node.op == "call_method" and name.endswith("_"))
        or (
            node.op == "call_function"
            and (name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv", "setitem"))
        )
        or bool(node.kwargs.get("inplace"))
        or any(argument is True for argument in node.args[1:])
        or any(getattr(module, "inplace", False) for module in inside)
    )


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes = []
    node = first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _may_wait(analysis: Analysis, match: Match, add: fx.Node) -> bool:
    """Whether the fused call may stand where the sum stands, behind what is skipped."""
    traced, call = match.path[-1]
    skipped = [node for node in _between(call, add) if node not in match.passed]
    if not skipped:
        return True
    source: Any = call.args[0] if call.args else None
    # A tensor that somebody else has may be changed under another name.
    exposed = not isinstance(source, fx.Node) or source.op in ("placeholder", "get_attr") or len(source.users) > 1
    if exposed and any(_is_in_place(traced, node) for node in skipped):
        return False
    moved = traced.callee(call)
    if len(match.path) == 1 or moved is None:
        return moved is not None
    # A whole module must draw no random numbers, nor change in place what is skipped reads.
    return all(_draws_nothing(analysis, module) for module in moved.modules()) and not (
        exposed and _is_in_place(traced, call)
    )


def _draws_nothing(analysis: Analysis, module: nn.Module) -> bool:
    """Whether a module surely draws no random numbers by itself."""
    if has_hooks(module) or isinstance(module, (_DropoutNd, nn.RReLU)):
        return False
    traced = analysis.traces.get(id(module))
    if traced is None:
        return type(module).__module__.startswith("torch.nn.modules")
    if traced.graph is None:
        return False
    targets = [node.target for node in traced.graph.nodes if node.op in ("call_function", "call_method")]
    names = [str(getattr(target, "__name__", target)) for target in targets]
    return not any(word in name for name in names for word in _RANDOM)


def _why_not_rewritten(traced: Trace) -> str:
    if is_sequential(traced.module):
        return (
            "" if type(traced.module).__reduce_ex__ is object.__reduce_ex__ else "its class has its own way of pickling"
        )
    return traced.fixed


def _check_rewriting(match: Match, rewritten: list[Trace]) -> None:
    """Refuse where the forwards that a match needs anew may not be replaced."""
    for traced in rewritten:
        if reason := _why_not_rewritten(traced):
            raise Refusal(f"the forward of {type(traced.module).__name__} may not be replaced: {reason}")
    for traced, node in match.path:
        if "." not in str(node.target):
            method = called_outside_forward(type(traced.module), str(node.target))
            if method is not None:
                raise Refusal(f"{type(traced.module).__name__}.{method} calls it as well")


def make_plan(analysis: Analysis, *, double: bool = True) -> Plan:
    """Settle every batch norm of the model; ``double``: two whose outputs are added may be one operation."""
    root = analysis.root
    left: dict[str, str] = {}
    matches: list[Match] = []

    def refuse(module: nn.Module, reason: object) -> None:
        left[analysis.names[id(module)]] = str(reason)

    for module in root.modules():
        if not _is_batch_norm(module):
            continue
        try:
            matches.append(Match(module, []) if module is root and type(module) in FUSED else analysis.match(module))
        except Refusal as error:
            refuse(module, error)
    _settle_sums(analysis, matches, double)

    while True:
        passed = _passed_activations(analysis, matches)
        kept = []
        for match in matches:
            try:
                _check_forwards(match, matches, passed)
                kept.append(match)
            except Refusal as error:
                refuse(match.module, error)
        if len(kept) == len(matches):
            break
        matches = kept  # a match less may leave an activation with a call that no fused layer computes
    add_acts, added = _add_acts(analysis, matches)
    return Plan(matches, add_acts, left, analysis.names, passed, added)


def _settle_sums(analysis: Analysis, matches: list[Match], double: bool) -> None:
    """One batch norm for each sum; the other, in a shortcut with a projection, goes with it or stands alone."""
    by_sum: dict[fx.Node, list[Match]] = defaultdict(list)
    for match in matches:
        if match.add is not None:
            by_sum[match.add].append(match)
    for add, candidates in by_sum.items():
        # In place, the sum's first operand. Else the one that is called in this very forward, or the later call.
        order = list(candidates[0].trace.graph.nodes)  # type: ignore[union-attr]
        candidates.sort(key=lambda m: (-len(m.path), order.index(m.path[-1][1])), reverse=True)
        taken = next((match for match in candidates if _may_wait(analysis, match, add)), None)
        for match in candidates:
            if match is not taken:
                match.add, match.act, match.in_place = None, None, False
        others = [match for match in candidates if match is not taken] + [m for m in matches if m.beside is add]
        if double and taken is not None and len(others) == 1 and _may_be_double(analysis, taken, others[0], add):
            (taken.shortcut,) = others
            others[0].add, others[0].waits = add, True


def _may_be_double(analysis: Analysis, taken: Match, match: Match, add: fx.Node) -> bool:
    """Whether the batch norm of ``match`` may wait for that of ``taken``: ``act(bn1(x) + bn2(residual))``."""
    if has_hooks(match.module):
        return False
    if any(type(m.module) is nn.SyncBatchNorm for m in (taken, match)):
        return False  # statistics that processes share are gathered one batch norm at a time
    try:
        for m in (taken, match):
            _check_rewriting_for_sum(m)
    except Refusal:
        return False
    traced, call = match.path[0]
    source: Any = call.args[0]
    # What it waits with must stay what it is: the output of a convolution is nobody else's.
    makes = traced.callee(source) if len(source.users) == 1 else None
    is_private = isinstance(makes, (_ConvNd, nn.Linear)) and not has_hooks(makes)
    return is_private or _may_wait(analysis, match, add)


def _check_forwards(match: Match, matches: list[Match], passed: list[nn.Module]) -> None:
    rewritten = []
    match.guarded = False
    if match.add is not None:
        _check_rewriting_for_sum(match)
    elif match.act is not None and not any(match.act.module is module for module in passed):
        if is_sequential(match.trace.module):
            raise Refusal("the activation that follows is shared with other places")
        rewritten = [match.trace]
    elif match.act is not None:
        _check_other_answers(match, matches)
        if any(isinstance(value, bool) for value in match.trace.read.values()) and not match.trace.fixed:
            match.guarded = not is_sequential(match.trace.module)
    if rewritten:
        _check_rewriting(match, rewritten)


def _check_rewriting_for_sum(match: Match) -> None:
    rewritten = [traced for traced, _ in match.path]
    if any(node.op == "placeholder" and str(node.target).startswith("*")
           for traced in rewritten[:-1] for node in traced.graph.nodes):  # type: ignore[union-attr]  # fmt: skip
        raise Refusal(f"the forward of {type(rewritten[0].module).__name__} takes any number of arguments")
    _check_rewriting(match, rewritten)


def _check_other_answers(match: Match, matches: list[Match]) -> None:
    """Refuse an activation that would be missed, or be too much, where a forward that stays finds other arguments."""
    assert match.act is not None
    activation = match.act.module
    asking = [traced for traced, _ in match.path if _asks(traced)]
    members = {id(m.module) for m in matches if m.act is not None and m.act.module is activation}
    for traced in asking:
        refusal = Refusal(f"the forward of {type(traced.module).__name__} asks for types, and goes other ways by them")
        graphs = alternatives(traced)
        if graphs is None or len(match.path) > 1:
            raise refusal
        for graph in graphs:
            other = Trace(traced.module, graph)
            for node in graph.nodes:
                callee = other.callee(node)
                if callee is match.module:
                    users = list(_past_identities(other, node).users)
                    if len(users) != 1 or other.callee(users[0]) is not activation:
                        raise refusal
                elif callee is activation and id(other.callee(_before_identities(other, node.args[0]))) not in members:
                    raise refusal


def _asks(traced: Trace) -> bool:
    kind: Any = type(traced.module)
    return bool(what_is_asked(kind))


def _past_identities(traced: Trace, node: fx.Node) -> fx.Node:
    while len(node.users) == 1 and type(traced.callee(user := next(iter(node.users)))) is nn.Identity:
        node = user
    return node


def _before_identities(traced: Trace, node: Any) -> Any:
    while type(traced.callee(node)) is nn.Identity:
        node = node.args[0]
    return node


def _passed_activations(analysis: Analysis, matches: list[Match]) -> list[nn.Module]:
    """Activation modules that have no other calls than those that fused layers compute."""
    taken: dict[int, int] = defaultdict(int)
    modules = {}
    for match in matches:
        if match.act is not None and match.act.module is not None:
            taken[id(match.act.module)] += 1
            modules[id(match.act.module)] = match.act.module
    return [
        module
        for key, module in modules.items()
        if taken[key] == len(analysis.calls[key]) and analysis.unseen(module) is None
    ]


def _add_acts(analysis: Analysis, matches: list[Match]) -> tuple[list[AddActMatch], list[nn.Module]]:
    """Sums with an activation that no batch norm took, and the modules that can take them as a second argument."""
    sums = {match.add for match in matches if match.add is not None}
    taken = {match.act.node for match in matches if match.act is not None}
    found = []
    for traced in analysis.live_traces():
        if traced.fixed or is_sequential(traced.module):
            continue
        for node in traced.graph.nodes:  # type: ignore[union-attr]
            act = activation_of(traced, node)
            if act is None or node in taken or not isinstance(node.args[0], fx.Node):
                continue
            add = node.args[0]
            if add in sums or len(add.users) != 1 or add.op not in ("call_function", "call_method"):
                continue
            in_place = _ADDS.get(add.target)  # type: ignore[arg-type]
            if (
                in_place is None
                or len(add.args) != 2
                or add.kwargs
                or not all(isinstance(a, fx.Node) for a in add.args)
            ):
                continue
            if act.module is not None and (has_hooks(act.module) or len(analysis.parents[id(act.module)]) > 1):
                continue
            if any(argument.op == "get_attr" for argument in add.all_input_nodes):
                continue  # it broadcasts
            target: Any = add.args[0]
            if in_place and (target.op != "call_module" or len(target.users) != 1):
                continue  # somebody may see the tensor that it changes
            if any(
                called_outside_forward(type(traced.module), str(a.target)) for a in (node,) if a.op == "call_module"
            ):
                continue
            found.append(AddActMatch(traced, add, in_place, act))
    added: list[nn.Module] = []
    bypassed = {id(match.act.module) for match in matches if match.act is not None}
    for match in found:
        module = match.act.module
        if module is None or isinstance(module, nn.PReLU) or id(module) in bypassed or module in added:
            continue
        same = len({other.in_place for other in found if other.act.module is module}) == 1
        if same and analysis.unseen(module) is None:
            added.append(module)
    return found, added
