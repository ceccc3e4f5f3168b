"""``vgkern demo``: train, tabulate, draw, conclude."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO

from ..errors import CommandError
from ..terminal import console, figure_path, writable
from ..terminal import device as usable_device
from .conclusion import conclude
from .display import notes, progress_for, tables
from .figure import save
from .results import Config, DemoResult
from .training import run

__all__ = ["main"]

FIGURE_NAME = "vgkern-demo.png"


def main(*, depth: int, epochs: int, device: str, seed: int, out: str, json_path: str | None) -> int:
    """Returns the exit status: 0, or 130 after Ctrl-C (what was trained so far is reported and saved all the same).

    Raises:
        CommandError: an option that cannot be used, before anything is trained.
    """
    try:
        config = Config(depth=depth, epochs=epochs, device=usable_device(device), seed=seed)
    except ValueError as error:
        raise CommandError(str(error)) from None
    # Before the minutes of training, not after them.
    figure = writable(figure_path(out, FIGURE_NAME))
    numbers = None if json_path in (None, "-") else writable(Path(json_path))

    progress_console = console(sys.stderr)
    with progress_for(progress_console, config) as progress:
        result = run(config, progress)

    # With the numbers on stdout, all else keeps out of their way.
    report = console(sys.stderr if json_path == "-" else sys.stdout)
    if result.nets:
        for part in tables(result, report):
            report.print(part)
        report.print(notes(result), style="dim", highlight=False, markup=False)
        save(result, figure)
        report.print(f"Figure: {figure}", highlight=False, markup=False, soft_wrap=True)
    if json_path == "-":
        _dump(result, sys.stdout)
    elif numbers:
        with numbers.open("w") as file:
            _dump(result, file)
        report.print(f"Numbers: {numbers}", highlight=False, markup=False, soft_wrap=True)
    report.print(f"\n{conclude(result)}", highlight=False, markup=False)
    return 130 if result.interrupted else 0


def _dump(result: DemoResult, file: IO[str]) -> None:
    json.dump({**result.to_dict(), "conclusion": conclude(result)}, file, indent=1, allow_nan=False)
    file.write("\n")
