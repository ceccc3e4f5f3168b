"""``GradReport``: findings, and the layers in a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..text import figures, jsonable, percent
from .findings import Finding, Thresholds, clip_norm, diagnose
from .history import History, median, quantile
from .model_state import ModelState

__all__ = ["GradReport", "LayerSummary"]

_ROWS = 40  # layers that a table shows


@dataclass(frozen=True)
class LayerSummary:
    """A layer over the recorded steps: medians of what :class:`~vgkern.gradients.GradRecord` has, NaN if unknown.

    ``grad_output_norm_low`` and ``_high`` are the 10th and 90th percentile; ``nonfinite`` is the sum over the steps.
    """

    index: int
    layer: str
    type: str
    activation: str | None
    source: str
    grad_output_norm: float
    grad_output_norm_low: float
    grad_output_norm_high: float
    gain: float
    dead_fraction: float
    nonfinite: float
    grad_norm: float


# Header and cell.
_COLUMNS: tuple[tuple[str, Callable[[LayerSummary], str]], ...] = (
    ("layer", lambda row: row.layer),
    ("type", lambda row: row.type),
    ("activation", lambda row: row.activation or ""),
    ("‖dy‖", lambda row: figures(row.grad_output_norm)),
    ("gain", lambda row: figures(row.gain)),
    ("dead", lambda row: "–" if math.isnan(row.dead_fraction) else percent(row.dead_fraction)),
    ("‖∇w‖", lambda row: figures(row.grad_norm)),
    ("inf, NaN", lambda row: f"{row.nonfinite:g}" if row.nonfinite else ""),
)
_LEFT = 3  # columns of words


@dataclass(frozen=True)
class GradReport:
    """What a :class:`~vgkern.gradients.GradientMonitor` has to say. ``str()`` is findings, advice and a table.

    Attributes:
        findings: what is wrong, causes first; empty where all is well.
        layers: one :class:`LayerSummary` a layer, in forward order.
        steps: how many are in it; first_step, last_step: their numbers, 0 without any.
        total_norm: of all parameters' gradients together, (10th percentile, median, 90th percentile) over the steps.
        clip_norm: where to clip so that nine steps in ten are left alone: the 90th percentile of that norm.
        hooked: the record was made by hooks, which cost passes over the gradients.
        thresholds: what the findings were judged by.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerSummary, ...]
    steps: int
    first_step: int
    last_step: int
    total_norm: tuple[float, float, float]
    clip_norm: float
    hooked: bool
    thresholds: Thresholds

    @classmethod
    def of(cls, history: History, state: ModelState, thresholds: Thresholds, unscale: float = 1.0) -> GradReport:
        """From a history and the state of its model."""
        count = len(history.steps)
        totals = history.total_norm[:, None]
        low, middle, high = (float(quantile(totals, q)[0]) if count else math.nan for q in (0.1, 0.5, 0.9))
        return cls(
            findings=tuple(diagnose(history, state, thresholds, unscale)),
            layers=tuple(_summaries(history)) if count else (),
            steps=count,
            first_step=int(history.steps[0]) if count else 0,
            last_step=int(history.steps[-1]) if count else 0,
            total_norm=(low, middle, high),
            clip_norm=clip_norm(history),
            hooked=any(layer.source == "hooks" for layer in history.layers),
            thresholds=thresholds,
        )

    @property
    def ok(self) -> bool:
        """Whether something was recorded and nothing was found."""
        return self.steps > 0 and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it: infinity and NaN become null."""
        return jsonable({"ok": self.ok, **asdict(self)})

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_frame(self) -> Any:
        """The layers as a ``pandas.DataFrame``.

        Raises:
            ModuleNotFoundError: pandas is missing; the message names the extra.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_frame() needs pandas: pip install 'vgkern[monitor]'") from error
        return pandas.DataFrame([asdict(layer) for layer in self.layers])

    def headline(self) -> str:
        """One line: how many findings in how many layers and steps."""
        if not self.steps:
            return "Nothing was recorded: GradientMonitor.step() belongs after backward() and before zero_grad()."
        over = f"{len(self.layers)} layers, {self.steps} step{'s' * (self.steps > 1)}"
        if not self.findings:
            return f"No findings ({over})."
        return f"{len(self.findings)} finding{'s' * (len(self.findings) > 1)} ({over})."

    def notes(self) -> str:
        """What the columns mean, and what the record cost."""
        low, middle, high = map(figures, self.total_norm)
        lines = [
            "Medians over the steps. ‖dy‖: gradient that arrives; gain: ‖dx‖ / ‖dy‖; ‖∇w‖: gradient of parameters.",
            f"Norm of all gradients: median {middle}, 10th to 90th percentile {low} to {high}.",
        ]
        if self.hooked:
            lines.append("Recorded by hooks, which cost passes over the gradients; fused layers report for nothing.")
        return "\n".join(lines)

    def rows(self, limit: int = _ROWS) -> tuple[list[LayerSummary], int]:
        """At most ``limit`` layers, those with findings among them, and how many are left out."""
        if len(self.layers) <= limit:
            return list(self.layers), 0
        named = {finding.layer for finding in self.findings}
        spread = {round(i * (len(self.layers) - 1) / (limit - 1)) for i in range(limit)}
        shown = [row for row in self.layers if row.index in spread or row.layer in named]
        return shown, len(self.layers) - len(shown)

    def __str__(self) -> str:
        lines = [self.headline()]
        for number, finding in enumerate(self.findings, start=1):
            lines += ["", f"{number}. {finding.kind}: {finding.layer}", f"   {finding.summary}"]
            lines += [f"   - {advice}" for advice in finding.advice]
        if self.layers:
            lines += ["", *self._plain_table(), "", self.notes()]
        return "\n".join(lines)

    def _plain_table(self) -> list[str]:
        shown, left_out = self.rows()
        cells = [[header for header, _ in _COLUMNS], *([cell(row) for _, cell in _COLUMNS] for row in shown)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < _LEFT else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return lines + [f"{left_out} more layers in to_dict()"] * (left_out > 0)

    def __rich__(self) -> Any:
        """What ``rich.print(report)`` shows."""
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.headline(), style="bold green" if self.ok else "bold red")]
        for number, finding in enumerate(self.findings, start=1):
            parts.append(Text.assemble("\n", f"{number}. ", (finding.kind, "bold"), ": ", (finding.layer, "cyan")))
            parts.append(Padding(Text(finding.summary), (0, 0, 0, 3)))
            parts += [Padding(Text(f"- {advice}"), (0, 0, 0, 3)) for advice in finding.advice]
        if self.layers:
            named = {finding.layer for finding in self.findings}
            grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
            for i, (header, _) in enumerate(_COLUMNS):
                grid.add_column(header, justify="left" if i < _LEFT else "right", no_wrap=i != 0, overflow="fold")
            shown, left_out = self.rows()
            for row in shown:
                grid.add_row(*(cell(row) for _, cell in _COLUMNS), style="yellow" if row.layer in named else None)
            parts += [grid, Text(f"{left_out} more layers in to_dict()\n", style="dim")][: 1 + (left_out > 0)]
            parts.append(Text(self.notes(), style="dim"))
        return Group(*parts)


def _summaries(history: History) -> list[LayerSummary]:
    arrives = history.grad_output_norm
    columns: dict[str, np.ndarray] = {
        "grad_output_norm": median(arrives),
        "grad_output_norm_low": quantile(arrives, 0.1),
        "grad_output_norm_high": quantile(arrives, 0.9),
        "gain": median(history.gain),
        "dead_fraction": median(history.dead_fraction),
        "nonfinite": history.nonfinite.sum(0),
        "grad_norm": median(history.grad_norm),
    }
    return [
        LayerSummary(index, layer.name, layer.type, layer.activation, layer.source,
                     **{name: float(values[index]) for name, values in columns.items()})
        for index, layer in enumerate(history.layers)
    ]  # fmt: skip
