"""Launches as data: what runs, and what a test or a compiler ahead of time can look at without running it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton

__all__ = ["Launch", "launch", "on_device"]


class Launch(NamedTuple):
    """One launch of a kernel.

    ``args``: every argument by name: tensors (or None), numbers, constexprs. ``options``: ``num_warps``, ....
    ``conditional``: whether it moves anything is decided on the device.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]
    conditional: bool = False


def launch(launches: Sequence[Launch], device: torch.device) -> None:
    """Run them in order on the device's current stream."""
    with on_device(device):
        for step in launches:
            step.kernel[step.grid](**step.args, **step.options)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Launch on that device; under the interpreter, without numpy's warnings of the infs and NaNs of a GPU."""
    if triton.knobs.runtime.interpret:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    else:
        with torch.cuda.device(device):
            yield
