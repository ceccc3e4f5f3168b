# ruff: noqa: RET505, SIM102, SIM300 -- a branch on a compile-time constant chooses between programs: both arms stay visible
"""Norms of a list of tensors, and scaling the list by a factor that stays on the device: Triton kernels.

::

    norms[i] = (Σ|x|ᵖ)^(1/p) over tensor i      total = (Σ|x|ᵖ)^(1/p) over all
    factor = min(1, max_norm / (total + 1e-6))  x ← x·factor

=========  ==========================================  ==================================================
call       kernels                                     memory traffic, u: one read or write of all tensors
=========  ==========================================  ==================================================
norms      norm_partial, norm_merge                    1
scale_     gradient_scale                              2, or 0 where the factor is 1
=========  ==========================================  ==================================================

whatever the number of tensors and their dtypes, beside a table of 4 int64 a tensor and one a program, and two
float64 of partial sums a program.

**The table.** Addresses, sizes, dtypes and who owns which chunk go to the device in one asynchronous copy, and stay
there while the same tensors come again. Kernels cast an address to a pointer of the tensor's dtype: one launch serves a
list of any mixture. Tiles begin at multiples of 16 bytes, the first of them before the tensor if that is not aligned
(a view into a DDP bucket, say), so every tile but a tensor's first and last is read unmasked in 16-byte loads.

**Accuracy.** Of float32 and narrower elements, squares and sums are pairs of float32, high and low (Dekker's product by
fma, Knuth's sum): each lane is good to 2⁻⁴⁴ or so, and lanes are added up in float64 once a program. Float64 for every
element would take a conversion and an fma at the rate of float64, 1/64 of float32's on consumer cards: by the rates
that NVIDIA gives, an RTX 3090 would need 1.7 times the time that memory needs for float32, and 3.4 times for bfloat16.
The pairs take about a dozen float32 operations an element. Elements are divided by a power of two near the largest
magnitude so far, which is exact; sums carry it along. So a finite tensor has a finite norm, and one that is not 0 has
one that is not 0. Float64 elements are summed in float64. Other p than 1, 2 and inf take float64 logarithms.

**Determinism.** No atomics: partial sums are merged in a fixed order. The same bits from run to run, for tensors whose
addresses are the same modulo 16.

**No host synchronisation.** Capturing in a CUDA graph works; a table copied during capture is kept for the replays.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_norm, launching

__all__ = ["DTYPES", "norm_launches", "norms", "scale_", "scale_launches"]

#: The dtypes that a list may hold; their place is their code in the table.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a norm is made of: the largest |x|, Σ|x|, Σx², or Σ|x|ᵖ for another p.
_LARGEST = tl.constexpr(0)
_MAGNITUDES = tl.constexpr(1)
_SQUARES = tl.constexpr(2)
_POWERS = tl.constexpr(3)

# Elements of a tile, half as many of float64: 8 a thread of 256. With 16 a thread the kernel takes 97 registers on
# sm_90, with 32 it takes 163, which leave a multiprocessor a quarter or an eighth of its warps; with 8 it takes 40, and
# there are six blocks of it, which have as many bytes in flight.
_TILE = 2048
_THREADS = 256
# Programs that a long list is cut into, beside one for each tensor: several for each multiprocessor, and few enough
# that one program can merge them all to the total.
_PROGRAMS = 2048
# norm_merge: tensors of a program, and chunks that it reads at once.
_MERGE_TENSORS = 16
_MERGE_CHUNKS = 32


# -- tiles -------------------------------------------------------------------------------------------------------------


@triton.jit
def _chunk_of(table_ptr, num_tensors):
    """This program's tensor, (address, size, dtype code), and the number of its chunk in that tensor."""
    program = tl.program_id(0)
    tensor = tl.load(table_ptr + 4 * num_tensors + 1 + program)
    address = tl.load(table_ptr + tensor)
    size = tl.load(table_ptr + num_tensors + tensor)
    code = tl.load(table_ptr + 2 * num_tensors + tensor)
    return address, size, code, program - tl.load(table_ptr + 3 * num_tensors + tensor)


