"""A sick net and its cure: the same 20 layers, once plain with sigmoids, once with batch norm, ReLU and residuals."""

from __future__ import annotations

import torch

from ..demo.nets import NETS, DeepNet
from .examination import Patient

__all__ = ["patients"]

_DEPTH = 20


def patients() -> dict[str, Patient]:
    """By title; both get the same random images of 8 × 8 pixels."""
    images = torch.randn(64, 1, 8, 8)
    specs = {spec.key: spec for spec in NETS}
    titles = {"sick": "sigmoid", "cured": "residual"}
    return {
        f"{state}: {specs[key].label}, {_DEPTH} layers": Patient(DeepNet(specs[key], _DEPTH, width=8), images)
        for state, key in titles.items()
    }
