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
    """One launch of a kernel: all that runs it, compiles it, or counts what it moves.

    ``args``: every argument by name: tensors (or None), numbers, constexprs. ``options``: ``num_warps``, ....
    ``conditional``: whether it moves anything is decided on the device. ``moved``: which of its arguments are tensors
    that it reads or writes in full, once; those of them that are None count for nothing.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]
    conditional: bool = False
    moved: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def bytes(self) -> int:
        """What it reads and writes of those tensors."""
        tensors = [self.args[name] for name in self.moved if self.args[name] is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
