"""Modules that become fused layers, and back: the same objects, with another class.

So whoever holds a reference keeps it, and parameters, buffers, hooks, names and their order are what they were.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import synchronised
from ..activations import ActivationSpec, resolve
from ..nn import AddAct, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct

__all__ = [
    "FUSED",
    "Fusion",
    "copied",
    "record_anew",
    "record_no_more",
    "to_add_act",
    "to_batch_norm_act",
    "to_passed",
    "to_plain",
]


@dataclass(frozen=True)
class Fusion:
    """What became of a module, kept on it as ``_fusion``: enough to report and to undo it."""

    original: type[nn.Module]
    operations: tuple[str, ...]  # for the report: "batch norm", "residual", "relu"
    in_place: bool = False  # the sum was `+=`


class _PReLUElsewhere(nn.Module):
    """A fused layer whose slope is the weight of a PReLU module, under whose name ``state_dict`` keeps it."""

    # In a tuple, so that it is no submodule. The weight is looked up at each use: it may have been replaced.
    _prelu: tuple[nn.PReLU] | None

    @property
    def activation_weight(self) -> Tensor | None:  # type: ignore[override]
        return None if self._prelu is None else self._prelu[0].weight


class BatchNormPReLU1d(_PReLUElsewhere, BatchNormAct1d):  # type: ignore[override]
    """A ``BatchNormAct1d`` that shares the weight of a ``PReLU``."""


class BatchNormPReLU2d(_PReLUElsewhere, BatchNormAct2d):  # type: ignore[override]
    """A ``BatchNormAct2d`` that shares the weight of a ``PReLU``."""


class BatchNormPReLU3d(_PReLUElsewhere, BatchNormAct3d):  # type: ignore[override]
    """A ``BatchNormAct3d`` that shares the weight of a ``PReLU``."""


class SyncBatchNormPReLU(_PReLUElsewhere, SyncBatchNormAct):  # type: ignore[override]
    """A ``SyncBatchNormAct`` that shares the weight of a ``PReLU``."""


class AddPReLU(_PReLUElsewhere, AddAct):  # type: ignore[override]
    """An ``AddAct`` that shares the weight of a ``PReLU``."""


class PassedPReLU(nn.PReLU):
    """A ``PReLU`` whose function is computed by the fused layer before it: it holds the weight and passes its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input


#: torch.nn's batch norms: without and with a PReLU's weight.
FUSED: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: (BatchNormAct1d, BatchNormPReLU1d),
    nn.BatchNorm2d: (BatchNormAct2d, BatchNormPReLU2d),
    nn.BatchNorm3d: (BatchNormAct3d, BatchNormPReLU3d),
    nn.SyncBatchNorm: (SyncBatchNormAct, SyncBatchNormPReLU),
}


def _device(module: nn.Module) -> Any:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; process groups, which cannot be copied, are the same."""
    groups = (getattr(module, "process_group", None) for module in model.modules())
    return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


def record_anew(layer: Any, tracked: bool) -> None:
    """The gradient record of a module that has become a fused layer, which shares statistics as the module did."""
    synchronises = isinstance(layer, SyncBatchNormAct)
    layer._init_grad_record(tracked or synchronises, _device(layer))
    if synchronises:
        layer._init_synchronisation(tracked, vars(layer).pop("process_group", None))


def record_no_more(layer: Any) -> bool:
    """Takes away what :func:`record_anew` made; returns whether the layer recorded."""
    tracked = layer._buffers.pop("_probe", None) is not None
    layer._non_persistent_buffers_set.discard("_probe")
    if isinstance(layer, SyncBatchNormAct):
        layer.__dict__["process_group"] = synchronised.process_group(vars(layer).pop("_group_name"))
        del layer._channels_agreed
        tracked = vars(layer).pop("_track_grad_stats")
    return tracked


def to_batch_norm_act(
    module: nn.Module, spec: ActivationSpec | None, prelu: nn.PReLU | None, operations: tuple[str, ...], in_place: bool
) -> None:
    """A batch norm of ``torch.nn`` into the fused layer."""
    layer: Any = module
    original = type(module)
    layer.__class__ = FUSED[original][prelu is not None]
    layer.activation = spec or resolve(None)
    if prelu is None:
        layer.activation_weight = None
    else:
        layer._prelu = (prelu,)
    record_anew(layer, True)
    layer.grad_norm_bounds = None
    layer._fusion = Fusion(original, operations, in_place)


def to_add_act(module: nn.Module, in_place: bool) -> None:
    """An activation module into ``AddAct``, which takes a second argument."""
    layer: Any = module
    spec = resolve(module)
    original = type(module)
    layer.__class__ = AddAct
    layer.activation, layer.activation_weight = spec, None
    record_anew(layer, True)
    layer._fusion = Fusion(original, ("residual", str(spec)), in_place)


def to_passed(module: nn.Module) -> None:
    """An activation module that a fused layer computes into one that passes its input on."""
    original = type(module)
    module.__class__ = PassedPReLU if original is nn.PReLU else nn.Identity
    module.__dict__["_fusion"] = Fusion(original, ())


#: What the conversions above put on a module.
_ADDED = ("activation", "activation_weight", "_prelu", "_bounds", "_grad_norm_bounds", "_fusion", "_fusion_broadcast")


def to_plain(module: nn.Module) -> None:
    """What one of the conversions above made, back into what it was."""
    fusion: Fusion = vars(module)["_fusion"]
    record_no_more(module)
    for name in _ADDED:
        vars(module).pop(name, None)
    module.__class__ = fusion.original
