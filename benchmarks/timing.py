"""Timings that can be compared: variants interleaved in one process, medians and quartiles, ratios pair by pair."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third

    def speedup_over(self, other: Timing) -> float:
        """Median of other/self, round by round: a machine whose speed drifts slows both alike."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def __add__(self, other: Timing) -> Timing:
        """Both, one after the other: round by round."""
        return Timing(tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=True)))


def interleave(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3, device: str = "cpu",
    hot: bool = False,
) -> dict[str, Timing]:  # fmt: skip
    """Time each variant once a round, in turn; on a GPU the GPU's time, from an L2 cache that holds other things.

    ``hot``: each call follows calls of its own variant that are not timed, so that it finds in a CPU's caches what
    those left there, and not what another variant did.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    clock = clock_of(device)
    for turn in range(warmup + rounds):
        for name, run in variants.items():
            if hot:
                _warm_up(run)
            result, elapsed = clock(run)
            del result  # outside the clock: freeing it is part of nobody's kernel
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


#: Of calls before a hot one: a cache lets go of what others left there only after several passes over as much.
WARM_SECONDS = 10e-3


def _warm_up(run: Callable[[], object]) -> None:
    start = time.perf_counter()
    while True:
        run()
        if time.perf_counter() - start >= WARM_SECONDS:
            return


Clock = Callable[[Callable[[], object]], tuple[object, float]]

#: Written between calls: more than the L2 cache of any GPU (AMD's MI300X: 256 MB beside it).
FLUSHED_BYTES = 2**29


def clock_of(device: str) -> Clock:
    """What runs a call and returns (its result, seconds)."""
    return cpu_clock if torch.device(device).type == "cpu" else gpu_clock(device)


def cpu_clock(run: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def gpu_clock(device: str) -> Clock:
    """Events on the device's stream. The flush before them also hides the time that the host takes to launch."""
    rest = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def clock(run: Callable[[], object]) -> tuple[object, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            rest.zero_()
            begin.record()
            result = run()
            end.record()
            end.synchronize()
        return result, begin.elapsed_time(end) / 1e3

    return clock


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))
