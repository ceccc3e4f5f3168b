"""The plain twins of layers that were built fused: the same keys, PyTorch's operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..activations import ActivationSpec
from ..nn import AddAct, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .runtime import activate

__all__ = ["PlainAddAct", "PlainBatchNormAct1d", "PlainBatchNormAct2d", "PlainBatchNormAct3d", "from_plain", "to_plain"]


class _Plain(nn.Module):
    activation: ActivationSpec
    activation_weight: Tensor | None

    def _finish(self, z: Tensor, residual: Tensor | None) -> Tensor:
        return activate(self.activation, z if residual is None else z + residual, self.activation_weight)

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), f"activation={self.activation}"])


class PlainBatchNormAct1d(_Plain, nn.BatchNorm1d):
    """``act(batch_norm(input) + residual)`` by three operations of PyTorch; ``vgkern.fuse`` makes it one again."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._finish(super().forward(input), residual)


class PlainBatchNormAct2d(_Plain, nn.BatchNorm2d):
    """``act(batch_norm(input) + residual)`` by three operations of PyTorch; ``vgkern.fuse`` makes it one again."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._finish(super().forward(input), residual)


class PlainBatchNormAct3d(_Plain, nn.BatchNorm3d):
    """``act(batch_norm(input) + residual)`` by three operations of PyTorch; ``vgkern.fuse`` makes it one again."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._finish(super().forward(input), residual)


class PlainAddAct(_Plain):
    """``act(input + residual)`` by two operations of PyTorch; ``vgkern.fuse`` makes it one again."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._finish(input, residual)


#: Fused layer -> plain twin.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct1d: PlainBatchNormAct1d,
    BatchNormAct2d: PlainBatchNormAct2d,
    BatchNormAct3d: PlainBatchNormAct3d,
    AddAct: PlainAddAct,
}
TWINS = tuple(_TWINS.values())


def to_plain(root: nn.Module) -> None:
    """Fused layers into their plain twins, which keep neither the gradient record nor bounds."""
    for module in root.modules():
        if (twin := _TWINS.get(type(module))) is not None:
            recorded = module._buffers.pop("_probe", None) is not None
            module._non_persistent_buffers_set.discard("_probe")
            for name in ("_bounds", "_grad_norm_bounds"):
                vars(module).pop(name, None)
            module.__dict__["track_grad_stats"] = recorded
            module.__class__ = twin


def from_plain(root: nn.Module) -> None:
    """Plain twins into fused layers."""
    for module in root.modules():
        for fused, twin in _TWINS.items():
            if type(module) is twin:
                layer: Any = module
                layer.__class__ = fused
                device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
                layer._init_grad_record(vars(layer).pop("track_grad_stats"), device)
                if fused is not AddAct:
                    layer.grad_norm_bounds = None
                break
