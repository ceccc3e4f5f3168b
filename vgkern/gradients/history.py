"""What a :class:`~vgkern.gradients.GradientMonitor` has recorded, on the host: arrays, steps × layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .. import ops

__all__ = ["GradRecord", "History", "LayerInfo"]

#: Stands in the place of the norm of a gradient that was None.
NO_GRADIENT = -1.0


@dataclass(frozen=True)
class GradRecord:
    """One layer in one recorded step.

    Norms are L2 norms; NaN stands for what is not known. Those of the first group were taken in the backward passes of
    this process, each time anew (root mean squares over the passes): under DDP they are local to the rank. Those of the
    second group are norms of ``.grad`` when ``step()`` was called: accumulated over micro-batches, and reduced over the
    ranks.

    Attributes:
        step: which call of ``step()`` it was, from 1.
        index: the layer's place in the forward pass, from 0.
        layer: its name in the model; type: the name of its class; activation: of a fused layer or an activation module.
        source: ``"kernel"`` (recorded by the backward kernels), ``"hooks"`` (by passes over the tensors), or
            ``"gradients"`` (the second group alone).
        grad_output_norm: of the gradient that arrives, dy.
        grad_preact_norm: of dz = φ'(z)·dy; kernels only.
        grad_input_norm: of dx, the gradient handed on.
        gain: ``grad_input_norm / grad_output_norm``.
        dead_fraction: share of elements with φ'(z) = 0.
        nonfinite: elements of dy that were inf or NaN.
        elements: of dy, in one backward pass.
        backwards: backward passes since the step recorded before.
        grad_weight_norm, grad_bias_norm: of the parameters of these names.
        grad_norm: of all parameters of the layer itself, those of its children excluded.
    """

    step: int
    index: int
    layer: str
    type: str
    activation: str | None
    source: str
    grad_output_norm: float
    grad_preact_norm: float
    grad_input_norm: float
    gain: float
    dead_fraction: float
    nonfinite: float
    elements: float
    backwards: float
    grad_weight_norm: float
    grad_bias_norm: float
    grad_norm: float


@dataclass(frozen=True)
class LayerInfo:
    """What does not change from step to step.

    ``counts_dead``: whether elements with φ'(z) = 0 are counted; ``parameters``: (name within the layer, column of the
    norms).
    """

    name: str
    type: str
    activation: str | None
    source: str
    normalises: bool
    counts_dead: bool
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class History:
    """The rows of the ring buffer, oldest first.

    Attributes:
        layers: L of them, in forward order.
        steps: (S,) the numbers of the steps.
        parameter_norms: (S, P), :data:`NO_GRADIENT` where there was none.
        grad_output_norm, grad_preact_norm, grad_input_norm, gain, dead_fraction, nonfinite, elements, backwards,
        grad_weight_norm, grad_bias_norm, grad_norm: (S, L), as in :class:`GradRecord`.
    """

    layers: tuple[LayerInfo, ...]
    steps: np.ndarray
    parameter_norms: np.ndarray
    grad_output_norm: np.ndarray
    grad_preact_norm: np.ndarray
    grad_input_norm: np.ndarray
    gain: np.ndarray
    dead_fraction: np.ndarray
    nonfinite: np.ndarray
    elements: np.ndarray
    backwards: np.ndarray
    grad_weight_norm: np.ndarray
    grad_bias_norm: np.ndarray
    grad_norm: np.ndarray

    @classmethod
    def from_sums(
        cls,
        layers: Sequence[LayerInfo],
        steps: Sequence[int],
        sums: np.ndarray,
        parameter_norms: np.ndarray,
        unscale: float,
    ) -> History:
        """From what the device held: ``sums`` (S, L, len(RECORD_FIELDS)); ``parameter_norms`` (S, P)."""
        column = dict(zip(ops.RECORD_FIELDS, np.moveaxis(sums, 2, 0), strict=True))
        has_gradient = parameter_norms != NO_GRADIENT
        norms = np.where(has_gradient, parameter_norms / unscale, NO_GRADIENT)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 is NaN: not known
            output, preact, input_ = (
                np.sqrt(column[f"grad_{name}_sq"] / column["backwards"]) / unscale
                for name in ("output", "preact", "input")
            )
            hooked = np.array([layer.source == "hooks" for layer in layers], dtype=bool)
            for values, absent in ((preact, hooked), (input_, hooked & (column["grad_input_sq"] == 0).all(0))):
                values[:, absent] = np.nan
            gain = input_ / output
            dead = column["dead"] / column["elements"]
            dead[:, [layer.activation is None or not layer.counts_dead for layer in layers]] = np.nan
            elements = column["elements"] / column["backwards"]
        by_layer = _by_layer(layers, norms)
        return cls(
            tuple(layers), np.asarray(steps, dtype=np.int64), norms, output, preact, input_, gain, dead,
            column["nonfinite"], elements, column["backwards"], *by_layer,
        )  # fmt: skip

    @property
    def total_norm(self) -> np.ndarray:
        """(S,) the norm of all parameters' gradients together, as ``clip_grad_norm_`` returns it."""
        known = np.where(self.parameter_norms == NO_GRADIENT, 0.0, self.parameter_norms)
        return _root_of_squares(known, axis=1)

    def has_flow(self) -> np.ndarray:
        """(L,) of which layers the arriving gradient is known."""
        return np.asarray((self.backwards > 0).any(0))

    def records(self) -> Iterator[GradRecord]:
        """Step by step, and in each step in forward order."""
        per_value = [f.name for f in fields(GradRecord)[6:]]
        columns = [getattr(self, name).tolist() for name in per_value]
        for row, step in enumerate(self.steps.tolist()):
            for index, layer in enumerate(self.layers):
                values = (column[row][index] for column in columns)
                yield GradRecord(step, index, layer.name, layer.type, layer.activation, layer.source, *values)


def _by_layer(layers: Sequence[LayerInfo], norms: np.ndarray) -> list[np.ndarray]:
    """(S, L) norms of the weight, of the bias and of all parameters of each layer; NaN where there is no gradient."""
    shape = (len(norms), len(layers))
    weight, bias, everything = (np.full(shape, np.nan) for _ in range(3))
    for index, layer in enumerate(layers):
        if not layer.parameters:
            continue
        names, columns = zip(*layer.parameters, strict=True)
        own = norms[:, columns]
        absent = own == NO_GRADIENT
        known = np.where(absent, np.nan, own)
        for name, values in (("weight", weight), ("bias", bias)):
            if name in names:
                values[:, index] = known[:, names.index(name)]
        total = _root_of_squares(np.where(absent, 0.0, own), axis=1)
        everything[:, index] = np.where(absent.all(1), np.nan, total)
    return [weight, bias, everything]


def _root_of_squares(values: np.ndarray, axis: int) -> Any:
    """The root of the sum of squares; squares of finite values must not leave the range of float64."""
    most = np.max(np.abs(values), axis=axis, initial=0.0)
    divisor = np.where((most > 0) & np.isfinite(most), most, 1.0)
    return np.sqrt(np.sum((values / np.expand_dims(divisor, axis)) ** 2, axis=axis)) * divisor


def median(values: np.ndarray) -> np.ndarray:
    """(L,) over the steps, of what is finite; NaN where nothing is."""
    return quantile(values, 0.5)


def quantile(values: np.ndarray, q: float) -> np.ndarray:
    """(L,) over the steps, of what is finite; NaN where nothing is."""
    with warnings.catch_warnings():  # of columns without a number
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(np.where(np.isfinite(values), values, np.nan), q, axis=0)
