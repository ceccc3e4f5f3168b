# ruff: noqa: RET505, SIM102, SIM108 -- a branch on a compile-time constant chooses between programs: both arms stay visible
"""Triton kernels for ``act(batch_norm(x) + residual)`` and its gradients, and the functions that launch them.

The mathematics, for a channel c over its m elements (float64 sums, float32 or float64 elements)::

    μ = mean(x)   σ² = mean((x−μ)²)   r = 1/√(σ²+ε)   x̂ = (x−μ)·r   z = γ·x̂ + β + residual   y = φ(z)
    dz = φ'(z)·dy   dβ = Σ dz   dγ = Σ dz·x̂   dslope = Σ_{z<0} z·dy
    dx = γ·r·(dz − dβ/m − x̂·dγ/m)          over the batch's statistics
    dx = γ·r·dz                            over given statistics, or none (then γ·r = 1)
    ‖dx_c‖² = (γ·r)²·(Σdz² − dβ²/m − (2−κ)·dγ²/m),  κ = 1 − ε·r²

(Ioffe & Szegedy, arXiv 1502.03167; the norm follows from Σx̂ = 0 and Σx̂² = κm.)

Launches, at most two a pass, and memory traffic in u, one read or write of a tensor of x's size, for a residual and a
ReLU-like activation. Of the mask, ``+ mask`` is 1/8 byte an element: 1/32 u in float32, 1/16 in half precision:

=====================================================  ======================================  =========================
pass                                                   kernels                                 u
=====================================================  ======================================  =========================
forward, a channel fits one program                    forward_channel                         3 + mask
forward, otherwise                                     forward_statistics, forward_apply       (1) + (3 + mask)
forward, given statistics or none                      forward_apply                           3 + mask
backward, a channel fits one program                   backward_channel, backward_finish       (4 + mask) + (0)
backward, otherwise                                    backward_reduce, backward_apply         (2 + mask) + (4 + mask)
backward, given statistics or none                     backward_reduce, backward_finish        (3 + mask, + 1 where dγ
                                                                                               is wanted) + (0)
moments alone, for processes to share                  forward_statistics                      1
dx over statistics that processes share                input_gradient                          3 + mask
=====================================================  ======================================  =========================

plus float64 workspaces of a few values a program. Bounds of the norm of dx: ``backward_apply`` has all partial sums
before it writes dx, and so its norm. The passes that write dx in their first launch are followed by ``backward_apply``
in the place of ``backward_finish``; it reads no tensor where the norm is within the bounds, and else writes dx again.

**Accuracy.** Statistics are sums of d and d², in float64, of d = x minus the channel's first element. With that offset
an x of any mean costs no digits, for the element subtracted is one of the sample: Σd² is at most some m times the sum
of squares about the mean, so the variance's relative error is of the order of m·2⁻⁵³ at most. A constant channel has
mean = that constant and variance = 0 exactly. Products of dz are float64 from the start. What multiplies or is
subtracted from every element (mean, γ·r, dβ/m) comes in two parts, high and low, so that its rounding does not add up;
in half precision z's γ·r comes in one, for more shows in no y that is stored.

**The norm of dx** is that of the dx that is written. ``backward_channel`` sums it up as it writes. ``backward_apply``
has it in closed form, from float64 sums of exact products. Of written float32 elements, that form knows all but their
rounding, some 2⁻²⁴ of ‖γ·r·dz‖ all in all: nothing, unless dx is little of dz. Where ‖dx‖² is below 2⁻¹⁰ of ‖γ·r·dz‖²,
one program therefore walks all of dy and x and sums up dx itself, 2 u more beside the others' work and in the same
launch; with bounds it then writes dx too, alone, for the others would need its sum. That is slow, and rare: a gradient
of which batch norm takes out all but 3 %.

**Determinism.** No atomics: partial sums go to a workspace and every reader merges them in one fixed order, so results
are the same bits from run to run, whatever order programs run in.

**Memory safety.** Every load and store of a tensor is masked to its extent; offsets are 64 bits wide.

Scalars: ε and the bounds of the norm are annotated ``tl.float64``: unannotated Python floats arrive as float32, a
tensor would cost a copy to the device, and a constexpr a compilation for each value.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activations, tuning
from .launching import Launch

__all__ = [
    "INTERPRETED", "TENSORS", "Shape", "backward_launches", "forward_launches", "input_gradient_launches",
    "moments_launches", "units",
]  # fmt: skip

#: Whether the kernels of this process run in Triton's interpreter: fixed by TRITON_INTERPRET when triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

#: Threads of a warp: 64 on AMD's data-centre GPUs.
LANES = 64 if torch.version.hip else 32

# Rows of the workspace of sums, float64 (row, split, channel).
_DZ = tl.constexpr(0)
_DZ_XHAT = tl.constexpr(1)
_DZ_SQ = tl.constexpr(2)
_SLOPE = tl.constexpr(3)
_DX_SQ = tl.constexpr(4)
# Rows of the workspace of tallies, float64 (row, program).
_TALLY_DY_SQ = tl.constexpr(0)
_TALLY_DEAD = tl.constexpr(1)
_TALLY_NONFINITE = tl.constexpr(2)
_NUM_TALLIES = 3

# The program that finishes reads this many values of a row of a workspace at once: eight a thread of eight warps.
_FINISH = 2048

# They are of at most this many channels, so that six float64 sums of each take few registers. For sm_90, with 1024
# channels at once backward_apply of halves in rows took 158 in place of 126, with 256 that of float32 in planes of
# 14 × 14 took 122 in place of 64.
_FINISH_CHANNELS = 128

# Elements in a tile of the program that works alone, which is not to take more registers than the others: with 512,
# ptxas spilled backward_apply of halves in planes, with 1024 took 165 in place of 90 registers in rows (sm_90).
_ALONE = 256

# The share of ‖γ·r·dz‖² up to which ‖dx‖² is summed up from dx. What is written has an error of at most some 6·2⁻²⁴ of
# ‖γ·r·dz‖ (the roundings of _input_gradient), by which ‖dx‖, at this share, is off by 1.1e-5 at worst, were every
# rounding in dx's direction; of roundings that are independent, by less than 1e-6.
_CANCELS = tl.constexpr(2.0**-10)


# -- geometry ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(program, num_channels, num_tiles, tiles_per_split, CHANNELS: tl.constexpr):
    """A program's channels (the first; all; which exist), its split, and the range of its tiles."""
    num_blocks = (num_channels + CHANNELS - 1) // CHANNELS
    first_channel = (program % num_blocks) * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    split = program // num_blocks
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    return first_channel, channel, channel < num_channels, split, first, last


