"""``SyncBatchNormAct``: the statistics of a batch are those of the batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import synchronised
from ..functional import Bounds
from ..gradients.record import GradStats
from .batch_norm_act import _BatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SyncBatchNormAct"]


class SyncBatchNormAct(_BatchNormAct):
    """``act(batch_norm(input) + residual)``, normalised in training by the mean and variance over all processes.

    In training it costs one all-gather of 3·C float64 numbers forward and one all-reduce of 2·C + 1 backward, which
    every process must take part in: each has to call the layer, and run the backward pass through its output, as often
    as the others. So the output requires grad (unless grad is off) even where neither input nor parameters do. In eval,
    in a group of one, and without ``torch.distributed`` it is :class:`BatchNormAct2d` for any rank of input.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``torch.nn.SyncBatchNorm``.
        bias, activation, activation_args, grad_norm_bounds: as :class:`BatchNormAct2d`; the bounds are those of the
            norm of the gradient of all processes' inputs together.
        track_grad_stats: whether ``grad_stats()`` reports. The record is the process's own: its part of every gradient.
        process_group: whose processes share statistics; None for all of them.

    Shape:
        input, residual, output: (N, C) to (N, C, D, H, W). N and the rest may differ from process to process, N may be
        0, and C·1 values are enough. Output and gradients keep input's memory format. dγ and dβ are the process's own
        part, as those of ``torch.nn.SyncBatchNorm``: DistributedDataParallel averages them.

    Raises:
        ValueError, RuntimeError: as :class:`BatchNormAct2d`. RuntimeError on every process if, in the first forward
            pass in training, they do not agree in channels (not under ``torch.compile``), and in a backward pass with
            ``create_graph=True``.

    Example:
        >>> import torch, vgkern
        >>> layer = vgkern.nn.SyncBatchNormAct(4, activation="silu")  # alone: as BatchNormAct2d
        >>> layer(torch.randn(8, 4, 5, 5)).shape
        torch.Size([8, 4, 5, 5])

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; over processes, Peng et al. 2018, arXiv 1711.07240.
    """

    _ranks = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | nn.Module | None = "relu",
        activation_args: Mapping[str, Any] | None = None,
        grad_norm_bounds: Bounds | None = None,
        track_grad_stats: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, activation=activation,
            activation_args=activation_args, grad_norm_bounds=grad_norm_bounds, track_grad_stats=True,
        )  # fmt: skip
        self._init_synchronisation(track_grad_stats, process_group)

    def _init_synchronisation(self, track_grad_stats: bool, process_group: ProcessGroup | None) -> None:
        # There is a probe in any case: it is what makes the output require grad.
        self._track_grad_stats = track_grad_stats
        # By its name, which can be copied and pickled.
        self._group_name = None if process_group is None else process_group.group_name
        self._channels_agreed = False

    @property
    def _group(self) -> synchronised.Group | None:  # type: ignore[override]
        return synchronised.group_of(self._group_name) if self.training else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As ``BatchNormAct2d.forward``; a collective operation in training."""
        if not torch.compiler.is_compiling() and not self._channels_agreed and (group := self._group):
            synchronised.agree_on_channels(input, self.num_features, group)
            self._channels_agreed = True
        return super().forward(input, residual)

    def grad_stats(self) -> GradStats | None:
        return super().grad_stats() if self._track_grad_stats else None

    def extra_repr(self) -> str:
        group = [] if self._group_name is None else [f"process_group={self._group_name!r}"]
        return ", ".join([super().extra_repr(), *group])
