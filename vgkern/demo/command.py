"""``vgkern demo``: train, tabulate, draw, conclude."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO

import torch
from rich.console import Console

from ..errors import CommandError
from .conclusion import conclude
from .display import notes, progress_for, tables
from .figure import save
from .results import Config, DemoResult
from .training import run

__all__ = ["figure_path", "main"]

FIGURE_NAME = "vgkern-demo.png"
_PIPE_WIDTH = 120  # columns where no terminal says how many it has


def main(*, depth: int, epochs: int, device: str, seed: int, out: str, json_path: str | None) -> int:
    """Returns the exit status: 0, or 130 after Ctrl-C (what was trained so far is reported and saved all the same).

    Raises:
        CommandError: an option that cannot be used, before anything is trained.
    """
    try:
        config = Config(depth=depth, epochs=epochs, device=_device(device), seed=seed)
    except ValueError as error:
        raise CommandError(str(error)) from None
    # Before the minutes of training, not after them.
    figure = _writable(figure_path(out))
    numbers = None if json_path in (None, "-") else _writable(Path(json_path))

    progress_console = _console(sys.stderr)
    with progress_for(progress_console, config) as progress:
        result = run(config, progress)

    # With the numbers on stdout, all else keeps out of their way.
    report = _console(sys.stderr if json_path == "-" else sys.stdout)
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


def figure_path(out: str) -> Path:
    """The file that ``--out`` means: itself if it ends in .png, else ``vgkern-demo.png`` in the folder of that name.

    Raises:
        CommandError: it ends like a file, but not of a kind that we write.
    """
    path = Path(out)
    if path.suffix.lower() == ".png":
        if path.is_dir():
            raise CommandError(f"--out: {path} is a folder")
        return path
    if path.is_file() or (path.suffix and not path.is_dir()):
        raise CommandError(f"--out: expected a folder or a .png file, got {out!r}")
    return path / FIGURE_NAME


def _writable(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create the folder {path.parent}: {error.strerror or error}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write to {path}")
    return path


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device: {name!r} cannot be used here: {reason}") from None
    return name


def _console(stream: IO[str]) -> Console:
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=_PIPE_WIDTH)


def _dump(result: DemoResult, file: IO[str]) -> None:
    json.dump({**result.to_dict(), "conclusion": conclude(result)}, file, indent=1, allow_nan=False)
    file.write("\n")
