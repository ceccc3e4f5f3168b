"""Modules with another forward: an instance gets a subclass of its own class, whose forward is a graph's code.

The class keeps its name, so that nothing but the forward differs: methods, ``isinstance``, hooks, submodules. It is
pickled as (the class it came from, the code), like ``torch.fx.GraphModule``.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import types
from collections import OrderedDict
from typing import Any

from torch import fx, nn

from . import runtime

__all__ = ["is_rewritten", "replace_forward", "restore_forward", "takes_residual"]

_classes: dict[Any, type[nn.Module]] = {}
_numbers = itertools.count(1)

#: The name of the argument by which a module is handed a residual for the batch norm that it ends with.
RESIDUAL = "fused_residual"

#: A module of the code's globals, by name: modules are not pickled.
_MODULE = "module "

Code = tuple[str, tuple[tuple[str, Any], ...]]


def _new(base: type[nn.Module], code: Code | None) -> nn.Module:
    kind = _rewritten(base, code)
    return kind.__new__(kind)


def _reduce(self, protocol):
    kind = type(self)
    _, _, *state = super(kind, self).__reduce_ex__(protocol)
    return _new, (kind._fusion_base, kind._fusion_code), *state


def _slice(self, index):
    # nn.Sequential makes a sequence of its own class, whose members are others than those of this forward.
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
    return super(type(self), self).__getitem__(index)


def _rewritten(base: type[nn.Module], code: Code | None) -> type[nn.Module]:
    """The subclass of ``base`` with the forward of ``code``; None for a sequence's own, with a residual."""
    key = (base, None if code is None else (code[0], tuple((name, _key(value)) for name, value in code[1])))
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
            "__reduce_ex__": _reduce, "_fusion_base": base, "_fusion_code": code,
        }  # fmt: skip
        if code is None:
            body |= {"forward": runtime.sequential, "__getitem__": _slice}
        else:
            body["forward"] = _function(*code)
        _classes[key] = types.new_class(base.__name__, (base,), {}, lambda namespace: namespace.update(body))
    return _classes[key]


def _key(value: Any) -> Any:
    return value if isinstance(value, str) else id(value)


def _function(source: str, names: tuple[tuple[str, Any], ...]) -> Any:
    namespace: dict[str, Any] = {}
    for name, value in names:
        is_module = isinstance(value, str) and value.startswith(_MODULE)
        namespace[name] = importlib.import_module(value.removeprefix(_MODULE)) if is_module else value
    filename = f"<vgkern.fuse {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(source, filename, "exec"), namespace)
    return namespace["forward"]


def replace_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Make ``graph`` the forward of ``module``."""
    python = graph.python_code("self")
    names = tuple(
        (name, _MODULE + value.__name__ if isinstance(value, types.ModuleType) else value)
        for name, value in sorted(python.globals.items())
    )
    module.__class__ = _rewritten(type(module), (python.src, names))


def takes_residual(module: nn.Module, name: str) -> None:
    """Make a sequence hand its second argument to the submodule ``name``."""
    module.__dict__["_residual_to"] = name
    module.__class__ = _rewritten(type(module), None)


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module has a forward made here."""
    return "_fusion_base" in vars(type(module))


def restore_forward(module: nn.Module) -> None:
    """Give a module back the class that it had."""
    module.__class__ = type(module)._fusion_base  # type: ignore[attr-defined]
    vars(module).pop("_residual_to", None)
