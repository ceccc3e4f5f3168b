"""``fold``: batch norms into the convolutions and linear layers before them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..nn import AddAct
from ..nn.batch_norm_act import _BatchNormAct
from . import twins
from .activations import has_hooks
from .applying import apply, undo
from .layers import FUSED, AddPReLU, _PReLUElsewhere, copied
from .plan import Analysis, make_plan

__all__ = ["fold"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference: batch norms folded into what comes before, the activation fused with the residual.

    Convolutions, transposed convolutions of one group, and linear layers (over (N, C) input) take the batch norm in,
    by ``torch.nn.utils.fusion``; in its place stands :class:`vgkern.nn.AddAct`, or nothing. A batch norm that follows
    something else stays a fused layer. The copy is in eval mode and no longer trains as the original does.

    Args:
        model: fused or not.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import torch, vgkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = vgkern.fold(model)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(folded(x), model(x), atol=1e-5), folded[1]
        (True, AddAct(activation=relu))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    folded = copied(model).eval()
    undo(folded)
    twins.from_plain(folded)
    analysis = Analysis(folded)
    pairs = _pairs(analysis)  # before the graphs change
    apply(make_plan(analysis, double=False), folded)  # of two that a sum needs, convolutions take both in
    for before, batch_norm in pairs:
        _take_in(before, batch_norm)
        _leave_out(batch_norm)
    return folded


def _pairs(analysis: Analysis) -> list[tuple[Any, Any]]:
    """(layer, batch norm) where the batch norm is all that becomes of the layer's output."""
    pairs = []
    for traced in analysis.live_traces():
        for node in traced.graph.nodes:  # type: ignore[union-attr]
            batch_norm: Any = traced.callee(node)
            if not isinstance(batch_norm, _BatchNormAct) and type(batch_norm) not in FUSED:
                continue
            before: Any = traced.callee(node.args[0]) if node.args else None
            if before is None or len(node.args[0].users) != 1:
                continue
            alone = all(
                len(analysis.calls[id(module)]) == 1
                and len(analysis.parents[id(module)]) == 1
                and analysis.unseen(module) is None
                and not has_hooks(module)
                and not parametrize.is_parametrized(module)
                and "forward" not in vars(module)
                for module in (before, batch_norm)
            )
            if alone and _takes_in(before, batch_norm):
                pairs.append((before, batch_norm))
    return pairs


def _takes_in(before: Any, batch_norm: Any) -> bool:
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        return False
    if type(before) is nn.Linear:
        return before.out_features == batch_norm.num_features
    return type(before) in _CONVOLUTIONS or (type(before) in _TRANSPOSED and before.groups == 1)


def _take_in(before: Any, batch_norm: Any) -> None:
    statistics = batch_norm.running_mean, batch_norm.running_var, batch_norm.eps, batch_norm.weight, batch_norm.bias
    if type(before) is nn.Linear:
        before.weight, before.bias = fuse_linear_bn_weights(before.weight, before.bias, *statistics)
    else:
        transposed = type(before) in _TRANSPOSED
        before.weight, before.bias = fuse_conv_bn_weights(before.weight, before.bias, *statistics, transposed)


def _leave_out(batch_norm: Any) -> None:
    """What remains of a batch norm without its normalisation: the sum and the activation."""
    fusion = vars(batch_norm).get("_fusion")
    nothing = not isinstance(batch_norm, _BatchNormAct) or (
        fusion is not None and "residual" not in fusion.operations and batch_norm.activation.name == "identity"
    )
    for name in ("weight", "bias"):
        batch_norm._parameters.pop(name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        batch_norm._buffers.pop(name)
    if nothing:
        vars(batch_norm).pop("_fusion", None)
        batch_norm._buffers.pop("_probe", None)
        batch_norm.__class__ = nn.Identity
    else:
        batch_norm.__class__ = AddPReLU if isinstance(batch_norm, _PReLUElsewhere) else AddAct
