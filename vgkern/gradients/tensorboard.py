"""The latest row of a monitor as TensorBoard knows it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .history import History

__all__ = ["scalars", "write"]

_OF_A_LAYER = ("grad_output_norm", "gain", "dead_fraction", "grad_norm")


def scalars(history: History) -> dict[str, float]:
    """The last row's numbers by tag: ``gradients/gain/layer1.0.bn1``; what is not known, or not finite, is left out."""
    row = len(history.steps) - 1
    values = {
        f"gradients/{name}/{layer.name}": float(getattr(history, name)[row, index])
        for name in _OF_A_LAYER
        for index, layer in enumerate(history.layers)
    }
    values["gradients/total_norm"] = float(history.total_norm[row])
    values["gradients/nonfinite"] = float(history.nonfinite[row].sum())
    return {tag: value for tag, value in values.items() if np.isfinite(value)}


def write(history: History, summary_writer: Any, global_step: int) -> None:
    """The last row's scalars, and over the layers a histogram of log10 of the norms and of the gains."""
    for tag, value in scalars(history).items():
        summary_writer.add_scalar(tag, value, global_step)
    for name in ("grad_output_norm", "grad_norm", "gain"):
        values = getattr(history, name)[-1]
        values = values[np.isfinite(values) & (values > 0)]
        if len(values):
            summary_writer.add_histogram(f"gradients/log10_{name}", np.log10(values), global_step)
