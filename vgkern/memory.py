"""Memory of the outputs and gradients that the CPU backend makes: a bounded pool of buffers on huge pages.

The allocator of the C library maps a large tensor anew at each step and unmaps it when it dies; the system then pages
it in with zeros, which takes longer than the arithmetic. The pool keeps such memory for the next tensor. A buffer is
handed out again only after torch has destroyed the storage on it: views, saved tensors, NumPy arrays and other threads
keep it as they keep any other tensor's memory.

Idle buffers take at most :func:`limit` bytes. The environment variable ``VGKERN_MEMORY_LIMIT`` sets it when the package
is imported: bytes, or with a suffix as in ``512M``, ``4G``; ``0`` turns the pool off. The default is an eighth of the
machine's memory, or of the control group's: idle memory is what the next step needs again, but four processes on one
machine, each with as much idle, shall leave half of it to others.

A buffer's data begins in the first page of a huge one but not at its beginning, and buffers by turns at other lines of
it: addresses that agree modulo 4096 hold each other up. The gradient of a smooth activation in half precision also
waits in a buffer between the two passes of a backward, which gives it back when it ends.

Outputs of less than 1 MiB lie on the C library's heap, which keeps its pages by itself, and are handed to torch in the
same way, which takes half of ``torch.empty``'s time; with a limit of 0 they too are ``torch.empty``'s.

Such a tensor behaves as one of ``torch.empty``, but for two things that it shares with ``torch.from_numpy``'s:
its storage cannot be resized (``resize_`` to more elements and ``untyped_storage().resize_`` raise ``RuntimeError``; in
torch 2.13 a refused ``resize_`` leaves the new shape on the tensor, which must not be used then), and torch's memory
profiler does not see it. ``share_memory_`` moves it out of the pool.
"""

from __future__ import annotations

import operator
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    from . import _C  # type: ignore[attr-defined]
except ImportError:  # vgkern.backends.cpu says why
    _C = None

__all__ = ["MemoryStats", "empty_cache", "limit", "set_limit", "stats"]


@dataclass(frozen=True)
class MemoryStats:
    """What the pool holds, and did since the process started.

    ``peak_bytes`` is the most that was in use at once: a limit of as much keeps all of it for the next step.
    """

    in_use_bytes: int
    idle_bytes: int
    peak_bytes: int
    limit_bytes: int
    hits: int
    misses: int


def stats() -> MemoryStats:
    """Bytes in use, idle and at most; the limit; and how many tensors got a reused buffer (hits) or a new one (misses).

    All zero where the extension is missing, for then there is no pool.

    Example:
        >>> import torch, vgkern
        >>> y = vgkern.functional.add_act(torch.ones(64, 256, 32, 32))
        >>> vgkern.memory.stats().in_use_bytes >= y.nbytes
        True
    """
    return MemoryStats(*_C.pool_stats()) if _C else MemoryStats(0, 0, 0, 0, 0, 0)


def empty_cache() -> None:
    """Give all idle buffers back to the system. Living tensors stay as they are.

    Example:
        >>> import vgkern
        >>> vgkern.memory.empty_cache()
        >>> vgkern.memory.stats().idle_bytes
        0
    """
    if _C:
        _C.pool_empty()


def limit() -> int:
    """Most bytes that idle buffers may take; 0 where the pool is off."""
    return stats().limit_bytes


def set_limit(bytes: int) -> None:
    """Set the most bytes that idle buffers may take; what is idle beyond it goes back to the system at once.

    With 0 new tensors come from ``torch.empty``, and buffers in use are given back when their tensors die. Without the
    extension there is no pool, and this changes nothing.

    Raises:
        ValueError: a negative number.
        TypeError: no integer.

    Example:
        >>> import vgkern
        >>> before = vgkern.memory.limit()
        >>> vgkern.memory.set_limit(1 << 30)
        >>> vgkern.memory.limit()
        1073741824
        >>> vgkern.memory.set_limit(before)
    """
    bytes = operator.index(bytes)
    if bytes < 0:
        raise ValueError(f"bytes: expected a number >= 0, got {bytes}")
    if _C:
        _C.pool_set_limit(min(bytes, sys.maxsize))


def _default_limit() -> int:
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_control_group_limits()]) // 8


def _control_group_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The limits of this process's control groups (versions 1 and 2) and of the groups around them, in bytes."""
    limits = []
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            path = top / folder / name
            # Inside a container the outer groups are not there; "max" stands for no limit.
            if path.exists() and (text := path.read_text().strip()).isdecimal():
                limits.append(int(text))
    return limits


def _parse_limit(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"expected bytes, or a number with K, M or G behind it, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _set_limit_from_environment() -> None:
    text = os.environ.get("VGKERN_MEMORY_LIMIT")
    try:
        set_limit(_parse_limit(text) if text else _default_limit())
    except ValueError as error:
        set_limit(_default_limit())
        warnings.warn(
            f"VGKERN_MEMORY_LIMIT: {error}; the default, {limit()} bytes, is used", RuntimeWarning, stacklevel=2
        )


_set_limit_from_environment()
