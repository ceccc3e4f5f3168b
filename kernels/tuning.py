"""Block sizes: how a tensor is cut into tiles and programs. A table with reasons, and no autotuner at run time.

A tensor is seen as ``num_outer`` × ``num_channels`` × ``inner_size``: planes (contiguous: N, C, S), or rows
(channels_last: R = N·S rows whose inner axis *is* the channel axis). A tile is ``runs`` × ``inner`` elements: ``inner``
neighbours (of a plane, or channels of a row) in each of ``runs`` planes or rows. A program owns ``channels`` channels,
and of these one of ``num_splits`` parts: it walks ``tiles_per_split`` tiles, or keeps all it has in one.

``vgkern tune`` times :func:`candidates` on the GPU at hand and prints rows in the form of :data:`TABLE`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

__all__ = ["LARGE", "TABLE", "Blocks", "Limits", "candidates", "choose", "key", "power_of_two"]


@dataclass(frozen=True)
class Limits:
    """One row of the table: what the blocks of a layout, element and size class may be.

    ``inner``, ``elements``: of a tile that is walked, at most; ``resident``: elements that a program may keep in
    registers; ``programs``: how many are wanted; ``splits``: into how many parts a channel is cut at most; ``warp``:
    elements of a tile per 32 threads; ``stages``: of the loops that only read, tiles in flight and in work together;
    ``apply_stages``: the same of the loops that write.
    """

    inner: int
    elements: int
    resident: int
    programs: int
    splits: int
    warp: int
    stages: int
    apply_stages: int
    reason: str = ""


#: Elements of x from which a tensor is "large": 16 MiB of float32. Below, much of what a layer reads and writes stays
#: in the L2 cache of an A100 or H100 (40, 50 MB), and a kernel takes ten microseconds or so.
LARGE = 2**22

_FEW = "stays in L2, where what counts is latency: half the programs, and sums that the next launch merges in one step"

# By layout, element and size class; the same on CUDA and ROCm, and whatever the device, so that the bits of a result do
# not depend on it. Beyond each row's reason:
# * 128 float32 or 256 halves a warp are one 16-byte load a thread of 32 and tensor. Twice that gave backward_reduce of
#   float32, for sm_90, 138 (planes) and 160 registers (rows) in place of 90 and 121.
# * 8192 resident elements are 16 a thread of 16 warps: forward_channel keeps one tensor of that size in registers,
#   backward_channel two of half of it. float64 takes two registers an element: half of everything.
# * Every program of the pass that follows reads the partial sums of all splits of its channels, from L2: in all
#   C·splits²·16 bytes. In planes 1024 programs, some eight for each multiprocessor of the largest devices, are 16
#   splits of 64 channels: nothing. In rows, whose programs own 32 channels, as many would be 128 splits and up to 43 %
#   of what x, residual and y are (256 channels of 56 × 56 halves, batch 32): 256 programs and 64 splits make it 3 %,
#   and 11 % at worst (64 channels).
# * The float64 sums of backward_reduce fill registers. For sm_90 it takes 80 to 122 in planes of float32 and up to 126
#   in rows: two programs of eight warps a multiprocessor, occupancy 25 %, seldom three. In planes of halves it is up to
#   140, in rows of halves, where a thread has eight channels, up to 202: one program, 12 %. So bytes in flight come
#   from stages, by asynchronous copies to shared memory that cost no register: 24, (rows) 32 and (halves) 40 KB of two
#   tensors a program. 38 KB a multiprocessor keep a B200's memory busy for the 700 ns that a load is assumed to take,
#   25 KB an H200's, 13 KB an A100's. double_backward_reduce reads three tensors. In rows of float32 it takes 158, one
#   program, for which four stages were 36 KB; five are 48.
# * In planes, loops that write have an occupancy of 50 % and more without stages (with three, ptxas spilled
#   backward_apply of float32), but for two, which get three; in rows it is 12 to 60 %, and six stages keep 40 KB and
#   more in flight.
# * On AMD's GPUs stages are kept in registers, and more than three take more of them than they bring: for gfx942
#   backward_reduce of halves in rows had 262 with six, occupancy 12 %, and 226 with three, 25 %.
# * Planes of an odd number of halves (7 × 7) are read 2 bytes at a time, for which there is no asynchronous copy. They
#   get 16 warps of four elements a thread: with eight, for sm_90, backward_reduce took 162 registers, 12 %, or 128 and
#   spilled; so it is up to 109, 25 %. The other kernels have 50 %, but for those of the double's backward, 25 %.
TABLE: dict[tuple[str, str, str], Limits] = {
    ("planes", "float32", "large"): Limits(
        1024, 1024, 8192, 1024, 128, 128, 4, 1, "a stretch of one plane, one 16-byte load a thread and tensor"
    ),
    ("planes", "float32", "small"): Limits(1024, 1024, 8192, 512, 32, 128, 4, 1, _FEW),
    ("planes", "half", "large"): Limits(
        2048, 2048, 8192, 1024, 128, 256, 6, 1, "the same: one 16-byte load, twice the elements"
    ),
    ("planes", "half", "small"): Limits(2048, 2048, 8192, 512, 32, 256, 6, 1, _FEW),
    ("planes", "float64", "large"): Limits(
        1024, 1024, 4096, 1024, 128, 128, 3, 1, "two registers an element: half of float32"
    ),
    ("planes", "float64", "small"): Limits(1024, 1024, 4096, 512, 32, 128, 3, 1, _FEW),
    ("rows", "float32", "large"): Limits(
        32, 1024, 8192, 256, 64, 128, 5, 6, "128 neighbouring bytes; wider leaves 64 channels with too few programs"
    ),
    ("rows", "float32", "small"): Limits(32, 1024, 8192, 128, 32, 128, 5, 6, _FEW),
    ("rows", "half", "large"): Limits(
        32, 2048, 8192, 256, 64, 256, 6, 6, "64 neighbouring bytes, two whole sectors; wider leaves too few programs"
    ),
    ("rows", "half", "small"): Limits(32, 2048, 8192, 128, 32, 256, 6, 6, _FEW),
    ("rows", "float64", "large"): Limits(16, 1024, 4096, 256, 64, 128, 3, 3, "128 neighbouring bytes, as float32"),
    ("rows", "float64", "small"): Limits(16, 1024, 4096, 128, 32, 128, 3, 3, _FEW),
    **{
        (layout, "interpreted", size): Limits(
            inner, 65536, 131072, 2, 8, 65536, 1, 1, "a tile costs milliseconds, an element nanoseconds: few and large"
        )
        for layout, inner in (("planes", 65536), ("rows", 256))
        for size in ("small", "large")
    },
}


@dataclass(frozen=True)
class Blocks:
    """The cut of one tensor; sizes of blocks are powers of two, ``channels`` are a program's.

    ``vector``: elements of 16 bytes. ``group``: how many elements of a channel one thread holds side by side (planes)
    or in rows far apart (rows): their sum needs no other thread. ``resident``: one tile holds all elements of a
    program's channels.
    """

    runs: int
    inner: int
    channels: int
    group: int
    vector: int
    num_tiles: int
    tiles_per_split: int
    num_splits: int
    programs: int
    num_warps: int
    stages: int
    apply_stages: int
    resident: bool

    def shrunk(self, divisor: int, rows: bool) -> tuple[int, int]:
        """(runs, inner) of a tile of the same channels and ``divisor`` times fewer elements, as far as it has them."""
        outer = self.runs if rows else self.runs // self.channels
        by = min(outer, divisor)
        return self.runs // by, self.inner if rows else max(self.inner * by // divisor, 8)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def key(rows: bool, element: str, num_elements: int) -> tuple[str, str, str]:
    """The key of :data:`TABLE` for a tensor of that many elements."""
    return "rows" if rows else "planes", element, "large" if num_elements >= LARGE else "small"


def choose(
    rows: bool, element: str, num_outer: int, num_channels: int, inner_size: int, live: int, lanes: int = 32
) -> Blocks:
    """Cut a tensor of ``num_outer`` × ``num_channels`` × ``inner_size`` (rows: ``inner_size`` = ``num_channels``).

    ``element``: "half", "float32", "float64", or "interpreted". ``live``: how many tensors the pass would have to keep
    in registers to read each of them once; 0 for a pass that gains nothing by that. ``lanes``: threads of a warp.
    """
    num_elements = num_outer * inner_size * (1 if rows else num_channels)
    limits = TABLE[key(rows, element, num_elements)]
    vector = {"float32": 4, "float64": 2}.get(element, 8)  # elements of a 16-byte load
    outer = power_of_two(num_outer)
    inner = max(power_of_two(inner_size), 8)  # 8: the bits of a mask are packed along the inner axis
    if rows:
        inner = min(inner, limits.inner)
    resident = live > 0 and outer * inner * live <= limits.resident
    if not resident:
        inner = min(inner, limits.inner)
        outer = min(outer, max(limits.elements // inner, 1))
    if rows:
        channels, runs = inner, outer
        num_tiles = _cdiv(num_outer, outer)
    else:
        # Several channels a program where there are more than programs wanted, and room in a tile.
        channels = power_of_two(_cdiv(num_channels, limits.programs))
        channels = min(channels, max(limits.elements // (outer * inner), 1))
        runs = outer * channels
        num_tiles = _cdiv(num_outer, outer) * _cdiv(inner_size, inner)
    num_blocks = _cdiv(num_channels, channels)
    wanted = max(min(num_tiles, limits.programs // num_blocks, limits.splits), 1)
    tiles_per_split = _cdiv(num_tiles, wanted)
    num_splits = _cdiv(num_tiles, tiles_per_split)
    warp = limits.warp if rows or element != "half" or inner_size % 2 == 0 else limits.warp // 2
    num_warps = min(max(power_of_two(runs * inner // warp), 4), 16) * 32 // lanes
    group = min(max(runs * inner // (num_warps * lanes * vector), 1), runs) if rows else vector
    most = 3 if lanes == 64 else max(limits.stages, limits.apply_stages)
    return Blocks(
        runs, inner, channels, group, vector, num_tiles, tiles_per_split, num_splits, num_blocks * num_splits,
        num_warps, min(limits.stages, most), min(limits.apply_stages, most), resident,
    )  # fmt: skip


def candidates(row: tuple[str, str, str]) -> Iterator[Limits]:
    """What ``vgkern tune`` tries for a row of the table, the row itself first."""
    limits = TABLE[row]
    yield limits
    for larger, warp, programs, stages in itertools.product((1, 2), (1, 2), (1, 2), (0, 1)):
        if (larger, warp, programs, stages) != (1, 1, 1, 0):
            yield replace(
                limits, inner=limits.inner * larger, elements=limits.elements * larger, warp=limits.warp * warp,
                programs=limits.programs // programs, splits=limits.splits // programs,
                stages=limits.stages + stages, apply_stages=limits.apply_stages + stages, reason="",
            )  # fmt: skip
