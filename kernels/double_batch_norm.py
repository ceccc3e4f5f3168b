# ruff: noqa: SIM102, SIM108 -- a branch on a compile-time constant chooses between programs: both arms stay visible
"""Triton kernels for ``act(batch_norm(x) + batch_norm(residual))``, of the pieces of :mod:`.batch_norm`.

With x̂ and r̂ as there, each over its own tensor (statistics, ε, γ and β)::

    z = γ·x̂ + β + γ'·r̂ + β'   y = φ(z)   dz = φ'(z)·dy   dβ = dβ' = Σ dz   dγ = Σ dz·x̂   dγ' = Σ dz·r̂
    dx = γ·r·(dz − dβ/m − x̂·dγ/m), and dresidual alike

(He et al., arXiv 1512.03385, for the shortcut with a projection.) Launches and units, as there; two operations, of
which one writes the residual that the other reads, take 7 + mask and 11 + 2 masks, or 5 + mask and 7 + mask where a
channel fits one program:

=====================================  ==========================================  =============================
pass                                   kernels                                     u
=====================================  ==========================================  =============================
forward, a channel fits one program    double_forward_channel                      3 + mask
forward, otherwise                     double_forward_statistics, …_apply          (2) + (3 + mask)
forward, given statistics              double_forward_apply                        3 + mask
backward, a channel fits one program   double_backward_channel, …_finish           (5 + mask) + (0)
backward, otherwise                    double_backward_reduce, …_apply             (3 + mask) + (5 + mask)
backward, given statistics             double_backward_reduce, …_finish            (5 + mask) + (0)
=====================================  ==========================================  =============================

Accuracy, the norms of dx and dresidual, determinism and memory safety are those of :mod:`.batch_norm`: the same sums,
in a workspace for each of the two batch norms, which are finished by the same functions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activations
from .batch_norm import (
    _ALONE,
    _DX_SQ,
    _FINISH_UNSPECIALISED,
    _UNSPECIALISED,
    INTERPRETED,
    Shape,
    _affine,
    _cancels,
    _channel_sums,
    _channel_values,
    _counts,
    _cut,
    _derivative,
    _finish_channels,
    _geometry,
    _gradient_sums,
    _gradient_terms,
    _gradient_totals,
    _group_sums,
    _input_gradient,
    _loop_options,
    _low_part,
    _merge,
    _moments,
    _no_sums,
    _origin,
    _program,
    _save_counts,
    _save_record,
    _save_statistics,
    _save_sums,
    _saved,
    _slope_stride,
    _splits_at_once,
    _spread,
    _stages_of_many_registers,
    _statistics,
    _store,
    _store_bits,
    _store_sum,
    _store_tally,
    _tile,
    _total,
)  # fmt: skip
from .launching import Launch

__all__ = ["TENSORS", "backward_launches", "forward_launches"]

# A row more of tallies: how many of dz are inf or NaN.
_TALLY_DZ_NONFINITE = tl.constexpr(3)
_NUM_TALLIES = 4


# -- pieces of the mathematics -----------------------------------------------------------------------------------------


@triton.jit
def _pre_activation(x, residual, affine, residual_affine):
    """z, x − mean and residual − its mean, as in :mod:`.batch_norm`. Where both are their means, z is the sum of the
    biases to the bit."""
    LOW: tl.constexpr = x.dtype.primitive_bitwidth > 16
    x = x.to(affine[0].dtype)
    residual = residual.to(affine[0].dtype)
    mean_hi, mean_lo, scale_hi, scale_lo, shift, _ = affine
    residual_mean_hi, residual_mean_lo, residual_scale_hi, residual_scale_lo, residual_shift, _ = residual_affine
    difference = x - mean_hi
    centred = difference - mean_lo
    residual_difference = residual - residual_mean_hi
    residual_centred = residual_difference - residual_mean_lo
    z = tl.fma(difference if LOW else centred, scale_hi, shift)
    z += tl.fma(residual_difference if LOW else residual_centred, residual_scale_hi, residual_shift)
    if LOW:
        z += _low_part(
            residual, residual_difference, residual_mean_hi, residual_mean_lo, residual_scale_hi, residual_scale_lo
        )
        z += _low_part(x, difference, mean_hi, mean_lo, scale_hi, scale_lo)
    return z, centred, residual_centred


@triton.jit
def _activate(
    x, residual, y_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine, residual_affine,
    FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
):  # fmt: skip
    """The forward of one tile: y and, where asked, the bits of the mask."""
    z, _, _ = _pre_activation(x, residual, affine, residual_affine)
    _store(y_ptr + offset, FORWARD(z, affine[5], ARGS), inside)
    if mask_ptr is not None:
        _store_bits(mask_ptr, ON(z, ARGS) & inside, run, start, exists, inner_size, x.shape[0], x.shape[1])


@triton.jit
def _differentiate(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine, residual_affine,
    COUNT_DEAD: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The backward of one tile up to dz: dy, dz, x, residual, both less their means, z, and which elements are dead."""
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(COMPUTE)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
    z, centred, residual_centred = _pre_activation(x, residual, affine, residual_affine)
    dz, dead = _derivative(
        dy, z, affine[5], mask_ptr, run, start, exists, inside, inner_size, COUNT_DEAD, BACKWARD, ON, ARGS, COMPUTE
    )
    return dy, dz, x, residual, centred, residual_centred, z, dead


