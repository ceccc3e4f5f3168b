"""What a training step of a net takes in memory: the tensors that autograd keeps, and the process at its largest."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Not what getrusage says, which counts the process that this one was before it was itself.
STATUS = Path("/proc/self/status")


def saved_bytes(net: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that the backward pass of ``forward`` keeps, each once, but for the net's parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # kept: what is saved must not die, and its address go to another
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    del loss
    return sum(size for address, size in sizes.items() if address not in own)


def peak_resident_bytes(work: Callable[..., object], *args: Any) -> int | None:
    """The most memory that a fresh process had resident until it had done ``work(*args)``, which it can import.

    None where the system is not Linux.
    """
    if not STATUS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_after, work, args).result()


def _peak_after(work: Callable[..., object], args: tuple[Any, ...]) -> int:
    work(*args)
    (peak,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024  # "VmHWM:   123456 kB"
