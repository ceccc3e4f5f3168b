"""Block sizes: how a tensor is cut into tiles and programs. A table with reasons, and no autotuner at run time.

A tensor is seen as ``num_outer`` × ``num_channels`` × ``inner_size``: planes (contiguous: N, C, S), or rows
(channels_last: R = N·S rows whose inner axis *is* the channel axis). A tile is ``runs`` × ``inner`` elements: ``inner``
neighbours (of a plane, or channels of a row) in each of ``runs`` planes or rows. A program owns ``channels`` channels,
and of these one of ``num_splits`` parts: it walks ``tiles_per_split`` tiles, or keeps all it has in one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TABLE", "Blocks", "Limits", "choose", "power_of_two"]


@dataclass(frozen=True)
class Limits:
    """One row of the table: what the blocks of a layout and width may be.

    ``inner``, ``elements``: of a tile that is walked, at most; ``resident``: elements that a program may keep in
    registers; ``programs``: how many are wanted; ``splits``: into how many parts a channel is cut at most; ``warp``:
    elements of a tile per warp.
    """

    inner: int
    elements: int
    resident: int
    programs: int
    splits: int
    warp: int


# By layout and width, the bytes of an element of x. On CUDA and ROCm alike:
# * 256 elements a warp are 8 a thread of 32: one or two 16-byte loads a tensor. For sm_80 ptxas gives backward_reduce,
#   which keeps dy, x, dz and float64 products of them, 105 to 112 registers in planes; with 16 a thread it was 174 and
#   more, which leaves a multiprocessor one program. float64 takes two registers an element: half of everything.
# * 8192 resident elements are 16 a thread of 16 warps, where forward_channel takes 118 of the 128 registers that there
#   are (gelu); backward_channel, which keeps two tensors, spilled at that size and gets half.
# * 1024 programs are some eight for each multiprocessor of the largest devices, which evens out the tail. The number is
#   fixed, so that the bits of a result do not depend on the size of the device.
# * 128 splits: each program of the pass that follows reads the partial sums of all of them.
TABLE: dict[tuple[str, int], Limits] = {
    # A tile is a stretch of one plane, or several planes where these are short.
    ("planes", 2): Limits(2048, 2048, 8192, 1024, 128, 256),
    ("planes", 4): Limits(2048, 2048, 8192, 1024, 128, 256),
    ("planes", 8): Limits(1024, 1024, 4096, 1024, 128, 128),
    # 64 to 128 neighbouring bytes, whole 32-byte sectors. Wider tiles would leave a layer of 64 channels, where
    # activations are largest, with too few programs or too many splits to merge.
    ("rows", 2): Limits(32, 2048, 8192, 1024, 128, 256),
    ("rows", 4): Limits(32, 2048, 8192, 1024, 128, 256),
    ("rows", 8): Limits(16, 1024, 4096, 1024, 128, 128),
    # Width 0 is the interpreter, where a tile costs milliseconds and an element nanoseconds: few and large.
    ("planes", 0): Limits(65536, 65536, 131072, 2, 8, 65536),
    ("rows", 0): Limits(256, 65536, 131072, 2, 8, 65536),
}


@dataclass(frozen=True)
class Blocks:
    """The cut of one tensor; ``runs``, ``inner`` and ``channels`` (of a program) are powers of two.

    ``resident``: one tile holds all elements of a program's channels.
    """

    runs: int
    inner: int
    channels: int
    num_tiles: int
    tiles_per_split: int
    num_splits: int
    programs: int
    num_warps: int
    resident: bool


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def choose(rows: bool, width: int, num_outer: int, num_channels: int, inner_size: int, live: int) -> Blocks:
    """Cut a tensor of ``num_outer`` × ``num_channels`` × ``inner_size`` (rows: ``inner_size`` = ``num_channels``).

    ``width``: bytes of an element of x, or 0 under the interpreter. ``live``: how many tensors the pass would have to
    keep in registers to read each of them once; 0 for a pass that gains nothing by that.
    """
    limits = TABLE["rows" if rows else "planes", width]
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
    num_warps = min(max(power_of_two(runs * inner // limits.warp), 4), 16)
    return Blocks(
        runs, inner, channels, num_tiles, tiles_per_split, num_splits, num_blocks * num_splits, num_warps, resident
    )
