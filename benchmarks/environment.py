"""What a number was measured on."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import vgkern


def describe(device: str) -> dict[str, str | int]:
    """The machine, the versions and the day, as columns of a row that is to be read alone.

    ``commit`` is empty where there is no repository, and ends in "-dirty" where files were changed since.
    """
    backend = vgkern.backends.name_of(device)
    return {
        "device": device,
        "device_name": _cpu() if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "backend": backend,
        "isa": _isa() if backend == "cpu" else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vgkern": vgkern.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
    }


def summary(environment: dict[str, str | int]) -> str:
    """The same as a line for people."""
    isa = f", {environment['isa']}" if environment["isa"] else ""
    commit = f" at {environment['commit']}" if environment["commit"] else ""
    return (
        f"{environment['device_name']}, {environment['threads']} threads; torch {environment['torch']}, "
        f"vgkern {environment['vgkern']}{commit} ({environment['backend']}{isa}); {environment['date']}"
    )


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()


def _isa() -> str:
    from vgkern.backends import cpu

    return cpu.isa()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
