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
from typing import Any, cast

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


def _methods(base: type[nn.Module], code: Code | None) -> dict[str, Any]:
    def reduce_ex(self, protocol):
        function, arguments, *state = cast(tuple[Any, ...], base.__reduce_ex__(self, protocol))
        if arguments == (kind,):  # a subclass of this one, FSDP's for instance, has its own way
            function, arguments = _new, (base, code)
        return function, arguments, *state

    def getitem(self, index):
        # nn.Sequential makes a sequence of its own class, whose members are others than those of this forward.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return nn.Sequential.__getitem__(self, index)

    kind: type[nn.Module] = _classes[_key(base, code)]
    if code is None:
        return {"__reduce_ex__": reduce_ex, "__getitem__": getitem, "forward": runtime.sequential}
    return {"__reduce_ex__": reduce_ex, "forward": _function(*code)}


def _key(base: type[nn.Module], code: Code | None) -> Any:
    if code is None:
        return base, None
    source, names = code
    return base, source, tuple((name, value if isinstance(value, str) else id(value)) for name, value in names)


def _rewritten(base: type[nn.Module], code: Code | None) -> type[nn.Module]:
    """The subclass of ``base`` with the forward of ``code``; None for a sequence's own, with a residual."""
    key = _key(base, code)
    if key not in _classes:
        body = {
            "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
            "_fusion_base": base,
        }  # fmt: skip
        _classes[key] = types.new_class(base.__name__, (base,), {}, lambda namespace: namespace.update(body))
        for name, method in _methods(base, code).items():
            setattr(_classes[key], name, method)
    return _classes[key]


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
