"""``BatchNormAct1d``, ``BatchNormAct2d``, ``BatchNormAct3d``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import functional, synchronised
from ..functional import Bounds
from ..gradients.record import GradRecordMixin
from ._activation import ActivationMixin

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]


class _BatchNormAct(GradRecordMixin, ActivationMixin, _NormBase):
    # Derived from _NormBase for its parameters, buffers and loading, and not from _BatchNorm: the converters of
    # PyTorch (SyncBatchNorm, quantisation) replace every _BatchNorm and would drop the activation without a word.
    _ranks: ClassVar[tuple[int, ...]]
    _group: synchronised.Group | None = None  # with whom the statistics of a batch are shared

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
    ) -> None:
        if not eps >= 0:  # NaN too
            raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._init_activation(activation, activation_args, device, dtype)
        self._init_grad_record(track_grad_stats, device)
        self.grad_norm_bounds = grad_norm_bounds

    @property
    def grad_norm_bounds(self) -> Bounds | None:
        """(low, high) within which the L2 norm of the gradient handed on is kept; None for no bounds."""
        return self._grad_norm_bounds

    @grad_norm_bounds.setter
    def grad_norm_bounds(self, bounds: Bounds | None) -> None:
        self._bounds = functional.resolve_bounds(bounds)
        self._grad_norm_bounds = bounds

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(batch_norm(input) + residual)``.

        Args:
            input: see the class.
            residual: of input's shape and device, or None.
        """
        if isinstance(input, Tensor) and input.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
        weight, bias, running_mean, running_var, counter, uses_batch = self._tensors_in_use()
        return functional.step(
            input, residual, weight, bias, self.activation_weight, self._probe_on(input.device),
            running_mean, running_var, counter, uses_batch, self.momentum, self.eps, self.activation, self._bounds,
            self.training, self._group,
        )  # fmt: skip

    def _tensors_in_use(self) -> tuple[Any, ...]:
        """(weight, bias, running_mean, running_var, counter), and whether the batch's own statistics are in use."""
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors()
        training, tracked = self.training, self.track_running_stats
        uses_batch = training or running_mean is None
        # Statistics that are there but not tracked take no part in training (track_running_stats switched off later).
        if running_mean is None or (training and not tracked):
            running_mean = running_var = None
        return weight, bias, running_mean, running_var, num_batches_tracked if tracked else None, uses_batch

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """(weight, bias, running_mean, running_var, num_batches_tracked)."""
        parameters, buffers = self._parameters, self._buffers
        try:  # 0.5 µs less a tensor than nn.Module.__getattr__
            return (
                parameters["weight"], parameters["bias"],
                buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"],
            )  # fmt: skip
        except KeyError:  # computed: a parametrisation, pruning, a replica of nn.DataParallel
            return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *_options(self)])


def _options(layer: Any) -> list[str]:
    """The layer's options beyond those of ``nn.BatchNorm*d``, as they are written in a call."""
    options = [f"activation={layer.activation}"]
    if layer.grad_norm_bounds is not None:
        options.append(f"grad_norm_bounds={layer.grad_norm_bounds}")
    return options


_DOC = """``act(batch_norm(input) + residual)`` over {shapes} input, fused forward and backward.

    A drop-in for ``torch.nn.BatchNorm{dim}d`` followed by an (optional) addition and an activation: the first seven
    arguments are its arguments, ``state_dict`` exchanges with it strictly both ways, errors are its errors.

    Args:
        num_features: C, the channels.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as ``torch.nn.BatchNorm{dim}d``.
        activation: a name of ``vgkern.activations.names()``, a ``torch.nn`` activation module (its parameters are
            taken over: a ``PReLU`` weight stays the same ``Parameter``), or None for none.
        activation_args: the activation's arguments by name, e.g. ``{{"negative_slope": 0.2}}``; for ``"prelu"``,
            ``num_parameters`` and ``init``.
        grad_norm_bounds: (low, high), either may be None: the gradient handed on is scaled, direction kept, so that
            its L2 norm lies in the bounds; a zero or non-finite gradient is left as it is.
        track_grad_stats: whether the backward kernels report (``grad_stats()``).

    Shape:
        input, residual, output: {shapes}. Output and gradients keep input's memory format.

    Raises:
        ValueError: an unknown activation, an argument it does not take, bad bounds or eps; in ``forward``, input of
            another rank, or one value per channel in training.
        RuntimeError: in ``forward``, tensors whose lengths, dtypes or devices do not fit. Nothing has changed then.

    Example:
        >>> import torch, vgkern
        >>> layer = vgkern.nn.BatchNormAct{dim}d(4, activation="leaky_relu", activation_args={{"negative_slope": 0.2}})
        >>> x = torch.randn({example})
        >>> layer(x, residual=x).shape == x.shape
        True

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167.
    """


class BatchNormAct1d(_BatchNormAct):
    __doc__ = _DOC.format(dim=1, shapes="(N, C) or (N, C, L)", example="8, 4, 5")
    _ranks = (2, 3)


class BatchNormAct2d(_BatchNormAct):
    __doc__ = _DOC.format(dim=2, shapes="(N, C, H, W)", example="8, 4, 5, 5")
    _ranks = (4,)


class BatchNormAct3d(_BatchNormAct):
    __doc__ = _DOC.format(dim=3, shapes="(N, C, D, H, W)", example="8, 4, 3, 5, 5")
    _ranks = (5,)
