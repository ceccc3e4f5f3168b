"""What the numbers mean: findings with their evidence, and what helps against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..text import figures, percent, some
from .history import NO_GRADIENT, History, median, quantile
from .model_state import ModelState

__all__ = ["Finding", "Thresholds", "diagnose"]


@dataclass(frozen=True)
class Thresholds:
    """What counts as a finding. Every one can be set: ``monitor.report(Thresholds(vanishing=1e-5))``.

    Attributes:
        vanishing: smallest ratio of the gradient that arrives at the first layers to that at the last, median over the
            steps. The healthy nets of vgkern's tests, ResNet-18 and a plain Kaiming net of 20 layers among them, lie
            between 0.07 and 7; sick ones, of 8 to 20 layers, below 1e-6.
        exploding: largest such ratio; sick ones have more than 1e4.
        dead: smallest share of elements with φ'(z) = 0. Half is what a ReLU on symmetric input has, and what He et al.
            2015 (arXiv 1502.01852) derive their initialisation from.
        spike: largest norm of all gradients, over the median of the steps. Pascanu et al. 2013 (arXiv 1211.5063)
            choose the norm at which they clip between half and ten times the average; ten times beyond that is no
            matter of choice.
        nonfinite_steps: share of steps with inf or NaN under a loss scale beyond which the scale is too high. A
            ``GradScaler`` that works meets one in its ``growth_interval`` of 2000 steps.
        underflow: root mean square of a gradient's elements below which float16 loses them: its smallest positive
            value, 2⁻²⁴ (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
    """

    vanishing: float = 1e-3
    exploding: float = 1e3
    dead: float = 0.9
    spike: float = 100.0
    nonfinite_steps: float = 0.1
    underflow: float = 2.0**-24

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``"vanishing"``, ``"exploding"``, ``"dead"``, ``"nonfinite"``, ``"no_gradient"``, ``"frozen_norm"`` or
            ``"loss_scale"``.
        layer: where it shows; of a stretch of layers the one nearest the input.
        summary: one sentence with the numbers.
        evidence: the numbers by name.
        advice: what helps, the likeliest first.
    """

    kind: str
    layer: str
    summary: str
    evidence: dict[str, Any]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(history: History, state: ModelState, thresholds: Thresholds, unscale: float = 1.0) -> list[Finding]:
    """All findings, causes before what they cause."""
    if not len(history.steps) or not history.layers:
        return []
    case = _Case(history, state, thresholds, unscale)
    return [finding for look in _LOOKS for finding in look(case)]


class _Case:
    """What the looks share."""

    def __init__(self, history: History, state: ModelState, thresholds: Thresholds, unscale: float) -> None:
        self.history, self.state, self.thresholds, self.unscale = history, state, thresholds, unscale
        self.layers = history.layers
        bad = (history.nonfinite > 0) | ~_finite_or_unknown(history.grad_output_norm, history.backwards > 0)
        norms = history.parameter_norms
        for index, layer in enumerate(self.layers):
            for _, column in layer.parameters:
                bad[:, index] |= ~np.isfinite(norms[:, column])
        #: (S, L) where inf or NaN was met.
        self.bad = bad
        self.scaled = unscale != 1 or state.half_precision
        self.dead = median(history.dead_fraction)
        flow = history.has_flow()
        #: (L,) layers with parameters that got a gradient.
        self.trained = (~np.isnan(history.grad_norm)).any(0)
        #: (n,) layers that the profile is made of, in forward order, and the (n,) gradients that arrive there.
        self.profile = np.flatnonzero(flow) if flow.sum() >= 3 else np.flatnonzero(self.trained)
        values = history.grad_output_norm if flow.sum() >= 3 else history.grad_norm
        #: What the profile is: the gradient of the layers' outputs or, where hooks saw nothing, of their parameters.
        self.profile_of = "gradient that arrives" if flow.sum() >= 3 else "gradient of the parameters"
        self.gradient = median(values[~bad.any(1)])[self.profile] if (~bad.any(1)).any() else np.array([])

    def name(self, index: int) -> str:
        return self.layers[index].name


def _finite_or_unknown(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.isfinite(values) | ~known


# Each look yields its findings. ---------------------------------------------------------------------------------------


def _nonfinite(case: _Case) -> Iterator[Finding]:
    steps = np.flatnonzero(case.bad.any(1))
    if not len(steps):
        return
    share = len(steps) / len(case.bad)
    if case.scaled and share < case.thresholds.nonfinite_steps:
        return  # as a loss scale that is sought from above behaves
    bad = np.flatnonzero(case.bad[steps[0]])
    index = int(bad[-1])  # the backward pass comes from the last layer
    evidence: dict[str, Any] = {
        "steps": len(steps), "of_steps": len(case.bad), "first_step": int(case.history.steps[steps[0]]),
        "layers": len(bad), "elements": float(case.history.nonfinite[steps[0], index]),
    }  # fmt: skip
    parameters = case.state.nonfinite_parameters
    known = _known(case.history, int(steps[0]))
    behind = known[known > index]
    if case.scaled and case.unscale > 1:
        yield Finding(
            "loss_scale", case.name(index),
            f"inf or NaN in {percent(share)} of the steps under a loss scale of {case.unscale:g}: it is too high.",
            evidence, (f"Lower the loss scale, to {case.unscale / 2**4:g} to begin with, or let "
                       "torch.amp.GradScaler find it.", "bfloat16 needs no loss scale."),
        )  # fmt: skip
        return
    if len(behind):
        name = case.name(index)
        above = case.name(int(behind[0]))
        where = f"{name} is the first layer in the backward pass to meet it; {above} behind it is finite"
        advice: tuple[str, ...] = (
            f"Look at what lies between {name} and {above}: a root or logarithm at 0, a division, "
            "an exponential; torch.autograd.set_detect_anomaly(True) names the operation.",
        )
    elif parameters and len(parameters) < len([layer for layer in case.layers if layer.parameters]):
        name = parameters[0]
        where = f"Parameters of {some(parameters)} are inf or NaN themselves"
        advice = (f"Look at how {name} is initialised or loaded: its parameters are not finite.",)
    else:
        name = case.name(index)
        where = f"it arrives at the last layer that is watched, {name}, already"
        advice = (
            "Look at the loss and at the forward pass: is the output finite, are input and targets? "
            "torch.autograd.set_detect_anomaly(True) names the operation.",
            "If the loss grew before: a lower learning rate, or clipping.",
        )
    yield Finding(
        "nonfinite", name, f"inf or NaN from step {evidence['first_step']} on, in {len(steps)} of {len(case.bad)} "
        f"steps: {where}.", evidence, advice,
    )  # fmt: skip


def _known(history: History, row: int) -> np.ndarray:
    """Layers of which anything is known in this step."""
    has = history.backwards[row] > 0
    for index, layer in enumerate(history.layers):
        has[index] |= any(history.parameter_norms[row, column] != NO_GRADIENT for _, column in layer.parameters)
    return np.flatnonzero(has)


def _frozen_norm(case: _Case) -> Iterator[Finding]:
    names = case.state.frozen_norms
    if names:
        yield Finding(
            "frozen_norm", names[0],
            f"{_count(len(names), 'batch norm')} ({some(names)}) in eval mode with running statistics that were "
            "never estimated: mean 0 and variance 1, so nothing is normalised.",
            {"layers": list(names)},
            ("Call model.train(), or load the statistics with the weights before they are frozen.",),
        )  # fmt: skip


def _no_gradient(case: _Case) -> Iterator[Finding]:
    if case.trained.any() and not case.history.total_norm.any():
        yield Finding(
            "no_gradient", case.layers[-1].name,
            f"The gradients of all parameters are exactly 0 in {_count(len(case.history.steps), 'step')}.",
            {"layers": [layer.name for layer in case.layers if layer.parameters]},
            ("The loss does not depend on the model's output: is it multiplied by 0, clamped, or rounded?",),
        )  # fmt: skip
        return
    never = [
        layer.name for layer in case.layers
        if layer.parameters and all(
            (case.history.parameter_norms[:, column] == NO_GRADIENT).all() for _, column in layer.parameters
        )
    ]  # fmt: skip
    if never:
        yield Finding(
            "no_gradient", never[-1],
            f"{_count(len(never), 'layer')} ({some(never)}) never got a gradient, though the parameters want one.",
            {"layers": never},
            (
                "Something cuts them off: detach(), .data, torch.no_grad(), an argmax or a conversion to numpy on the "
                "way from them to the loss.",
                "If that is meant: requires_grad_(False), and leave them out of the optimiser.",
            ),
        )  # fmt: skip


def _dead(case: _Case) -> Iterator[Finding]:
    found = np.flatnonzero(case.dead >= case.thresholds.dead)
    if not len(found):
        return
    worst = int(found[np.argmax(case.dead[found])])
    names = [case.name(int(i)) for i in found]
    activation = case.layers[worst].activation or ""
    yield Finding(
        "dead", case.name(worst),
        f"{_count(len(found), 'layer')} ({some(names)}) with nearly all units dead: φ'(z) = 0 in "
        f"{percent(float(case.dead[worst]))} of {case.name(worst)}'s elements ({activation}; half is usual for ReLU).",
        {"layers": names, "dead_fraction": [float(case.dead[i]) for i in found], "activation": activation},
        _DEAD_ADVICE.get(activation, _SATURATED),
    )  # fmt: skip


_SATURATED = (
    "The units are saturated: a smaller initialisation (nn.init.xavier_normal_), inputs with mean 0 and variance 1, or "
    "a batch norm before the activation.",
    "relu or silu in the place of {activation}, which is flat on both sides.",
)
_DEAD_RELU = (
    "leaky_relu or silu, whose derivative is nowhere 0 over a whole side (Maas et al. 2013).",
    "A batch norm before the activation, so that half of the units are on; biases that start at 0.",
    "If they died in training: a lower learning rate, or a warm-up.",
)
_DEAD_ADVICE = {
    "relu": _DEAD_RELU,
    "sigmoid": tuple(text.format(activation="sigmoid") for text in _SATURATED),
    "tanh": tuple(text.format(activation="tanh") for text in _SATURATED),
    "relu6": (*_DEAD_RELU, "relu6 is flat above 6 too: are the inputs normalised?"),
    "hardsigmoid": tuple(text.format(activation="hardsigmoid") for text in _SATURATED),
}


def _depth(case: _Case) -> Iterator[Finding]:
    """Vanishing or exploding along the depth: the product of the gains between the last layers and the first."""
    gradient = case.gradient
    if len(gradient) < 3 or np.isnan(gradient).all():
        return
    # A group at either end, and its largest: a layer in a branch may have little gradient and still be well.
    ends = max(1, len(gradient) // 8)
    first, last = float(np.nanmax(gradient[:ends])), float(np.nanmax(gradient[-ends:]))
    ratio = first / last if last else math.nan
    vanishes, explodes = ratio < case.thresholds.vanishing, ratio > case.thresholds.exploding
    if not (vanishes or explodes):
        return
    low, high = _steepest(gradient if vanishes else 1 / np.maximum(gradient, 1e-300))
    stretch = [int(i) for i in case.profile[low : high + 1]]
    if vanishes and any(case.dead[i] >= case.thresholds.dead for i in stretch):
        return  # the dead layer is the cause, and a finding of its own
    product = float(gradient[low] / gradient[high])
    per_layer = product ** (1 / max(1, high - low)) if product > 0 else 0.0
    kind, verb = ("vanishing", "shrinks") if vanishes else ("exploding", "grows")
    measure = "to nothing" if product == 0 else f"{figures(max(product, 1 / product))}-fold"
    yield Finding(
        kind, case.name(stretch[0]),
        f"The {case.profile_of} {verb} {measure} on its way back from {case.name(stretch[-1])} to "
        f"{case.name(stretch[0])}, over {_count(high - low, 'layer')}: a factor of {figures(per_layer)} each.",
        {
            "from_layer": case.name(stretch[-1]), "to_layer": case.name(stretch[0]), "layers": high - low,
            "product_of_gains": product, "gain_per_layer": per_layer, "first_to_last": ratio,
        },
        tuple(_depth_advice(case, stretch, vanishes)),
    )  # fmt: skip


def _steepest(gradient: np.ndarray) -> tuple[int, int]:
    """(low, high), low < high, between which a gradient that shrinks on its way back shrinks most."""
    best, pair = -1.0, (0, len(gradient) - 1)
    lowest = 0
    logarithm = np.log(np.maximum(np.nan_to_num(gradient, nan=np.inf), 1e-300))
    for high in range(1, len(gradient)):
        drop = logarithm[high] - logarithm[lowest]
        if np.isfinite(drop) and drop > best:
            best, pair = drop, (lowest, high)
        if logarithm[high] < logarithm[lowest]:
            lowest = high
    return pair


_SQUASHING = ("sigmoid", "hardsigmoid", "tanh", "softplus")


def _depth_advice(case: _Case, stretch: Sequence[int], vanishes: bool) -> Iterator[str]:
    """Activation first, then the weights' scale, then normalisation, a residual, clipping: as far as each fits."""
    span = range(min(stretch), max(stretch) + 1)
    layers = [case.layers[i] for i in span]
    activations = [layer.activation for layer in layers if layer.activation]
    squashing = sorted(set(activations) & set(_SQUASHING))
    normalised = sum(layer.normalises for layer in layers)
    scales = [case.state.weight_scales[layer.name] for layer in layers if layer.name in case.state.weight_scales]
    if vanishes and squashing:
        bound = "at most 1/4" if "sigmoid" in squashing else "below 1 away from 0"
        yield f"relu or silu in the place of {' and '.join(squashing)}, whose derivative is {bound}."
    if scales and not normalised:
        scale, wanted = float(np.median(scales)), 1.0 if squashing else math.sqrt(2.0)
        if scale < 0.75 * wanted if vanishes else scale > 1.25 * wanted:
            name, call = ("Glorot & Bengio's", "xavier_normal_(weight)") if squashing else (
                "Kaiming's", "kaiming_normal_(weight, nonlinearity='relu')")  # fmt: skip
            yield f"Initialisation: the weights are {figures(scale / wanted)} of {name} scale; torch.nn.init.{call}."
    if not normalised:
        yield "Batch norm before each activation: vgkern.nn.BatchNormAct2d(channels, activation=...)."
    yield "A residual connection every second or third layer: BatchNormAct2d()(x, residual)."
    if not vanishes:
        yield _clip_advice(case.history)


def _spike(case: _Case) -> Iterator[Finding]:
    totals = case.history.total_norm
    totals = np.where(np.isfinite(totals), totals, np.nan)
    if np.isfinite(totals).sum() < 5:
        return
    middle, most = float(np.nanmedian(totals)), int(np.nanargmax(totals))
    if middle > 0 and totals[most] > case.thresholds.spike * middle:
        worst = int(np.nanargmax(np.nan_to_num(case.history.grad_norm[most], nan=-1.0)))
        yield Finding(
            "exploding", case.name(worst),
            f"The norm of all gradients leaps to {figures(float(totals[most]))} in step {case.history.steps[most]}, "
            f"{figures(float(totals[most]) / middle)} times its median; most of it in {case.name(worst)}.",
            {"step": int(case.history.steps[most]), "norm": float(totals[most]), "median_norm": middle},
            (_clip_advice(case.history), "A lower learning rate, or a warm-up."),
        )  # fmt: skip


def clip_norm(history: History) -> float:
    """The 90th percentile of the norm of all gradients: clipping there leaves nine steps in ten alone. NaN without any.

    Pascanu et al. 2013, arXiv 1211.5063, take it from the norms that were recorded as well.
    """
    totals = history.total_norm[:, None]
    return float(quantile(totals, 0.9)[0]) if len(totals) else math.nan


def _clip_advice(history: History) -> str:
    return (
        f"Clipping: clip_grad_norm_(parameters, max_norm={clip_norm(history):.2g}), the 90th percentile of what was "
        "recorded."
    )


def _loss_scale(case: _Case) -> Iterator[Finding]:
    """Too low: most elements of the scaled gradient are below what float16 holds."""
    if not case.scaled:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        rms = median(case.history.grad_output_norm / np.sqrt(case.history.elements)) * case.unscale
    low = np.flatnonzero(rms < case.thresholds.underflow)
    if not len(low):
        return
    index = int(low[np.argmin(rms[low])])
    known = rms[np.isfinite(rms) & (rms > 0)]
    target = case.unscale * 2.0 ** round(math.log2(2.0**-10 / float(np.median(known)))) if len(known) else math.inf
    yield Finding(
        "loss_scale", case.name(index),
        f"At a loss scale of {case.unscale:g} the elements of the gradient have a root mean square of "
        f"{figures(float(rms[index]))} in {case.name(index)}: {_count(len(low), 'layer')} below what float16 holds.",
        {"rms": float(rms[index]), "layers": [case.name(int(i)) for i in low], "scale": case.unscale},
        (f"A loss scale of about {target:g}, or torch.amp.GradScaler, which finds it.",
         "bfloat16 needs no loss scale."),
    )  # fmt: skip


_LOOKS: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _nonfinite, _frozen_norm, _no_gradient, _dead, _depth, _spike, _loss_scale,
)  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