@triton.jit
def _tile(
    tile, first_channel, num_outer, num_channels, inner_size,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where tile number ``tile`` lies: ``run``, ``start``, ``exists``, ``offset``, ``inside``.

    A run is ``inner_size`` neighbouring elements: a row's C channels, or a plane's S elements. Element (i, j) of the
    (RUNS, INNER) tile is number ``start + j`` of run ``run[i]``, if that exists; ``offset`` and ``inside`` are its
    place in memory and whether it has one. In planes, CHANNELS neighbouring runs belong to one sample. All in int64.
    ``ALIGN`` divides ``inner_size``, which tells the compiler how wide loads may be: it asks about 16 alone.
    """
    inner_size = inner_size // ALIGN * ALIGN
    if ROWS:
        start = tl.cast(first_channel, tl.int64)
        run = tl.cast(tile, tl.int64) * RUNS + tl.arange(0, RUNS)
        exists = run < num_outer
    else:
        tiles_per_run = (inner_size + INNER - 1) // INNER
        start = tl.cast(tile % tiles_per_run, tl.int64) * INNER
        outer = tl.cast(tile // tiles_per_run, tl.int64) * (RUNS // CHANNELS) + tl.arange(0, RUNS) // CHANNELS
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
def _store_tally(tallies_ptr, row, groups):
    """Write Σ groups of this program into a row of a (row, program) workspace."""
    total = tl.sum(tl.sum(groups.to(tl.float64), axis=1), axis=0)
    tl.store(tallies_ptr + tl.num_programs(0) * row + tl.program_id(0), total)


# -- reductions --------------------------------------------------------------------------------------------------------
#
# A loop over tiles adds up what each thread holds, and threads meet once, after it: a reduction over threads in each
# tile would be a barrier in each tile, with nothing in flight behind it.


@triton.jit
def _groups(block, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """A tile with an axis of GROUP elements of one channel that one thread holds: first in rows, last in planes."""
    RUNS: tl.constexpr = block.shape[0]
    INNER: tl.constexpr = block.shape[1]
    if ROWS:
        return tl.reshape(block, [GROUP, RUNS // GROUP, INNER])
    else:
        return tl.reshape(block, [RUNS, INNER // GROUP, GROUP])


@triton.jit
def _group_sums(block, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Σ over each group of a tile, in the block's type."""
    return tl.sum(_groups(block, ROWS, GROUP), axis=0 if ROWS else 2)


@triton.jit
def _group_squares(block, VECTOR: tl.constexpr):
    """Σ block² over each VECTOR neighbours, float64, to float32's precision and for float32 of any finite magnitude.

    Each group of float32 is scaled by a power of two near its largest, so that its squares neither vanish nor overflow;
    one with an infinity is not, so that its sum is inf; NaN goes through the product.
    """
    groups = _groups(block, False, VECTOR)
    if block.dtype == tl.float64:
        return tl.sum(groups * groups, axis=2)
    else:
        exponent = tl.max(tl.abs(groups), axis=2, keep_dims=True).to(tl.int32, bitcast=True) >> 23
        exponent = tl.where(exponent == 255, 127, tl.minimum(tl.maximum(exponent, 1), 253))
        scaled = groups * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        power = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
        return tl.sum(scaled * scaled, axis=2).to(tl.float64) * tl.sum(power * power, axis=2)


@triton.jit
def _no_sums(DTYPE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
    """Zeros of the shape of ``_group_sums``."""
    if ROWS:
        return tl.zeros([RUNS // GROUP, INNER], DTYPE)
    else:
        return tl.zeros([RUNS, INNER // GROUP], DTYPE)


@triton.jit
def _channel_sums(groups, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Σ over all groups for each channel, (CHANNELS,): where threads meet."""
    RUNS: tl.constexpr = groups.shape[0]
    if ROWS:
        return tl.sum(groups, axis=0)
    else:
        return tl.sum(tl.reshape(tl.sum(groups, axis=1), [RUNS // CHANNELS, CHANNELS]), axis=0)


@triton.jit
def _merge(sums_ptr, row, channel, present, num_splits, num_channels, SPLITS: tl.constexpr):
    """Σ over splits of two neighbouring rows of a (row, split, channel) workspace.

    SPLITS at a time, always in the same order.
    """
    first_total = tl.zeros(channel.shape, tl.float64)
    second_total = tl.zeros(channel.shape, tl.float64)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        offset = (split[:, None] + num_splits * row) * num_channels + channel[None, :]
        inside = (split < num_splits)[:, None] & present[None, :]
        first_total += tl.sum(tl.load(sums_ptr + offset, mask=inside, other=0.0), axis=0)
        second = sums_ptr + num_splits * num_channels + offset
        second_total += tl.sum(tl.load(second, mask=inside, other=0.0), axis=0)
    return first_total, second_total


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
def _moments(x, origin, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Σ (x − origin) and Σ (x − origin)² of each group of a tile, float64; outside the tensor x is the origin."""
    d = x.to(tl.float64) - origin
    return _group_sums(d, ROWS, GROUP), _group_sums(d * d, ROWS, GROUP)


@triton.jit
def _statistics(origin, total, squares, channel_size, eps, statistics_ptr, channel, present, num_channels, save):
    """mean and rstd of each channel from Σ(x − origin) and Σ(x − origin)²; if ``save``, these are written, with the
    unbiased variance."""
    offset = total / channel_size
    squares = squares - total * offset
    squares = tl.where(squares < 0, 0.0, squares)  # not tl.maximum, which drops NaN
    mean = origin.to(tl.float64) + offset
    rstd = 1.0 / tl.sqrt(squares / channel_size + eps)
    if save:
        _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, squares / (channel_size - 1))
    return mean, rstd


@triton.jit
def _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, unbiased):
    tl.store(statistics_ptr + channel, mean, mask=present)
    tl.store(statistics_ptr + num_channels + channel, rstd, mask=present)
    tl.store(statistics_ptr + 2 * num_channels + channel, unbiased, mask=present)


@triton.jit
def _split(values, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Per-channel float64 values as two operands of a tile whose sum they are; of inf and NaN the second is 0."""
    hi = values.to(COMPUTE).to(tl.float64)
    lo = tl.where(tl.abs(hi) < float("inf"), values - hi, 0.0)
    return _spread(hi, COMPUTE, ROWS, RUNS), _spread(lo, COMPUTE, ROWS, RUNS)


@triton.jit
def _affine(mean, scale, bias, slope, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Per-channel float64 values as operands of a tile: mean and scale in two parts each, bias, slope."""
    mean_hi, mean_lo = _split(mean, COMPUTE, ROWS, RUNS)
    scale_hi, scale_lo = _split(scale, COMPUTE, ROWS, RUNS)
    return mean_hi, mean_lo, scale_hi, scale_lo, _spread(bias, COMPUTE, ROWS, RUNS), _spread(slope, COMPUTE, ROWS, RUNS)


@triton.jit
def _low_part(x, difference, mean_hi, mean_lo, scale_hi, scale_lo):
    """(x − mean)·scale less (x − mean_hi, rounded)·scale_hi; 0 for an x of inf or NaN, which have none.

    What the difference lost is had exactly (Knuth's two-sum): of a mean that is no neighbour of x it is as much as z's
    own rounding.
    """
    virtual = difference - x
    lost = (x - (difference - virtual)) - (mean_hi + virtual)
    low = tl.fma(difference, scale_lo, (lost - mean_lo) * scale_hi)
    return tl.where(tl.abs(low) < float("inf"), low, 0.0)


@triton.jit
def _pre_activation(x, affine, residual_ptr, offset, inside, NORMALISE: tl.constexpr):
    """z = (x − mean)·scale + bias + residual, and x − mean, of x as it is stored. Forward and backward share the order.

    Where x is the mean, z is bias + residual to the bit. The residual comes after the product, and low parts last: a
    sum of opposite terms is exact and small, and what was rounded off a larger sum before it would show in z. Not in
    half precision, where z is stored with 8 or 11 bits: there x − mean, rounded twice, is multiplied by scale alone.
    """
    LOW: tl.constexpr = x.dtype.primitive_bitwidth > 16
    x = x.to(affine[0].dtype)
    if NORMALISE:
        mean_hi, mean_lo, scale_hi, scale_lo, shift, _ = affine
        difference = x - mean_hi
        centred = difference - mean_lo
        z = tl.fma(difference if LOW else centred, scale_hi, shift)
    else:
        centred = x
        z = x
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(x.dtype)
    if NORMALISE and LOW:
        z += _low_part(x, difference, mean_hi, mean_lo, scale_hi, scale_lo)
    return z, centred


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
    """The backward of one tile up to dz: dy, dz, x as it is stored, x − mean, z, and which elements are dead.

    x is read where z or READS_X asks for it; what was not asked for comes back as dy, unused.
    """
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
    x = dy
    z = dy
    centred = dy
    if READS_Z or READS_X:
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        z, centred = _pre_activation(x, affine, residual_ptr if READS_Z else None, offset, inside, NORMALISE)
    dz, dead = _derivative(
        dy, z, affine[5], mask_ptr, run, start, exists, inside, inner_size, COUNT_DEAD, BACKWARD, ON, ARGS, COMPUTE
    )
    return dy, dz, x, centred, z, dead


@triton.jit
def _derivative(
    dy, z, slope, mask_ptr, run, start, exists, inside, inner_size,
    COUNT_DEAD: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dz of one tile from dy and the mask, or z; and which elements are dead."""
    if mask_ptr is not None:
        state = _load_bits(mask_ptr, run, start, exists, inner_size, dy.shape[0], dy.shape[1])
    elif ON is not None:
        state = ON(z, ARGS)
    else:
        state = z
    dz = tl.where(inside, BACKWARD(dy, state, slope, ARGS), 0.0)
    if COUNT_DEAD:
        dead = (BACKWARD(tl.full(dy.shape, 1.0, COMPUTE), state, slope, ARGS) == 0) & inside
    else:
        dead = inside
    return dz, dead


@triton.jit
def _gradient_sums(
    dy, dz, x, mean, z,
    NEEDS_XHAT: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Σdz, Σdz·(x − mean), Σdz² and the slope's gradient of each group of a tile; of dz, 0 for what is not needed.

    All in float64 from the first product on. In float32 the terms' rounding reached four units in the last place of a
    sum of 4650 of them, and ‖dx‖² could not be had by subtraction. The price: two conversions and six operations an
    element, at half the rate of float32 on data-centre GPUs and at 1/64 on others.
    """
    wide = dz.to(tl.float64)
    dz_sum = _group_sums(wide, ROWS, GROUP)
    dz_sq = _group_sums(wide * wide, ROWS, GROUP)
    dz_centred = dz_sum
    dslope = dz_sum
    if NEEDS_XHAT:
        dz_centred = _group_sums(wide * (x.to(tl.float64) - mean), ROWS, GROUP)
    if WEIGHT_BACKWARD is not None:  # outside the tensor dy is 0
        dslope = _group_sums(WEIGHT_BACKWARD(dy.to(tl.float64), z.to(tl.float64)), ROWS, GROUP)
    return dz_sum, dz_centred, dz_sq, dslope


@triton.jit
def _save_sums(
    sums_ptr, dz_sum, dz_centred, dz_sq, dslope, rstd, channel, present, split, num_splits, num_channels,
    NEEDS_XHAT: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the sums of this program's channels, 0 for what is not needed; returns Σdz and Σdz·x̂."""
    CHANNELS: tl.constexpr = channel.shape[0]
    dz_total = _channel_sums(dz_sum, ROWS, CHANNELS)
    dz_xhat = tl.zeros([CHANNELS], tl.float64)
    slope = tl.zeros([CHANNELS], tl.float64)
    if NEEDS_XHAT:
        dz_xhat = _channel_sums(dz_centred, ROWS, CHANNELS) * rstd
    if WEIGHT_BACKWARD is not None:
        slope = _channel_sums(dslope, ROWS, CHANNELS)
    _store_sum(sums_ptr, _DZ, dz_total, channel, present, split, num_splits, num_channels)
    _store_sum(sums_ptr, _DZ_XHAT, dz_xhat, channel, present, split, num_splits, num_channels)
    _store_sum(
        sums_ptr, _DZ_SQ, _channel_sums(dz_sq, ROWS, CHANNELS), channel, present, split, num_splits, num_channels
    )
    _store_sum(sums_ptr, _SLOPE, slope, channel, present, split, num_splits, num_channels)
    return dz_total, dz_xhat


@triton.jit
def _counts(dy, dead, inside, VECTOR: tl.constexpr):
    """Of each VECTOR neighbours, whatever their channels: Σdy², how many are dead, and how many of dy inf or NaN."""
    finite = tl.abs(dy) < float("inf")
    nonfinite = inside & (finite == 0)
    dead_count = _group_sums(dead.to(tl.int32), False, VECTOR)
    return _group_squares(dy, VECTOR), dead_count, _group_sums(nonfinite.to(tl.int32), False, VECTOR)


@triton.jit
def _save_counts(tallies_ptr, dy_sq, dead, nonfinite):
    _store_tally(tallies_ptr, _TALLY_DY_SQ, dy_sq)
    _store_tally(tallies_ptr, _TALLY_DEAD, dead)
    _store_tally(tallies_ptr, _TALLY_NONFINITE, nonfinite)


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

# Counts: not alignments. Of inner_size ALIGN tells what there is to know.
_UNSPECIALISED = ["num_outer", "inner_size", "num_tiles", "tiles_per_split", "num_splits", "channel_size"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_statistics_kernel(
    x_ptr, partials_ptr, num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial sums of every channel: float64 (2, num_splits, num_channels) of Σ(x − first) and Σ(x − first)².

    Units: 1. Reads x.
    """
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0), num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
    filler = _spread(origin, COMPUTE, ROWS, RUNS)
    wide_origin = _spread(origin, tl.float64, ROWS, RUNS)
    total = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    squares = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    for tile in tl.range(first, last, num_stages=STAGES):
        _, _, _, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        x = tl.load(x_ptr + offset, mask=inside, other=filler)
        part, part_squares = _moments(x, wide_origin, ROWS, GROUP)
        total += part
        squares += part_squares
    total = _channel_sums(total, ROWS, CHANNELS)
    squares = _channel_sums(squares, ROWS, CHANNELS)
    _store_sum(partials_ptr, 0, total, channel, present, split, num_splits, num_channels)
    _store_sum(partials_ptr, 1, squares, channel, present, split, num_splits, num_channels)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, slope_ptr, partials_ptr,
    y_ptr, statistics_ptr, mask_ptr, eps: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y = φ(γ·x̂ + β + residual), from partial sums, from running statistics, or without normalisation.

    Units: 3 + mask. Reads x and residual, writes y and the mask; 2 without residual. Each program merges the partial
    sums of its own channels; the first split's write statistics, float64 (3, C): mean, rstd, unbiased variance.
    """
    NORMALISE: tl.constexpr = statistics_ptr is not None
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0), num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    scale = _channel_values(weight_ptr, channel, present, 1, 1.0)
    bias = _channel_values(bias_ptr, channel, present, 1, 0.0)
    slope = _channel_values(slope_ptr, channel, present, SLOPE_STRIDE, 0.0)
    mean = bias
    if NORMALISE:
        if partials_ptr is not None:
            origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
            total, squares = _merge(partials_ptr, 0, channel, present, num_splits, num_channels, SPLITS)
            mean, rstd = _statistics(
                origin, total, squares, channel_size, eps, statistics_ptr, channel, present, num_channels, split == 0
            )
        else:
            mean = _channel_values(running_mean_ptr, channel, present, 1, 0.0)
            rstd = 1.0 / tl.sqrt(_channel_values(running_var_ptr, channel, present, 1, 1.0) + eps)
            unbiased = tl.full([CHANNELS], float("nan"), tl.float64)
            if split == 0:
                _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, unbiased)
        scale = scale * rstd
    affine = _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        _activate(
            x, y_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            NORMALISE, FORWARD, ON, ARGS,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_channel_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, slope_ptr, y_ptr, statistics_ptr, mask_ptr, eps: tl.float64,
    num_outer, num_channels, inner_size, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics and y in one pass, for channels that fit a program's registers: one tile holds all their elements.

    Units: 3 + mask. Reads x and residual, writes y and the mask; 2 without residual.
    """
    first_channel, channel, present, _, _, _ = _program(tl.program_id(0), num_channels, 1, 1, CHANNELS)
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
    )
    origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
    x = tl.load(x_ptr + offset, mask=inside, other=_spread(origin, COMPUTE, ROWS, RUNS))
    total, squares = _moments(x, _spread(origin, tl.float64, ROWS, RUNS), ROWS, GROUP)
    mean, rstd = _statistics(
        origin, _channel_sums(total, ROWS, CHANNELS), _channel_sums(squares, ROWS, CHANNELS), channel_size, eps,
        statistics_ptr, channel, present, num_channels, True,
    )  # fmt: skip
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
    dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    NEEDS_XHAT: tl.constexpr, READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients and, where it is wanted here, dx = γ·r·dz: statistics that do not depend on x.

    Units: 2 + mask. Reads dy, x and the mask (x only where z or x̂ is needed, residual only where z is); each of dx and
    dresidual that is written here is one more. ``sums``: float64 (4, num_splits, C) of Σdz, Σdz·x̂, Σdz² and the slope's
    gradient; ``tallies``: float64 (3, programs) of Σdy² and of dead and non-finite elements. Either may be None.
    """
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0), num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    affine, mean, rstd, _scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    wide_mean = _spread(mean, tl.float64, ROWS, RUNS)
    dz_sum = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dz_centred = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dz_sq = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dslope = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dy_sq = _no_sums(tl.float64, False, RUNS, INNER, VECTOR)
    dead_count = _no_sums(tl.int32, False, RUNS, INNER, VECTOR)
    nonfinite = _no_sums(tl.int32, False, RUNS, INNER, VECTOR)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        dy, dz, x, _centred, z, dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            statistics_ptr is not None, READS_Z, NEEDS_XHAT, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        if dx_ptr is not None:
            _store(dx_ptr + offset, dz * affine[2], inside)
        if dresidual_ptr is not None:
            _store(dresidual_ptr + offset, dz, inside)
        if sums_ptr is not None:
            parts = _gradient_sums(dy, dz, x, wide_mean, z, NEEDS_XHAT, WEIGHT_BACKWARD, ROWS, GROUP)
            dz_sum += parts[0]
            dz_sq += parts[2]
            if NEEDS_XHAT:
                dz_centred += parts[1]
            if WEIGHT_BACKWARD is not None:
                dslope += parts[3]
        if tallies_ptr is not None:
            counts = _counts(dy, dead, inside, VECTOR)
            dy_sq += counts[0]
            dead_count += counts[1]
            nonfinite += counts[2]
    if sums_ptr is not None:
        _save_sums(
            sums_ptr, dz_sum, dz_centred, dz_sq, dslope, rstd, channel, present, split, num_splits, num_channels,
            NEEDS_XHAT, WEIGHT_BACKWARD, ROWS,
        )  # fmt: skip
    if tallies_ptr is not None:
        _save_counts(tallies_ptr, dy_sq, dead_count, nonfinite)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_channel_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
    dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, channel_size,
    NEEDS_NORM: tl.constexpr, READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All of the backward over the batch's statistics in one pass, for channels that fit a program's registers.

    Units: 4 + mask. Reads dy, x and the mask (residual only where z is needed), writes dx and dresidual. Sums and
    tallies as ``backward_reduce``, with one split, and a row more of sums: Σdx², where the norm is asked for.
    """
    first_channel, channel, present, _, _, _ = _program(tl.program_id(0), num_channels, 1, 1, CHANNELS)
    affine, mean, rstd, scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
    )
    dy, dz, x, centred, z, dead = _differentiate(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
        True, READS_Z, True, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
    )  # fmt: skip
    dz_sum, dz_centred, dz_sq, dslope = _gradient_sums(
        dy, dz, x, _spread(mean, tl.float64, ROWS, RUNS), z, True, WEIGHT_BACKWARD, ROWS, GROUP
    )
    dz_total, dz_xhat = _save_sums(
        sums_ptr, dz_sum, dz_centred, dz_sq, dslope, rstd, channel, present, 0, 1, num_channels,
        True, WEIGHT_BACKWARD, ROWS,
    )  # fmt: skip
    if tallies_ptr is not None:
        dy_sq, dead_count, nonfinite = _counts(dy, dead, inside, VECTOR)
        _save_counts(tallies_ptr, dy_sq, dead_count, nonfinite)
    terms = _gradient_terms(dz_total / channel_size, dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)
    dx = tl.where(inside, _input_gradient(dz, centred, terms), 0.0)
    _store(dx_ptr + offset, dx, inside)
    if dresidual_ptr is not None:
        _store(dresidual_ptr + offset, dz, inside)
    if NEEDS_NORM:
        wide = dx.to(tl.float64)
        dx_sq = _channel_sums(_group_sums(wide * wide, ROWS, GROUP), ROWS, CHANNELS)
        _store_sum(sums_ptr, _DX_SQ, dx_sq, channel, present, 0, 1, num_channels)


@triton.jit
def _total(tallies_ptr, row, num_programs, PROGRAMS: tl.constexpr):
    """Σ over programs of one row of the tallies."""
    total = tl.zeros([PROGRAMS], tl.float64)
    for first in range(0, num_programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        total += tl.load(tallies_ptr + num_programs * row + program, mask=program < num_programs, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _gradient_totals(
    sums_ptr, statistics_ptr, weight_ptr, dweight_ptr, dbias_ptr, dslope_ptr, eps, channel_size,
    num_channels, num_splits, OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, SHARED_SLOPE: tl.constexpr,
    CHANNELS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge all channels' sums: Σdz², ‖dx‖² (before bounds), ‖γ·r·dz‖², ‖dγ‖², ‖dβ‖² over the layer.

    ``SUMMED``: ‖dx‖² is a row of the sums, of one split; else it is the closed form, which may cancel. Writes the
    parameters' gradients that are not None. Whoever calls it gets the same bits.
    """
    dz_sq = tl.zeros([CHANNELS], tl.float64)
    dx_sq = tl.zeros([CHANNELS], tl.float64)
    scaled_sq = tl.zeros([CHANNELS], tl.float64)
    dweight_sq = tl.zeros([CHANNELS], tl.float64)
    dbias_sq = tl.zeros([CHANNELS], tl.float64)
    slope = tl.zeros([CHANNELS], tl.float64)
    for first in range(0, num_channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        present = channel < num_channels
        dz, dz_xhat = _merge(sums_ptr, _DZ, channel, present, num_splits, num_channels, SPLITS)
        squares, dslope = _merge(sums_ptr, _DZ_SQ, channel, present, num_splits, num_channels, SPLITS)
        scale = _channel_values(weight_ptr, channel, present, 1, 1.0)
        excess = scale * 0.0  # ε·r², which is 1 − κ
        if statistics_ptr is not None:
            rstd = tl.load(statistics_ptr + num_channels + channel, mask=present, other=0.0)
            scale = scale * rstd
            excess = eps * rstd * rstd
        scale_sq = scale * scale
        rest = squares
        if OVER_BATCH:
            rest = squares - (dz * dz + (1.0 + excess) * dz_xhat * dz_xhat) / channel_size
            rest = tl.where(rest < 0, 0.0, rest)  # by rounding; NaN stays
        dz_sq += squares
        if SUMMED:
            dx_sq += tl.load(sums_ptr + num_channels * _DX_SQ + channel, mask=present, other=0.0)
        else:
            dx_sq += tl.where(present, scale_sq * rest, 0.0)
        scaled_sq += tl.where(present, scale_sq * squares, 0.0)
        dweight_sq += dz_xhat * dz_xhat
        dbias_sq += dz * dz
        slope += dslope
        if dweight_ptr is not None:
            _store(dweight_ptr + channel, dz_xhat, present)
        if dbias_ptr is not None:
            _store(dbias_ptr + channel, dz, present)
        if dslope_ptr is not None:
            if not SHARED_SLOPE:
                _store(dslope_ptr + channel, dslope, present)
    if SHARED_SLOPE:
        if dslope_ptr is not None:
            one = tl.arange(0, 1)
            _store(dslope_ptr + one, tl.sum(slope, axis=0, keep_dims=True), one == 0)
    return (
        tl.sum(dz_sq, axis=0), tl.sum(dx_sq, axis=0), tl.sum(scaled_sq, axis=0), tl.sum(dweight_sq, axis=0),
        tl.sum(dbias_sq, axis=0),
    )  # fmt: skip


@triton.jit
def _cancels(dx_sq, scaled_sq):
    """Whether the closed form of ‖dx‖² is too little of ‖γ·r·dz‖² to be the norm of what is written; not if NaN."""
    return (dx_sq <= scaled_sq * _CANCELS) & (scaled_sq > 0)


@triton.jit
def _factor(dx_sq, min_norm, max_norm):
    """What takes ‖dx‖ into its bounds: 1 for a norm that is zero or not finite."""
    norm = tl.sqrt(dx_sq)
    bounded = (norm > 0) & (norm < float("inf"))
    bound = tl.where(norm < min_norm, min_norm, norm)
    bound = tl.where(norm > max_norm, max_norm, bound)
    return tl.where(bounded, bound / tl.where(bounded, norm, 1.0), 1.0)


@triton.jit
def _save_record(
    record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, min_norm, max_norm, num_programs, num_elements,
    BOUNDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write the record, float64 (9,), from the layer's totals and the tallies."""
    if BOUNDED:
        factor = _factor(dx_sq, min_norm, max_norm)
        dx_sq *= factor * factor
    tl.store(record_ptr, _total(tallies_ptr, _TALLY_DY_SQ, num_programs, PROGRAMS))
    tl.store(record_ptr + 1, dz_sq)
    tl.store(record_ptr + 2, dx_sq)
    tl.store(record_ptr + 3, dweight_sq if HAS_WEIGHT else dz_sq * 0.0)
    tl.store(record_ptr + 4, dbias_sq if HAS_BIAS else dz_sq * 0.0)
    tl.store(record_ptr + 5, _total(tallies_ptr, _TALLY_DEAD, num_programs, PROGRAMS))
    tl.store(record_ptr + 6, _total(tallies_ptr, _TALLY_NONFINITE, num_programs, PROGRAMS))
    tl.store(record_ptr + 7, num_elements)
    tl.store(record_ptr + 8, 1.0)


_FINISH_UNSPECIALISED = ["num_channels", "num_splits", "channel_size", "num_programs", "num_elements"]


@triton.jit(do_not_specialize=_FINISH_UNSPECIALISED)
def backward_finish_kernel(
    sums_ptr, tallies_ptr, statistics_ptr, weight_ptr, dweight_ptr, dbias_ptr, dslope_ptr, record_ptr,
    eps: tl.float64, min_norm: tl.float64, max_norm: tl.float64,
    num_channels, num_splits, channel_size, num_programs, num_elements,
    OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED_SLOPE: tl.constexpr,
    FINISH_CHANNELS: tl.constexpr, FINISH_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: merge the parameters' gradients and the record, for passes whose first launch wrote dx, or none.

    Units: 0. It reads the workspaces, some kilobytes, and no tensor.
    """
    dz_sq, dx_sq, _scaled_sq, dweight_sq, dbias_sq = _gradient_totals(
        sums_ptr, statistics_ptr, weight_ptr, dweight_ptr, dbias_ptr, dslope_ptr, eps, channel_size,
        num_channels, num_splits, OVER_BATCH, SUMMED, SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
    )  # fmt: skip
    if record_ptr is not None:
        _save_record(
            record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, min_norm, max_norm, num_programs,
            num_elements, BOUNDED, HAS_WEIGHT, HAS_BIAS, FINISH_CHANNELS * FINISH_SPLITS,
        )  # fmt: skip


@triton.jit
def _apply(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr, dx_ptr, dresidual_ptr,
    sums_ptr, block, first, last, factor, writes,
    num_outer, num_channels, inner_size, num_splits, channel_size,
    OVER_BATCH: tl.constexpr, BOUNDED: tl.constexpr, WRITES: tl.constexpr, SUMS: tl.constexpr, READS_Z: tl.constexpr,
    SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx, times ``factor`` where BOUNDED, and dresidual, of the tiles ``first`` to ``last`` of a block of channels.

    ``WRITES`` and ``writes``: whether they are stored. ``SUMS``: returns Σdx² before the factor, else 0. dx is the same
    bits whoever makes it.
    """
    first_channel = block * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    present = channel < num_channels
    affine, _mean, rstd, scale = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    if OVER_BATCH:
        dz_total, dz_xhat = _merge(sums_ptr, _DZ, channel, present, num_splits, num_channels, SPLITS)
        terms = _gradient_terms(dz_total / channel_size, dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)
    else:
        gain = _spread(scale, COMPUTE, ROWS, RUNS)
    dx_sq = tl.zeros([RUNS, INNER] if SUMS else [1, 1], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        _dy, dz, _x, centred, _z, _dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            statistics_ptr is not None, READS_Z, OVER_BATCH, False, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        if OVER_BATCH:
            dx = _input_gradient(dz, centred, terms)
        else:
            dx = dz * gain
        if BOUNDED:  # times the dx whose norm it is: by a scaled γ·r, another rounding would be left of what cancels
            scaled = (dx.to(tl.float64) * factor).to(COMPUTE)
        else:
            scaled = dx
        if WRITES:
            _store(dx_ptr + offset, scaled, inside & writes)
            if dresidual_ptr is not None:
                _store(dresidual_ptr + offset, dz, inside & writes)
        if SUMS:
            wide = tl.where(inside, dx, 0.0).to(tl.float64)
            dx_sq += wide * wide
    return tl.sum(tl.sum(dx_sq, axis=1), axis=0)


@triton.jit
def _alone(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr, dx_ptr, dresidual_ptr,
    sums_ptr, record_ptr, min_norm, max_norm, num_outer, num_channels, inner_size, num_splits, channel_size,
    BOUNDED: tl.constexpr, READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
    BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Put right the record's ‖dx‖², summed up from dx by one program; BOUNDED: which then writes dx, within its bounds.

    Its tiles are small, so that it does with the registers that the others take.
    """
    if ROWS:
        num_tiles = (num_outer + RUNS - 1) // RUNS
    else:
        OUTER: tl.constexpr = RUNS // CHANNELS
        num_tiles = (num_outer + OUTER - 1) // OUTER * ((inner_size + INNER - 1) // INNER)
    dx_sq = tl.full([], 0.0, tl.float64)
    factor = tl.full([], 1.0, tl.float64)
    for sweep in range(2 if BOUNDED else 1):
        for block in range((num_channels + CHANNELS - 1) // CHANNELS):
            squares = _apply(
                dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
                dx_ptr, dresidual_ptr, sums_ptr, block, 0, num_tiles, factor, sweep == 1,
                num_outer, num_channels, inner_size, num_splits, channel_size,
                True, BOUNDED, BOUNDED, True, READS_Z, SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS,
                ROWS, RUNS, INNER, CHANNELS, ALIGN, 1, COMPUTE,
            )  # fmt: skip
            dx_sq += tl.where(sweep == 0, squares, 0.0)
        if BOUNDED:
            factor = _factor(dx_sq, min_norm, max_norm)
    if record_ptr is not None:
        tl.store(record_ptr + 2, dx_sq * factor * factor)


@triton.jit(do_not_specialize=[*_UNSPECIALISED, *_FINISH_UNSPECIALISED])
def backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
    dx_ptr, dresidual_ptr, sums_ptr, tallies_ptr, dweight_ptr, dbias_ptr, dslope_ptr, record_ptr,
    eps: tl.float64, min_norm: tl.float64, max_norm: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    num_programs, num_elements,
    OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, BOUNDED: tl.constexpr, IF_OUT_OF_BOUNDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED_SLOPE: tl.constexpr,
    READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    SPLITS: tl.constexpr, FINISH_CHANNELS: tl.constexpr, FINISH_SPLITS: tl.constexpr,
    ALONE_RUNS: tl.constexpr, ALONE_INNER: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx from the sums of the launch before, times the factor that takes its norm into the bounds; dresidual.

    Units: 4 + mask. Reads dy, x and the mask (x only where z or x̂ is needed, residual only where z is), writes dx and
    dresidual. Where the closed form of the norm cancels, 2 + mask more; twice that with bounds, and dy, x and the mask
    only. With ``IF_OUT_OF_BOUNDS`` the launch before has written both: 0 where that factor is 1. Program 0 merges what
    ``backward_finish`` does and, where the form cancels, sums up ‖dx‖²; it comes first, for it may take longest.
    """
    MAY_CANCEL: tl.constexpr = OVER_BATCH and not SUMMED and (BOUNDED or record_ptr is not None)
    num_blocks = (num_channels + CHANNELS - 1) // CHANNELS
    if tl.program_id(0) == 0:
        dz_sq, dx_sq, scaled_sq, dweight_sq, dbias_sq = _gradient_totals(
            sums_ptr, statistics_ptr, weight_ptr, dweight_ptr, dbias_ptr, dslope_ptr, eps, channel_size,
            num_channels, num_splits, OVER_BATCH, SUMMED, SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
        )  # fmt: skip
        cancels = _cancels(dx_sq, scaled_sq)
        if record_ptr is not None:
            _save_record(
                record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, min_norm, max_norm, num_programs,
                num_elements, BOUNDED, HAS_WEIGHT, HAS_BIAS, FINISH_CHANNELS * FINISH_SPLITS,
            )  # fmt: skip
        if MAY_CANCEL:
            if cancels:
                _alone(
                    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr,
                    dx_ptr, dresidual_ptr, sums_ptr, record_ptr, min_norm, max_norm,
                    num_outer, num_channels, inner_size, num_splits, channel_size,
                    BOUNDED, READS_Z, SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS,
                    ROWS, ALONE_RUNS, ALONE_INNER, CHANNELS, ALIGN, COMPUTE,
                )  # fmt: skip
        return
    program = tl.program_id(0) - 1
    split = program // num_blocks
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    factor = 1.0
    if BOUNDED:
        _dz_sq, dx_sq, scaled_sq, _dweight_sq, _dbias_sq = _gradient_totals(
            sums_ptr, statistics_ptr, weight_ptr, None, None, None, eps, channel_size,
            num_channels, num_splits, OVER_BATCH, SUMMED, SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
        )  # fmt: skip
        factor = _factor(dx_sq, min_norm, max_norm)
        if MAY_CANCEL:  # then program 0 writes all
            last = tl.where(_cancels(dx_sq, scaled_sq), first, last)
        if IF_OUT_OF_BOUNDS:
            last = tl.where(factor == 1.0, first, last)
    _apply(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr, dx_ptr, dresidual_ptr,
        sums_ptr, program % num_blocks, first, last, factor, True,
        num_outer, num_channels, inner_size, num_splits, channel_size,
        OVER_BATCH, BOUNDED, True, False, READS_Z, SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS,
        ROWS, RUNS, INNER, CHANNELS, ALIGN, STAGES, COMPUTE,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def input_gradient_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr, means_ptr, factor_ptr,
    dx_ptr, squares_ptr, num_outer, num_channels, inner_size, num_tiles, tiles_per_split,
    READS_Z: tl.constexpr, SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx from the means of dz and dz·x̂ (float64, (2, C)), times a factor, (1,); each program's Σdx².

    Units: 3 + mask. Reads dy, x and the mask (residual where z is needed), writes dx. The means are to ``_apply`` sums
    over one split and a channel of one element.
    """
    num_blocks = (num_channels + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    first = program // num_blocks * tiles_per_split
    factor = tl.load(factor_ptr)
    squares = _apply(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, slope_ptr, dx_ptr, None,
        means_ptr, program % num_blocks, first, tl.minimum(first + tiles_per_split, num_tiles), factor, True,
        num_outer, num_channels, inner_size, 1, 1,
        True, True, True, True, READS_Z, SLOPE_STRIDE, BACKWARD, ON, ARGS, 1,
        ROWS, RUNS, INNER, CHANNELS, ALIGN, STAGES, COMPUTE,
    )  # fmt: skip
    tl.store(squares_ptr + program, squares * factor * factor)


# -- launches ----------------------------------------------------------------------------------------------------------

_FORWARD_TENSORS = ("x_ptr", "residual_ptr", "y_ptr", "mask_ptr")
_BACKWARD_TENSORS = ("dy_ptr", "x_ptr", "residual_ptr", "mask_ptr", "dx_ptr", "dresidual_ptr")

#: Of each kernel, the arguments that are tensors of x's size, or the mask. What is given is read or written in full,
#: once; what is not needed is None. The kernel's units count these, not workspaces and per-channel tensors.
TENSORS: dict[str, tuple[str, ...]] = {
    "forward_statistics_kernel": ("x_ptr",),
    "forward_apply_kernel": _FORWARD_TENSORS,
    "forward_channel_kernel": _FORWARD_TENSORS,
    "backward_reduce_kernel": _BACKWARD_TENSORS,
    "backward_channel_kernel": _BACKWARD_TENSORS,
    "backward_apply_kernel": _BACKWARD_TENSORS,
    "backward_finish_kernel": (),
    "input_gradient_kernel": ("dy_ptr", "x_ptr", "residual_ptr", "mask_ptr", "dx_ptr"),
}


def _launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any], **more: Any) -> Launch:
    return Launch(kernel, grid, args, options, moved=TENSORS[kernel.__name__], **more)


def units(launch: Launch) -> float:
    """What a launch reads and writes in u; where it is conditional, if at all."""
    if not launch.moved:
        return 0.0
    x = next(launch.args[name] for name in ("x_ptr", "dy_ptr") if launch.args.get(name) is not None)
    return launch.bytes / (x.numel() * x.element_size())


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


_ELEMENTS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "half", torch.float16: "half"}


def _cut(x: Tensor, shape: Shape, live: int) -> tuning.Blocks:
    element = "interpreted" if INTERPRETED else _ELEMENTS[x.dtype]
    return tuning.choose(shape.rows, element, shape.num_outer, shape.num_channels, shape.inner_size, live, LANES)


class _Geometry(NamedTuple):
    """The arguments and options of a launch that come from a tensor's shape and cut alone."""

    sizes: dict[str, Any]
    cut: dict[str, Any]
    blocks: dict[str, Any]
    options: dict[str, Any]


def _geometry(x: Tensor, shape: Shape, blocks: tuning.Blocks) -> _Geometry:
    return _Geometry(
        sizes={
            "num_outer": shape.num_outer, "num_channels": shape.num_channels, "inner_size": shape.inner_size,
        },
        cut={
            "num_tiles": blocks.num_tiles, "tiles_per_split": blocks.tiles_per_split, "num_splits": blocks.num_splits,
        },
        blocks={
            "ROWS": shape.rows, "RUNS": blocks.runs, "INNER": blocks.inner, "CHANNELS": blocks.channels,
            "GROUP": blocks.group, "VECTOR": blocks.vector,
            "ALIGN": math.gcd(shape.inner_size, 16),
            "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        },
        options={"num_warps": blocks.num_warps, "enable_fp_fusion": False},  # contraction is written out as tl.fma
    )  # fmt: skip


# Registers that ptxas may give a thread of a kernel that walks tiles, in planes and in rows. Left to itself it would
# save a few, so that one program more fits a multiprocessor, and spill in the loop. Told a limit it takes what it needs
# up to there: 128 are two programs of eight warps. None where a limit does worse: backward_reduce in rows of halves
# takes 200, and with 128 it spilled up to 65 times; backward_apply in planes takes 56 to 64, and with 64 it spilled for
# sm_90 and sm_100. double_backward_apply of halves in rows takes up to 180, and spilled 82 times with 128.
_MAX_REGISTERS = {
    "forward_apply": (128, 128),
    "backward_reduce": (144, None),
    "backward_apply": (None, 128),
    "double_backward_reduce": (144, None),
    "double_backward_apply": (128, 192),
}

# For a compute capability below 9.0 Triton has a ptxas of its own: 3.9.0 has 12.9 in the place of 13.4. Left to itself,
# that one saves backward_apply in planes down to 48 registers and spills up to 16 times; with 64 it does not.
_MAX_REGISTERS_BELOW_90 = {**_MAX_REGISTERS, "backward_apply": (64, 128)}


@functools.cache
def _capability() -> int:
    """Ten times the compute capability of the current GPU, 0 without one."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def _loop_options(kernel: str, x: Tensor, rows: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a kernel that walks tiles. AMD's compiler knows no limit of registers; float64 takes two each."""
    if LANES != 32 or INTERPRETED or x.dtype == torch.float64:
        return options
    limit = (_MAX_REGISTERS_BELOW_90 if _capability() < 90 else _MAX_REGISTERS)[kernel][rows]
    return options if limit is None else {**options, "maxnreg": min(limit, 65536 // (LANES * options["num_warps"]))}


def _stages_of_many_registers(blocks: tuning.Blocks) -> int:
    """The stages of a loop that writes and leaves a multiprocessor, in planes too, less than half of its warps.

    For sm_100 with one tile at a time, input_gradient of halves had 24 KB in flight, double_backward_apply of float32,
    which takes up to 95 registers, 12 KB. With three it is 48 KB and more. On AMD's GPUs they would be registers.
    """
    return max(blocks.apply_stages, 3) if LANES == 32 else blocks.apply_stages


def _slope_stride(activation_weight: Tensor | None) -> int:
    return 0 if activation_weight is None or activation_weight.numel() == 1 else 1


def _splits_at_once(num_splits: int) -> int:
    """How many splits a merge reads at once: with 32 channels 512 float64 values, two a thread of eight warps.

    With twice as many, backward_apply of float32 in rows took 146 registers (sm_90, 32 channels) in place of 85.
    """
    return min(tuning.power_of_two(num_splits), 16)


def _finish_channels(num_channels: int, splits: int) -> int:
    """Of how many channels the program that finishes reads so many splits at once."""
    return min(tuning.power_of_two(num_channels), _FINISH // splits, _FINISH_CHANNELS)


def forward_launches(
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
) -> list[Launch]:
    """What fills ``y`` and, where given, ``statistics`` (float64 (3, C)) and ``mask`` (uint8, one bit an element).

    Normalises by the running statistics if they are given, else by the batch's if ``statistics`` is, else not at all.
    Tensors of x's size lie in memory as x does; parameters are contiguous. Meta tensors give the launches alone.
    """
    functions = activations.TABLE[activation]
    over_batch = statistics is not None and running_mean is None
    blocks = _cut(x, shape, live=1 if over_batch else 0)
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    grid = (blocks.programs,)
    apply = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "bias_ptr": bias, "slope_ptr": activation_weight,
        "y_ptr": y, "statistics_ptr": statistics, "mask_ptr": mask, "eps": eps, **sizes,
        "channel_size": shape.channel_size, "SLOPE_STRIDE": _slope_stride(activation_weight),
        "FORWARD": functions.forward, "ON": functions.on if mask is not None else None, "ARGS": activation_args,
        **block_sizes,
    }  # fmt: skip
    if over_batch and blocks.resident:
        return [_launch(forward_channel_kernel, grid, apply, options)]
    partials = None
    launches = []
    if over_batch:
        partials = x.new_empty((2, blocks.num_splits, shape.num_channels), dtype=torch.float64)
        statistics_args = {
            "x_ptr": x, "partials_ptr": partials, **sizes, **cut, **block_sizes, "STAGES": blocks.stages,
        }  # fmt: skip
        launches.append(_launch(forward_statistics_kernel, grid, statistics_args, options))
    apply |= {
        "running_mean_ptr": running_mean, "running_var_ptr": running_var, "partials_ptr": partials, **cut,
        "SPLITS": _splits_at_once(blocks.num_splits) if over_batch else 1, "STAGES": blocks.apply_stages,
    }  # fmt: skip
    return [
        *launches,
        _launch(forward_apply_kernel, grid, apply, _loop_options("forward_apply", x, shape.rows, options)),
    ]


def backward_launches(
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
) -> list[Launch]:
    """What fills the gradients that are not None and, if it is not None, the record (float64 (9,)).

    ``over_batch``: ``statistics`` are those of x itself. The record holds the norms of dx and, where the layer has
    them, of the weight's and the bias's gradients whether those gradients are wanted or not.
    """
    functions = activations.TABLE[activation]
    recorded = record is not None
    bounded = (dx is not None or recorded) and (min_norm > 0 or max_norm < math.inf)
    has_weight = dweight is not None or (recorded and weight is not None)
    parameters = dweight is not None or dbias is not None or dactivation_weight is not None
    two_passes = over_batch and dx is not None  # dx needs sums over all of dz
    blocks = _cut(x, shape, live=2 if two_passes else 0)
    two_passes &= not blocks.resident
    one_launch = over_batch and dx is not None and blocks.resident
    needs_sums = two_passes or one_launch or parameters or recorded or bounded
    needs_xhat = needs_sums and (has_weight or (over_batch and (dx is not None or recorded)))
    reads_z = mask is None and activation != "identity"
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    grid = (blocks.programs,)

    sums = None
    if needs_sums:
        rows = 5 if one_launch else 4
        sums = x.new_empty((rows, blocks.num_splits, shape.num_channels), dtype=torch.float64)
    tallies = x.new_empty((_NUM_TALLIES, blocks.programs), dtype=torch.float64) if recorded else None
    channels = {
        "statistics_ptr": statistics, "weight_ptr": weight, "bias_ptr": bias, "slope_ptr": activation_weight,
        "sums_ptr": sums, "tallies_ptr": tallies,
    }  # fmt: skip
    derivative = {
        "dy_ptr": dy, "residual_ptr": residual if reads_z else None, "mask_ptr": mask, **channels, **sizes,
        "READS_Z": reads_z, "SLOPE_STRIDE": _slope_stride(activation_weight),
        "BACKWARD": functions.backward, "ON": functions.on, "ARGS": activation_args, **block_sizes,
    }  # fmt: skip
    first = {
        **derivative, "x_ptr": x if reads_z or needs_xhat else None,
        "dx_ptr": None if two_passes else dx, "dresidual_ptr": None if two_passes else dresidual,
        "WEIGHT_BACKWARD": functions.weight_backward if dactivation_weight is not None else None,
    }  # fmt: skip
    if one_launch:
        launches = [
            _launch(
                backward_channel_kernel,
                grid,
                {**first, "channel_size": shape.channel_size, "NEEDS_NORM": recorded or bounded},
                options,
            ),
        ]
    else:
        reduce = {**first, **cut, "NEEDS_XHAT": needs_xhat, "STAGES": blocks.stages}
        reduce_options = _loop_options("backward_reduce", x, shape.rows, options)
        launches = [_launch(backward_reduce_kernel, grid, reduce, reduce_options)]

    splits = _splits_at_once(blocks.num_splits)
    finish = {
        "sums_ptr": sums, "tallies_ptr": tallies, "statistics_ptr": statistics, "weight_ptr": weight,
        "dweight_ptr": dweight, "dbias_ptr": dbias, "dslope_ptr": dactivation_weight, "record_ptr": record,
        "eps": eps, "min_norm": min_norm, "max_norm": max_norm,
        "num_channels": shape.num_channels, "num_splits": blocks.num_splits, "channel_size": shape.channel_size,
        "num_programs": blocks.programs, "num_elements": x.numel(),
        "OVER_BATCH": over_batch, "SUMMED": one_launch and (recorded or bounded), "BOUNDED": bounded,
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "SHARED_SLOPE": dactivation_weight is not None and dactivation_weight.numel() == 1,
        "FINISH_CHANNELS": _finish_channels(shape.num_channels, splits), "FINISH_SPLITS": splits,
    }  # fmt: skip
    out_of_bounds = bounded and dx is not None and not two_passes
    if two_passes or out_of_bounds:
        elements = blocks.runs * blocks.inner
        alone_runs, alone_inner = blocks.shrunk(4 if INTERPRETED else max(elements // _ALONE, 1), shape.rows)
        apply = {
            **derivative, **finish, **cut, "x_ptr": x if reads_z or over_batch else None,
            "dx_ptr": dx, "dresidual_ptr": dresidual if two_passes else None,
            "IF_OUT_OF_BOUNDS": out_of_bounds,
            "ALONE_RUNS": alone_runs, "ALONE_INNER": alone_inner, "SPLITS": splits, "STAGES": blocks.apply_stages,
        }  # fmt: skip
        apply_grid = (1 + blocks.programs,)
        apply_options = _loop_options("backward_apply", x, shape.rows, options)
        launches.append(_launch(backward_apply_kernel, apply_grid, apply, apply_options, conditional=out_of_bounds))
    elif parameters or recorded:
        finish_options = {"num_warps": 8, "enable_fp_fusion": False}
        launches.append(_launch(backward_finish_kernel, (1,), finish, finish_options))
    return launches


def moments_launches(x: Tensor, *, shape: Shape) -> tuple[Tensor, list[Launch]]:
    """(sums, launches): what fills each split's Σ(x − first) and Σ(x − first)², float64 (2, num_splits, C)."""
    blocks = _cut(x, shape, live=0)
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    sums = x.new_empty((2, blocks.num_splits, shape.num_channels), dtype=torch.float64)
    args = {"x_ptr": x, "partials_ptr": sums, **sizes, **cut, **block_sizes, "STAGES": blocks.stages}
    return sums, [_launch(forward_statistics_kernel, (blocks.programs,), args, options)]


def input_gradient_launches(
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
) -> tuple[Tensor, list[Launch]]:
    """(squares, launches): what fills ``dx`` and, float64, each program's part of ‖dx‖²."""
    functions = activations.TABLE[activation]
    reads_z = mask is None and activation != "identity"
    blocks = _cut(x, shape, live=0)
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    squares = x.new_empty((blocks.programs,), dtype=torch.float64)
    args = {
        "dy_ptr": dy, "x_ptr": x, "residual_ptr": residual if reads_z else None, "mask_ptr": mask,
        "statistics_ptr": statistics, "weight_ptr": weight, "bias_ptr": bias, "slope_ptr": activation_weight,
        "means_ptr": means, "factor_ptr": factor, "dx_ptr": dx, "squares_ptr": squares, **sizes,
        "num_tiles": cut["num_tiles"], "tiles_per_split": cut["tiles_per_split"],
        "READS_Z": reads_z, "SLOPE_STRIDE": _slope_stride(activation_weight),
        "BACKWARD": functions.backward, "ON": functions.on, "ARGS": activation_args,
        **block_sizes, "STAGES": _stages_of_many_registers(blocks),
    }  # fmt: skip
    return squares, [_launch(input_gradient_kernel, (blocks.programs,), args, options)]
