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
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Time each variant once a round, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, run in variants.items():
            _synchronize(device)
            start = time.perf_counter()
            result = run()
            _synchronize(device)
            elapsed = time.perf_counter() - start
            del result  # outside the clock: freeing it is part of nobody's kernel
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
