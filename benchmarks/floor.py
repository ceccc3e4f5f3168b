"""The floor under a time: the bytes that a pass must move, at the bandwidth that this machine gives them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vgkern
from vgkern import ops

from . import timing
from .shapes import Configuration

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _recomputes_z(configuration: Configuration) -> bool:
    return vgkern.activations.TABLE[configuration.activation].backward_reads == "z"


def _has_mask(configuration: Configuration) -> bool:
    return ops.needs_mask(configuration.activation, configuration.residual)


def _always(configuration: Configuration) -> bool:
    return True


def _has_residual(configuration: Configuration) -> bool:
    return configuration.residual


#: What one pass over memory reads and writes: a tensor, and when it moves. Training or not makes no difference: frozen
#: statistics spare the forward pass a reduction, the backward pass still reads x for dγ. Tensors of C are left out.
TRAFFIC: dict[str, tuple[tuple[str, Callable[[Configuration], bool]], ...]] = {
    "forward": (
        ("x", _always),
        ("residual", _has_residual),
        ("y", _always),
        ("mask", _has_mask),
    ),
    "backward": (
        ("dy", _always),
        ("x", _always),
        ("mask", _has_mask),
        ("residual", lambda configuration: configuration.residual and _recomputes_z(configuration)),
        ("dx", _always),
        ("dresidual", _has_residual),
    ),
}


def floor_bytes(direction: str, configuration: Configuration) -> int:
    """Bytes that ``direction`` ("forward" or "backward") moves if it passes over memory once.

    With u for a tensor of x's size, float32: ReLU with residual 3 + 1/32 u forward and 4 + 1/32 u backward; ReLU alone
    2 u and 3 u; GELU with residual 3 u and 5 u.
    """
    x = torch.empty(
        configuration.shape, dtype=getattr(torch, configuration.dtype), device="meta",
        memory_format=FORMATS[configuration.layout],
    )  # fmt: skip
    return sum(
        _mask_bytes(x) if tensor == "mask" else x.nbytes for tensor, moves in TRAFFIC[direction] if moves(configuration)
    )


def _mask_bytes(x: Tensor) -> int:
    outer, inner = ops.mask_geometry(x)
    return outer * math.ceil(inner / 8)


@dataclass(frozen=True)
class Roof:
    """Bandwidth by how many bytes a pass moves: what fits a cache goes faster.

    Attributes:
        points: (bytes, bytes a second), ascending in bytes.
    """

    points: tuple[tuple[int, float], ...]

    def at(self, size: int) -> float:
        """Bytes a second of a pass that moves ``size`` bytes; between two points, straight on a log-log scale."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        for (low, low_rate), (high, high_rate) in itertools.pairwise(points):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return low_rate ** (1 - share) * high_rate**share
        return points[-1][1]

    def seconds(self, size: int) -> float:
        return size / self.at(size)

    def best_of(self, other: Roof) -> Roof:
        """The higher bandwidth at each size: a machine that was busy for a moment has no lower roof for that."""
        pairs = zip(self.points, other.points, strict=True)
        return Roof(tuple((size, max(rate, other_rate)) for (size, rate), (_, other_rate) in pairs))


def floor_variants(direction: str, configuration: Configuration) -> dict[str, Callable[[], None]]:
    """a = b + k·c over the bytes of :func:`floor_bytes`, with plain and with streaming stores: variants to time beside
    the others, as the bandwidth of a shared machine wanders. None of a GPU's, and none without the extension."""
    if vgkern.backends.available()["cpu"] != "usable":
        return {}
    from vgkern import _C

    triad = _C.Triad(floor_bytes(direction, configuration), torch.get_num_threads())
    return {name: functools.partial(triad.run, streaming) for name, streaming in FLOOR_VARIANTS.items()}


#: Name of a variant: whether its stores bypass the caches.
FLOOR_VARIANTS = {"triad": False, "triad_streaming": True}

#: 64 KiB to 512 MiB.
ROOF_SIZES = tuple(2**exponent for exponent in range(16, 30))


def measure_roof(device: str) -> Roof | None:
    """The bandwidth of a = b + k·c with torch's number of threads, plain or streaming stores, whichever is faster.

    On a GPU that of a copy. None where there is no probe: on other devices, and where the extension is not built.
    """
    if torch.device(device).type == "cuda":
        return measure_copies(device)
    if torch.device(device).type != "cpu" or vgkern.backends.available()["cpu"] != "usable":
        return None
    from vgkern import _C

    threads = torch.get_num_threads()

    def best(size: int) -> float:
        triad = _C.Triad(size, threads)
        return max(triad.bandwidth(streaming) for streaming in (False, True))

    return Roof(tuple((size, best(size)) for size in ROOF_SIZES))


def measure_copies(device: str) -> Roof:
    """Bytes read and written a second, of copies that nothing else shares the device with; the fastest of ten."""
    clock = timing.clock_of(device)

    def best(size: int) -> float:
        source = torch.zeros(size // 2, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return size / min(clock(lambda: target.copy_(source))[1] for _ in range(10))

    return Roof(tuple((size, best(size)) for size in ROOF_SIZES))
