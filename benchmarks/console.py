"""The terminal: where output goes, what shows that something goes on, and an option that the commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vgkern import terminal

_PIPE_WIDTH = 140  # columns where no terminal says how many it has


def console(stream: IO[str]) -> Console:
    return terminal.console(stream, _PIPE_WIDTH, highlight=False)


def rounds(text: str) -> int:
    """The type of ``--rounds``: quartiles need two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of at least 2, got {text!r}")
    return int(text)


class Bar:
    """What a long command tells of itself: a bar with a text where somebody sees it move, lines where not."""

    def __init__(self, total: int) -> None:
        self._console = console(sys.stderr)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self.progress.add_task("", total=total)

    def now(self, text: str) -> None:
        self.progress.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, soft_wrap=True, markup=False)

    def done(self) -> None:
        self.progress.advance(self._task)


@contextmanager
def progress(total: int) -> Iterator[Bar]:
    bar = Bar(total)
    with bar.progress:
        yield bar
