"""What the commands share: consoles, and what they are given as paths and devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import torch

from .errors import CommandError

__all__ = ["console", "device", "figure_path", "writable"]

_PIPE_WIDTH = 120  # columns where no terminal says how many it has


def console(stream: IO[str], pipe_width: int = _PIPE_WIDTH, **options: Any) -> Any:
    """A ``rich.console.Console`` on ``stream``, ``pipe_width`` columns wide where that is no terminal."""
    from rich.console import Console

    made = Console(file=stream, **options)
    return made if made.is_terminal else Console(file=stream, width=pipe_width, **options)


def figure_path(out: str, name: str) -> Path:
    """The file that ``--out`` means: itself if it ends in .png, else ``name`` in the folder ``out``.

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
    return path / name


def writable(path: Path) -> Path:
    """``path``, whose folder is made.

    Raises:
        CommandError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create the folder {path.parent}: {error.strerror or error}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write to {path}")
    return path


def device(name: str) -> str:
    """The device that ``--device`` means; ``auto`` is a GPU if there is one.

    Raises:
        CommandError: it cannot be used here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device: {name!r} cannot be used here: {reason}") from None
    return name
