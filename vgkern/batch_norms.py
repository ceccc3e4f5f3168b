"""What PyTorch does to every batch norm of a model, done to the layers of this package as well.

PyTorch's own functions look for ``_BatchNorm``, which these layers are not: its converters would replace them by layers
without their activation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .nn.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct
from .nn.sync_batch_norm_act import SyncBatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["convert_sync_batchnorm", "update_bn"]

_CONVERTED = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct,
)  # fmt: skip


def convert_sync_batchnorm(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Every batch norm of a model becomes a :class:`vgkern.nn.SyncBatchNormAct`.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, and for ``BatchNormAct*`` too, with activation, bounds and
    record. Parameters and buffers stay the same objects (an optimiser may hold them); names, modes and hooks stay. A
    module that stands in two places is converted to one.

    Args:
        model: is changed in place, unless it is itself a batch norm.
        process_group: whose processes share statistics; None for all of them.

    Returns:
        The model, or the layer that replaces it.

    Warns:
        RuntimeWarning: a subclass of a batch norm is left as it is: it may do more than normalise, and what that is
            would be lost. So is a lazy layer that has seen no batch.

    Example:
        >>> import torch, vgkern
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), vgkern.nn.BatchNormAct2d(8), torch.nn.BatchNorm2d(8))
        >>> [type(layer).__name__ for layer in vgkern.convert_sync_batchnorm(net)]
        ['Conv2d', 'SyncBatchNormAct', 'SyncBatchNormAct']
    """
    replacements: dict[nn.Module, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if type(module) in _CONVERTED:
            replacements[module] = _synchronised(module, process_group)
        elif isinstance(module, (_BatchNorm, _BatchNormAct)):
            left.append(f"{name or 'the model'} ({type(module).__name__})")
    if left:
        warnings.warn(
            f"convert_sync_batchnorm left what is no plain batch norm: {', '.join(left)}", RuntimeWarning, stacklevel=2
        )
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replacements:
                module._modules[name] = replacements[child]
    return replacements.get(model, model)


def _synchronised(layer: nn.Module, process_group: ProcessGroup | None) -> SyncBatchNormAct:
    """A layer of the same parameters, buffers, hooks and settings."""
    new = SyncBatchNormAct(1, device="meta", activation=None)
    tracked = getattr(layer, "_track_grad_stats", None)  # of a layer that is synchronised already
    if tracked is None:
        tracked = not isinstance(layer, _BatchNormAct) or layer._probe is not None
    if isinstance(layer, _BatchNormAct):
        new.__dict__.clear()
    # Registries and hooks are copied: what is later registered on one of the two is not to show in the other.
    new.__dict__.update(
        {name: value.copy() if isinstance(value, dict) else value for name, value in vars(layer).items()}
    )
    new.__dict__.pop("process_group", None)  # nn.SyncBatchNorm's
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), None)
    if new._buffers.get("_probe") is None:
        new._init_grad_record(True, device)
    new._init_synchronisation(tracked, process_group)
    return new


def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | int | None = None) -> None:
    """Running statistics of the batch norms of ``model`` as the average over one pass through ``loader``.

    As ``torch.optim.swa_utils.update_bn``, which does not know the layers of this package.

    Args:
        loader: of tensors, or of lists or tuples of which the first element is the input.
        model: every ``BatchNormAct*``, ``SyncBatchNormAct`` and ``torch.nn.BatchNorm*d`` in it is reset first; its
            training mode and their momenta are afterwards what they were.
        device: where inputs are moved to; None to leave them.

    Example:
        >>> import torch, vgkern
        >>> net = vgkern.nn.BatchNormAct2d(3)
        >>> vgkern.update_bn([torch.randn(8, 3, 4, 4) for _ in range(5)], net)
        >>> int(net.num_batches_tracked)
        5
    """
    momenta = {}
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if isinstance(module, (_BatchNorm, _BatchNormAct)):
            module.reset_running_stats()
            momenta[module] = module.momentum
    if not momenta:
        return
    try:
        model.train()
        for module in momenta:
            module.momentum = None
        with torch.no_grad():
            for batch in loader:
                input = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(input if device is None else input.to(device))
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
        for module, training in modes.items():
            module.training = training
