"""One module's forward as a graph, its children as single calls; or the reason why that cannot be had.

``torch.fx`` records what a forward does with stand-ins for its arguments. What it would get wrong without a word is
refused here: values that a stand-in answers wrongly (``is None``, ``isinstance``), numbers drawn or tensors made while
tracing, ``no_grad`` and autocast inside, attributes set. Plain values that the forward read from ``self`` are listed,
so that a forward made from the graph can notice when they change.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import operator
import random
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy
import torch
from torch import Tensor, fx, nn

__all__ = ["Trace", "alternatives", "called_outside_forward", "opened_attributes", "trace", "what_is_asked"]

#: Types of attribute that are settled in a graph, and can be compared later.
_PLAIN = (bool, int, float, str)
_MODULE_STATE = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))
_IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"]


class NotTraceable(Exception):
    """With the reason."""


@dataclass
class Trace:
    """What is known of the forward of ``module``."""

    module: nn.Module
    graph: fx.Graph | None = None
    reason: str = ""  # why there is no graph
    fixed: str = ""  # why the forward may not be replaced by the graph's; empty where it may
    read: dict[str, Any] = field(default_factory=dict)  # plain attributes that the graph has settled

    @property
    def output(self) -> fx.Node | None:
        """The one tensor that the forward returns; None where it returns something else."""
        if self.graph is None:
            return None
        (node,) = (node for node in self.graph.nodes if node.op == "output")
        return node.args[0] if isinstance(node.args[0], fx.Node) else None

    def callee(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))


class _Proxy(fx.Proxy):
    """With the in-place operators, which fx records as if they made a new tensor."""


def _in_place(target: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self._modes_outside = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes_outside:
            raise NotTraceable("it computes under no_grad, autocast or the like, which a graph does not keep")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        known = (*self.root.parameters(), *self.root.buffers()) if isinstance(a, Tensor) else ()
        if isinstance(a, Tensor) and not any(a is tensor for tensor in known):
            raise NotTraceable("it makes a tensor of its own, which a graph would keep as a constant")
        return super().create_arg(a)


def _watched(kind: type[nn.Module], tracer: _Tracer, read: dict[str, Any]) -> type[nn.Module]:
    """``kind`` that writes down which plain attributes are read, and refuses to be changed."""

    def getattribute(self, name):
        value = kind.__getattribute__(self, name)
        if type(value) in _PLAIN and name not in _MODULE_STATE:
            read[name] = value
        return value

    def setattribute(self, name, value):
        raise NotTraceable(f"its forward sets the attribute {name!r}")

    # `training` changes from call to call: a stand-in, which refuses to be branched on.
    training = property(lambda self: tracer.create_proxy("get_attr", "training", (), {}))
    body: dict[str, Any] = {"__getattribute__": getattribute, "__setattr__": setattribute, "training": training}
    return types.new_class(kind.__name__, (kind,), {}, lambda namespace: namespace.update(body))


def _random_state() -> tuple[Any, ...]:
    _, keys, *rest = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return random.getstate(), keys.tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()


def trace(module: nn.Module) -> Trace:
    """The graph of one module's own forward."""
    if isinstance(module, torch.jit.ScriptModule):
        return Trace(module, reason="it is scripted")
    if "forward" in vars(module):
        return Trace(module, reason="its forward was replaced on the instance")
    read: dict[str, Any] = {}
    try:
        graph = _graph(module, read)
    except NotTraceable as error:
        return Trace(module, reason=str(error))
    return Trace(module, graph, fixed=_why_fixed(module, graph), read=read)


