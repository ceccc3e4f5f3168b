"""Rows of a micro benchmark, and what is made of them: a CSV file, tables, totals of a step, geometric means."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .competitors import COMPETITORS, VARIANTS, Competitor
from .floor import FLOOR_VARIANTS, Roof, floor_bytes
from .shapes import Configuration
from .timing import Timing, geometric_mean

DIRECTIONS = ("forward", "backward")
_TOTAL = "forward + backward"


@dataclass(frozen=True)
class Result:
    """What was measured of one configuration: {"forward" | "backward": {variant: Timing}}."""

    configuration: Configuration
    timings: Mapping[str, Mapping[str, Timing]]

    def timing(self, direction: str, variant: str) -> Timing | None:
        """``direction`` may be "forward + backward"."""
        if direction != _TOTAL:
            return self.timings[direction].get(variant)
        forward, backward = (self.timings[each].get(variant) for each in DIRECTIONS)
        return forward + backward if forward and backward else None

    def speedup(self, direction: str, competitor: Competitor) -> float | None:
        ours, theirs = (self.timing(direction, name) for name in (competitor.baseline, competitor.variant))
        return ours.speedup_over(theirs) if ours and theirs else None

    def recording_cost(self, direction: str) -> float | None:
        """The share by which the gradient record makes a pass slower; None if that was not measured."""
        recorded, unrecorded = (self.timing(direction, name) for name in ("recorded", "unrecorded"))
        return unrecorded.speedup_over(recorded) - 1 if recorded and unrecorded else None

    def floor_seconds(self, direction: str, roof: Roof) -> float:
        """The least time that the memory allows: measured in the same rounds, else taken from the roof."""
        beside = [self.timings[direction][name].median for name in FLOOR_VARIANTS if name in self.timings[direction]]
        return min(beside, default=roof.seconds(floor_bytes(direction, self.configuration)))

    def floor_share(self, direction: str, roof: Roof) -> float:
        """The floor as a share of vgkern's time; 1 is the floor."""
        return self.floor_seconds(direction, roof) / self.timings[direction]["vgkern"].median

    def floor_speedup(self, direction: str, competitor: Competitor, roof: Roof) -> float | None:
        """What :meth:`speedup` would be at the floor: no kernel that reads and writes its tensors exceeds it."""
        speedup = self.speedup(direction, competitor)
        return None if speedup is None else speedup / self.floor_share(direction, roof)


# ---- CSV -----------------------------------------------------------------------------------------------------------

_TIMES = tuple(f"{variant}_{what}" for variant in VARIANTS for what in ("ms", "q1_ms", "q3_ms"))
_SPEEDUPS = tuple(f"speedup_{name}" for name in COMPETITORS)
#: Columns of a row, before those of ``environment.describe``; the same in every file, empty where not measured.
COLUMNS = (
    "shape", "count", "dtype", "layout", "activation", "residual", "training", "record", "pass", "rounds",
    *_TIMES, *_SPEEDUPS, "recording_cost", "floor_bytes", "bandwidth_gb_s", "floor_ms", "floor_share",
)  # fmt: skip