@triton.jit
def _tiles_of(address, size, chunk, tiles_per_chunk, DTYPE: tl.constexpr, ELEMENTS: tl.constexpr):
    """``base``, aligned to 16 bytes, from which the tensor is elements ``lead`` to ``end``, and the range of tiles."""
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    base = tl.multiple_of(((address >> 4) << 4).to(tl.pointer_type(DTYPE)), 16)
    lead = (address & 15) // ITEM
    end = lead + size
    first = chunk * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, tl.cdiv(end, ELEMENTS))
    return base, lead, end, first, last


@triton.jit
def _load_tile(base, lead, end, tile, ELEMENTS: tl.constexpr):
    """Elements of a tile, 0 outside of the tensor."""
    start = tile * ELEMENTS
    place = start + tl.arange(0, ELEMENTS)
    if (start >= lead) & (start + ELEMENTS <= end):
        x = tl.load(base + place)
    else:
        x = tl.load(base + place, mask=(place >= lead) & (place < end), other=0.0)
    return x


# -- sums --------------------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(value):
    """The power of two just below a magnitude, kept where its reciprocal, too, is a normal number."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = bits.to(tl.float64, bitcast=True)
        return tl.minimum(tl.maximum(power, 9.332636185032189e-302), 1.0715086071862673e301)  # 2^±1000
    else:
        bits = value.to(tl.int32, bitcast=True) & 0x7F800000
        power = bits.to(tl.float32, bitcast=True)
        return tl.minimum(tl.maximum(power, 1.1754943508222875e-38), 8.507059173023462e37)  # 2^±126


@triton.jit
def _raise(value, power, KIND: tl.constexpr):
    """value ≥ 0 to the norm's power."""
    if KIND == _MAGNITUDES:
        return value
    elif KIND == _SQUARES:
        return value * value
    else:
        return tl.exp2(power * tl.log2(value.to(tl.float64)))


