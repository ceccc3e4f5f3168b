"""The demo in the terminal: progress while it trains, then the table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ..text import first_epochs, percent
from .nets import NETS, NetSpec
from .results import Config, DemoResult, NetResult, StepSeconds
from .training import Observer

__all__ = ["LiveProgress", "LogProgress", "notes", "progress_for", "tables"]

_LINES_PER_NET = 6
_WIDE = 100  # columns from which there is room for bars


def progress_for(console: Console, config: Config) -> LiveProgress | LogProgress:
    """Bars where somebody can see them move, lines where not."""
    return LiveProgress(console, config) if console.is_terminal else LogProgress(console, config)


class _Clock(Observer):
    """Estimates the time left from the steps done, all nets together."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._trained = 0.0  # seconds spent in training, timing runs excluded
        self._done = 0  # epochs
        self._mark = time.perf_counter()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def training_started(self, spec: NetSpec) -> None:
        self._mark = time.perf_counter()

    def epoch_done(self, spec: NetSpec, net: NetResult) -> None:
        now = time.perf_counter()
        self._trained, self._mark, self._done = self._trained + now - self._mark, now, self._done + 1

    def net_done(self, spec: NetSpec, net: NetResult) -> None:
        self._done += self.config.epochs - len(net.epochs)  # a net that diverged is done early

    @property
    def seconds_left(self) -> float:
        if not self._done:
            return math.nan
        return self._trained / self._done * (len(NETS) * self.config.epochs - self._done)

    @property
    def time_left(self) -> str:
        if math.isnan(self.seconds_left):
            return ""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{minutes}:{seconds:02d} left"


class LogProgress(_Clock):
    """A few plain lines a net, for a pipe or a log file."""

    def __init__(self, console: Console, config: Config) -> None:
        super().__init__(config)
        self.console = console
        self._every = max(1, math.ceil(config.epochs / _LINES_PER_NET))

    def net_started(self, spec: NetSpec) -> None:
        self._line(f"{spec.label}: timing a step, then training")

    def epoch_done(self, spec: NetSpec, net: NetResult) -> None:
        super().epoch_done(spec, net)
        done = len(net.epochs)
        if done % self._every == 0 or done in (1, self.config.epochs) or net.diverged:
            self._line(f"{spec.label}: epoch {done}/{self.config.epochs}, {_progress_text(net)}, {self.time_left}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


class LiveProgress(_Clock):
    """A bar a net, and one for all."""

    def __init__(self, console: Console, config: Config) -> None:
        super().__init__(config)
        bar = [BarColumn(bar_width=20)] if console.width >= _WIDE else []
        columns = (TextColumn("{task.description}"), *bar, TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        for spec in NETS:
            self._tasks[spec.key] = self._progress.add_task(spec.label, total=self.config.epochs, text="")
        self._all = self._progress.add_task("[dim]all four", total=len(NETS) * self.config.epochs, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def net_started(self, spec: NetSpec) -> None:
        self._progress.update(self._tasks[spec.key], text="[dim]timing a step, fused and plain")

    def training_started(self, spec: NetSpec) -> None:
        super().training_started(spec)
        self._progress.update(self._tasks[spec.key], text="[dim]first epoch")

    def step_done(self, spec: NetSpec, share: float) -> None:
        self._progress.advance(self._tasks[spec.key], share)
        self._progress.advance(self._all, share)

    def epoch_done(self, spec: NetSpec, net: NetResult) -> None:
        super().epoch_done(spec, net)
        text = f"{len(net.epochs):>3}/{self.config.epochs} {_progress_text(net)}"
        self._progress.update(self._tasks[spec.key], completed=len(net.epochs), text=text)
        self._progress.update(self._all, completed=self._done, text=f"[dim]{self.time_left}")

    def net_done(self, spec: NetSpec, net: NetResult) -> None:
        super().net_done(spec, net)
        self._progress.update(self._tasks[spec.key], completed=self.config.epochs)
        self._progress.update(self._all, completed=self._done)


def _progress_text(net: NetResult) -> str:
    epoch = net.epochs[-1]
    loss = number(epoch.train_loss)
    return f"loss {loss}, accuracy {percent(epoch.test_accuracy)}, first/last gradient {number(epoch.ratio)}"


def number(value: float) -> str:
    """Three figures; a dash where there is no number."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-2 or value >= 1e4 else f"{value:.3g}"


def _timing(of: Callable[[StepSeconds], float], form: str) -> Callable[[NetResult], str]:
    return lambda net: format(of(net.step_seconds), form) if net.step_seconds else "–"


# Header and cell of each column. Where the terminal is narrow, each group becomes a table of its own.
_COLUMNS: tuple[tuple[tuple[str, Callable[[NetResult], str]], ...], ...] = (
    (
        ("test\naccuracy", lambda net: percent(net.accuracy)),
        ("test\nloss", lambda net: number(net.loss)),
        ("gradient\nlayer 1", lambda net: number(net.first_norm)),
        ("gradient\nlayer {depth}", lambda net: number(net.last_norm)),
        ("ratio", lambda net: number(net.ratio)),
    ),
    (
        ("dead\nmean", lambda net: percent(net.dead_fraction)),
        ("dead\nworst", lambda net: percent(max(net.epochs[-1].dead))),
        ("ms/step\nvgkern", _timing(lambda step: 1e3 * step.fused, ".1f")),
        ("ms/step\ntorch.nn", _timing(lambda step: 1e3 * step.torch, ".1f")),
        ("torch.nn\n/ vgkern", _timing(lambda step: step.speedup, ".2f")),
    ),
)


def tables(result: DemoResult, console: Console) -> list[Table]:
    """The numbers, a row a net: one table if the console is wide enough, else one a group of columns."""
    one = _table(result, tuple(column for group in _COLUMNS for column in group))
    if console.measure(one, options=console.options.update(max_width=1000)).maximum <= console.width:
        return [one]
    return [_table(result, group) for group in _COLUMNS]


def _table(result: DemoResult, columns: tuple[tuple[str, Callable[[NetResult], str]], ...]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    grid.add_column("net", no_wrap=True, vertical="bottom")
    for header, _ in columns:
        grid.add_column(header.format(depth=result.config.depth), justify="right", no_wrap=True, vertical="bottom")
    for net in result.nets:
        grid.add_row(net.label, *(cell(net) for _, cell in columns))
    return grid


def notes(result: DemoResult) -> str:
    """What the columns mean, and where the numbers come from."""
    environment = result.environment
    return (
        f"Gradient: L2 norm of the weight's gradient, median over {first_epochs(result.early_epochs)}.\n"
        "Dead: share of units with φ'(z) = 0 in the last epoch, mean and worst of the layers; half is usual for ReLU.\n"
        f"Steps: medians, by turns; vgkern's include the gradient record. Backend {environment['backend']}, "
        f"device {environment['device']}, threads {environment['threads']}, "
        f"torch {environment['torch']}. In all {result.seconds:.0f} s."
    )