def _graph(module: nn.Module, read: dict[str, Any], fixed_arguments: dict[str, Any] | None = None) -> fx.Graph:
    kind = type(module)
    tracer = _Tracer()
    before, states = _random_state(), (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    try:
        module.__class__ = _watched(kind, tracer, read)
        graph = tracer.trace(module, fixed_arguments)
    except NotTraceable:
        raise
    except Exception as error:  # whatever a forward does with a stand-in
        message = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise NotTraceable(message.rstrip(":.")) from error
    finally:
        object.__setattr__(module, "__class__", kind)  # past the watch
        changed = _random_state() != before
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
    if changed:
        raise NotTraceable("it draws random numbers itself")
    for node in graph.nodes:
        node.type = None  # an annotation need not be a name where the new forward is made
    return graph


def alternatives(traced: Trace) -> list[fx.Graph] | None:
    """The graphs of the other answers to what the forward asks of its arguments; None where they are not to be had."""
    kind: Any = type(traced.module)
    asked = what_is_asked(kind)
    if not asked <= {"isinstance", "None"}:
        return None
    optional = {
        name: None
        for name, parameter in inspect.signature(kind.forward).parameters.items()
        if parameter.default is None and "None" in asked
    }
    graphs = []
    for arguments in ({}, optional) if optional else ({},):
        for answer in (False, True) if "isinstance" in asked else (False,):
            if not arguments and not answer:
                continue  # the one that is there
            try:
                with _isinstance_says(kind, answer):
                    graphs.append(_graph(traced.module, {}, arguments))
            except NotTraceable:
                return None
    return graphs


@contextlib.contextmanager
def _isinstance_says(kind: Any, answer: bool) -> Iterator[None]:
    """Within it, the methods of a class are told ``answer`` where they ask for the type of a stand-in."""

    def replaced(thing, kinds):
        return answer if isinstance(thing, fx.Proxy) else isinstance(thing, kinds)

    functions = (inspect.unwrap(getattr(kind, name)) for name in _methods(kind) or {})
    scopes = {id(f.__globals__): f.__globals__ for f in functions if hasattr(f, "__globals__")}
    scopes = {key: scope for key, scope in scopes.items() if "isinstance" not in scope}
    for scope in scopes.values():
        scope["isinstance"] = replaced
    try:
        yield
    finally:
        for scope in scopes.values():
            del scope["isinstance"]


def _why_fixed(module: nn.Module, graph: fx.Graph) -> str:
    kind: Any = type(module)
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return "its class has its own way of pickling"
    if what_is_asked(kind):
        return "its forward asks whether an argument is None, or of which type it is"
    try:
        graph.python_code("self")
    except Exception as error:  # a function that has no importable name
        return f"its graph cannot be written as code: {error}"
    return ""


# What the source of a class tells and a trace does not.


@functools.cache
def _methods(kind: type) -> dict[str, ast.FunctionDef] | None:
    """The methods of a class and its bases up to nn.Module by name; None where a source is not to be had."""
    found: dict[str, ast.FunctionDef] = {}
    seen: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base is object:
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if name in seen or not inspect.isfunction(function):
                seen.add(name)
                continue
            seen.add(name)
            try:
                (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            except (OSError, SyntaxError, TypeError, ValueError):
                return None
            if isinstance(node, ast.FunctionDef):
                found[name] = node
    return found


def _is_of(owner: str, node: ast.AST) -> bool:
    """Whether an expression starts from the name ``owner``."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and node.id == owner


def _first_argument(function: ast.FunctionDef) -> str:
    """``self``, by whatever name; empty for a static method."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return arguments[0].arg if arguments else ""


def _self_attributes(tree: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Attributes of self that are called, and those that are read otherwise."""
    owner = _first_argument(tree)
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tested = [
        node.left
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
    ]
    called, read = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_of(owner, node.value) and isinstance(node.value, ast.Name):
            if any(node is function for function in functions):
                called.add(node.attr)
            elif not any(node is subject for subject in tested):
                read.add(node.attr)
    return called, read


def _reached_from_forward(methods: dict[str, ast.FunctionDef]) -> set[str]:
    reached, todo = set(), ["forward"]
    while todo:
        name = todo.pop()
        if name in methods and name not in reached:
            reached.add(name)
            todo += set.union(*_self_attributes(methods[name]))
    return reached


def _code_asks_for_types(code: types.CodeType) -> bool:
    """The same where there is no source, in an interactive session: of the forward alone, and stricter."""
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        if "NONE" in instruction.opname and "JUMP" in instruction.opname:
            subject = index - 1
        elif instruction.opname == "IS_OP":
            subject = index - 2  # before the constant
        else:
            continue
        while instructions[subject].opname == "LOAD_ATTR":
            subject -= 1
        load = instructions[subject]
        if not load.opname.startswith("LOAD_FAST") or load.argval != code.co_varnames[0]:
            return True
    return bool({"isinstance", "type", "hasattr"} & set(code.co_names))


@functools.cache
def what_is_asked(kind: Any) -> frozenset[str]:
    """What a forward asks that a stand-in answers wrongly.

    ``"isinstance"`` of something that is no attribute of its own, whether an optional argument is ``"None"``, or
    ``"more"``.
    """
    methods = _methods(kind)
    if methods is None:
        return frozenset({"more"} if _code_asks_for_types(inspect.unwrap(kind.forward).__code__) else ())
    forward = inspect.signature(kind.forward).parameters
    asked = set()
    for name in _reached_from_forward(methods):
        for node in ast.walk(methods[name]):
            subject: ast.AST | None = None
            question = "more"
            if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                subject = node.left
                if name == "forward" and isinstance(subject, ast.Name) and subject.id in forward:
                    question = "None" if forward[subject.id].default is None else "more"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                subject = node.args[0] if node.func.id in ("isinstance", "type", "hasattr") else None
                question = "isinstance" if node.func.id == "isinstance" else "more"
            if subject is not None and not _is_of(_first_argument(methods[name]), subject):
                asked.add(question)
    return frozenset(asked)


def called_outside_forward(kind: type, attribute: str) -> str | None:
    """The method that calls ``self.<attribute>`` and is not just a part of the forward."""
    methods = _methods(kind) or {}
    inside = {name for name in _reached_from_forward(methods) if name == "forward" or name.startswith("_")}
    for name, tree in methods.items():
        if name not in inside and attribute in _self_attributes(tree)[0]:
            return name
    return None


def opened_attributes(kind: type) -> set[str]:
    """Attributes that methods of a class read other than to call them: containers that they may look into."""
    methods = _methods(kind) or {}
    return set().union(*(_self_attributes(tree)[1] for name, tree in methods.items() if name != "__init__"))
