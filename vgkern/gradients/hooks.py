"""The record of a module without fused kernels, made by hooks: what the kernels get for nothing costs passes here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .. import activations, backends, ops

__all__ = ["Tap", "activation_name", "is_tapped"]

# Values of y = φ(z) at which φ'(z) = 0, for the activations of which y alone tells.
_FLAT: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardsigmoid": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}
_NAMES = {row.module: name for name, row in activations.TABLE.items()}


def activation_name(module: nn.Module) -> str | None:
    """The activation that a module applies, of ``torch.nn`` or of this package; None if it applies none."""
    spec = getattr(module, "activation", None)
    if isinstance(spec, activations.ActivationSpec):
        return None if spec.name == "identity" else spec.name
    return _NAMES.get(type(module)) if not isinstance(module, nn.Identity) else None


def is_tapped(module: nn.Module) -> bool:
    """Whether the module has children of its own to be looked at, or a gradient worth looking at."""
    if next(module.children(), None) is not None:
        return False
    return activation_name(module) is not None or any(p.requires_grad for p in module.parameters())


class Tap:
    """Sums of one module, as ``ops.RECORD_FIELDS`` says; ‖dz‖ and the parameters' norms are not among them.

    Hooks of autograd's node and not ``register_full_backward_hook``, which puts a node of its own around the module and
    breaks modules that work in place. Under ``torch.compile`` it does nothing, so nothing of it is traced.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sums: Tensor | None = None
        self._flat = _FLAT.get(activation_name(module) or "", ())
        self._edge: Any = None
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after),
        ]

    @property
    def counts_dead(self) -> bool:
        """Whether the output tells where φ'(z) = 0."""
        return bool(self._flat)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict) -> Tap:
        """A copied model keeps no monitor: its hooks go on recording into nothing that anybody reads."""
        copied = object.__new__(Tap)
        copied.__dict__.update(sums=None, _flat=self._flat, _edge=None, _handles=[])
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"sums": None, "_flat": self._flat, "_edge": None, "_handles": []}

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        x = next((a for a in args if isinstance(a, Tensor) and a.requires_grad), None)
        # Asked now: a module that works in place makes itself the origin of x.
        self._edge = None if x is None else get_gradient_edge(x)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        y = output[0] if isinstance(output, (tuple, list)) and output else output
        if not (isinstance(y, Tensor) and y.grad_fn is not None and torch.is_grad_enabled()):
            return
        edge, self._edge = self._edge, None
        origins = y.grad_fn.next_functions
        place = None if edge is None else next((i for i, o in enumerate(origins) if o == tuple(edge)[:2]), None)
        with torch.no_grad():
            dead = sum((y == value).sum() for value in self._flat) if self._flat else 0
        output_nr = y.output_nr

        def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            dy = grad_outputs[output_nr]
            if dy is not None:
                self._add(dy, None if place is None else grad_inputs[place], dead)

        y.grad_fn.register_hook(hook)

    @torch.no_grad()
    def _add(self, dy: Tensor, dx: Tensor | None, dead: Tensor | int) -> None:
        tensors = [dy] if dx is None else [dy, dx]
        norms = backends.of(dy).gradient_norms(tensors, 2.0)[0]
        sums = norms.new_zeros(len(ops.RECORD_FIELDS))
        values = {
            "grad_output_sq": norms[0].square(),
            "grad_input_sq": norms[1].square() if dx is not None else 0,
            "dead": dead,
            "nonfinite": dy.isfinite().logical_not_().sum(),
            "elements": dy.numel(),
            "backwards": 1,
        }
        for name, value in values.items():
            sums[ops.RECORD_FIELDS.index(name)] = value
        self.sums = sums if self.sums is None else self.sums.add_(sums)
