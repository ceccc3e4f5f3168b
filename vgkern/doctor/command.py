"""``vgkern doctor``: build, examine, print, draw."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import terminal
from ..errors import CommandError
from ..gradients import GradReport
from .examination import Examination, Patient, examine

__all__ = ["main"]

FIGURE_NAME = "vgkern-doctor.png"
_PANEL_WIDTH = 82  # columns of a report beside another

Progress = Callable[[int, int], None]


def main(
    *,
    factory: str | None,
    demo: bool,
    input: tuple[int, ...] | None,
    steps: int,
    device: str,
    seed: int,
    out: str,
    dark: bool,
    json_path: str | None,
    progress: Progress | None,
) -> int:
    """Returns the exit status: 0, or 1 if there are findings (those of the demo's sick net do not count).

    Raises:
        CommandError: what was asked for cannot be done.
    """
    if steps < 1:
        raise CommandError(f"--steps: expected at least 1, got {steps}")
    device = terminal.device(device)
    figure = terminal.writable(terminal.figure_path(out, FIGURE_NAME))
    numbers = None if json_path in (None, "-") else terminal.writable(Path(json_path))
    torch.manual_seed(seed)
    if demo:
        from .demo import patients

        if factory or input:
            raise CommandError("--demo brings its own models: no MODULE:FACTORY and no --input beside it")
        cases = patients()
    elif factory is None:
        raise CommandError("MODULE:FACTORY is missing (or --demo)")
    else:
        cases = {"": _patient(factory, input)}

    results = {title: _examined(patient, steps, device, progress) for title, patient in cases.items()}
    reports = {title: result.report for title, result in results.items()}
    stream = sys.stderr if json_path == "-" else sys.stdout
    _print(reports, stream)
    if importlib.util.find_spec("matplotlib"):
        from ..gradients.plot import draw_side_by_side

        drawn = {title: result.history for title, result in results.items()}
        draw_side_by_side(drawn, dark=dark).savefig(figure)
        print(f"Figure: {figure}", file=stream)
    else:
        print("No figure: it needs matplotlib (pip install 'vgkern[monitor]')", file=stream)
    if json_path is not None:
        import json

        content = {title: report.to_dict() for title, report in reports.items()}
        text = json.dumps(content if demo else content[""], indent=1, allow_nan=False)
        if numbers is None:
            print(text)
        else:
            numbers.write_text(text + "\n")
            print(f"Numbers: {numbers}", file=stream)
    return 0 if demo or all(report.ok for report in reports.values()) else 1


def _examined(patient: Patient, steps: int, device: str, progress: Progress | None) -> Examination:
    try:
        return examine(patient, steps=steps, device=device, progress=progress)
    except Exception as error:  # of the user's model or data, whatever it is
        raise CommandError(f"a training step raised {_described(error)}") from error


def _patient(factory: str, input: tuple[int, ...] | None) -> Patient:
    made = _made(factory)
    parts = made if isinstance(made, tuple) else (made,)
    if not (1 <= len(parts) <= 3 and isinstance(parts[0], nn.Module)):
        raise CommandError(
            f"{factory} returned {type(made).__name__}; expected a torch.nn.Module, (module, data) or "
            "(module, data, loss)"
        )
    model, data, loss = (*parts, None, None)[:3]
    if (data is None) == (input is None):
        many = "both --input and data" if input else "neither data nor --input 32,3,224,224"
        raise CommandError(f"{factory} gives {many}; one of the two is needed")
    return Patient(model, torch.randn(input) if input else data, loss)


def _made(factory: str) -> Any:
    """What MODULE:FACTORY() returns; MODULE is found in the working directory as ``python -m`` finds it."""
    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise CommandError(f"expected MODULE:FACTORY, such as nets:make_resnet, got {factory!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # an import runs the user's code
        raise CommandError(f"importing {module_name} raised {_described(error)}") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise CommandError(f"{module_name} has no {attribute!r}")
        target = getattr(target, name)
    if isinstance(target, nn.Module) or not callable(target):
        return target
    try:
        return target()
    except Exception as error:
        raise CommandError(f"{factory}() raised {_described(error)}") from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def _print(reports: dict[str, GradReport], stream: Any) -> None:
    if not importlib.util.find_spec("rich"):
        for title, report in reports.items():
            print(*filter(None, (title, str(report))), sep="\n\n", file=stream)
        return
    from rich.columns import Columns
    from rich.panel import Panel

    console = terminal.console(stream, len(reports) * _PANEL_WIDTH if len(reports) > 1 else 120)
    if len(reports) == 1:
        console.print(*reports.values())
        return
    width = console.width // len(reports)
    beside = width >= _PANEL_WIDTH
    panels = [Panel(report, title=title, width=width if beside else None) for title, report in reports.items()]
    if beside:
        console.print(Columns(panels, padding=(0, 0)))
    else:
        console.print(*panels, sep="\n")
