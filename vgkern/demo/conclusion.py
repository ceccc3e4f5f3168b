"""What the numbers say, in words. Nothing here knows how a run ought to end: every clause is computed."""

from __future__ import annotations

import math
from itertools import pairwise

from ..text import figures, first_epochs, percent
from .nets import NETS
from .results import DemoResult, NetResult

__all__ = ["conclude", "headline"]

# Differences that count as none: two points of accuracy are nine of the 450 test images, and half a power of ten is
# what the median gradient of a layer moves by from seed to seed.
_SAME_ACCURACY = 0.02
_SAME_IMBALANCE = 0.5

#: Within this factor of each other, first and last layer count as in balance.
BALANCED = 100.0
#: Below this ratio of first to last layer, the gradient counts as vanished.
VANISHED = 1e-6


def _change(ratio: float) -> tuple[str, str]:
    """Verb and measure of what becomes of the gradient between the last layer and the first."""
    if math.isnan(ratio):
        return "is", "zero throughout"
    if ratio == 0:
        return "shrinks", "to zero"
    return "grows" if ratio > 1 else "shrinks", f"{figures(max(ratio, 1 / ratio))}-fold"


def _changes(nets: list[NetResult]) -> str:
    parts, last = [], ""
    for net in nets:
        verb, measure = _change(net.ratio)
        parts.append(f"{measure} ({net.label})" if verb == last else f"{verb} {measure} ({net.label})")
        last = verb
    return _listed(parts)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _out_of_order(nets: list[NetResult]) -> list[str]:
    """Neighbours in the table that stand against what the theory predicts, each with its numbers.

    From row to row of ``NETS`` the accuracy should rise, and less and less of the gradient get lost on its way until it
    arrives (Glorot & Bengio 2010; He et al. 2015, arXiv 1502.01852, and 2016, arXiv 1512.03385). Among nets in which
    it does arrive, within a factor of ``BALANCED``, theory says nothing about which does better.
    """
    found = []
    for worse, better in pairwise(nets):
        if not better.accuracy >= worse.accuracy - _SAME_ACCURACY:
            found.append(f"{better.label} gets {percent(better.accuracy)}, {worse.label} {percent(worse.accuracy)}")
        if not better.imbalance <= max(worse.imbalance + _SAME_IMBALANCE, math.log10(BALANCED)):
            found.append(f"the gradient is more even in {worse.label} than in {better.label}")
    return found


def conclude(result: DemoResult) -> str:
    """Two or three sentences on what a run showed; one on why there is nothing to say where it was cut short."""
    nets = result.nets
    if not nets:
        return "Interrupted before the first net was trained: there is nothing to show."
    depth = result.config.depth
    epochs = max(len(net.epochs) for net in nets)
    accuracies = _listed([percent(net.accuracy) for net in nets])
    sentences = [
        f"Over {first_epochs(result.early_epochs)} the gradient on its way back from layer {depth} to layer 1 "
        f"{_changes(nets)}.",
        f"After {epochs} epoch{'s' * (epochs > 1)} {'the nets classify' if len(nets) > 1 else 'the net classifies'} "
        f"{accuracies} of {result.test_images} unseen digits (guessing: 10 %).",
    ]
    sentences += [f"{net.label} diverged in epoch {len(net.epochs)}.".capitalize() for net in nets if net.diverged]
    if not result.complete:
        sentences.append(f"The run was interrupted in net {len(nets)} of {len(NETS)}, so it decides nothing.")
    elif against := _out_of_order(nets):
        sentences.append(f"This is not the order that the theory predicts: {'; '.join(against)}.")
    elif max(net.accuracy for net in nets) - min(net.accuracy for net in nets) <= _SAME_ACCURACY:
        sentences.append("That does not tell them apart.")
    else:
        sentences.append("Both are in the order that the theory predicts.")
    return " ".join(sentences)


def headline(result: DemoResult) -> str:
    """The finding as the figure's title; a neutral title where a run found something else."""
    nets = {net.key: net for net in result.nets}
    depth = result.config.depth
    sigmoid, residual = nets.get("sigmoid"), nets.get("residual")
    if sigmoid and residual and sigmoid.ratio < VANISHED and 1 / BALANCED <= residual.ratio <= BALANCED:
        learns = " and learns best" if residual.accuracy >= max(net.accuracy for net in result.nets) else ""
        return f"{depth} layers deep: sigmoid loses the gradient, batch norm + residual keeps it{learns}"
    return f"Gradient and training of nets with {depth} weight layers"