def rows(
    results: Iterable[Result], roof: Roof | None, *, record: str, environment: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row a configuration and direction. It says all about itself: read alone, it still means something."""
    return [_row(result, direction, roof, record, environment) for result in results for direction in DIRECTIONS]


def _row(
    result: Result, direction: str, roof: Roof | None, record: str, environment: Mapping[str, Any]
) -> dict[str, Any]:
    configuration, timings = result.configuration, result.timings[direction]
    moved = floor_bytes(direction, configuration)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
        "shape": configuration.shape_text, "count": configuration.count, "dtype": configuration.dtype,
        "layout": configuration.layout, "activation": configuration.activation, "residual": configuration.residual,
        "training": configuration.training, "record": record, "pass": direction,
        "rounds": len(timings["vgkern"].seconds), "floor_bytes": moved,
    }  # fmt: skip
    for name, timing in timings.items():
        first, third = timing.quartiles
        row |= {f"{name}_ms": timing.median * 1e3, f"{name}_q1_ms": first * 1e3, f"{name}_q3_ms": third * 1e3}
    ratios = {f"speedup_{name}": result.speedup(direction, competitor) for name, competitor in COMPETITORS.items()}
    ratios["recording_cost"] = result.recording_cost(direction)
    row |= {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if roof:
        row |= {
            "bandwidth_gb_s": roof.at(moved) / 1e9, "floor_ms": result.floor_seconds(direction, roof) * 1e3,
            "floor_share": result.floor_share(direction, roof),
        }  # fmt: skip
    return row | environment


def write_csv(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


# ---- For people ----------------------------------------------------------------------------------------------------


def measured_competitors(results: Collection[Result]) -> dict[str, Competitor]:
    return {
        name: competitor
        for name, competitor in COMPETITORS.items()
        if any(result.speedup("forward", competitor) is not None for result in results)
    }


def tables(results: Sequence[Result], roof: Roof | None) -> list[Table]:
    """One a dtype, memory format and activation; its last lines are a step's totals where the set has counts."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        configuration = result.configuration
        groups.setdefault((configuration.dtype, configuration.layout, configuration.net_activation), []).append(result)
    return [_table(", ".join(title), group, roof) for title, group in groups.items()]


def _table(title: str, results: Sequence[Result], roof: Roof | None) -> Table:
    competitors = measured_competitors(results)
    has_cost = any(result.recording_cost("backward") is not None for result in results)
    counted = any(result.configuration.count > 1 for result in results)
    table = Table(title=f"{title}; ms", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("shape", *["times"] * counted, "", "pass"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("shape", "times") else "left")
    headers = [
        "vgkern",
        *["floor"] * (roof is not None),
        *(c.label for c in competitors.values()),
        *["record"] * has_cost,
    ]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        for direction in DIRECTIONS:
            configuration = result.configuration
            residual = " + r" if configuration.residual else ""
            vgkern = result.timings[direction]["vgkern"].median
            cost = result.recording_cost(direction)
            table.add_row(
                configuration.shape_text, *[f"{configuration.count}"] * counted,
                f"{configuration.activation}{residual}", direction, _milliseconds(vgkern),
                *([f"{result.floor_share(direction, roof):.0%}"] if roof else []),
                *(_versus(result, direction, competitor) for competitor in competitors.values()),
                *["" if cost is None else f"{cost:+.1%}"] * has_cost,
                end_section=direction == DIRECTIONS[-1] and result is results[-1],
            )  # fmt: skip
    if counted:
        for direction in (*DIRECTIONS, _TOTAL):
            totals = step_totals(results, direction)
            table.add_row(
                "a step", str(sum(result.configuration.count for result in results)), "", direction,
                _milliseconds(totals["vgkern"]), *[""] * (roof is not None),
                *(
                    _cell(totals[competitor.variant], totals[competitor.variant] / totals[competitor.baseline])
                    for competitor in competitors.values()
                ),
            )  # fmt: skip
    return table


def step_totals(results: Iterable[Result], direction: str) -> dict[str, float]:
    """Seconds of all layers of a network, each as often as it occurs, by variant; medians are what is added."""
    totals: dict[str, float] = {}
    for result in results:
        for variant in result.timings["forward"]:
            timing = result.timing(direction, variant)
            if timing:
                totals[variant] = totals.get(variant, 0.0) + result.configuration.count * timing.median
    return totals


def _versus(result: Result, direction: str, competitor: Competitor) -> str:
    timing, speedup = result.timing(direction, competitor.variant), result.speedup(direction, competitor)
    return _cell(timing.median, speedup) if timing and speedup else "–"


def _cell(seconds: float, speedup: float) -> str:
    ratio = f"{speedup:5.2f}x"
    return f"{_milliseconds(seconds)} {ratio if speedup >= 1 else f'[red]{ratio}[/red]'}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 0.1 else 1}f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"


def conclusions(results: Sequence[Result], roof: Roof | None) -> list[str]:
    """Geometric means against each competitor, the lowest and where it is, shares of the floor, the record's cost."""
    lines = []
    for competitor in measured_competitors(results).values():
        for direction in (*DIRECTIONS, _TOTAL):
            compared = [(result.speedup(direction, competitor), result) for result in results]
            speedups = [(speedup, result.configuration) for speedup, result in compared if speedup is not None]
            lowest, where = min(speedups, key=lambda pair: pair[0])
            mean = geometric_mean(speedup for speedup, _ in speedups)
            lines.append(
                f"{competitor.label}, {direction}: geometric mean {mean:.2f}x, lowest {lowest:.2f}x ({where}), "
                f"{len(speedups)} configurations"
            )
    costs = [cost for result in results if (cost := result.recording_cost("backward")) is not None]
    if costs:
        mean = geometric_mean(1 + cost for cost in costs) - 1
        lines.append(f"gradient record, backward: {mean:+.1%} in the geometric mean, at most {max(costs):+.1%}")
    if roof:
        for direction in DIRECTIONS:
            shares = [(result.floor_share(direction, roof), result.configuration) for result in results]
            lowest, where = min(shares, key=lambda pair: pair[0])
            mean = geometric_mean(share for share, _ in shares)
            bounds = [
                f"{geometric_mean(bound):.2f}x {competitor.label}"
                for competitor in measured_competitors(results).values()
                if None not in (bound := [result.floor_speedup(direction, competitor, roof) for result in results])
            ]
            at_the_floor = f"; at the floor a kernel would be {', '.join(bounds)}" if bounds else ""
            lines.append(
                f"floor, {direction}: {mean:.0%} of it in the geometric mean, lowest {lowest:.0%} ({where})"
                + at_the_floor
            )
    return lines
