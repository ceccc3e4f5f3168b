"""What kernels do in Triton's interpreter, watched from outside: bytes that move, launches, the order of programs.

The process must run under ``TRITON_INTERPRET=1``, set before triton is imported. Nothing here knows any kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

__all__ = ["Traffic", "count_bytes", "permute_programs", "record_launches"]


def _builder() -> Any:
    return interpreter.interpreter_builder


@dataclass
class Traffic:
    """Bytes that masked-in elements of loads and stores touched, by kernel and, in these, by the tensor they lie in.

    ``loaded`` and ``stored`` are keyed (kernel, name of tensor); the name is None outside the tensors that were given.
    An element that is loaded twice counts twice.
    """

    loaded: dict[tuple[str, str | None], int] = field(default_factory=dict)
    stored: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def bytes(self, kernel: str | None = None, names: Iterable[str | None] | None = None) -> int:
        """Loaded and stored together: of one kernel or all, in the named tensors or anywhere."""
        wanted = None if names is None else set(names)
        return sum(
            count
            for counts in (self.loaded, self.stored)
            for (of, name), count in counts.items()
            if kernel in (None, of) and (wanted is None or name in wanted)
        )


@contextlib.contextmanager
def record_launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside, in order."""
    names: list[str] = []
    with _around_launches(lambda kernel, arguments: names.append(kernel)):
        yield names


@contextlib.contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Count what every load and store inside touches; tensors are named by the kernels' own arguments."""
    traffic = Traffic()
    builder = type(_builder())
    load, store = builder.create_masked_load, builder.create_masked_store
    kernel = ""
    ranges: list[tuple[str, int, int]] = []

    def begin(name: str, arguments: dict[str, Any]) -> None:
        nonlocal kernel, ranges
        kernel = name
        ranges = [
            (argument, value.data_ptr(), value.data_ptr() + value.numel() * value.element_size())
            for argument, value in arguments.items()
            if isinstance(value, Tensor)
        ]

    def add(counts: dict[tuple[str, str | None], int], pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data))]
        if not addresses.size:
            return
        size = addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
        first = int(addresses.min())
        name = next((argument for argument, begins, ends in ranges if begins <= first < ends), None)
        counts[kernel, name] = counts.get((kernel, name), 0) + size

    def counted_load(self, pointers, mask, *rest):
        add(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        add(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        with _around_launches(begin):
            yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


@contextlib.contextmanager
def permute_programs(order: Callable[[int], list[int]]) -> Iterator[list[int]]:
    """Run the programs of every (one-dimensional) launch in the order ``order(number of programs)``.

    Yields the numbers of programs of the launches, so that a test can tell that there was something to permute.
    """
    builder = type(_builder())
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    programs: list[int] = []
    places: list[int] = []

    def begin(self, x, y, z):
        programs.append(x)
        places[:] = order(x)
        if sorted(places) != list(range(x)):
            raise ValueError(f"order: expected a permutation of {x} programs, got {places}")
        set_grid_dim(self, x, y, z)

    def step(self, x, y, z):
        set_grid_idx(self, places[x], y, z)

    builder.set_grid_dim, builder.set_grid_idx = begin, step
    try:
        yield programs
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


@contextlib.contextmanager
def _around_launches(begin: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Call ``begin(name, arguments by name)`` before each launch."""
    kind = interpreter.GridExecutor
    call = kind.__call__

    def launched(self, *args, **kwargs):
        begin(self.fn.__name__, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return call(self, *args, **kwargs)

    kind.__call__ = launched
    try:
        yield
    finally:
        kind.__call__ = call
