"""The engine of verification: one layer, one input, judged against float64 autograd beside PyTorch's own ops.

``vgkern.verify()``, the test suite and users' own checks all run :func:`compare`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nn as fused
from .gradients.record import GradStats
from .nn.batch_norm_act import _BatchNormAct
from .nn.double_batch_norm import add_held, hold_batch_norm

__all__ = ["Row", "assert_matches_autograd", "compare"]

Layer = _BatchNormAct | fused.AddAct

#: Relative tolerance of the record's norms: they are sums of float32 (or better) terms, kept in float64.
RECORD_TOLERANCE = 1e-5

#: Units in the last place beyond PyTorch's error; 1 but in float64, where the judge rounds as the judged do. Against
#: 80-bit arithmetic the judge itself was off by 5 units in a sum of 140 terms, in PyTorch's own order of summation, and
#: by 11 from PyTorch where a steep φ' magnifies what z is off by.
ALLOWED_ULPS = {torch.float64: 32.0}

#: Below this derivative, whether a unit counts as dead depends on the dtype.
SATURATED = 1e-6


@dataclass(frozen=True)
class Row:
    """One tensor (or one field of the record) of one comparison.

    Attributes:
        name: ``output``, ``grad_input``, ..., or ``record.grad_input_norm``, ...
        error: largest absolute error against float64; for a norm of the record, relative.
        torch_error: the same of PyTorch's own operations in the same dtype; 0 for the record.
        allowed: what ``error`` may exceed ``torch_error`` by: one unit in the last place of the largest value
            (32 in float64, where the judge rounds as well).
        ok: ``error <= torch_error + allowed``; False for NaN.
    """

    name: str
    error: float
    torch_error: float
    allowed: float
    ok: bool

    @property
    def excess(self) -> float:
        """The error beyond PyTorch's as a share of what is allowed; at most 1 where ``ok``."""
        return (self.error - self.torch_error) / self.allowed if self.allowed else math.inf * (not self.ok)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _ulp(reference: Tensor, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at the largest magnitude in ``reference``."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    info = torch.finfo(dtype)
    if not math.isfinite(largest):
        return 0.0
    return max(2.0 ** math.floor(math.log2(largest)) if largest else 0.0, info.tiny) * info.eps


def _activate(layer: Layer, z: Tensor, weight: Tensor | None) -> Tensor:
    row, args = layer.activation.row, layer.activation.args
    if z.dtype == torch.float64:  # where PyTorch's own function is too coarse for a judge
        if row.name == "hardsigmoid":  # its backward multiplies by a float32 1/6 in every dtype: 3e-8 off
            return F.relu6(z + 3) / 6
        if row.name == "gelu" and args[0]:  # its 1 + tanh(u) cancels: 5e-15 off at -7, against 40 digits
            return z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))
    return row.reference(z, *args) if weight is None else row.reference(z, *args, weight.to(z.dtype))


def _momentum(layer: _BatchNormAct) -> float:
    """Of the next batch: the share of a cumulative average where the layer's is None."""
    if layer.momentum is not None:
        return layer.momentum
    return 1.0 / (int(layer.num_batches_tracked) + 1) if layer.num_batches_tracked is not None else 0.0


def _pre_activation_float64(layer: Layer, x: Tensor, residual: Tensor | None, state: dict[str, Any]) -> Tensor:
    """z from the definition, for the judge."""
    z = x
    if isinstance(layer, _BatchNormAct):
        view = (-1, *[1] * (x.dim() - 2))
        running_mean, running_var = state["running_mean"], state["running_var"]
        if layer.training or running_mean is None:
            dims, count = [d for d in range(x.dim()) if d != 1], x.numel() // x.shape[1]
            mean = x.mean(dims)
            mean = mean + (x - mean.view(view)).mean(dims)  # refined: the judge of float64 needs all of float64
            var = (x - mean.view(view)).square().mean(dims)
            if layer.training and layer.track_running_stats and running_mean is not None:
                momentum = _momentum(layer)
                state["running_mean"] = (1 - momentum) * running_mean + momentum * mean.detach()
                state["running_var"] = (1 - momentum) * running_var + momentum * var.detach() * (count / (count - 1))
        else:
            mean, var = running_mean, running_var
        z = (x - mean.view(view)) / (var + layer.eps).sqrt().view(view)
        if state["weight"] is not None:
            z = z * state["weight"].view(view)
        if state["bias"] is not None:
            z = z + state["bias"].view(view)
    return z if residual is None else z + residual


def _pre_activation_torch(layer: Layer, x: Tensor, residual: Tensor | None, state: dict[str, Any]) -> Tensor:
    """z by PyTorch's own operations, in the dtypes given."""
    z = x
    if isinstance(layer, _BatchNormAct):
        tracked = not layer.training or layer.track_running_stats
        z = F.batch_norm(
            x, state["running_mean"] if tracked else None, state["running_var"] if tracked else None,
            state["weight"], state["bias"], layer.training or state["running_mean"] is None,
            _momentum(layer), layer.eps,
        )  # fmt: skip
    return z if residual is None else z + residual


