# ruff: noqa: RET505, SIM102, SIM108 -- a branch on a compile-time constant chooses between programs: both arms stay visible
"""Triton kernels for ``act(batch_norm(x) + residual)`` and its gradients, and the functions that launch them.

The mathematics, for a channel c over its m elements (float64 sums, float32 or float64 elements)::

    μ = mean(x)   σ² = mean((x−μ)²)   r = 1/√(σ²+ε)   x̂ = (x−μ)·r   z = γ·x̂ + β + residual   y = φ(z)
    dz = φ'(z)·dy   dβ = Σ dz   dγ = Σ dz·x̂   dslope = Σ_{z<0} z·dy
    dx = γ·r·(dz − dβ/m − x̂·dγ/m)          over the batch's statistics
    dx = γ·r·dz                            over given statistics, or none (then γ·r = 1)
    ‖dx_c‖² = (γ·r)²·(Σdz² − dβ²/m − (2−κ)·dγ²/m),  κ = 1 − ε·r²

(Ioffe & Szegedy, arXiv 1502.03167; the norm follows from Σx̂ = 0 and Σx̂² = κm.)

Launches, and memory traffic in u, one read or write of a tensor of x's size, for a residual and a ReLU-like activation:

=====================================================  ==========================================  ================
pass                                                   kernels                                     u
=====================================================  ==========================================  ================
forward, a channel fits one program                    forward_channel                             3
forward, otherwise                                     forward_statistics, forward_apply           1 + 3
forward, given statistics or none                      forward_apply                               3
backward, a channel fits one program                   backward_channel, finish                    4
backward, otherwise                                    backward_reduce, backward_apply, finish     2 + 4
backward, given statistics or none                     backward_reduce, finish                     3 (x only for dγ)
backward over the batch with bounds of the norm        backward_reduce, backward_apply (reads      2 + 4
                                                       where the closed form cancels), finish,
                                                       backward_apply
moments alone                                          forward_statistics                          1
dx over statistics that processes share                backward_apply                              3
=====================================================  ==========================================  ================

plus 1/8 byte an element for the mask and float64 workspaces of a few values a program.

**Accuracy.** Elements are float32 (float64 for float64); up to eight of them are summed in that type, all else in
float64. Statistics are taken about the channel's first element, then about the tile's mean, and merged by Chan's
formula: an offset of x costs no digits, and a constant channel has mean = that constant and variance = 0 exactly. What
multiplies or is subtracted from every element (mean, γ·r, dβ/m) comes in two parts, high and low, so that its rounding
does not add up. Squares are scaled by the largest magnitude of the tile's channel, so that neither those of 1e−25 nor
those of 1e25 leave float32: one more reduction a tile.

**Determinism.** No atomics: partial sums go to a workspace and every reader merges them in one fixed order, so results
are the same bits from run to run, whatever order programs run in.

**Memory safety.** Every load and store of a tensor is masked to its extent; offsets are 64 bits wide.

Scalars: ε and the bounds of the norm are annotated ``tl.float64``: unannotated Python floats arrive as float32, a
tensor would cost a copy to the device, and a constexpr a compilation for each value.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activations, tuning
from .launching import on_device

__all__ = ["INTERPRETED", "Shape", "backward", "forward", "input_gradient", "moments"]

#: Whether the kernels of this process run in Triton's interpreter: fixed by TRITON_INTERPRET when triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Rows of the workspace of sums, float64 (row, split, channel).
_DZ = tl.constexpr(0)
_DZ_XHAT = tl.constexpr(1)
_DZ_SQ = tl.constexpr(2)
_SLOPE = tl.constexpr(3)
_NUM_SUMS = 4
# Rows of the workspace of tallies, float64 (row, program); named as in the record.
_TALLY_DY_SQ = tl.constexpr(0)
_TALLY_DZ_SQ = tl.constexpr(1)
_TALLY_DX_SQ = tl.constexpr(2)
_TALLY_DEAD = tl.constexpr(3)
_TALLY_NONFINITE = tl.constexpr(4)
_NUM_TALLIES = 5

# backward_finish is one program: its blocks are 16 splits × 64 channels, and 1024 programs' tallies.
_FINISH_CHANNELS = 64
_FINISH_PROGRAMS = 1024

# Where the closed form of ‖dx‖² keeps less than this part of Σdz², it has lost more than one digit of its seven.
_CANCELLATION = tl.constexpr(0.1)


# -- geometry ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(num_channels, num_tiles, tiles_per_split, CHANNELS: tl.constexpr):
    """This program's channels (the first; all; which exist), its split, and the range of its tiles."""
    num_blocks = (num_channels + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    first_channel = (program % num_blocks) * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    split = program // num_blocks
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    return first_channel, channel, channel < num_channels, split, first, last


@triton.jit
def _tile(
    tile, first_channel, num_outer, num_channels, inner_size,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Where tile number ``tile`` lies: ``run``, ``start``, ``exists``, ``offset``, ``inside``.

    A run is ``inner_size`` neighbouring elements: a row's C channels, or a plane's S elements. Element (i, j) of the
    (RUNS, INNER) tile is number ``start + j`` of run ``run[i]``, if that exists; ``offset`` and ``inside`` are its
    place in memory and whether it has one. In planes, CHANNELS neighbouring runs belong to one sample. All in int64.
    """
    tile = tl.cast(tile, tl.int64)
    if ROWS:
        start = tl.cast(first_channel, tl.int64)
        run = tile * RUNS + tl.arange(0, RUNS)
        exists = run < num_outer
    else:
        tiles_per_run = (inner_size + INNER - 1) // INNER
        start = (tile % tiles_per_run) * INNER
        outer = (tile // tiles_per_run) * (RUNS // CHANNELS) + tl.arange(0, RUNS) // CHANNELS
        channel = first_channel + tl.arange(0, RUNS) % CHANNELS
        run = outer * num_channels + channel
        exists = (outer < num_outer) & (channel < num_channels)
    inner = start + tl.arange(0, INNER)
    inside = exists[:, None] & (inner < inner_size)[None, :]
    return run, start, exists, run[:, None] * inner_size + inner[None, :], inside


@triton.jit
def _spread(values, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Per-channel values in the elements' type, shaped so that they broadcast over a tile."""
    CHANNELS: tl.constexpr = values.shape[0]
    values = values.to(COMPUTE)
    if ROWS:
        return values[None, :]
    elif CHANNELS == 1:
        return values[:, None]
    else:
        return tl.reshape(tl.broadcast_to(values[None, :], [RUNS // CHANNELS, CHANNELS]), [RUNS])[:, None]


# -- memory ------------------------------------------------------------------------------------------------------------


@triton.jit
def _store(ptr, value, inside):
    """Store rounded to nearest even. The interpreter truncates float32 to bfloat16: there, bits are rounded first."""
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(ptr, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channel_values(ptr, channel, present, STRIDE: tl.constexpr, DEFAULT: tl.constexpr):
    """A (CHANNELS,) float64 block of a per-channel tensor, or of DEFAULT where there is none."""
    if ptr is None:
        return tl.full(channel.shape, DEFAULT, tl.float64)
    else:
        return tl.load(ptr + channel * STRIDE, mask=present, other=0.0).to(tl.float64)


@triton.jit
def _mask_bytes(run, start, exists, inner_size, INNER: tl.constexpr):
    """Offsets and existence of the (RUNS, INNER / 8) bytes of the mask that belong to a tile."""
    bytes_per_run = (inner_size + 7) // 8
    byte = start // 8 + tl.arange(0, INNER // 8)
    return run[:, None] * bytes_per_run + byte[None, :], exists[:, None] & (byte < bytes_per_run)[None, :]


@triton.jit
def _store_bits(mask_ptr, bits, run, start, exists, inner_size, RUNS: tl.constexpr, INNER: tl.constexpr):
    """Pack a (RUNS, INNER) block of booleans, eight neighbours of a run a byte, lowest bit first."""
    offset, inside = _mask_bytes(run, start, exists, inner_size, INNER)
    eights = tl.reshape(bits.to(tl.int32), [RUNS, INNER // 8, 8])
    packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2)
    tl.store(mask_ptr + offset, packed.to(tl.uint8), mask=inside)


@triton.jit
def _load_bits(mask_ptr, run, start, exists, inner_size, RUNS: tl.constexpr, INNER: tl.constexpr):
    offset, inside = _mask_bytes(run, start, exists, inner_size, INNER)
    packed = tl.load(mask_ptr + offset, mask=inside, other=0).to(tl.int32)
    eights = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, [RUNS, INNER]) != 0


@triton.jit
def _store_sum(sums_ptr, row, values, channel, present, split, num_splits, num_channels):
    """Write (CHANNELS,) values into a row of a (row, split, channel) workspace."""
    tl.store(sums_ptr + num_channels * (split + num_splits * row) + channel, values, mask=present)


@triton.jit
def _store_tally(tallies_ptr, row, values):
    """Write Σ values of this program into a row of a (row, program) workspace."""
    tl.store(tallies_ptr + tl.num_programs(0) * row + tl.program_id(0), tl.sum(values, axis=0))


# -- reductions --------------------------------------------------------------------------------------------------------


@triton.jit
def _channel_sum(block, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Σ over a tile for each of its channels: (RUNS, INNER) to (CHANNELS,) in float64.

    Of narrower blocks the block's own type adds up eight elements, which lie so far apart in the tile that one thread
    holds them.
    """
    RUNS: tl.constexpr = block.shape[0]
    INNER: tl.constexpr = block.shape[1]
    GROUP: tl.constexpr = 1 if block.dtype == tl.float64 or (ROWS and RUNS < 8) else 8
    if ROWS:
        groups = tl.sum(tl.reshape(block, [GROUP, RUNS // GROUP, CHANNELS]), axis=0)
        return tl.sum(groups.to(tl.float64), axis=0)
    else:
        groups = tl.sum(tl.reshape(block, [RUNS, GROUP, INNER // GROUP]), axis=1)
        runs = tl.sum(groups.to(tl.float64), axis=1)
        return tl.sum(tl.reshape(runs, [RUNS // CHANNELS, CHANNELS]), axis=0)


@triton.jit
def _sum_of_squares(block, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Σ block² for each channel in float64, for channels of any finite magnitude: each is scaled by its largest one.

    A channel with an infinity is not scaled, so that its sum is inf; NaN goes through the product.
    """
    TINY: tl.constexpr = 1e-150 if block.dtype == tl.float64 else 1e-37  # its reciprocal's square is a float64
    RUNS: tl.constexpr = block.shape[0]
    if ROWS:
        largest = tl.max(tl.abs(block), axis=0)
    else:
        largest = tl.max(tl.reshape(tl.max(tl.abs(block), axis=1), [RUNS // CHANNELS, CHANNELS]), axis=0)
    scale = tl.where(largest < float("inf"), 1.0 / tl.where(largest > TINY, largest, TINY), 1.0)
    scaled = block * _spread(scale, block.dtype, ROWS, RUNS)
    scale = scale.to(tl.float64)
    return _channel_sum(scaled * scaled, ROWS, CHANNELS) / (scale * scale)


@triton.jit
def _moments(x, inside, origin, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a tile, for each channel in float64: the count, Σ (x − origin) and Σ (x − the tile's mean)²."""
    RUNS: tl.constexpr = x.shape[0]
    count = _channel_sum(inside.to(tl.int32), ROWS, CHANNELS)
    divisor = tl.where(count > 0, count, 1.0)
    d = tl.where(inside, x - _spread(origin, x.dtype, ROWS, RUNS), 0.0)
    centre = (_channel_sum(d, ROWS, CHANNELS) / divisor).to(x.dtype)
    d = tl.where(inside, d - _spread(centre, x.dtype, ROWS, RUNS), 0.0)
    rest = _channel_sum(d, ROWS, CHANNELS)  # what rounding left; NaN beside an infinite centre, which then rules
    rest = tl.where(rest == rest, rest, 0.0)
    squares = _sum_of_squares(d, ROWS, CHANNELS) - rest * rest / divisor
    return count, count * centre.to(tl.float64) + rest, squares


@triton.jit
def _merge(sums_ptr, row, channel, present, num_splits, num_channels, SPLITS: tl.constexpr):
    """Σ over splits of one row of a (row, split, channel) workspace, SPLITS at a time, always in the same order."""
    total = tl.zeros(channel.shape, tl.float64)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        offset = (split[:, None] + num_splits * row) * num_channels + channel[None, :]
        inside = (split < num_splits)[:, None] & present[None, :]
        total += tl.sum(tl.load(sums_ptr + offset, mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def _merge_squares(partials_ptr, mean, channel, present, num_splits, num_channels, SPLITS: tl.constexpr):
    """Σ (x − mean)² of each channel from its splits' moments: Σ_i (M2_i + n_i·(mean_i − mean)²), Chan et al. 1979."""
    total = tl.zeros(channel.shape, tl.float64)
    row = num_splits * num_channels
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        offset = split[:, None] * num_channels + channel[None, :]
        inside = (split < num_splits)[:, None] & present[None, :]
        count = tl.load(partials_ptr + offset, mask=inside, other=1.0)
        part = tl.load(partials_ptr + row + offset, mask=inside, other=0.0)
        squares = tl.load(partials_ptr + 2 * row + offset, mask=inside, other=0.0)
        delta = part / count - mean[None, :]
        total += tl.sum(tl.where(inside, squares + count * delta * delta, 0.0), axis=0)
    return total


# -- pieces of the mathematics -----------------------------------------------------------------------------------------


@triton.jit
def _origin(x_ptr, channel, present, inner_size, ROWS: tl.constexpr, COMPUTE: tl.constexpr):
    """Each channel's first element, 0 where that is not finite."""
    offset = channel.to(tl.int64)
    if not ROWS:
        offset = offset * inner_size
    value = tl.load(x_ptr + offset, mask=present, other=0.0).to(COMPUTE)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, unbiased):
    tl.store(statistics_ptr + channel, mean, mask=present)
    tl.store(statistics_ptr + num_channels + channel, rstd, mask=present)
    tl.store(statistics_ptr + 2 * num_channels + channel, unbiased, mask=present)


@triton.jit
def _split(values, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Per-channel float64 values as two operands of a tile whose sum they are."""
    hi = values.to(COMPUTE).to(tl.float64)
    return _spread(hi, COMPUTE, ROWS, RUNS), _spread(values - hi, COMPUTE, ROWS, RUNS)


@triton.jit
def _affine(mean, scale, bias, slope, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Per-channel float64 values as operands of a tile: mean and scale in two parts each, bias, slope."""
    mean_hi, mean_lo = _split(mean, COMPUTE, ROWS, RUNS)
    scale_hi, scale_lo = _split(scale, COMPUTE, ROWS, RUNS)
    return mean_hi, mean_lo, scale_hi, scale_lo, _spread(bias, COMPUTE, ROWS, RUNS), _spread(slope, COMPUTE, ROWS, RUNS)


@triton.jit
def _pre_activation(x, affine, residual_ptr, offset, inside, NORMALISE: tl.constexpr):
    """z = (x − mean)·scale + bias + residual, and x − mean. Forward and backward share its order of rounding.

    Where x is the mean, z is bias + residual to the bit.
    """
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(x.dtype)
    if NORMALISE:
        mean_hi, mean_lo, scale_hi, scale_lo, shift, _ = affine
        centred = (x - mean_hi) - mean_lo
        if residual_ptr is not None:
            shift = shift + residual
        # The low part is no business of an infinite x: inf·scale_lo may be −inf or NaN.
        shift = tl.fma(tl.where(tl.abs(centred) < float("inf"), centred, 0.0), scale_lo, shift)
        return tl.fma(centred, scale_hi, shift), centred
    elif residual_ptr is not None:
        return x + residual, x
    else:
        return x, x


@triton.jit
def _activate(
    x, y_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
    NORMALISE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
):  # fmt: skip
    """The forward of one tile: y and, where asked, the bits of the mask."""
    z, _ = _pre_activation(x, affine, residual_ptr, offset, inside, NORMALISE)
    _store(y_ptr + offset, FORWARD(z, affine[5], ARGS), inside)
    if mask_ptr is not None:
        _store_bits(mask_ptr, ON(z, ARGS) & inside, run, start, exists, inner_size, x.shape[0], x.shape[1])


@triton.jit
def _differentiate(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
    NORMALISE: tl.constexpr, READS_Z: tl.constexpr, READS_X: tl.constexpr, COUNT_DEAD: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The backward of one tile up to dz: dy, dz, x, x − mean, z, and which elements are dead.

    x is read where z or READS_X asks for it; what was not asked for comes back as dy, unused.
    """
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
    x = dy
    z = dy
    centred = dy
    if READS_Z or READS_X:
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        z, centred = _pre_activation(x, affine, residual_ptr if READS_Z else None, offset, inside, NORMALISE)
    if mask_ptr is not None:
        state = _load_bits(mask_ptr, run, start, exists, inner_size, dy.shape[0], dy.shape[1])
    elif ON is not None:
        state = ON(z, ARGS)
    else:
        state = z
    dz = tl.where(inside, BACKWARD(dy, state, affine[5], ARGS), 0.0)
    if COUNT_DEAD:
        dead = (BACKWARD(tl.full(dy.shape, 1.0, COMPUTE), state, affine[5], ARGS) == 0) & inside
    else:
        dead = inside
    return dy, dz, x, centred, z, dead


@triton.jit
def _parameter_sums(
    dy, dz, x, mean, z, inside,
    NEEDS_XHAT: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σdz, Σdz·(x − mean) and the slope's gradient of one tile for each channel; 0 for what is not needed.

    All in float64 from the first product on. In float32 the terms' rounding reached four units in the last place of
    a sum of 4650 of them. The price: two conversions and three operations an element, at half the rate of
    float32 on data-centre GPUs and at 1/64 on others.
    """
    wide = dz.to(tl.float64)
    dz_total = _channel_sum(wide, ROWS, CHANNELS)
    dz_centred = tl.zeros([CHANNELS], tl.float64)
    dslope = tl.zeros([CHANNELS], tl.float64)
    if NEEDS_XHAT:
        distance = x.to(tl.float64) - _spread(mean, tl.float64, ROWS, x.shape[0])
        dz_centred = _channel_sum(tl.where(inside, wide * distance, 0.0), ROWS, CHANNELS)
    if WEIGHT_BACKWARD is not None:
        share = WEIGHT_BACKWARD(dy.to(tl.float64), z.to(tl.float64))
        dslope = _channel_sum(tl.where(inside, share, 0.0), ROWS, CHANNELS)
    return dz_total, dz_centred, dslope


@triton.jit
def _gradient_terms(
    mean_dz, mean_dz_xhat, gain, rstd, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """The operands of ``_input_gradient``, from per-channel float64 values: dβ/m and γ·r in two parts each, and r and
    γ·r·r·dγ/m, of which a power of two goes to the former, so that neither leaves float32."""
    power = _power_of_two(rstd)
    mean_hi, mean_lo = _split(mean_dz, COMPUTE, ROWS, RUNS)
    gain_hi, gain_lo = _split(gain, COMPUTE, ROWS, RUNS)
    slope = _spread(gain * mean_dz_xhat * (rstd / power), COMPUTE, ROWS, RUNS)
    return mean_hi, mean_lo, gain_hi, gain_lo, _spread(power, COMPUTE, ROWS, RUNS), slope


@triton.jit
def _input_gradient(dz, centred, terms):
    """dx = γ·r·(dz − dβ/m) − γ·r·x̂·dγ/m of one tile: one rounding beyond the result's own, and 0 for a constant dz."""
    mean_hi, mean_lo, gain_hi, gain_lo, power, slope = terms
    d = (dz - mean_hi) - mean_lo
    return tl.fma(d, gain_hi, tl.fma(d, gain_lo, -(centred * power) * slope))


@triton.jit
def _power_of_two(values):
    """The powers of two just below positive float64 values: their mantissas cleared."""
    bits = values.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return bits.to(tl.float64, bitcast=True)


# -- forward -----------------------------------------------------------------------------------------------------------

_UNSPECIALISED = ["num_outer", "num_tiles", "tiles_per_split", "num_splits", "channel_size"]  # counts: not alignments


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_statistics_kernel(
    x_ptr, partials_ptr, num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial moments of every channel: float64 (3, num_splits, num_channels) of n, Σ(x − first) and Σ(x − mean_i)².

    Reads x: 1 u. Tiles are merged in order by Chan's update, in float64.
    """
    first_channel, channel, present, split, first, last = _program(num_channels, num_tiles, tiles_per_split, CHANNELS)
    origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
    count = tl.zeros([CHANNELS], tl.float64)
    total = tl.zeros([CHANNELS], tl.float64)
    squares = tl.zeros([CHANNELS], tl.float64)
    for tile in range(first, last):
        _, _, _, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
        )
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        n, part, part_squares = _moments(x, inside, origin, ROWS, CHANNELS)
        divisor = tl.where(n > 0, n, 1.0)  # 0 in the lanes of channels that do not exist
        delta = part / divisor - total / tl.where(count > 0, count, 1.0)
        squares += part_squares + delta * delta * (count * n / (count + divisor))
        count += n
        total += part
    _store_sum(partials_ptr, 0, count, channel, present, split, num_splits, num_channels)
    _store_sum(partials_ptr, 1, total, channel, present, split, num_splits, num_channels)
    _store_sum(partials_ptr, 2, squares, channel, present, split, num_splits, num_channels)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, slope_ptr, partials_ptr,
    y_ptr, statistics_ptr, mask_ptr, eps: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y = φ(γ·x̂ + β + residual), from partial moments, from running statistics, or without normalisation.

    Reads x and residual, writes y: 3 u (2 without residual), and the mask. Each program merges the moments of its own
    channels; the first split's programs write statistics, float64 (3, C): mean, rstd, unbiased variance.
    """
    NORMALISE: tl.constexpr = statistics_ptr is not None
    first_channel, channel, present, split, first, last = _program(num_channels, num_tiles, tiles_per_split, CHANNELS)
    scale = _channel_values(weight_ptr, channel, present, 1, 1.0)
    bias = _channel_values(bias_ptr, channel, present, 1, 0.0)
    slope = _channel_values(slope_ptr, channel, present, SLOPE_STRIDE, 0.0)
    mean = bias
    if NORMALISE:
        if partials_ptr is not None:
            origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE).to(tl.float64)
            part = _merge(partials_ptr, 1, channel, present, num_splits, num_channels, SPLITS) / channel_size
            squares = _merge_squares(partials_ptr, part, channel, present, num_splits, num_channels, SPLITS)
            mean = origin + part
            variance = squares / channel_size
            unbiased = squares / (channel_size - 1)
        else:
            mean = _channel_values(running_mean_ptr, channel, present, 1, 0.0)
            variance = _channel_values(running_var_ptr, channel, present, 1, 1.0)
            unbiased = tl.full([CHANNELS], float("nan"), tl.float64)
        rstd = 1.0 / tl.sqrt(variance + eps)
        scale = scale * rstd
        if split == 0:
            _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, unbiased)
    affine = _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS)
    for tile in range(first, last):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
        )
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
        _activate(
            x, y_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            NORMALISE, FORWARD, ON, ARGS,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_channel_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, slope_ptr, y_ptr, statistics_ptr, mask_ptr, eps: tl.float64,
    num_outer, num_channels, inner_size, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics and y in one pass, for channels that fit a program's registers: one tile holds all their elements.

    Reads x and residual, writes y: 3 u (2 without residual), and the mask.
    """
    first_channel, channel, present, _, _, _ = _program(num_channels, 1, 1, CHANNELS)
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
    )
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
    origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
    _, total, squares = _moments(x, inside, origin, ROWS, CHANNELS)
    mean = origin.to(tl.float64) + total / channel_size
    rstd = 1.0 / tl.sqrt(squares / channel_size + eps)
    _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, squares / (channel_size - 1))
    scale = _channel_values(weight_ptr, channel, present, 1, 1.0) * rstd
    bias = _channel_values(bias_ptr, channel, present, 1, 0.0)
    slope = _channel_values(slope_ptr, channel, present, SLOPE_STRIDE, 0.0)
    _activate(
        x, y_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size,
        _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS), True, FORWARD, ON, ARGS,
    )  # fmt: skip


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _saved(
    statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """What a backward needs of its channels: the operands of ``_pre_activation``; mean, r and γ·r in float64."""
    weight = _channel_values(weight_ptr, channel, present, 1, 1.0)
    bias = _channel_values(bias_ptr, channel, present, 1, 0.0)
    slope = _channel_values(slope_ptr, channel, present, SLOPE_STRIDE, 0.0)
    if statistics_ptr is None:
        mean = tl.zeros(channel.shape, tl.float64)
        rstd = mean + 1.0
    else:
        mean = tl.load(statistics_ptr + channel, mask=present, other=0.0)
        rstd = tl.load(statistics_ptr + num_channels + channel, mask=present, other=1.0)
    scale = weight * rstd
    return _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS), mean, rstd, scale


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
    factor_ptr, dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    DX_IS_SCALED_DZ: tl.constexpr, NEEDS_XHAT: tl.constexpr, READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients and, where statistics do not depend on x, dx = γ·r·dz·factor in the same pass.

    Reads dy, x (or the mask alone) and writes what is wanted: 1 to 5 u. ``sums``: float64 (4, num_splits, C) of Σdz,
    Σdz·x̂, Σdz² and the slope's gradient; ``tallies``: float64 (5, programs), see ``_TALLY_*``. Either may be None.
    ``DX_IS_SCALED_DZ``: that is the whole of dx, so its norm is known; else its tally is the next pass's.
    """
    first_channel, channel, present, split, first, last = _program(num_channels, num_tiles, tiles_per_split, CHANNELS)
    affine, mean, rstd, scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    if factor_ptr is not None:
        gain = _spread(scale * tl.load(factor_ptr), COMPUTE, ROWS, RUNS)
    else:
        gain = affine[2]

    dz_total = tl.zeros([CHANNELS], tl.float64)
    dz_centred = tl.zeros([CHANNELS], tl.float64)
    dz_sq = tl.zeros([CHANNELS], tl.float64)
    dy_sq = tl.zeros([CHANNELS], tl.float64)
    dslope = tl.zeros([CHANNELS], tl.float64)
    dead_count = tl.zeros([CHANNELS], tl.float64)
    nonfinite = tl.zeros([CHANNELS], tl.float64)
    for tile in range(first, last):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
        )
        dy, dz, x, _, z, dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            statistics_ptr is not None, READS_Z, NEEDS_XHAT, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        if dx_ptr is not None:
            _store(dx_ptr + offset, dz * gain, inside)
        if dresidual_ptr is not None:
            _store(dresidual_ptr + offset, dz, inside)
        if sums_ptr is not None:
            parts = _parameter_sums(dy, dz, x, mean, z, inside, NEEDS_XHAT, WEIGHT_BACKWARD, ROWS, CHANNELS)
            dz_total += parts[0]
            dz_centred += parts[1]
            dslope += parts[2]
        if tallies_ptr is not None:
            dz_sq += _sum_of_squares(dz, ROWS, CHANNELS)
            dy_sq += _sum_of_squares(dy, ROWS, CHANNELS)
            dead_count += _channel_sum(dead.to(tl.int32), ROWS, CHANNELS)
            finite = tl.abs(dy) < float("inf")
            nonfinite += _channel_sum((inside & (finite == 0)).to(tl.int32), ROWS, CHANNELS)

    if sums_ptr is not None:
        _store_sum(sums_ptr, _DZ, dz_total, channel, present, split, num_splits, num_channels)
        _store_sum(sums_ptr, _DZ_XHAT, dz_centred * rstd, channel, present, split, num_splits, num_channels)
        _store_sum(sums_ptr, _DZ_SQ, dz_sq, channel, present, split, num_splits, num_channels)
        _store_sum(sums_ptr, _SLOPE, dslope, channel, present, split, num_splits, num_channels)
    if tallies_ptr is not None:
        _store_tally(tallies_ptr, _TALLY_DY_SQ, dy_sq)
        _store_tally(tallies_ptr, _TALLY_DZ_SQ, dz_sq)
        if DX_IS_SCALED_DZ:
            _store_tally(tallies_ptr, _TALLY_DX_SQ, dz_sq * scale * scale)
        _store_tally(tallies_ptr, _TALLY_DEAD, dead_count)
        _store_tally(tallies_ptr, _TALLY_NONFINITE, nonfinite)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
    factor_ptr, dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr, eps: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx over the batch's statistics, from the sums of ``backward_reduce``; and ‖dx‖² where ``tallies_ptr`` is given.

    Reads dy, x (and the mask), writes dx and dresidual: 4 u + the mask. The norm is the closed form, told by the first
    split's programs, except for channels where that cancels: theirs is summed up from dx itself, by every program.
    Where neither dx nor dresidual is wanted, programs whose channels do not cancel read no tensor.
    """
    first_channel, channel, present, split, first, last = _program(num_channels, num_tiles, tiles_per_split, CHANNELS)
    affine, _mean, rstd, scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    mean_dz = _merge(sums_ptr, _DZ, channel, present, num_splits, num_channels, SPLITS) / channel_size
    mean_dz_xhat = _merge(sums_ptr, _DZ_XHAT, channel, present, num_splits, num_channels, SPLITS) / channel_size
    gain = scale
    if factor_ptr is not None:
        gain = scale * tl.load(factor_ptr)
    terms = _gradient_terms(mean_dz, mean_dz_xhat, gain, rstd, COMPUTE, ROWS, RUNS)

    dx_sq = tl.zeros([CHANNELS], tl.float64)
    cancels = channel < 0
    any_cancels = split < 0
    if tallies_ptr is not None:
        dz_sq = _merge(sums_ptr, _DZ_SQ, channel, present, num_splits, num_channels, SPLITS)
        kappa = 1.0 - rstd * rstd * eps
        closed = dz_sq - (mean_dz * mean_dz + (2.0 - kappa) * mean_dz_xhat * mean_dz_xhat) * channel_size
        cancels = present & ((closed > dz_sq * _CANCELLATION) == 0)  # NaN counts as cancelling
        any_cancels = tl.sum(cancels.to(tl.int32), axis=0) > 0
        if split == 0:
            dx_sq = tl.where(present & (cancels == 0), scale * scale * closed, 0.0)
        if dx_ptr is None and dresidual_ptr is None:
            if any_cancels == 0:
                last = first
    for tile in range(first, last):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
        )
        _dy, dz, _x, centred, _z, _dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            True, READS_Z, True, False, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        dx = _input_gradient(dz, centred, terms)
        if dx_ptr is not None:
            _store(dx_ptr + offset, dx, inside)
        if dresidual_ptr is not None:
            _store(dresidual_ptr + offset, dz, inside)
        if tallies_ptr is not None:
            if any_cancels:
                dx_sq += tl.where(cancels, _sum_of_squares(tl.where(inside, dx, 0.0), ROWS, CHANNELS), 0.0)
    if tallies_ptr is not None:
        _store_tally(tallies_ptr, _TALLY_DX_SQ, dx_sq)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_channel_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
    dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, channel_size,
    READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All of the backward over the batch's statistics in one pass, for channels that fit a program's registers.

    Reads dy, x (and the mask), writes dx and dresidual: 4 u + the mask. Sums and tallies as ``backward_reduce``, with
    one split; ‖dx‖² is summed up from dx itself.
    """
    first_channel, channel, present, _, _, _ = _program(num_channels, 1, 1, CHANNELS)
    affine, mean, rstd, scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS
    )
    dy, dz, x, centred, z, dead = _differentiate(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
        True, READS_Z, True, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
    )  # fmt: skip
    dz_total, dz_centred, dslope = _parameter_sums(dy, dz, x, mean, z, inside, True, WEIGHT_BACKWARD, ROWS, CHANNELS)
    dz_xhat = dz_centred * rstd
    terms = _gradient_terms(dz_total / channel_size, dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)
    dx = _input_gradient(dz, centred, terms)
    if dx_ptr is not None:
        _store(dx_ptr + offset, dx, inside)
    if dresidual_ptr is not None:
        _store(dresidual_ptr + offset, dz, inside)
    _store_sum(sums_ptr, _DZ, dz_total, channel, present, 0, 1, num_channels)
    _store_sum(sums_ptr, _DZ_XHAT, dz_xhat, channel, present, 0, 1, num_channels)
    if WEIGHT_BACKWARD is not None:
        _store_sum(sums_ptr, _SLOPE, dslope, channel, present, 0, 1, num_channels)
    if tallies_ptr is not None:
        finite = tl.abs(dy) < float("inf")
        nonfinite = _channel_sum((inside & (finite == 0)).to(tl.int32), ROWS, CHANNELS)
        _store_tally(tallies_ptr, _TALLY_DY_SQ, _sum_of_squares(dy, ROWS, CHANNELS))
        _store_tally(tallies_ptr, _TALLY_DZ_SQ, _sum_of_squares(dz, ROWS, CHANNELS))
        _store_tally(tallies_ptr, _TALLY_DX_SQ, _sum_of_squares(tl.where(inside, dx, 0.0), ROWS, CHANNELS))
        _store_tally(tallies_ptr, _TALLY_DEAD, _channel_sum(dead.to(tl.int32), ROWS, CHANNELS))
        _store_tally(tallies_ptr, _TALLY_NONFINITE, nonfinite)


@triton.jit
def _total(tallies_ptr, row, num_programs, PROGRAMS: tl.constexpr):
    """Σ over programs of one row of the tallies, a (1,) block."""
    total = tl.zeros([PROGRAMS], tl.float64)
    for first in range(0, num_programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += tl.load(tallies_ptr + num_programs * row + program, mask=program < num_programs, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def _save_gradient(ptr, sums_ptr, row, channel, present, num_splits, num_channels, SPLITS: tl.constexpr):
    """Merge a parameter's gradient, write it where it is wanted, and return its square, (1,)."""
    total = _merge(sums_ptr, row, channel, present, num_splits, num_channels, SPLITS)
    if ptr is not None:
        _store(ptr + channel, total, present)
    return tl.sum(total * total, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["num_channels", "num_splits", "num_programs", "num_elements"])
def backward_finish_kernel(
    sums_ptr, tallies_ptr, dweight_ptr, dbias_ptr, dslope_ptr, record_ptr, factor_ptr,
    min_norm: tl.float64, max_norm: tl.float64, num_channels, num_splits, num_programs, num_elements,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED_SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One program: merge the parameters' gradients, the record (float64 (9,)) and the factor that bounds ‖dx‖.

    It reads the workspaces, a few kilobytes, and no tensor: 0 u. Any output may be None. The factor is 1 for a norm
    that is zero or not finite.
    """
    one = tl.arange(0, 1)
    dweight_sq = tl.zeros([1], tl.float64)
    dbias_sq = tl.zeros([1], tl.float64)
    shared_slope = tl.zeros([1], tl.float64)
    if sums_ptr is not None:
        for first in range(0, num_channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            present = channel < num_channels
            if HAS_WEIGHT:
                dweight_sq += _save_gradient(
                    dweight_ptr, sums_ptr, _DZ_XHAT, channel, present, num_splits, num_channels, SPLITS
                )
            if HAS_BIAS:
                dbias_sq += _save_gradient(dbias_ptr, sums_ptr, _DZ, channel, present, num_splits, num_channels, SPLITS)
            if SHARED_SLOPE:
                slopes = _merge(sums_ptr, _SLOPE, channel, present, num_splits, num_channels, SPLITS)
                shared_slope += tl.sum(slopes, axis=0, keep_dims=True)
            elif dslope_ptr is not None:
                _save_gradient(dslope_ptr, sums_ptr, _SLOPE, channel, present, num_splits, num_channels, SPLITS)
    if SHARED_SLOPE:
        _store(dslope_ptr + one, shared_slope, one == 0)
    if tallies_ptr is not None:
        dx_sq = _total(tallies_ptr, _TALLY_DX_SQ, num_programs, PROGRAMS)
        if factor_ptr is not None:
            norm = tl.sqrt(dx_sq)
            bound = tl.where(norm < min_norm, tl.full([1], min_norm, tl.float64), norm)
            bound = tl.where(norm > max_norm, tl.full([1], max_norm, tl.float64), bound)
            bounded = (norm > 0) & (norm < float("inf"))
            factor = tl.where(bounded, bound / tl.where(bounded, norm, 1.0), 1.0)
            tl.store(factor_ptr + one, factor)
            dx_sq *= factor * factor
        if record_ptr is not None:
            tl.store(record_ptr + one, _total(tallies_ptr, _TALLY_DY_SQ, num_programs, PROGRAMS))
            tl.store(record_ptr + 1 + one, _total(tallies_ptr, _TALLY_DZ_SQ, num_programs, PROGRAMS))
            tl.store(record_ptr + 2 + one, dx_sq)
            tl.store(record_ptr + 3 + one, dweight_sq)
            tl.store(record_ptr + 4 + one, dbias_sq)
            tl.store(record_ptr + 5 + one, _total(tallies_ptr, _TALLY_DEAD, num_programs, PROGRAMS))
            tl.store(record_ptr + 6 + one, _total(tallies_ptr, _TALLY_NONFINITE, num_programs, PROGRAMS))
            tl.store(record_ptr + 7 + one, tl.full([1], num_elements, tl.float64))
            tl.store(record_ptr + 8 + one, tl.full([1], 1, tl.float64))


# -- launchers ---------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """How a kernel sees a tensor: ``num_outer`` × ``num_channels`` × ``inner_size``.

    Planes (contiguous): N, C, S. Rows (channels_last): N·S, C, C: the inner axis is the channel axis.
    """

    rows: bool
    num_outer: int
    num_channels: int
    inner_size: int

    @property
    def channel_size(self) -> int:
        return self.num_outer if self.rows else self.num_outer * self.inner_size


def _cut(x: Tensor, shape: Shape, live: int) -> tuning.Blocks:
    width = 0 if INTERPRETED else x.element_size()
    return tuning.choose(shape.rows, width, shape.num_outer, shape.num_channels, shape.inner_size, live)


def _common(x: Tensor, shape: Shape, blocks: tuning.Blocks) -> dict[str, Any]:
    """What every kernel over elements takes beside its tensors. Contraction is off: it is written out as tl.fma."""
    return {
        "ROWS": shape.rows,
        "RUNS": blocks.runs,
        "INNER": blocks.inner,
        "CHANNELS": blocks.channels,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": blocks.num_warps,
        "enable_fp_fusion": False,
    }


def _slope_stride(activation_weight: Tensor | None) -> int:
    return 0 if activation_weight is None or activation_weight.numel() == 1 else 1


def _splits_at_once(num_splits: int) -> int:
    """How many splits a merge reads at once: with 32 channels 512 float64 values, a few a thread."""
    return min(tuning.power_of_two(num_splits), 16)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation_weight: Tensor | None,
    y: Tensor,
    statistics: Tensor | None,
    mask: Tensor | None,
    *,
    shape: Shape,
    eps: float,
    activation: str,
    activation_args: tuple[float, ...],
) -> None:
    """Fill ``y`` and, where given, ``statistics`` (float64 (3, C)) and ``mask`` (uint8, one bit an element).

    Normalises by the running statistics if they are given, else by the batch's if ``statistics`` is, else not at all.
    Tensors of x's size lie in memory as x does; parameters are contiguous.
    """
    functions = activations.TABLE[activation]
    over_batch = statistics is not None and running_mean is None
    blocks = _cut(x, shape, live=1 if over_batch else 0)
    grid = (blocks.programs,)
    sizes = shape.num_outer, shape.num_channels, shape.inner_size
    cut = blocks.num_tiles, blocks.tiles_per_split, blocks.num_splits
    common = _common(x, shape, blocks)
    epilogue = {
        "SLOPE_STRIDE": _slope_stride(activation_weight),
        "FORWARD": functions.forward,
        "ON": functions.on if mask is not None else None,
        "ARGS": activation_args,
    }
    with on_device(x.device):
        if over_batch and blocks.resident:
            forward_channel_kernel[grid](
                x, residual, weight, bias, activation_weight, y, statistics, mask, eps, *sizes, shape.channel_size,
                **epilogue, **common,
            )  # fmt: skip
            return
        partials = None
        if over_batch:
            partials = x.new_empty((3, blocks.num_splits, shape.num_channels), dtype=torch.float64)
            forward_statistics_kernel[grid](x, partials, *sizes, *cut, **common)
        forward_apply_kernel[grid](
            x, residual, weight, bias, running_mean, running_var, activation_weight, partials, y, statistics, mask,
            eps, *sizes, *cut, shape.channel_size,
            SPLITS=_splits_at_once(blocks.num_splits), **epilogue, **common,
        )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation_weight: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dactivation_weight: Tensor | None,
    record: Tensor | None,
    *,
    shape: Shape,
    over_batch: bool,
    eps: float,
    activation: str,
    activation_args: tuple[float, ...],
    min_norm: float,
    max_norm: float,
) -> None:
    """Fill the gradients that are not None and, if it is not None, the record (float64 (9,)).

    ``over_batch``: ``statistics`` are those of x itself. The record holds the norms of dx and, where the layer has
    them, of the weight's and the bias's gradients whether those gradients are wanted or not.
    """
    functions = activations.TABLE[activation]
    recorded = record is not None
    norm_wanted = dx is not None or recorded
    bounded = norm_wanted and (min_norm > 0 or max_norm < math.inf)
    through_statistics = over_batch and norm_wanted
    has_weight = dweight is not None or (recorded and weight is not None)
    has_bias = dbias is not None or (recorded and bias is not None)
    parameters = has_weight or has_bias or dactivation_weight is not None
    blocks = _cut(x, shape, live=2 if through_statistics and not bounded else 0)
    grid = (blocks.programs,)
    sizes = shape.num_outer, shape.num_channels, shape.inner_size
    cut = blocks.num_tiles, blocks.tiles_per_split, blocks.num_splits
    splits = _splits_at_once(blocks.num_splits)
    epilogue = {
        "SLOPE_STRIDE": _slope_stride(activation_weight),
        "BACKWARD": functions.backward,
        "ON": functions.on,
        "ARGS": activation_args,
        "READS_Z": mask is None and activation != "identity",
        **_common(x, shape, blocks),
    }
    weight_backward = functions.weight_backward if dactivation_weight is not None else None
    sums = tallies = factor = None
    if through_statistics or parameters:
        sums = x.new_empty((_NUM_SUMS, blocks.num_splits, shape.num_channels), dtype=torch.float64)
    if recorded or bounded:
        tallies = x.new_empty((_NUM_TALLIES, blocks.programs), dtype=torch.float64)
    if bounded:
        factor = x.new_empty((1,), dtype=torch.float64)
    saved = dy, x, residual, mask, statistics, weight, bias, activation_weight

    def reduce(dx, dresidual, sums, tallies, factor=None):
        backward_reduce_kernel[grid](
            *saved, factor, dx, dresidual, sums, tallies, *sizes, *cut,
            DX_IS_SCALED_DZ=not over_batch,
            WEIGHT_BACKWARD=weight_backward if sums is not None else None,
            NEEDS_XHAT=sums is not None and (through_statistics or has_weight), **epilogue,
        )  # fmt: skip

    def apply(dx, dresidual, tallies, factor=None):
        backward_apply_kernel[grid](
            *saved, factor, dx, dresidual, sums, tallies, eps, *sizes, *cut, shape.channel_size,
            SPLITS=splits, **epilogue,
        )  # fmt: skip

    def finish():
        if parameters or tallies is not None:
            backward_finish_kernel[(1,)](
                sums, tallies, dweight, dbias, dactivation_weight, record, factor, min_norm, max_norm,
                shape.num_channels, blocks.num_splits, blocks.programs, x.numel(),
                HAS_WEIGHT=has_weight, HAS_BIAS=has_bias,
                SHARED_SLOPE=dactivation_weight is not None and dactivation_weight.numel() == 1,
                CHANNELS=_FINISH_CHANNELS, SPLITS=splits, PROGRAMS=_FINISH_PROGRAMS,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip

    written = dx is not None or dresidual is not None
    with on_device(x.device):
        if blocks.resident:
            backward_channel_kernel[grid](
                *saved, dx, dresidual, sums, tallies, *sizes, shape.channel_size,
                WEIGHT_BACKWARD=weight_backward, **epilogue,
            )  # fmt: skip
            finish()
        elif through_statistics:
            reduce(None, None, sums, tallies)
            if bounded:
                apply(None, None, tallies)
                finish()
                if written:
                    apply(dx, dresidual, None, factor)
            else:
                apply(dx, dresidual, tallies)
                finish()
        elif bounded:
            reduce(None, None, sums, tallies)
            finish()
            if written:
                reduce(dx, dresidual, None, None, factor)
        else:
            reduce(dx, dresidual, sums, tallies)
            finish()


def moments(x: Tensor, *, shape: Shape) -> Tensor:
    """Of each channel's splits, float64 (3, num_splits, C): the count n, Σ(x − first) and Σ(x − mean)²."""
    blocks = _cut(x, shape, live=0)
    partials = x.new_empty((3, blocks.num_splits, shape.num_channels), dtype=torch.float64)
    with on_device(x.device):
        forward_statistics_kernel[(blocks.programs,)](
            x, partials, shape.num_outer, shape.num_channels, shape.inner_size,
            blocks.num_tiles, blocks.tiles_per_split, blocks.num_splits, **_common(x, shape, blocks),
        )  # fmt: skip
    return partials


def input_gradient(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation_weight: Tensor | None,
    means: Tensor,
    factor: Tensor,
    dx: Tensor,
    *,
    shape: Shape,
    activation: str,
    activation_args: tuple[float, ...],
) -> Tensor:
    """Fill ``dx`` from the means of dz and dz·x̂, float64 (2, C), times ``factor``, (1,); returns ‖dx‖², (1,).

    To ``backward_apply`` they are the sums over one split and a channel of one element; with Σdz² = 0 beside them its
    closed form of the norm is never larger than 0, so that every channel's norm is summed up from dx.
    """
    functions = activations.TABLE[activation]
    blocks = _cut(x, shape, live=0)
    sums = x.new_zeros((_NUM_SUMS, 1, shape.num_channels), dtype=torch.float64)
    sums[:2, 0] = means
    tallies = x.new_empty((_NUM_TALLIES, blocks.programs), dtype=torch.float64)
    with on_device(x.device):
        backward_apply_kernel[(blocks.programs,)](
            dy, x, residual, mask, statistics, weight, bias, activation_weight, factor, dx, None, sums, tallies, 0.0,
            shape.num_outer, shape.num_channels, shape.inner_size, blocks.num_tiles, blocks.tiles_per_split, 1, 1,
            READS_Z=mask is None and activation != "identity", SLOPE_STRIDE=_slope_stride(activation_weight),
            BACKWARD=functions.backward, ON=functions.on, ARGS=activation_args, SPLITS=1,
            **_common(x, shape, blocks),
        )  # fmt: skip
    return tallies[_TALLY_DX_SQ.value].sum().reshape(1)
