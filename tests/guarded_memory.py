"""Memory whose ends cannot be crossed: a script, since an access beyond them ends the process.

``python tests/guarded_memory.py ACTIVATION [--full]`` runs the grid of ``vgkern verify`` on the Triton kernels in the
interpreter, where every tensor that the backend takes or makes lies against a page that cannot be accessed, is filled
with NaN until it is written, and programs run in another order than on a GPU. The judge is float64 autograd, as always:
a stray load or store is a crash, an element read or left unwritten is a NaN. ``python tests/guarded_memory.py fault
load|store`` does what none of them may.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton_problems import small_limits  # noqa: E402
from vgkern.kernels import tuning  # noqa: E402

from benchmarks.interpreter import permute_programs  # noqa: E402
from vgkern.backends import triton as backend  # noqa: E402
from vgkern.testing import format_rows  # noqa: E402
from vgkern.verify import cases  # noqa: E402


def pages_before_and_behind(like: torch.Tensor, at_end: bool) -> torch.Tensor:
    """An uninitialised tensor like ``like``, all bits set, that begins or ends at a page that cannot be accessed."""
    size = like.numel() * like.element_size()
    if size == 0:
        return like
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    region = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + page + room):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    memory = (ctypes.c_char * size).from_address(address + page + (room - size if at_end else 0))
    memory.region = region  # unmapped with the tensor, and not before
    ctypes.memset(memory, 0xFF, size)
    flat = torch.frombuffer(memory, dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


class GuardedMemory(TorchDispatchMode):
    """Every tensor made inside ends (or begins) at a page that cannot be accessed, and is filled with NaN."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return pages_before_and_behind(result, self.at_end)
        return result


@contextlib.contextmanager
def guarded(at_end: bool, order):
    """The Triton backend on guarded memory, its programs in the given order; yields how many launches had several."""
    names = [f"{double}batch_norm_act_{way}" for double in ("", "double_") for way in ("forward", "backward")]
    plain = {name: getattr(backend, name) for name in names}

    def within(operator):
        def call(*args):
            args = [
                pages_before_and_behind(a, at_end).copy_(a) if isinstance(a, torch.Tensor) and a.numel() else a
                for a in args
            ]
            with GuardedMemory(at_end):
                return operator(*args)

        return call

    for name, operator in plain.items():
        setattr(backend, name, within(operator))
    try:
        with permute_programs(order) as programs:
            yield programs
    finally:
        for name, operator in plain.items():
            setattr(backend, name, operator)


def backwards(programs: int) -> list[int]:
    return list(range(programs))[::-1]


def shuffled(programs: int) -> list[int]:
    return random.Random(programs).sample(range(programs), programs)


def run(activation: str, full: bool) -> int:
    table = dict(tuning.TABLE)
    small = {row: small_limits(row, elements=1024, inner=256, programs=32) for row in table}
    several = failed = 0
    todo = [case for case in cases([activation], full=full) if full or case.dtype == "float32"]
    for limits, at_end, order in ((small, True, backwards), (table, False, shuffled)):
        tuning.TABLE.update(limits)
        with guarded(at_end, order) as programs:
            for case in todo:
                rows = case.check("triton")
                if not all(row.ok for row in rows):
                    failed += 1
                    print(f"{case}\n{format_rows(rows)}", file=sys.stderr)
        several += sum(n > 1 for n in programs)
    print(f"{2 * len(todo)} cases, {several} launches of several programs, {failed} failed")
    return 1 if failed or not todo else 0


@triton.jit
def _one_too_many(ptr, size, STORE: tl.constexpr):
    place = tl.arange(0, 8) + size - 7  # the last of them is the first behind the end
    if STORE:
        tl.store(ptr + place, 0.0)
    else:
        tl.load(ptr + place)


def fault(kind: str) -> int:
    x = pages_before_and_behind(torch.empty(16), True)
    print("about to", kind, flush=True)
    _one_too_many[(1,)](x, x.numel(), kind == "store")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("kind", nargs="?")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    sys.exit(fault(options.kind) if options.what == "fault" else run(options.what, options.full))