_PARAMETERS = ("weight", "bias", "activation_weight")
_BUFFERS = ("running_mean", "running_var")
_SHORTCUT = "residual_"  # before the names of what is the residual's batch norm's


def _detached(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A leaf of the same values, strides and, unless given, dtype."""
    return t if t is None else t.detach().clone(memory_format=torch.preserve_format).to(dtype or t.dtype)


class _Twin:
    """The layer's computation by plain PyTorch operations: the judge in float64, or PyTorch in the layer's dtype."""

    def __init__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, shortcut: _BatchNormAct | None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.x: Any = _detached(x, dtype)
        self.residual: Any = _detached(residual, dtype)
        self.states: dict[str, dict[str, Any]] = {
            prefix: {name: _detached(getattr(of, name, None), dtype) for name in (*_PARAMETERS, *_BUFFERS)}
            for prefix, of in (("", layer), (_SHORTCUT, shortcut))
        }
        self.state, residual_state = self.states.values()
        parameters = (state[name] for state in self.states.values() for name in _PARAMETERS)
        self.leaves = [leaf.requires_grad_() for leaf in (self.x, self.residual, *parameters) if leaf is not None]
        pre_activation: Any = _pre_activation_float64 if dtype == torch.float64 else _pre_activation_torch
        added = self.residual
        if shortcut is not None:
            added = pre_activation(shortcut, added, None, residual_state)
        self.z = pre_activation(layer, self.x, added, self.state)
        self.y = _activate(layer, self.z, self.state["activation_weight"])

    def results(self, dy: Tensor) -> dict[str, Tensor]:
        self.y.backward(dy.to(self.y.dtype))
        named = {"output": self.y, "grad_input": self.x.grad}
        if self.residual is not None:
            named["grad_residual"] = self.residual.grad
        for prefix, state in self.states.items():
            named |= {f"grad_{prefix}{name}": state[name].grad for name in _PARAMETERS if state[name] is not None}
            named |= {f"{prefix}{name}": state[name] for name in _BUFFERS if state[name] is not None}
        return {name: tensor.detach() for name, tensor in named.items()}


def _fused_results(
    layer: Layer, x: Tensor, residual: Tensor | None, shortcut: _BatchNormAct | None, dy: Tensor
) -> tuple[dict[str, Tensor], dict[str, GradStats | None]]:
    layer, shortcut = copy.deepcopy((layer, shortcut))
    layers: dict[str, Any] = {"": layer} if shortcut is None else {"": layer, _SHORTCUT: shortcut}
    for of in layers.values():
        of.requires_grad_().reset_grad_stats()
        of.zero_grad()
    # Not cloned: the strides that the caller gave, views and gaps included, are part of what is checked.
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    if shortcut is None or residual is None:
        y = layer(x, residual)
    else:
        y = add_held(layer, x, hold_batch_norm(shortcut, residual))
    y.backward(dy.to(y.dtype))
    named = {"output": y, "grad_input": x.grad}
    if residual is not None:
        named["grad_residual"] = residual.grad
    for prefix, of in layers.items():
        there = {name for name in (*_PARAMETERS, *_BUFFERS) if getattr(of, name, None) is not None}
        named |= {f"grad_{prefix}{name}": getattr(of, name).grad for name in _PARAMETERS if name in there}
        named |= {f"{prefix}{name}": getattr(of, name) for name in _BUFFERS if name in there}
    stats = {prefix: of.grad_stats() for prefix, of in layers.items()}
    return {name: tensor.detach() for name, tensor in named.items()}, stats


def _near_kink(layer: Layer, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Where rounding may move z across a kink of φ, so that either one-sided derivative is right.

    z is computed in float32 from half-precision data, too: what PyTorch's own z loses there is PyTorch's error.
    """
    near = torch.zeros_like(z, dtype=torch.bool)
    scale = 64 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for kink in layer.activation.row.kinks(*layer.activation.args):
        near |= (z - kink).abs() <= scale * max(1.0, abs(kink), z.abs().max().item())
    return near


def compare(
    layer: Layer,
    input: Tensor,
    residual: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    shortcut: _BatchNormAct | None = None,
) -> list[Row]:
    """Judge a fused layer on one input: output, every gradient, running statistics and the gradient record.

    The layer is copied and not changed. Its ``grad_norm_bounds`` must be None: autograd knows no bounds.

    Args:
        layer: a layer of ``vgkern.nn``, in the mode (train, eval) that is to be checked.
        input, residual: as the layer takes them.
        grad_output: the gradient that arrives; by default random normal numbers, 0 where z lies so near a kink of the
            activation that rounding decides on which side.

        shortcut: the residual's own batch norm, without activation; both are then one operation, and rows that begin
            with ``residual_`` are this one's.

    Returns:
        A row a tensor, each with the error against float64 autograd and PyTorch's own error in the same dtype.
    """
    if getattr(layer, "grad_norm_bounds", None) is not None:
        raise ValueError("layer: grad_norm_bounds changes the gradient on purpose; compare a layer without them")
    judge = _Twin(layer, input, residual, shortcut, torch.float64)
    ours_dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    near = _near_kink(layer, judge.z.detach(), ours_dtype)
    if grad_output is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
        grad_output = torch.randn(judge.y.shape, generator=generator, dtype=torch.float64).to(judge.y.device)
        grad_output = torch.empty_like(judge.y, dtype=ours_dtype).copy_(grad_output).masked_fill_(near, 0.0)
    derivative = _derivative(layer, judge)
    expected = judge.results(grad_output)
    plain = _Twin(layer, input, residual, shortcut).results(grad_output)
    got, stats = _fused_results(layer, input, residual, shortcut, grad_output)

    rows = []
    for name, reference in expected.items():
        allowed = ALLOWED_ULPS.get(got[name].dtype, 1.0) * _ulp(reference, got[name].dtype)
        error = _max_error(got[name], reference)
        torch_error = _max_error(plain[name], reference)
        rows.append(Row(name, error, torch_error, allowed, error <= torch_error + allowed))
    dz = derivative * grad_output.double()
    arrives = {"": ("grad_input", grad_output), _SHORTCUT: ("grad_residual", dz)}
    for prefix, record in stats.items():
        if record is None:
            continue
        handed_on, dy = arrives[prefix]
        norms = {
            "grad_output_norm": dy,
            "grad_preact_norm": dz,
            "grad_input_norm": expected[handed_on],
            "grad_weight_norm": expected.get(f"grad_{prefix}weight"),
            "grad_bias_norm": expected.get(f"grad_{prefix}bias"),
        }
        for name, tensor in norms.items():
            norm = 0.0 if tensor is None else tensor.double().norm().item()
            error = abs(getattr(record, name) - norm) / (norm or 1.0)
            rows.append(Row(f"{prefix}record.{name}", error, 0.0, RECORD_TOLERANCE, error <= RECORD_TOLERANCE))
    if (record := stats[""]) is not None:
        # In float32 the tails of a smooth activation are flat a little earlier than in float64.
        unsure = near | ((derivative != 0) & (derivative.abs() < SATURATED))
        error = abs(record.dead_fraction - (derivative == 0).double().mean().item())
        allowed = unsure.double().mean().item() + 0.5 / max(unsure.numel(), 1)
        rows.append(Row("record.dead_fraction", error, 0.0, allowed, error <= allowed))
    return rows


def _derivative(layer: Layer, judge: _Twin) -> Tensor:
    """φ'(z) of the judge."""
    z = judge.z.detach().requires_grad_()
    weight = judge.state["activation_weight"]
    y = _activate(layer, z, None if weight is None else weight.detach())
    return torch.autograd.grad(y.sum(), z)[0]


def _max_error(got: Tensor, reference: Tensor) -> float:
    if got.shape != reference.shape:
        return math.inf
    if not got.numel():
        return 0.0
    # Equal infinities are no error; a NaN anywhere else compares false with every bound.
    difference = torch.where(got == reference, 0.0, (got.double() - reference).abs())
    return difference.max().item()


def format_rows(rows: Sequence[Row]) -> str:
    lines = [f"{'':28}{'error':>11}{'PyTorch':>11}{'allowed +':>11}"]
    lines += [
        f"{row.name:28}{row.error:11.2e}{row.torch_error:11.2e}{row.allowed:11.2e}{'' if row.ok else '   <- too large'}"
        for row in rows
    ]
    return "\n".join(lines)


def assert_matches_autograd(layer: Layer, input: Tensor, residual: Tensor | None = None) -> None:
    """Assert that a layer is right for your configuration: your channels, dtype, memory format, mode and data.

    Output, all gradients and the running statistics must be as close to float64 autograd as PyTorch's own operations
    in the same dtype are, within one unit in the last place of the largest value; the record's norms within 1e-5.

    Args:
        layer: a layer of ``vgkern.nn``; copied, not changed.
        input, residual: as the layer takes them.

    Raises:
        AssertionError: with a row a tensor: its error, PyTorch's, and what was allowed beyond.
        ValueError: the layer has ``grad_norm_bounds``, which change the gradient on purpose.

    Example:
        >>> import torch, vgkern
        >>> layer = vgkern.nn.BatchNormAct2d(16, activation="gelu")
        >>> x = torch.randn(8, 16, 10, 10).to(memory_format=torch.channels_last)
        >>> vgkern.testing.assert_matches_autograd(layer, x, residual=torch.randn_like(x))
    """
    rows = compare(layer, input, residual)
    if not all(row.ok for row in rows):
        raise AssertionError(f"{layer} does not match float64 autograd:\n{format_rows(rows)}")
