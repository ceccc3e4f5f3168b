"""Other libraries' fused batch norms, each timed where it is installed and does what a configuration asks for.

* apex ``contrib.groupbn``: float16 in channels_last, ReLU, with a residual or without; training.
* inplace_abn ``InPlaceABN``: leaky ReLU, ELU or none, no residual. It overwrites its input, and so is handed a copy,
  one read and one write that are timed with it.
* attorch ``BatchNorm2d``: Triton, contiguous, the activation and the residual in the kernel.

Liger-Kernel, which has no batch norm, is not here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shapes import Configuration

__all__ = ["LIBRARIES", "Library"]

#: x and residual (or None) to y, and the parameters beside them.
Fused = tuple[Callable[[Tensor, Tensor | None], Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Library:
    module: str
    takes: Callable[[Configuration], bool]
    build: Callable[[Any, Configuration, nn.Module], Fused]

    def fused(self, configuration: Configuration, layer: nn.Module) -> Fused | None:
        """The library's layer with the parameters of ``layer``; None where it is not installed or cannot do that."""
        top = self.module.partition(".")[0]
        if importlib.util.find_spec(top) is None or not self.takes(configuration):
            return None
        try:
            module = importlib.import_module(self.module)
        except ImportError:  # apex without the extension that this part of it needs
            return None
        return self.build(module, configuration, layer)


def _like(made: nn.Module, layer: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    made.to(layer.weight.device, dtype).train(layer.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(made, name).copy_(getattr(layer, name))
    return made, (made.weight, made.bias)


def _apex(module: Any, configuration: Configuration, layer: nn.Module) -> Fused:
    made = module.BatchNorm2d_NHWC(configuration.shape[1], fuse_relu=True)
    made, parameters = _like(made, layer, torch.float32)

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        rows = [None if t is None else t.permute(0, 2, 3, 1) for t in (x, residual)]
        return made(*rows).permute(0, 3, 1, 2)

    return forward, parameters


def _inplace_abn(module: Any, configuration: Configuration, layer: nn.Module) -> Fused:
    argument = (*layer.activation.args, 0.01)[0]
    made = module.InPlaceABN(configuration.shape[1], activation=configuration.activation, activation_param=argument)
    made, parameters = _like(made, layer, layer.weight.dtype)
    return lambda x, residual: made(x.clone()), parameters


def _attorch(module: Any, configuration: Configuration, layer: nn.Module) -> Fused:
    activation = None if configuration.activation == "identity" else configuration.activation
    made = module.BatchNorm2d(configuration.shape[1], act_func=activation, device=str(layer.weight.device))
    made, parameters = _like(made, layer, torch.float32)
    return lambda x, residual: made(x, residual), parameters


LIBRARIES = {
    "apex": Library(
        "apex.contrib.groupbn",
        lambda c: (c.dtype, c.layout, c.activation, c.training) == ("float16", "channels_last", "relu", True),
        _apex,
    ),
    "inplace_abn": Library(
        "inplace_abn",
        lambda c: c.activation in ("identity", "leaky_relu", "elu") and not c.residual and c.dtype != "float64",
        _inplace_abn,
    ),
    "attorch": Library(
        "attorch",
        lambda c: (
            c.activation in ("identity", "relu", "gelu", "silu", "sigmoid", "tanh")
            and c.layout == "contiguous"
            and c.dtype == "float32"
        ),
        _attorch,
    ),
}