@triton.jit
def _chunk_norm(
    address, size, chunk, tiles_per_chunk, power,
    KIND: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(scale, sum) of a chunk in float64: Σ|x|ᵖ = scaleᵖ·sum; of _LARGEST the magnitude is the sum."""
    ELEMENTS: tl.constexpr = TILE // 2 if DTYPE == tl.float64 else TILE
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    SUMS: tl.constexpr = tl.float64 if KIND == _POWERS else COMPUTE
    base, lead, end, first, last = _tiles_of(address, size, chunk, tiles_per_chunk, DTYPE, ELEMENTS)
    if KIND == _LARGEST:
        most = tl.zeros([ELEMENTS], COMPUTE)
        nan = tl.zeros([ELEMENTS], tl.int32)
        for tile in range(first, last):
            x = _load_tile(base, lead, end, tile, ELEMENTS).to(COMPUTE)
            most = tl.maximum(most, tl.abs(x))
            nan = nan | (x != x).to(tl.int32)
        largest = tl.max(most, axis=0).to(tl.float64)
        return largest * 0.0 + 1.0, tl.where(tl.max(nan, axis=0) > 0, float("nan"), largest)
    else:
        scale = _power_of_two(tl.full([], 0.0, COMPUTE))
        high = tl.zeros([ELEMENTS], SUMS)
        low = tl.zeros([ELEMENTS], SUMS)
        for tile in range(first, last):
            x = _load_tile(base, lead, end, tile, ELEMENTS).to(COMPUTE)
            needed = _power_of_two(tl.max(tl.abs(x), axis=0))
            if needed > scale:
                ratio = _raise(scale / needed, power, KIND).to(SUMS)
                high *= ratio
                low *= ratio
                scale = needed
            v = tl.abs(x * (1.0 / scale))
            term = _raise(v, power, KIND).to(SUMS)
            if SUMS == tl.float64:
                high += term
            else:
                sum = high + term
                part = sum - high
                low += (high - (sum - part)) + (term - part)
                if KIND == _SQUARES and DTYPE == tl.float32:  # the square of a narrower one is exact
                    low += tl.fma(v, v, -term)
                high = sum
        total = tl.sum(high.to(tl.float64), axis=0)
        # The low parts of what is not finite are NaN.
        total = tl.where(total < float("inf"), total + tl.sum(low.to(tl.float64), axis=0), total)
        return scale.to(tl.float64), total


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tensors", "num_chunks", "tiles_per_chunk"])
def norm_partial_kernel(
    table_ptr, partials_ptr, power: tl.float64, num_tensors, num_chunks, tiles_per_chunk,
    KIND: tl.constexpr, DTYPES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a chunk: its (scale, sum) into partials, float64 (2, num_chunks). Reads every element once: 1 u.

    ``DTYPES``: for each code (float32, float64, bfloat16, float16) whether the list has tensors of it.
    """
    address, size, code, chunk = _chunk_of(table_ptr, num_tensors)
    scale = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    if DTYPES[0]:
        if code == 0:
            scale, total = _chunk_norm(address, size, chunk, tiles_per_chunk, power, KIND, tl.float32, TILE)
    if DTYPES[1]:
        if code == 1:
            scale, total = _chunk_norm(address, size, chunk, tiles_per_chunk, power, KIND, tl.float64, TILE)
    if DTYPES[2]:
        if code == 2:
            scale, total = _chunk_norm(address, size, chunk, tiles_per_chunk, power, KIND, tl.bfloat16, TILE)
    if DTYPES[3]:
        if code == 3:
            scale, total = _chunk_norm(address, size, chunk, tiles_per_chunk, power, KIND, tl.float16, TILE)
    tl.store(partials_ptr + tl.program_id(0), scale)
    tl.store(partials_ptr + num_chunks + tl.program_id(0), total)


@triton.jit
def _merge(
    partials_ptr, first, count, num_chunks, power, KIND: tl.constexpr, TENSORS: tl.constexpr, CHUNKS: tl.constexpr
):
    """The norms of (TENSORS,) stretches of chunks, ``count`` of them from ``first``."""
    most = tl.max(count, axis=0)
    lane = tl.arange(0, CHUNKS)[None, :]
    scale = tl.zeros([TENSORS], tl.float64)
    nan = tl.zeros([TENSORS], tl.int32)
    for start in range(0, most, CHUNKS):
        inside = start + lane < count[:, None]
        place = partials_ptr + first[:, None] + start + lane
        if KIND == _LARGEST:
            part = tl.load(place + num_chunks, mask=inside, other=0.0)
            scale = tl.maximum(scale, tl.max(tl.where(part == part, part, 0.0), axis=1))
            nan = nan | tl.max((part != part).to(tl.int32), axis=1)
        else:
            scale = tl.maximum(scale, tl.max(tl.load(place, mask=inside, other=0.0), axis=1))
    if KIND == _LARGEST:
        return tl.where(nan > 0, float("nan"), scale)
    else:
        divisor = tl.where(scale > 0, scale, 1.0)
        total = tl.zeros([TENSORS], tl.float64)
        for start in range(0, most, CHUNKS):
            inside = start + lane < count[:, None]
            place = partials_ptr + first[:, None] + start + lane
            ratio = tl.load(place, mask=inside, other=0.0) / divisor[:, None]
            part = tl.load(place + num_chunks, mask=inside, other=0.0)
            # An infinite part stays so, however small its scale is beside another's.
            total += tl.sum(tl.where(part < float("inf"), part * _raise(ratio, power, KIND), part), axis=1)
        if KIND == _MAGNITUDES:
            return scale * total
        elif KIND == _SQUARES:
            return scale * tl.sqrt(total)
        else:
            return scale * _raise(total, 1.0 / power, KIND)


@triton.jit(do_not_specialize=["num_tensors", "num_chunks"])
def norm_merge_kernel(
    table_ptr, partials_ptr, norms_ptr, total_ptr, factor_ptr, power: tl.float64, max_norm: tl.float64,
    num_tensors, num_chunks, KIND: tl.constexpr, TENSORS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Norms, float64, from the partial sums: no tensor is read, 0 u. Program 0 merges all chunks to the total and the
    factor, every other one TENSORS tensors."""
    program = tl.program_id(0)
    if program == 0:
        one = tl.arange(0, 1)
        total = _merge(
            partials_ptr, one.to(tl.int64), one.to(tl.int64) + num_chunks, num_chunks, power, KIND, 1, TENSORS * CHUNKS
        )
        factor = max_norm / (total + 1e-6)
        tl.store(total_ptr + one, total)
        tl.store(factor_ptr + one, tl.where(factor >= 1.0, 1.0, factor))  # NaN stays
    else:
        tensor = (program - 1) * TENSORS + tl.arange(0, TENSORS)
        present = tensor < num_tensors
        first = tl.load(table_ptr + 3 * num_tensors + tensor, mask=present, other=0)
        count = tl.load(table_ptr + 3 * num_tensors + 1 + tensor, mask=present, other=0) - first
        norm = _merge(partials_ptr, first, count, num_chunks, power, KIND, TENSORS, CHUNKS)
        tl.store(norms_ptr + tensor, norm, mask=present)


@triton.jit
def _toward_zero(x, DTYPE: tl.constexpr):
    """float32 at the precision of DTYPE, rounded towards 0 if that is narrower: what is scaled down to a norm does not
    exceed it."""
    if DTYPE == tl.bfloat16:
        return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        # Below 2⁻¹⁴ all have the unit of the smallest, 2⁻²⁴, which is that of a half.
        magnitude = tl.abs(x)
        nearest = (magnitude + 0.5) - 0.5
        below = tl.where(nearest > magnitude, nearest - 5.9604644775390625e-08, nearest)
        normal = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return tl.where(magnitude < 6.103515625e-05, tl.where(x < 0, -below, below), normal)
    else:
        return x


@triton.jit
def _scale_chunk(
    address, size, chunk, tiles_per_chunk, factor, DTYPE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    ELEMENTS: tl.constexpr = TILE // 2 if DTYPE == tl.float64 else TILE
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    base, lead, end, first, last = _tiles_of(address, size, chunk, tiles_per_chunk, DTYPE, ELEMENTS)
    # A factor that is no normal float32 keeps its digits: multiplied by 2⁶⁴ first, and the product by 2⁻⁶⁴.
    lift = tl.where(tl.abs(factor) < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)
    high = (factor * lift).to(COMPUTE)
    low = (1.0 / lift).to(COMPUTE)
    for tile in range(first, last):
        start = tile * ELEMENTS
        place = start + tl.arange(0, ELEMENTS)
        scaled = _toward_zero((_load_tile(base, lead, end, tile, ELEMENTS).to(COMPUTE) * high) * low, DTYPE)
        if (start >= lead) & (start + ELEMENTS <= end):
            batch_norm._store(base + place, scaled, None)
        else:
            batch_norm._store(base + place, scaled, (place >= lead) & (place < end))


@triton.jit(do_not_specialize=["num_tensors", "tiles_per_chunk"])
def gradient_scale_kernel(
    table_ptr, factor_ptr, num_tensors, tiles_per_chunk, DTYPES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """x ← x·factor, rounded once, in half precision towards 0. Reads and writes every element: 2 u; nothing where the
    factor is 1: 0 u."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        address, size, code, chunk = _chunk_of(table_ptr, num_tensors)
        if DTYPES[0]:
            if code == 0:
                _scale_chunk(address, size, chunk, tiles_per_chunk, factor, tl.float32, TILE)
        if DTYPES[1]:
            if code == 1:
                _scale_chunk(address, size, chunk, tiles_per_chunk, factor, tl.float64, TILE)
        if DTYPES[2]:
            if code == 2:
                _scale_chunk(address, size, chunk, tiles_per_chunk, factor, tl.bfloat16, TILE)
        if DTYPES[3]:
            if code == 3:
                _scale_chunk(address, size, chunk, tiles_per_chunk, factor, tl.float16, TILE)


# -- launchers ---------------------------------------------------------------------------------------------------------


class _List(NamedTuple):
    """A list of tensors on the device.

    ``table``: int64, T addresses, T sizes, T codes of dtypes, T + 1 first chunks, and the tensor of each chunk.
    ``source``: what it was copied from, which a captured graph copies again.
    """

    table: Tensor
    source: Tensor
    num_tensors: int
    num_chunks: int
    tiles_per_chunk: int
    dtypes: tuple[bool, ...]


# The last few lists: a step scales the list whose norms it took, and often finds it where it was a step ago.
_LISTS: OrderedDict[tuple, _List] = OrderedDict()
_MOST_LISTS = 8
_captured: list[_List] = []


def _describe(tensors: Sequence[Tensor]) -> _List:
    addresses = [t.data_ptr() for t in tensors]
    sizes = [t.numel() for t in tensors]
    codes = [DTYPES.index(t.dtype) for t in tensors]
    device = tensors[0].device
    key = device, *addresses, *sizes, *codes
    if key in _LISTS:
        _LISTS.move_to_end(key)
        return _LISTS[key]

    items = [t.element_size() for t in tensors]
    tiles = [
        -(-(address % 16 + size * item) // (item * (_TILE // 2 if item == 8 else _TILE))) if size else 0
        for address, size, item in zip(addresses, sizes, items, strict=True)
    ]
    tiles_per_chunk = max(1, -(-sum(tiles) // _PROGRAMS))
    chunks = torch.tensor([-(-n // tiles_per_chunk) for n in tiles])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
    owner = torch.repeat_interleave(chunks)
    source = torch.cat([torch.tensor([*addresses, *sizes, *codes]), first, owner])
    if device.type == "cuda":
        source = source.pin_memory()
    present = tuple(code in codes for code in range(len(DTYPES)))
    table = source.to(device, non_blocking=True)
    entry = _List(table, source, len(tensors), len(owner), tiles_per_chunk, present)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(entry)
        return entry
    _LISTS[key] = entry
    if len(_LISTS) > _MOST_LISTS:
        _LISTS.popitem(last=False)
    return entry


def _options() -> dict[str, Any]:
    """_THREADS threads, whatever the width of a warp: 8 half-precision elements, 16 bytes, for each."""
    warp = 32 if batch_norm.INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": _THREADS // warp, "enable_fp_fusion": False}


def norm_launches(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float
) -> tuple[tuple[Tensor, Tensor, Tensor], list[launching.Launch]]:
    """(what :func:`norms` returns, the launches that fill it)."""
    kind = {1.0: _MAGNITUDES, 2.0: _SQUARES, math.inf: _LARGEST}.get(norm_type, _POWERS)
    entry = _describe(tensors)
    out = torch.empty(entry.num_tensors + 2, dtype=torch.float64, device=tensors[0].device)
    partials = torch.empty((2, max(entry.num_chunks, 1)), dtype=torch.float64, device=out.device)
    norms, total, factor = out[:-2], out[-2], out[-1]
    both = {
        "table_ptr": entry.table, "partials_ptr": partials, "power": norm_type, "num_tensors": entry.num_tensors,
        "num_chunks": entry.num_chunks, "KIND": kind,
    }  # fmt: skip
    partial = {**both, "tiles_per_chunk": entry.tiles_per_chunk, "DTYPES": entry.dtypes, "TILE": _TILE}
    merge = {
        **both, "norms_ptr": norms, "total_ptr": total, "factor_ptr": factor, "max_norm": max_norm,
        "TENSORS": _MERGE_TENSORS, "CHUNKS": _MERGE_CHUNKS,
    }  # fmt: skip
    merge_grid = (1 + triton.cdiv(entry.num_tensors, _MERGE_TENSORS),)
    launches = [launching.Launch(norm_merge_kernel, merge_grid, merge, {"num_warps": 4, "enable_fp_fusion": False})]
    if entry.num_chunks:
        launches.insert(0, launching.Launch(norm_partial_kernel, (entry.num_chunks,), partial, _options()))
    return (norms, total, factor), launches


def norms(tensors: Sequence[Tensor], norm_type: float, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of tensors of one device, each of which is a stretch of memory: two launches.

    Args:
        tensors: at least one, of the dtypes of :data:`DTYPES`. One without elements has norm 0.
        norm_type: p > 0, or inf.
        max_norm: for the factor: what the total may be.

    Returns:
        (norms, total, factor): float64, (T,), () and (). ``factor = min(1, max_norm / (total + 1e-6))``, NaN if the
        total is.
    """
    results, launches = norm_launches(tensors, norm_type, max_norm)
    launching.launch(launches, tensors[0].device)
    return results


def scale_launches(tensors: Sequence[Tensor], factor: Tensor) -> list[launching.Launch]:
    """The launch of :func:`scale_`; none where there are no elements."""
    entry = _describe(tensors)
    if not entry.num_chunks:
        return []
    args = {
        "table_ptr": entry.table, "factor_ptr": factor, "num_tensors": entry.num_tensors,
        "tiles_per_chunk": entry.tiles_per_chunk, "DTYPES": entry.dtypes, "TILE": _TILE,
    }  # fmt: skip
    return [launching.Launch(gradient_scale_kernel, (entry.num_chunks,), args, _options(), conditional=True)]


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """x ← x·factor for tensors as those of :func:`norms`, the factor a float64 scalar on their device: one launch.

    Where the factor is 1 nothing is written, and no tensor is read.
    """
    launching.launch(scale_launches(tensors, factor), tensors[0].device)
