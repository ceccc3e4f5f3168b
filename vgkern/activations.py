"""The table of activations: one row each, read by the layers, the checks, the reference backend and the tests.

A row says which arguments an activation takes, what PyTorch computes for it, and what its backward pass reads. The
same names key two more tables, ``kernels/activations.py`` (Triton) and ``csrc/activations.h`` (C++); a test asserts
that the three agree. Adding an activation means adding one row to each of the three and nothing else.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Activation", "ActivationSpec", "names", "resolve"]


@dataclass(frozen=True)
class Activation:
    """One activation function φ.

    ``arguments`` maps each argument to its default, in the order in which kernels receive them as floats.
    ``reference(z, *arguments)`` is PyTorch's own function; a learnable activation gets its weight as last argument.
    ``on(z, *arguments)``, if given, says that φ is made of two straight pieces as far as its derivative goes:
    φ' is ``slopes(*arguments)[0]`` where it is true and ``slopes(*arguments)[1]`` elsewhere. One bit an element then
    holds all that the backward pass needs to know of z. Comparisons are written so that NaN falls on the side on which
    PyTorch's backward puts it. ``kinks(*arguments)`` lists the points where φ or φ' is not smooth, for the tests.
    """

    name: str
    module: type[nn.Module]
    reference: Callable[..., Tensor]
    arguments: Mapping[str, float | str] = field(default_factory=dict)
    on: Callable[..., Tensor] | None = None
    slopes: Callable[..., tuple[float, float]] | None = None
    kinks: Callable[..., tuple[float, ...]] = lambda *arguments: ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    learnable: bool = False

    #: ``"nothing"``, ``"mask"`` (one bit an element) or ``"z"`` (the pre-activation, recomputed). No cached property:
    #: before Python 3.12 that takes a lock, at which ``torch.compile`` breaks the graph.
    backward_reads: str = field(init=False)

    def __post_init__(self) -> None:
        reads = "nothing" if self.name == "identity" else "mask" if self.on is not None else "z"
        object.__setattr__(self, "backward_reads", reads)


def _gelu(z: Tensor, approximate: float) -> Tensor:
    return F.gelu(z, approximate="tanh" if approximate else "none")


def _prelu(z: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(z, weight)


# What each backward does with NaN and at the kinks is PyTorch's: see the functions named in aten's derivatives.yaml.
_ROWS = (
    Activation("identity", nn.Identity, lambda z: z),
    Activation("relu", nn.ReLU, F.relu,
               on=lambda z: ~(z <= 0), slopes=lambda: (1.0, 0.0), kinks=lambda: (0.0,)),
    Activation("relu6", nn.ReLU6, F.relu6,
               on=lambda z: ~((z <= 0) | (z >= 6)), slopes=lambda: (1.0, 0.0), kinks=lambda: (0.0, 6.0)),
    Activation("leaky_relu", nn.LeakyReLU, F.leaky_relu, {"negative_slope": 0.01},
               on=lambda z, slope: z > 0, slopes=lambda slope: (1.0, slope), kinks=lambda slope: (0.0,)),
    Activation("prelu", nn.PReLU, _prelu, kinks=lambda: (0.0,), learnable=True),
    Activation("elu", nn.ELU, F.elu, {"alpha": 1.0}, kinks=lambda alpha: (0.0,)),
    Activation("celu", nn.CELU, F.celu, {"alpha": 1.0}, kinks=lambda alpha: (0.0,)),
    Activation("selu", nn.SELU, F.selu, kinks=lambda: (0.0,)),
    Activation("gelu", nn.GELU, _gelu, {"approximate": "none"}, choices={"approximate": ("none", "tanh")}),
    Activation("silu", nn.SiLU, F.silu),
    Activation("mish", nn.Mish, F.mish, kinks=lambda: (20.0,)),
    Activation("hardswish", nn.Hardswish, F.hardswish, kinks=lambda: (-3.0, 3.0)),
    Activation("hardsigmoid", nn.Hardsigmoid, F.hardsigmoid,
               on=lambda z: (z > -3) & (z < 3), slopes=lambda: (1.0 / 6.0, 0.0), kinks=lambda: (-3.0, 3.0)),
    Activation("sigmoid", nn.Sigmoid, torch.sigmoid),
    Activation("tanh", nn.Tanh, torch.tanh),
    Activation("softplus", nn.Softplus, F.softplus, {"beta": 1.0, "threshold": 20.0},
               kinks=lambda beta, threshold: (threshold / beta,)),
)  # fmt: skip

TABLE: dict[str, Activation] = {row.name: row for row in _ROWS}
#: The modules that apply an activation.
MODULES = frozenset(row.module for row in _ROWS if row.name != "identity")


def _calls() -> dict[Callable[..., Any] | str, str]:
    """A clamp is none of them: at its bounds its derivative is not that of relu and relu6."""
    found: dict[Callable[..., Any] | str, str] = {}
    for name in TABLE:
        for spelling in () if name == "identity" else (name, f"{name}_"):
            found |= {getattr(namespace, spelling): name for namespace in (F, torch) if hasattr(namespace, spelling)}
            if hasattr(Tensor, spelling):
                found[spelling] = name
    return found


#: Functions of PyTorch, and names of a tensor's methods -> the activation that a call applies.
_CALLS = _calls()


def of_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What ``target(x, *args, **kwargs)`` applies, ``target`` a function, or the name of a method of x.

    Returns:
        The activation's name and the arguments that it is given, by name, as they are: numbers, or what a graph has in
        their place. None for other calls.
    """
    name = _CALLS.get(target)
    if name is None:
        return None
    row = TABLE[name]
    names = ("weight",) if row.learnable else (*row.arguments, "inplace")
    if len(args) > len(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    given.pop("inplace", None)
    return name, given


@dataclass(frozen=True)
class ActivationSpec:
    """An activation with its arguments settled: what layers store and operators receive.

    ``args`` are floats in the row's order; a choice between names is its index (``gelu``: 0 exact, 1 tanh).
    """

    name: str
    args: tuple[float, ...] = ()

    @property
    def row(self) -> Activation:
        return TABLE[self.name]

    def keywords(self) -> dict[str, float | str]:
        """The arguments as PyTorch's module takes them."""
        row = self.row
        return {
            name: row.choices[name][int(value)] if name in row.choices else value
            for name, value in zip(row.arguments, self.args, strict=True)
        }

    def __str__(self) -> str:
        given = ", ".join(
            f"{name}={value!r}" for name, value in self.keywords().items() if value != self.row.arguments[name]
        )
        return f"{self.name}({given})" if given else self.name


def names() -> tuple[str, ...]:
    """The names that ``activation=`` takes.

    Example:
        >>> import vgkern
        >>> "relu" in vgkern.activations.names()
        True
    """
    return tuple(TABLE)


def resolve(activation: str | nn.Module | None, activation_args: Mapping[str, Any] | None = None) -> ActivationSpec:
    """Settle what a user gave as ``activation`` and ``activation_args``.

    Args:
        activation: a name from :func:`names`, an activation module of ``torch.nn``, or None for ``"identity"``.
        activation_args: arguments by name, for a name only; missing ones take PyTorch's defaults.

    Raises:
        ValueError: an unknown name, an argument that the activation does not take, or a value that it refuses.
        TypeError: neither a name, a module nor None; or an argument that is not a number.
    """
    if activation is None:
        activation = "identity"
    if isinstance(activation, str) and not activation_args and activation in _DEFAULT_SPECS:
        return _DEFAULT_SPECS[activation]  # 1 µs less, which counts where a function is called with small tensors
    if isinstance(activation, nn.Module):
        if activation_args:
            raise ValueError(
                f"activation_args: got {dict(activation_args)!r} beside the module {activation!r}, "
                "which carries its own arguments"
            )
        return _from_module(activation)
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: expected a name, a torch.nn activation module or None, got {type(activation).__name__}"
        )
    if activation not in TABLE:
        close = difflib.get_close_matches(activation.lower(), TABLE, n=1, cutoff=0.0)
        raise ValueError(
            f"activation: unknown name {activation!r}; did you mean {close[0]!r}? Known names: {', '.join(TABLE)}"
        )
    row = TABLE[activation]
    given = dict(activation_args or {})
    for name in given:
        if name not in row.arguments:
            # How a layer makes its weight is the layer's affair; a function is given the weight itself.
            takes = ", ".join(row.arguments) or ("num_parameters, init (layers)" if row.learnable else "no arguments")
            raise ValueError(f"activation_args: {activation!r} does not take {name!r}; it takes {takes}")
    return ActivationSpec(
        activation, tuple(_encode(row, name, given.get(name, default)) for name, default in row.arguments.items())
    )


def _encode(row: Activation, name: str, value: Any) -> float:
    if name in row.choices:
        if value not in row.choices[name]:
            raise ValueError(f"activation_args: {name} of {row.name!r} is one of {row.choices[name]}, got {value!r}")
        return float(row.choices[name].index(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"activation_args: {name} of {row.name!r} is a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"activation_args: {name} of {row.name!r} is finite, got {value!r}")
    if row.name in ("celu", "softplus") and name in ("alpha", "beta") and value == 0:
        raise ValueError(f"activation_args: {name} of {row.name!r} divides and cannot be 0")
    return float(value)


def _from_module(module: nn.Module) -> ActivationSpec:
    for row in _ROWS:
        # The exact type: a subclass may compute something else.
        if type(module) is row.module:
            return ActivationSpec(row.name, tuple(_encode(row, name, getattr(module, name)) for name in row.arguments))
    known = ", ".join(row.module.__name__ for row in _ROWS)
    raise ValueError(f"activation: no fused form of {module!r}; modules that have one: {known}")


_DEFAULT_SPECS: dict[str, ActivationSpec] = {}
_DEFAULT_SPECS.update((name, resolve(name)) for name in TABLE)
