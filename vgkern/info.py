"""``vgkern info``: what is installed and what of it can be used here."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import _version, backends, memory

__all__ = ["collect", "render"]


def collect() -> dict[str, Any]:
    """Versions, backends, CPU, the pool of memory and GPUs as JSON knows them."""
    states = backends.available()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": {
            "vgkern": _version.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "numpy": _installed("numpy"),
        },
        "platform": platform.platform(),
        "backends": states,
        "default_backend": {device: backends.name_of(device) for device in devices},
        "cpu": {**_instruction_sets(states), "threads": torch.get_num_threads()},
        "memory": {**asdict(memory.stats()), "huge_pages": _huge_pages()},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def render(info: dict[str, Any]) -> str:
    """``info`` for people."""
    cpu = info["cpu"]
    sets = ", ".join(cpu["available_isas"])
    isa = f"{cpu['isa']} (available: {sets})" if cpu["isa"] else "– (the cpu backend is not usable)"
    pool = info["memory"]
    size = {name: f"{pool[name] / 2**20:.0f} MiB" for name in pool if name.endswith("_bytes")}
    used = f"{size['in_use_bytes']} in use (at most {size['peak_bytes']}), {size['idle_bytes']} idle"
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['runtime']}, {gpu['architecture']}"
        for gpu in info["gpus"]
    ]
    sections = {
        "Versions": {name: version or "not installed" for name, version in info["versions"].items()},
        "Platform": {"system": info["platform"]},
        "Backends": info["backends"] | {f"used for {k} tensors": v for k, v in info["default_backend"].items()},
        "CPU": {"instruction set": isa, "threads": cpu["threads"]},
        "Memory pool": {
            "limit of idle memory": size["limit_bytes"] if pool["limit_bytes"] else "0: the pool is off",
            "this process": f"{used}; {pool['hits']} buffers reused, {pool['misses']} new",
            "huge pages": pool["huge_pages"] or "unknown to this system",
        },
        "GPU": {str(index): gpu for index, gpu in enumerate(gpus)} or {"": "none that torch can use"},
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:24}{value}".rstrip() for name, value in rows.items()]
    return "\n".join(lines)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_sets(states: dict[str, str]) -> dict[str, Any]:
    if states["cpu"] != "usable":
        return {"isa": None, "available_isas": []}
    from .backends import cpu

    return {"isa": cpu.isa(), "available_isas": list(cpu.available_isas())}


def _huge_pages() -> str | None:
    """Linux's setting: ``"always"``, ``"madvise"`` (by request, as the pool's are), or ``"never"``."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    rocm = torch.version.hip
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "runtime": f"ROCm {rocm}" if rocm else f"CUDA {torch.version.cuda}",
        "architecture": properties.gcnArchName if rocm else f"sm_{properties.major}{properties.minor}",
    }
