"""``vgkern tune``: time the candidates for each row of the Triton kernels' block sizes on the GPU at hand.

The table itself (``kernels/tuning.py``) is the same for every GPU, so that a result's bits do not depend on which one
computes it. What is printed here are rows in its form, for those who rather have the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import triton as backend
from .errors import CommandError

__all__ = ["check_device", "render", "tune"]

Row = tuple[str, str, str]
Call = Callable[[], object]

#: (N, C, H, W) of ResNet-50 at batch 32, by size class: the ends and the middle of it.
SHAPES = {
    "large": ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28)),
    "small": ((32, 128, 28, 28), (32, 256, 14, 14), (32, 2048, 7, 7)),
}
_DTYPES = {"float32": torch.float32, "half": torch.bfloat16, "float64": torch.float64}

#: A candidate must take this share of the row's time, or the row stays: below, it is noise.
WORTH = 0.98


def check_device(device: str) -> None:
    """Raise CommandError where the kernels cannot be timed on that device."""
    if not torch.cuda.is_available():
        raise CommandError("tune times the Triton kernels on a GPU, and there is no CUDA or ROCm device here")
    reason = backend.unavailable()
    if reason or backend._kernels().INTERPRETED:
        raise CommandError(f"tune times the Triton kernels: {reason or 'TRITON_INTERPRET=1 runs them on the CPU'}")
    if torch.device(device).type != "cuda":
        raise CommandError(f"device: expected a CUDA or ROCm device, got {device!r}")


def milliseconds(call: Call) -> float:
    """The median time of a call on the current GPU, its L2 cache flushed before each."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def tune(
    device: str = "cuda",
    *,
    time: Callable[[Call], float] = milliseconds,
    shapes: dict[str, Sequence[tuple[int, ...]]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Row, Any]:
    """The table of block sizes with, in each row, the fastest candidate: forward and backward of ReLU and a residual.

    Args:
        device: where the tensors are.
        time: a call's milliseconds.
        shapes: by size class; by default :data:`SHAPES`.
        progress: is told each candidate's time.
    """
    from triton.runtime.errors import OutOfResources

    tuning = backend._kernels().tuning
    best = {}
    for row in [row for row in tuning.TABLE if row[1] in _DTYPES]:
        seconds = {}
        for limits in tuning.candidates(row):
            try:
                with _table_row(tuning.TABLE, row, limits):
                    total = sum(_time_layer(shape, row, device, time) for shape in (shapes or SHAPES)[row[2]])
            except OutOfResources as error:  # registers or shared memory that this GPU does not have
                progress(f"{row}: {limits} does not fit: {error}")
                continue
            seconds[limits] = total
            progress(f"{row}: {total:.4f} ms with {limits}")
        best[row] = _choose(tuning.TABLE[row], seconds, device)
    return best


def _choose(current: Any, seconds: dict[Any, float], device: str) -> Any:
    fastest = min(seconds, key=seconds.__getitem__, default=current)
    before = seconds.get(current, math.inf)
    if fastest == current or seconds[fastest] > WORTH * before:
        return current
    reason = f"{seconds[fastest]:.4f} ms in place of {before:.4f} on {_name(device)}"
    return dataclasses.replace(fastest, reason=reason)


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


@contextlib.contextmanager
def _table_row(table: dict[Row, Any], row: Row, limits: Any) -> Iterator[None]:
    before = table[row]
    table[row] = limits
    try:
        yield
    finally:
        table[row] = before


def _time_layer(shape: tuple[int, ...], row: Row, device: str, time: Callable[[Call], float]) -> float:
    memory_format = torch.channels_last if row[0] == "rows" else torch.contiguous_format

    def normal() -> Tensor:
        x = torch.randn(shape, device=device).to(_DTYPES[row[1]])
        return x.contiguous(memory_format=memory_format)

    x, residual, dy = normal(), normal(), normal()
    weight = torch.ones(shape[1], device=device, dtype=torch.float64 if row[1] == "float64" else torch.float32)
    bias = torch.zeros_like(weight)
    (_, saved, mask), forward = backend.forward_launches(
        x, residual, weight, bias, None, None, None, True, 1e-5, "relu", [], True
    )
    _, backward = backend.backward_launches(
        dy, x, None, mask, saved, weight, bias, None, True, 1e-5, "relu", [], 0.0, math.inf,
        [True, True, True, True, False, True],
    )  # fmt: skip
    launching = backend._launching()
    return math.fsum(
        time(lambda launches=launches: launching.launch(launches, x.device))  # type: ignore[misc]
        for launches in (forward, backward)
    )


def render(table: dict[Row, Any]) -> str:
    """Rows in the form of ``kernels/tuning.py``."""
    lines = []
    for row, limits in table.items():
        values = ", ".join(repr(getattr(limits, field.name)) for field in dataclasses.fields(limits))
        key = ", ".join(f'"{part}"' for part in row)
        lines.append(f"    ({key}): Limits({values}),")
    return "\n".join(["TABLE |= {", *lines, "}"])
