"""The gradient record of a layer: sums made inside the backward kernels, read as norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["GradRecordMixin", "GradStats"]


@dataclass(frozen=True)
class GradStats:
    """What the backward passes of one layer since the last reset reported.

    Norms are L2 norms; over several backward passes, root mean squares of them.

    Attributes:
        grad_output_norm: of the gradient that arrives, dy.
        grad_preact_norm: of dz = φ'(z)·dy, which is also the gradient handed to the residual.
        grad_input_norm: of dx as handed on, after ``grad_norm_bounds``.
        grad_weight_norm: of dγ; 0 in a layer without γ.
        grad_bias_norm: of dβ; 0 in a layer without β.
        gain: ``grad_input_norm / grad_output_norm``, the layer's factor in the chain rule's product; NaN for 0/0.
        dead_fraction: share of elements with φ'(z) = 0.
        nonfinite: how many elements of dy were inf or NaN.
        backwards: how many backward passes are in the record.
    """

    grad_output_norm: float
    grad_preact_norm: float
    grad_input_norm: float
    grad_weight_norm: float
    grad_bias_norm: float
    gain: float
    dead_fraction: float
    nonfinite: float
    backwards: float

    @classmethod
    def from_record(cls, record: Sequence[float]) -> GradStats:
        """From the sums that the kernels made, in the order of ``ops.RECORD_FIELDS``."""
        sums = dict(zip(ops.RECORD_FIELDS, record, strict=True))
        backwards = sums["backwards"]
        output, preact, input_, weight, bias = (
            math.sqrt(sums[f"grad_{name}_sq"] / backwards) for name in ("output", "preact", "input", "weight", "bias")
        )
        return cls(
            grad_output_norm=output,
            grad_preact_norm=preact,
            grad_input_norm=input_,
            grad_weight_norm=weight,
            grad_bias_norm=bias,
            gain=input_ / output if output else math.nan,
            dead_fraction=sums["dead"] / sums["elements"] if sums["elements"] else math.nan,
            nonfinite=sums["nonfinite"],
            backwards=backwards,
        )


def _new_probe(device: torch.device) -> Tensor:
    return torch.zeros(len(ops.RECORD_FIELDS), dtype=ops.statistics_dtype(device), device=device, requires_grad=True)


class GradRecordMixin(nn.Module):
    """A layer whose backward kernels report.

    The record is the accumulated gradient of a probe, a non-persistent buffer: autograd adds the sums of one backward
    pass to those of the last, as it adds any gradient, so accumulation, checkpointing and ``torch.compile`` need no
    code of ours. A buffer and no parameter: optimisers, ``parameters()`` and ``state_dict`` do not see it.
    """

    _probe: Tensor | None

    def _init_grad_record(self, track_grad_stats: bool, device: Any) -> None:
        probe = _new_probe(torch.empty(0, device=device).device) if track_grad_stats else None
        self.register_buffer("_probe", probe, persistent=False)

    def _probe_on(self, device: torch.device) -> Tensor | None:
        """The probe, on the device of the input (``load_state_dict(assign=True)`` leaves a meta layer's behind)."""
        probe = self._buffers["_probe"]  # 0.5 µs less than self._probe, which nn.Module.__getattr__ looks up
        if probe is not None and probe.device != device:
            self._probe = probe = _new_probe(device)
        return probe

    def grad_stats(self) -> GradStats | None:
        """What the backward passes since the last reset reported; None before the first, or with recording off.

        Costs one transfer from the device, and only when it is called.

        Example:
            >>> import torch, vgkern
            >>> layer = vgkern.nn.BatchNormAct2d(3)
            >>> layer(torch.randn(4, 3, 8, 8, requires_grad=True)).square().sum().backward()
            >>> 0 < layer.grad_stats().dead_fraction < 1
            True
        """
        if self._probe is None or self._probe.grad is None:
            return None
        record = self._probe.grad.tolist()
        if record[ops.RECORD_FIELDS.index("backwards")] == 0:  # a GradientMonitor has taken it
            return None
        return GradStats.from_record(record)

    def reset_grad_stats(self) -> None:
        """Forget what was recorded."""
        if self._probe is not None:
            self._probe.grad = None

    def _apply(self, fn, recurse=True):
        # Module._apply would cast the probe to half precision and make it a non-leaf. Moved by itself instead.
        probe, self._buffers["_probe"] = self._buffers["_probe"], None
        super()._apply(fn, recurse)
        if probe is not None:
            device = fn(torch.empty(0, dtype=torch.int8, device=probe.device)).device
            moved = probe if device == probe.device else _new_probe(device)
            if moved is not probe and probe.grad is not None and device.type != "meta" and not probe.is_meta:
                moved.grad = probe.grad.to(moved)
            self._buffers["_probe"] = moved
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a tensor drops its .grad, which is the record.
        state = dict(self.__dict__)
        if self._probe is not None and self._probe.grad is not None:
            state["_grad_record"] = self._probe.grad
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        record = state.pop("_grad_record", None)
        super().__setstate__(state)
        if record is not None and self._probe is not None:
            self._probe.grad = record
