"""Fused layers in models that people have: :func:`fuse`, :func:`unfuse`, :func:`fusion_report`, :func:`fold`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import AddAct
from ..nn.batch_norm_act import _BatchNormAct
from . import twins
from .applying import apply, undo
from .folding import fold
from .layers import copied
from .plan import Analysis, make_plan
from .report import Fused, FusionReport, Left

__all__ = ["Fused", "FusionReport", "Left", "fold", "fuse", "fusion_report", "unfuse"]


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Make one operation of every batch norm with the sum and the activation that follow it.

    Each module's forward is traced by itself with ``torch.fx``, so the hierarchy stays: where the activation is a
    module of its own, the batch norm becomes :class:`vgkern.nn.BatchNormAct2d` (1d, 3d, ``SyncBatchNormAct``) and the
    activation passes its input on; where a sum or a function has to go, the forward of the module in which it stands is
    replaced, by a subclass of the module's own class. Sums with an activation and no batch norm become
    :class:`vgkern.nn.AddAct`.
    A module that cannot be traced stays as it is and the modules inside it are fused.

    ``state_dict`` keys and values, modes, hooks, devices, dtypes, tied and frozen parameters, names and order of
    modules are those of the model. What a reader could not be sure of is left: :func:`fusion_report` says why. A sum
    whose operands turn out to be of different shapes is computed by PyTorch's operations. What a traced forward read
    from ``self`` as a number is settled; the new forward raises RuntimeError when it is another one.

    Args:
        model: any ``nn.Module``. Fusing twice changes nothing.
        inplace: change ``model`` itself, so that its parameters stay the same objects, which an optimiser may hold
            already. By default a deep copy is changed.

    Returns:
        The fused model.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import torch, vgkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        >>> fused = vgkern.fuse(model)
        >>> fused[1].activation, fused[2], list(fused.state_dict()) == list(model.state_dict())
        (ActivationSpec(name='relu', args=()), Identity(), True)
    """
    _check(model)
    model = model if inplace else copied(model)
    twins.from_plain(model)
    apply(make_plan(Analysis(model)), model)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Back to plain ``torch.nn``, with the same ``state_dict`` and outputs.

    What :func:`fuse` changed becomes what it was, class by class. Layers that were built fused become modules that
    compute the same by PyTorch's operations, under the same keys. Gradient records and bounds are forgotten.

    Args:
        model: fused by :func:`fuse`, or built of the layers of ``vgkern.nn``.
        inplace: change ``model`` itself; by default a deep copy is changed.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import torch, vgkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> vgkern.unfuse(vgkern.fuse(model))[1:]
        Sequential(
          (1): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (2): ReLU()
        )
    """
    _check(model)
    model = model if inplace else copied(model)
    undo(model)
    twins.to_plain(model)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What :func:`fuse` made of a model, or would make; and every batch norm that it leaves, with the reason.

    Args:
        model: fused or not; not changed.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import vgkern
        >>> from torch import nn
        >>> report = vgkern.fusion_report(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> report.fused, report.left
        ((Fused(name='1', operations=('batch norm', 'relu')),), ())
    """
    _check(model)
    plan = make_plan(Analysis(model))
    planned = {id(match.module): match.operations for match in plan.matches}
    planned |= {id(sum_.act.module): sum_.operations for sum_ in plan.add_acts if sum_.act.module in plan.added}
    fused, left = [], []
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        fusion = vars(module).get("_fusion")
        if reason := vars(module).get("_fusion_broadcast"):
            left.append(Left(name, reason))
        elif fusion is not None and fusion.operations:
            fused.append(Fused(name, fusion.operations))
        elif id(module) in planned:
            fused.append(Fused(name, planned[id(module)]))
        elif fusion is None and (isinstance(module, (_BatchNormAct, AddAct)) or type(module) in twins.TWINS):
            norm = ["batch norm"] if hasattr(module, "num_features") else []
            fused.append(Fused(name, (*norm, str(module.activation))))
        elif name in plan.left:
            left.append(Left(name, vars(module).get("_fusion_left", plan.left[name])))
    return FusionReport(tuple(fused), tuple(left))


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