@triton.jit
def _saved_of_both(
    statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr, residual_bias_ptr, slope_ptr, channel, present,
    num_channels, SLOPE_STRIDE: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """What a backward needs of its channels, as ``_saved``, for x and for the residual."""
    of_x = _saved(
        statistics_ptr, weight_ptr, bias_ptr, slope_ptr, channel, present, num_channels, SLOPE_STRIDE,
        COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    of_residual = _saved(
        statistics_ptr + 3 * num_channels, residual_weight_ptr, residual_bias_ptr, None, channel, present,
        num_channels, 0, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    return of_x, of_residual


@triton.jit
def _nonfinite(dz, inside, VECTOR: tl.constexpr):
    """How many of each VECTOR neighbours are inf or NaN."""
    nonfinite = inside & ((tl.abs(dz) < float("inf")) == 0)
    return _group_sums(nonfinite.to(tl.int32), False, VECTOR)


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_UNSPECIALISED)
def double_forward_statistics_kernel(
    x_ptr, residual_ptr, partials_ptr, num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial sums of every channel of x and of the residual: float64 (2, 2, num_splits, num_channels).

    Units: 2. Reads x and residual, in two halves of the programs.
    """
    programs = tl.num_programs(0) // 2
    is_residual = tl.program_id(0) >= programs
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0) % programs, num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    if is_residual:
        source_ptr = residual_ptr
    else:
        source_ptr = x_ptr
    partials_ptr += tl.where(is_residual, 2, 0) * num_splits * num_channels
    origin = _origin(source_ptr, channel, present, inner_size, ROWS, COMPUTE)
    filler = _spread(origin, COMPUTE, ROWS, RUNS)
    wide_origin = _spread(origin, tl.float64, ROWS, RUNS)
    total = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    squares = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    for tile in tl.range(first, last, num_stages=STAGES):
        _, _, _, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        x = tl.load(source_ptr + offset, mask=inside, other=filler)
        part, part_squares = _moments(x, wide_origin, ROWS, GROUP)
        total += part
        squares += part_squares
    total = _channel_sums(total, ROWS, CHANNELS)
    squares = _channel_sums(squares, ROWS, CHANNELS)
    _store_sum(partials_ptr, 0, total, channel, present, split, num_splits, num_channels)
    _store_sum(partials_ptr, 1, squares, channel, present, split, num_splits, num_channels)


@triton.jit
def _normalisation(
    x_ptr, running_mean_ptr, running_var_ptr, partials_ptr, statistics_ptr, eps, channel, present, num_channels,
    num_splits, channel_size, inner_size, save, ROWS: tl.constexpr, COMPUTE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """mean and rstd of each channel, from partial sums or running statistics; written if ``save``."""
    if partials_ptr is not None:
        origin = _origin(x_ptr, channel, present, inner_size, ROWS, COMPUTE)
        total, squares = _merge(partials_ptr, 0, channel, present, num_splits, num_channels, SPLITS)
        mean, rstd = _statistics(
            origin, total, squares, channel_size, eps, statistics_ptr, channel, present, num_channels, save
        )
    else:
        mean = _channel_values(running_mean_ptr, channel, present, 1, 0.0)
        rstd = 1.0 / tl.sqrt(_channel_values(running_var_ptr, channel, present, 1, 1.0) + eps)
        if save:
            unbiased = tl.full(channel.shape, float("nan"), tl.float64)
            _save_statistics(statistics_ptr, channel, present, num_channels, mean, rstd, unbiased)
    return mean, rstd


@triton.jit(do_not_specialize=_UNSPECIALISED)
def double_forward_apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, residual_weight_ptr,
    residual_bias_ptr, residual_running_mean_ptr, residual_running_var_ptr, slope_ptr, partials_ptr,
    y_ptr, statistics_ptr, mask_ptr, eps: tl.float64, residual_eps: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """y from partial sums or from running statistics.

    Units: 3 + mask. Reads x and residual, writes y and the mask. The first split's programs write statistics, float64
    (2, 3, C).
    """
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0), num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    if partials_ptr is not None:
        residual_partials_ptr = partials_ptr + 2 * num_splits * num_channels
    else:
        residual_partials_ptr = partials_ptr
    mean, rstd = _normalisation(
        x_ptr, running_mean_ptr, running_var_ptr, partials_ptr, statistics_ptr, eps, channel, present, num_channels,
        num_splits, channel_size, inner_size, split == 0, ROWS, COMPUTE, SPLITS,
    )  # fmt: skip
    residual_mean, residual_rstd = _normalisation(
        residual_ptr, residual_running_mean_ptr, residual_running_var_ptr, residual_partials_ptr,
        statistics_ptr + 3 * num_channels, residual_eps, channel, present, num_channels,
        num_splits, channel_size, inner_size, split == 0, ROWS, COMPUTE, SPLITS,
    )  # fmt: skip
    slope = _channel_values(slope_ptr, channel, present, SLOPE_STRIDE, 0.0)
    scale = _channel_values(weight_ptr, channel, present, 1, 1.0) * rstd
    bias = _channel_values(bias_ptr, channel, present, 1, 0.0)
    affine = _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS)
    scale = _channel_values(residual_weight_ptr, channel, present, 1, 1.0) * residual_rstd
    bias = _channel_values(residual_bias_ptr, channel, present, 1, 0.0)
    residual_affine = _affine(residual_mean, scale, bias, slope, COMPUTE, ROWS, RUNS)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
        _activate(
            x, residual, y_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine, residual_affine,
            FORWARD, ON, ARGS,
        )  # fmt: skip


@triton.jit
def _measured(
    x_ptr, weight_ptr, bias_ptr, slope_ptr, statistics_ptr, eps, offset, inside, channel, present, num_channels,
    inner_size, channel_size, SLOPE_STRIDE: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A tensor of which one tile holds all elements of its channels; its operands of ``_pre_activation``."""
    CHANNELS: tl.constexpr = channel.shape[0]
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
    return x, _affine(mean, scale, bias, slope, COMPUTE, ROWS, RUNS)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def double_forward_channel_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, residual_weight_ptr, residual_bias_ptr, slope_ptr,
    y_ptr, statistics_ptr, mask_ptr, eps: tl.float64, residual_eps: tl.float64,
    num_outer, num_channels, inner_size, channel_size,
    SLOPE_STRIDE: tl.constexpr, FORWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Statistics and y in one pass, for channels that fit a program's registers twice.

    Units: 3 + mask. Reads x and residual, writes y and the mask.
    """
    first_channel, channel, present, _, _, _ = _program(tl.program_id(0), num_channels, 1, 1, CHANNELS)
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
    )
    x, affine = _measured(
        x_ptr, weight_ptr, bias_ptr, slope_ptr, statistics_ptr, eps, offset, inside, channel, present, num_channels,
        inner_size, channel_size, SLOPE_STRIDE, GROUP, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    residual, residual_affine = _measured(
        residual_ptr, residual_weight_ptr, residual_bias_ptr, None, statistics_ptr + 3 * num_channels, residual_eps,
        offset, inside, channel, present, num_channels, inner_size, channel_size, 0, GROUP, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    _activate(
        x, residual, y_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine, residual_affine,
        FORWARD, ON, ARGS,
    )  # fmt: skip


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_UNSPECIALISED)
def double_backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits,
    SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, WEIGHT_BACKWARD: tl.constexpr,
    ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients and, where they are wanted here, dx and dresidual over given statistics.

    Units: 3 + mask. Reads dy, x, residual and the mask; each of dx and dresidual that is written here is one more.
    ``sums``, ``residual_sums``: as ``backward_reduce``, of either batch norm; ``tallies`` too, float64 (4, programs),
    the last of non-finite elements of dz.
    """
    first_channel, channel, present, split, first, last = _program(
        tl.program_id(0), num_channels, num_tiles, tiles_per_split, CHANNELS
    )
    of_x, of_residual = _saved_of_both(
        statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr, residual_bias_ptr, slope_ptr, channel, present,
        num_channels, SLOPE_STRIDE, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    affine, mean, rstd, _ = of_x
    residual_affine, residual_mean, residual_rstd, _ = of_residual
    wide_mean = _spread(mean, tl.float64, ROWS, RUNS)
    wide_residual_mean = _spread(residual_mean, tl.float64, ROWS, RUNS)
    dz_sum = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dz_centred = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dz_residual = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dz_sq = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dslope = _no_sums(tl.float64, ROWS, RUNS, INNER, GROUP)
    dy_sq = _no_sums(tl.float64, False, RUNS, INNER, VECTOR)
    dead_count = _no_sums(tl.int32, False, RUNS, INNER, VECTOR)
    nonfinite = _no_sums(tl.int32, False, RUNS, INNER, VECTOR)
    dz_nonfinite = _no_sums(tl.int32, False, RUNS, INNER, VECTOR)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        dy, dz, x, residual, _centred, _residual_centred, z, dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            residual_affine, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        if dx_ptr is not None:
            _store(dx_ptr + offset, dz * affine[2], inside)
        if dresidual_ptr is not None:
            _store(dresidual_ptr + offset, dz * residual_affine[2], inside)
        parts = _gradient_sums(dy, dz, x, wide_mean, z, True, WEIGHT_BACKWARD, ROWS, GROUP)
        dz_sum += parts[0]
        dz_centred += parts[1]
        dz_sq += parts[2]
        if WEIGHT_BACKWARD is not None:
            dslope += parts[3]
        dz_residual += _group_sums(dz.to(tl.float64) * (residual.to(tl.float64) - wide_residual_mean), ROWS, GROUP)
        if tallies_ptr is not None:
            counts = _counts(dy, dead, inside, VECTOR)
            dy_sq += counts[0]
            dead_count += counts[1]
            nonfinite += counts[2]
            dz_nonfinite += _nonfinite(dz, inside, VECTOR)
    _save_sums(
        sums_ptr, dz_sum, dz_centred, dz_sq, dslope, rstd, channel, present, split, num_splits, num_channels,
        True, WEIGHT_BACKWARD, ROWS,
    )  # fmt: skip
    _save_sums(
        residual_sums_ptr, dz_sum, dz_residual, dz_sq, dslope, residual_rstd, channel, present, split, num_splits,
        num_channels, True, None, ROWS,
    )  # fmt: skip
    if tallies_ptr is not None:
        _save_counts(tallies_ptr, dy_sq, dead_count, nonfinite)
        _store_tally(tallies_ptr, _TALLY_DZ_NONFINITE, dz_nonfinite)


@triton.jit
def _save_squares(sums_ptr, dx, channel, present, num_channels, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Σdx² of each channel, of one split."""
    wide = dx.to(tl.float64)
    squares = _channel_sums(_group_sums(wide * wide, ROWS, GROUP), ROWS, channel.shape[0])
    _store_sum(sums_ptr, _DX_SQ, squares, channel, present, 0, 1, num_channels)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def double_backward_channel_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, tallies_ptr,
    num_outer, num_channels, inner_size, channel_size,
    NEEDS_NORM: tl.constexpr, SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr,
    WEIGHT_BACKWARD: tl.constexpr, ARGS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All of the backward over the batch's statistics in one pass, for channels that fit a program's registers.

    Units: 5 + mask. Reads dy, x, residual and the mask, writes dx and dresidual, if they are wanted. Sums and tallies
    as ``double_backward_reduce``, with one split, and a row more of sums: Σdx², where the norms are asked for.
    """
    first_channel, channel, present, _, _, _ = _program(tl.program_id(0), num_channels, 1, 1, CHANNELS)
    of_x, of_residual = _saved_of_both(
        statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr, residual_bias_ptr, slope_ptr, channel, present,
        num_channels, SLOPE_STRIDE, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    affine, mean, rstd, scale = of_x
    residual_affine, residual_mean, residual_rstd, residual_scale = of_residual
    run, start, exists, offset, inside = _tile(
        0, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
    )
    dy, dz, x, residual, centred, residual_centred, z, dead = _differentiate(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
        residual_affine, tallies_ptr is not None, BACKWARD, ON, ARGS, COMPUTE,
    )  # fmt: skip
    dz_sum, dz_centred, dz_sq, dslope = _gradient_sums(
        dy, dz, x, _spread(mean, tl.float64, ROWS, RUNS), z, True, WEIGHT_BACKWARD, ROWS, GROUP
    )
    wide_residual = residual.to(tl.float64) - _spread(residual_mean, tl.float64, ROWS, RUNS)
    dz_residual = _group_sums(dz.to(tl.float64) * wide_residual, ROWS, GROUP)
    dz_total, dz_xhat = _save_sums(
        sums_ptr, dz_sum, dz_centred, dz_sq, dslope, rstd, channel, present, 0, 1, num_channels,
        True, WEIGHT_BACKWARD, ROWS,
    )  # fmt: skip
    _, dz_rhat = _save_sums(
        residual_sums_ptr, dz_sum, dz_residual, dz_sq, dslope, residual_rstd, channel, present, 0, 1, num_channels,
        True, None, ROWS,
    )  # fmt: skip
    if tallies_ptr is not None:
        dy_sq, dead_count, nonfinite = _counts(dy, dead, inside, VECTOR)
        _save_counts(tallies_ptr, dy_sq, dead_count, nonfinite)
        _store_tally(tallies_ptr, _TALLY_DZ_NONFINITE, _nonfinite(dz, inside, VECTOR))
    mean_dz = dz_total / channel_size
    if dx_ptr is not None:
        terms = _gradient_terms(mean_dz, dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)
        dx = tl.where(inside, _input_gradient(dz, centred, terms), 0.0)
        _store(dx_ptr + offset, dx, inside)
        if NEEDS_NORM:
            _save_squares(sums_ptr, dx, channel, present, num_channels, ROWS, GROUP)
    if dresidual_ptr is not None:
        terms = _gradient_terms(mean_dz, dz_rhat / channel_size, residual_scale, residual_rstd, COMPUTE, ROWS, RUNS)
        dresidual = tl.where(inside, _input_gradient(dz, residual_centred, terms), 0.0)
        _store(dresidual_ptr + offset, dresidual, inside)
        if NEEDS_NORM:
            _save_squares(residual_sums_ptr, dresidual, channel, present, num_channels, ROWS, GROUP)


@triton.jit
def _save_residual_record(
    record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, num_programs, num_elements,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """As ``_save_record``, of a layer without activation at which dz arrives."""
    tl.store(record_ptr, dz_sq)
    tl.store(record_ptr + 1, dz_sq)
    tl.store(record_ptr + 2, dx_sq)
    tl.store(record_ptr + 3, dweight_sq if HAS_WEIGHT else dz_sq * 0.0)
    tl.store(record_ptr + 4, dbias_sq if HAS_BIAS else dz_sq * 0.0)
    tl.store(record_ptr + 5, 0.0)
    tl.store(record_ptr + 6, _total(tallies_ptr, _TALLY_DZ_NONFINITE, num_programs, PROGRAMS))
    tl.store(record_ptr + 7, num_elements)
    tl.store(record_ptr + 8, 1.0)


@triton.jit
def _finish(
    sums_ptr, residual_sums_ptr, tallies_ptr, statistics_ptr, weight_ptr, residual_weight_ptr, dweight_ptr, dbias_ptr,
    dresidual_weight_ptr, dresidual_bias_ptr, dslope_ptr, record_ptr, residual_record_ptr, eps, residual_eps,
    num_channels, num_splits, channel_size, num_programs, num_elements,
    OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, RESIDUAL_SUMMED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL_WEIGHT: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr,
    SHARED_SLOPE: tl.constexpr, FINISH_CHANNELS: tl.constexpr, FINISH_SPLITS: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients and the records; whether the closed form of ‖dx‖², of ‖dresidual‖² cancels."""
    PROGRAMS: tl.constexpr = FINISH_CHANNELS * FINISH_SPLITS
    dz_sq, dx_sq, scaled_sq, dweight_sq, dbias_sq = _gradient_totals(
        sums_ptr, statistics_ptr, weight_ptr, dweight_ptr, dbias_ptr, dslope_ptr, eps, channel_size,
        num_channels, num_splits, OVER_BATCH, SUMMED, SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
    )  # fmt: skip
    if record_ptr is not None:
        _save_record(
            record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, 0.0, 0.0, num_programs, num_elements,
            False, HAS_WEIGHT, HAS_BIAS, PROGRAMS,
        )  # fmt: skip
    cancels = _cancels(dx_sq, scaled_sq)
    _dz_sq, dx_sq, scaled_sq, dweight_sq, _dbias_sq = _gradient_totals(
        residual_sums_ptr, statistics_ptr + 3 * num_channels, residual_weight_ptr, dresidual_weight_ptr,
        dresidual_bias_ptr, None, residual_eps, channel_size,
        num_channels, num_splits, OVER_BATCH, RESIDUAL_SUMMED, False, FINISH_CHANNELS, FINISH_SPLITS,
    )  # fmt: skip
    if residual_record_ptr is not None:
        _save_residual_record(
            residual_record_ptr, tallies_ptr, dz_sq, dx_sq, dweight_sq, dbias_sq, num_programs, num_elements,
            HAS_RESIDUAL_WEIGHT, HAS_RESIDUAL_BIAS, PROGRAMS,
        )  # fmt: skip
    return cancels, _cancels(dx_sq, scaled_sq)


@triton.jit(do_not_specialize=_FINISH_UNSPECIALISED)
def double_backward_finish_kernel(
    sums_ptr, residual_sums_ptr, tallies_ptr, statistics_ptr, weight_ptr, residual_weight_ptr, dweight_ptr, dbias_ptr,
    dresidual_weight_ptr, dresidual_bias_ptr, dslope_ptr, record_ptr, residual_record_ptr,
    eps: tl.float64, residual_eps: tl.float64,
    num_channels, num_splits, channel_size, num_programs, num_elements,
    OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, RESIDUAL_SUMMED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL_WEIGHT: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr,
    SHARED_SLOPE: tl.constexpr, FINISH_CHANNELS: tl.constexpr, FINISH_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: merge the parameters' gradients and the records, for passes whose first launch wrote dx, or none.

    Units: 0. It reads the workspaces, some kilobytes, and no tensor.
    """
    _finish(
        sums_ptr, residual_sums_ptr, tallies_ptr, statistics_ptr, weight_ptr, residual_weight_ptr, dweight_ptr,
        dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, dslope_ptr, record_ptr, residual_record_ptr, eps,
        residual_eps, num_channels, num_splits, channel_size, num_programs, num_elements,
        OVER_BATCH, SUMMED, RESIDUAL_SUMMED, HAS_WEIGHT, HAS_BIAS, HAS_RESIDUAL_WEIGHT, HAS_RESIDUAL_BIAS,
        SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
    )  # fmt: skip


@triton.jit
def _apply(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, block, first, last,
    num_outer, num_channels, inner_size, num_splits, channel_size,
    SUMS: tl.constexpr, SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of the tiles ``first`` to ``last`` of a block of channels; with ``SUMS`` Σdx² and Σdresidual² of
    them in the place of storing them."""
    first_channel = block * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    present = channel < num_channels
    of_x, of_residual = _saved_of_both(
        statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr, residual_bias_ptr, slope_ptr, channel, present,
        num_channels, SLOPE_STRIDE, COMPUTE, ROWS, RUNS,
    )  # fmt: skip
    affine, _mean, rstd, scale = of_x
    residual_affine, _residual_mean, residual_rstd, residual_scale = of_residual
    dz_total, dz_xhat = _merge(sums_ptr, 0, channel, present, num_splits, num_channels, SPLITS)
    _dz_total, dz_rhat = _merge(residual_sums_ptr, 0, channel, present, num_splits, num_channels, SPLITS)
    mean_dz = dz_total / channel_size
    terms = _gradient_terms(mean_dz, dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)
    residual_terms = _gradient_terms(
        mean_dz, dz_rhat / channel_size, residual_scale, residual_rstd, COMPUTE, ROWS, RUNS
    )
    dx_sq = tl.zeros([RUNS, INNER] if SUMS else [1, 1], tl.float64)
    dresidual_sq = tl.zeros([RUNS, INNER] if SUMS else [1, 1], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        run, start, exists, offset, inside = _tile(
            tile, first_channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, CHANNELS, ALIGN
        )
        _dy, dz, _x, _residual, centred, residual_centred, _z, _dead = _differentiate(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, run, start, exists, offset, inside, inner_size, affine,
            residual_affine, False, BACKWARD, ON, ARGS, COMPUTE,
        )  # fmt: skip
        dx = _input_gradient(dz, centred, terms)
        dresidual = _input_gradient(dz, residual_centred, residual_terms)
        if SUMS:
            wide = tl.where(inside, dx, 0.0).to(tl.float64)
            dx_sq += wide * wide
            wide = tl.where(inside, dresidual, 0.0).to(tl.float64)
            dresidual_sq += wide * wide
        else:
            if dx_ptr is not None:
                _store(dx_ptr + offset, dx, inside)
            if dresidual_ptr is not None:
                _store(dresidual_ptr + offset, dresidual, inside)
    return tl.sum(tl.sum(dx_sq, axis=1), axis=0), tl.sum(tl.sum(dresidual_sq, axis=1), axis=0)


@triton.jit
def _alone(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, record_ptr, residual_record_ptr,
    num_outer, num_channels, inner_size, num_splits, channel_size,
    SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr, ARGS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Put right the records' ‖dx‖² and ‖dresidual‖², summed up from both by one program in small tiles."""
    if ROWS:
        num_tiles = (num_outer + RUNS - 1) // RUNS
    else:
        OUTER: tl.constexpr = RUNS // CHANNELS
        num_tiles = (num_outer + OUTER - 1) // OUTER * ((inner_size + INNER - 1) // INNER)
    dx_sq = tl.full([], 0.0, tl.float64)
    dresidual_sq = tl.full([], 0.0, tl.float64)
    for block in range((num_channels + CHANNELS - 1) // CHANNELS):
        parts = _apply(
            dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
            residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, block, 0, num_tiles,
            num_outer, num_channels, inner_size, num_splits, channel_size,
            True, SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS, ROWS, RUNS, INNER, CHANNELS, ALIGN, 1, COMPUTE,
        )  # fmt: skip
        dx_sq += parts[0]
        dresidual_sq += parts[1]
    if record_ptr is not None:
        tl.store(record_ptr + 2, dx_sq)
    if residual_record_ptr is not None:
        tl.store(residual_record_ptr + 2, dresidual_sq)


@triton.jit(do_not_specialize=[*_UNSPECIALISED, *_FINISH_UNSPECIALISED])
def double_backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, tallies_ptr,
    dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, dslope_ptr, record_ptr, residual_record_ptr,
    eps: tl.float64, residual_eps: tl.float64,
    num_outer, num_channels, inner_size, num_tiles, tiles_per_split, num_splits, channel_size,
    num_programs, num_elements,
    OVER_BATCH: tl.constexpr, SUMMED: tl.constexpr, RESIDUAL_SUMMED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL_WEIGHT: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr,
    SHARED_SLOPE: tl.constexpr, SLOPE_STRIDE: tl.constexpr, BACKWARD: tl.constexpr, ON: tl.constexpr,
    ARGS: tl.constexpr, SPLITS: tl.constexpr, FINISH_CHANNELS: tl.constexpr, FINISH_SPLITS: tl.constexpr,
    ALONE_RUNS: tl.constexpr, ALONE_INNER: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx and dresidual from the sums of the launch before.

    Units: 5 + mask. Reads dy, x, residual and the mask, writes dx and dresidual, if they are wanted. Program 0 does
    what ``double_backward_finish`` does; where the closed form of a norm cancels it sums up both, 3 + mask more.
    """
    num_blocks = (num_channels + CHANNELS - 1) // CHANNELS
    if tl.program_id(0) == 0:
        cancels, residual_cancels = _finish(
            sums_ptr, residual_sums_ptr, tallies_ptr, statistics_ptr, weight_ptr, residual_weight_ptr, dweight_ptr,
            dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr, dslope_ptr, record_ptr, residual_record_ptr, eps,
            residual_eps, num_channels, num_splits, channel_size, num_programs, num_elements,
            OVER_BATCH, SUMMED, RESIDUAL_SUMMED, HAS_WEIGHT, HAS_BIAS, HAS_RESIDUAL_WEIGHT, HAS_RESIDUAL_BIAS,
            SHARED_SLOPE, FINISH_CHANNELS, FINISH_SPLITS,
        )  # fmt: skip
        if (record_ptr is not None) or (residual_record_ptr is not None):
            if cancels | residual_cancels:
                _alone(
                    dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
                    residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, record_ptr,
                    residual_record_ptr, num_outer, num_channels, inner_size, num_splits, channel_size,
                    SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS,
                    ROWS, ALONE_RUNS, ALONE_INNER, CHANNELS, ALIGN, COMPUTE,
                )  # fmt: skip
        return
    program = tl.program_id(0) - 1
    first = program // num_blocks * tiles_per_split
    _apply(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_weight_ptr,
        residual_bias_ptr, slope_ptr, dx_ptr, dresidual_ptr, sums_ptr, residual_sums_ptr, program % num_blocks, first,
        tl.minimum(first + tiles_per_split, num_tiles), num_outer, num_channels, inner_size, num_splits, channel_size,
        False, SLOPE_STRIDE, BACKWARD, ON, ARGS, SPLITS, ROWS, RUNS, INNER, CHANNELS, ALIGN, STAGES, COMPUTE,
    )  # fmt: skip


# -- launches ----------------------------------------------------------------------------------------------------------

_FORWARD_TENSORS = ("x_ptr", "residual_ptr", "y_ptr", "mask_ptr")
_BACKWARD_TENSORS = ("dy_ptr", "x_ptr", "residual_ptr", "mask_ptr", "dx_ptr", "dresidual_ptr")

#: As ``batch_norm.TENSORS``.
TENSORS: dict[str, tuple[str, ...]] = {
    "double_forward_statistics_kernel": ("x_ptr", "residual_ptr"),
    "double_forward_apply_kernel": _FORWARD_TENSORS,
    "double_forward_channel_kernel": _FORWARD_TENSORS,
    "double_backward_reduce_kernel": _BACKWARD_TENSORS,
    "double_backward_channel_kernel": _BACKWARD_TENSORS,
    "double_backward_apply_kernel": _BACKWARD_TENSORS,
    "double_backward_finish_kernel": (),
}


def _launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> Launch:
    return Launch(kernel, grid, args, options, moved=TENSORS[kernel.__name__])


def forward_launches(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    activation_weight: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    *,
    shape: Shape,
    eps: float,
    residual_eps: float,
    activation: str,
    activation_args: tuple[float, ...],
) -> list[Launch]:
    """What fills ``y``, ``statistics`` (float64 (2, 3, C)) and, if it is given, ``mask``.

    Normalises by the running statistics if they are given, else by the batch's. Meta tensors give the launches alone.
    """
    functions = activations.TABLE[activation]
    over_batch = running_mean is None
    blocks = _cut(x, shape, live=2 if over_batch else 0)
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    grid = (blocks.programs,)
    apply = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "bias_ptr": bias,
        "residual_weight_ptr": residual_weight, "residual_bias_ptr": residual_bias, "slope_ptr": activation_weight,
        "y_ptr": y, "statistics_ptr": statistics, "mask_ptr": mask, "eps": eps, "residual_eps": residual_eps, **sizes,
        "channel_size": shape.channel_size, "SLOPE_STRIDE": _slope_stride(activation_weight),
        "FORWARD": functions.forward, "ON": functions.on if mask is not None else None, "ARGS": activation_args,
        **block_sizes,
    }  # fmt: skip
    if over_batch and blocks.resident:
        return [_launch(double_forward_channel_kernel, grid, apply, options)]
    partials = None
    launches = []
    if over_batch:
        partials = x.new_empty((2, 2, blocks.num_splits, shape.num_channels), dtype=torch.float64)
        statistics_args = {
            "x_ptr": x, "residual_ptr": residual, "partials_ptr": partials, **sizes, **cut, **block_sizes,
            "STAGES": blocks.stages,
        }  # fmt: skip
        launches.append(_launch(double_forward_statistics_kernel, (2 * blocks.programs,), statistics_args, options))
    apply |= {
        "running_mean_ptr": running_mean, "running_var_ptr": running_var,
        "residual_running_mean_ptr": residual_running_mean, "residual_running_var_ptr": residual_running_var,
        "partials_ptr": partials, **cut, "SPLITS": _splits_at_once(blocks.num_splits), "STAGES": blocks.apply_stages,
    }  # fmt: skip
    return [*launches, _launch(double_forward_apply_kernel, grid, apply, options)]


def backward_launches(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    mask: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    activation_weight: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual_weight: Tensor | None,
    dresidual_bias: Tensor | None,
    dactivation_weight: Tensor | None,
    record: Tensor | None,
    residual_record: Tensor | None,
    *,
    shape: Shape,
    over_batch: bool,
    eps: float,
    residual_eps: float,
    activation: str,
    activation_args: tuple[float, ...],
) -> list[Launch]:
    """What fills the gradients and the records (float64 (9,)) that are not None.

    ``over_batch``: ``statistics`` are those of x and residual themselves.
    """
    functions = activations.TABLE[activation]
    recorded = record is not None or residual_record is not None
    needs_sums = over_batch and (dx is not None or dresidual is not None)
    blocks = _cut(x, shape, live=3 if needs_sums else 0)
    sizes, cut, block_sizes, options = _geometry(x, shape, blocks)
    one_launch = needs_sums and blocks.resident
    two_passes = needs_sums and not one_launch
    rows = 5 if one_launch else 4
    sums, residual_sums = x.new_empty((2, rows, blocks.num_splits, shape.num_channels), dtype=torch.float64).unbind()
    tallies = x.new_empty((_NUM_TALLIES, blocks.programs), dtype=torch.float64) if recorded else None
    derivative = {
        "dy_ptr": dy, "x_ptr": x, "residual_ptr": residual, "mask_ptr": mask, "statistics_ptr": statistics,
        "weight_ptr": weight, "bias_ptr": bias, "residual_weight_ptr": residual_weight,
        "residual_bias_ptr": residual_bias, "slope_ptr": activation_weight, "sums_ptr": sums,
        "residual_sums_ptr": residual_sums, "tallies_ptr": tallies, **sizes,
        "SLOPE_STRIDE": _slope_stride(activation_weight),
        "BACKWARD": functions.backward, "ON": functions.on, "ARGS": activation_args, **block_sizes,
    }  # fmt: skip
    first = {
        **derivative, "dx_ptr": None if two_passes else dx, "dresidual_ptr": None if two_passes else dresidual,
        "WEIGHT_BACKWARD": functions.weight_backward if dactivation_weight is not None else None,
    }  # fmt: skip
    if one_launch:
        channel = {**first, "channel_size": shape.channel_size, "NEEDS_NORM": recorded}
        launches = [_launch(double_backward_channel_kernel, (blocks.programs,), channel, options)]
    else:
        reduce = {**first, **cut, "STAGES": blocks.stages}
        reduce_options = _loop_options("double_backward_reduce", x, shape.rows, options)
        launches = [_launch(double_backward_reduce_kernel, (blocks.programs,), reduce, reduce_options)]

    splits = _splits_at_once(blocks.num_splits)
    finish = {
        "sums_ptr": sums, "residual_sums_ptr": residual_sums, "tallies_ptr": tallies, "statistics_ptr": statistics,
        "weight_ptr": weight, "residual_weight_ptr": residual_weight, "dweight_ptr": dweight, "dbias_ptr": dbias,
        "dresidual_weight_ptr": dresidual_weight, "dresidual_bias_ptr": dresidual_bias,
        "dslope_ptr": dactivation_weight, "record_ptr": record, "residual_record_ptr": residual_record,
        "eps": eps, "residual_eps": residual_eps,
        "num_channels": shape.num_channels, "num_splits": blocks.num_splits, "channel_size": shape.channel_size,
        "num_programs": blocks.programs, "num_elements": x.numel(), "OVER_BATCH": over_batch,
        "SUMMED": one_launch and recorded and dx is not None,
        "RESIDUAL_SUMMED": one_launch and recorded and dresidual is not None,
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL_WEIGHT": residual_weight is not None, "HAS_RESIDUAL_BIAS": residual_bias is not None,
        "SHARED_SLOPE": dactivation_weight is not None and dactivation_weight.numel() == 1,
        "FINISH_CHANNELS": _finish_channels(shape.num_channels, splits), "FINISH_SPLITS": splits,
    }  # fmt: skip
    parameters = (dweight, dbias, dresidual_weight, dresidual_bias, dactivation_weight)
    if two_passes:
        elements = blocks.runs * blocks.inner
        alone_runs, alone_inner = blocks.shrunk(4 if INTERPRETED else max(elements // _ALONE, 1), shape.rows)
        apply = {
            **derivative, **finish, **cut, "dx_ptr": dx, "dresidual_ptr": dresidual,
            "ALONE_RUNS": alone_runs, "ALONE_INNER": alone_inner, "SPLITS": splits,
            "STAGES": _stages_of_many_registers(blocks),
        }  # fmt: skip
        apply_options = _loop_options("double_backward_apply", x, shape.rows, options)
        launches.append(_launch(double_backward_apply_kernel, (1 + blocks.programs,), apply, apply_options))
    elif recorded or any(gradient is not None for gradient in parameters):
        finish_options = {"num_warps": 8, "enable_fp_fusion": False}
        launches.append(_launch(double_backward_finish_kernel, (1,), finish, finish_options))
    return launches
