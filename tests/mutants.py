"""``make mutants``: plant faults one at a time in a copy of the tree; each must be caught by the tests named beside it.

    python -m tests.mutants [NAME ...] [--jobs N] [--list]

A fault is a text of a file and what takes its place. If the text is not there exactly once, the fault is out of date
and the run fails before it begins. A fault is caught if a test fails with it that passes without it. Exit status 1 if
one survives.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest, the expression of -k after a |


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    caught_by: str  # empty: it survived
    seconds: float
    trouble: str = ""  # a test that failed with the fault, and without it too


BATCH_NORM, NORMS = "kernels/batch_norm.py", "kernels/gradient_norm.py"
DOUBLE_KERNELS, DOUBLE = "kernels/double_batch_norm.py", "tests/test_double_batch_norm.py"
MONITOR = "vgkern/gradients/monitor.py"
CPU, CPU_NORMS, CHANNELS = "csrc/batch_norm.cpp", "csrc/gradient_norm.cpp", "csrc/channels.h"
KERNELS = "tests/test_triton_kernels.py|many_tiles or accuracy_does or offsets_reach or halves_are or not_wanted"
CANCELS = "tests/test_triton_kernels.py|gradient_that_cancels and 0.0001"
GUARDS = "tests/test_triton_traffic.py|outside"
TRAFFIC = "tests/test_triton_traffic.py|bytes"
RECORD = "tests/test_grad_record.py|triton and (every_field or epsilon or dead_fraction or root_mean)"
BOUNDS = "tests/test_grad_norm_bounds.py|triton and (lies_within or accept)"
GRADIENTS = "tests/test_gradient_norms.py|triton"
CPU_KERNELS = "tests/test_cpu_kernels.py"
SMALL_PLANES = "csrc/small_planes.cpp"
SYNC = "tests/test_sync_batch_norm.py"
CPU_GRID = "tests/test_grid.py|test_grid and cpu"
CPU_GRADIENTS = "tests/test_gradient_norms.py|cpu or threads"
CLIPPING, CLIPPER = "tests/test_clipping.py", "tests/test_clipper.py"
HOT = "csrc/known_norms.cpp"
NODE, ORDINARY, OUTPUTS = "csrc/node.cpp", "csrc/ordinary.cpp", "csrc/outputs.cpp"
WATCHERS, UNWATCHED, USUAL = "csrc/torch_objects.cpp", "tests/test_unwatched.py", "tests/test_unwatched.py|usual_call"
SIMD = "tests/test_simd_math.py|coarse"
AUTOGRAD, MEMORY = "tests/test_autograd.py", "tests/test_memory.py"

FUSION, FUSE = "vgkern/fusion/", "tests/test_fuse.py"

FAULTS = [
    # -- Triton: memory
    Fault("a load without its mask", BATCH_NORM,
          "        x = tl.load(x_ptr + offset, mask=inside, other=0.0)\n        _activate(",
          "        x = tl.load(x_ptr + offset)\n        _activate(", GUARDS),
    Fault("a store without its mask", BATCH_NORM,
          "_store(y_ptr + offset, FORWARD(z, affine[5], ARGS), inside)",
          "_store(y_ptr + offset, FORWARD(z, affine[5], ARGS), None)", GUARDS),
    Fault("a channel's value read past the last channel", BATCH_NORM,
          "tl.load(ptr + channel * STRIDE, mask=present, other=0.0)", "tl.load(ptr + channel * STRIDE)", GUARDS),
    Fault("partial sums written past the last channel", BATCH_NORM,
          "num_splits * row) + channel, values, mask=present)", "num_splits * row) + channel, values)", GUARDS),
    Fault("strides of batch and channel swapped", BATCH_NORM,
          "run = outer * num_channels + channel", "run = channel * num_outer + outer", KERNELS),
    Fault("a row's number in 32 bits", BATCH_NORM,
          "run = tl.cast(tile, tl.int64) * RUNS", "run = tile * RUNS", KERNELS),
    Fault("x read where the mask suffices", BATCH_NORM,
          '"x_ptr": x if reads_z or needs_xhat else None', '"x_ptr": x', TRAFFIC),
    # -- Triton: forward
    Fault("biased running variance", BATCH_NORM,
          "rstd, squares / (channel_size - 1))", "rstd, squares / channel_size)", KERNELS),
    Fault("a wrong count in the mean", BATCH_NORM,
          "offset = total / channel_size", "offset = total / (channel_size + 1)", KERNELS),
    Fault("the last split's sums skipped", BATCH_NORM,
          "inside = (split < num_splits)[:, None] & present[None, :]\n        first_total",
          "inside = (split < tl.maximum(num_splits - 1, 1))[:, None] & present[None, :]\n        first_total", KERNELS),
    Fault("no epsilon", BATCH_NORM,
          "tl.sqrt(squares / channel_size + eps)", "tl.sqrt(squares / channel_size)", KERNELS),
    Fault("squares not taken about the mean", BATCH_NORM,
          "squares = squares - total * offset", "squares = squares + 0.0 * offset", KERNELS),
    Fault("a mean of one part", BATCH_NORM, "(lost - mean_lo) * scale_hi", "lost * scale_hi",
          "tests/test_better_than_pytorch.py|triton"),
    Fault("what x - mean lost, forgotten", BATCH_NORM, "(lost - mean_lo) * scale_hi", "-mean_lo * scale_hi",
          "tests/test_grid.py|nothing_is_lost and triton"),
    Fault("a mean of one part in half precision", BATCH_NORM,
          "tl.fma(difference if LOW else centred, scale_hi", "tl.fma(difference, scale_hi",
          "tests/test_better_than_pytorch.py|triton and neighbours"),
    Fault("a residual's mean of one part in half precision", DOUBLE_KERNELS,
          "tl.fma(residual_difference if LOW else residual_centred", "tl.fma(residual_difference",
          "tests/test_better_than_pytorch.py|triton and neighbours"),
    Fault("the residual added twice", BATCH_NORM,
          "z += tl.load(residual_ptr", "z += 2.0 * tl.load(residual_ptr", KERNELS),
    Fault("statistics never written", BATCH_NORM,
          "present, num_channels, split == 0\n", "present, num_channels, split < 0\n", KERNELS),
    Fault("an infinite first element as the origin", BATCH_NORM,
          'return tl.where(tl.abs(value) < float("inf"), value, 0.0)', "return value", "tests/test_values.py|triton"),
    Fault("bits of the mask in reverse", BATCH_NORM,
          "eights << tl.arange(0, 8)[None, None, :]", "eights << (7 - tl.arange(0, 8))[None, None, :]", KERNELS),
    Fault("bfloat16 rounded half up", BATCH_NORM,
          "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16", KERNELS),
    # -- Triton: backward
    Fault("no dβ/m in dx", BATCH_NORM, "d = (dz - mean_hi) - mean_lo\n", "d = dz\n", KERNELS),
    Fault("no dγ/m in dx", BATCH_NORM, "-(centred * power) * slope", "-(centred * 0.0) * slope", KERNELS),
    Fault("the wrong sign of dγ/m", BATCH_NORM, "-(centred * power) * slope", "(centred * power) * slope", KERNELS),
    Fault("dγ of x and not of x̂", BATCH_NORM,
          "_channel_sums(dz_centred, ROWS, CHANNELS) * rstd", "_channel_sums(dz_centred, ROWS, CHANNELS)", KERNELS),
    Fault("dγ about zero and not the mean", BATCH_NORM,
          "wide * (x.to(tl.float64) - mean)", "wide * x.to(tl.float64)", KERNELS),
    Fault("the wrong sign of 1 − κ in the norm", BATCH_NORM,
          "(1.0 + excess) * dz_xhat", "(1.0 - excess) * dz_xhat", RECORD),
    Fault("elements outside the tensor counted as dead", BATCH_NORM,
          "slope, ARGS) == 0) & inside", "slope, ARGS) == 0)", RECORD),
    Fault("an upper bound that does not bound", BATCH_NORM,
          "tl.where(norm > max_norm, max_norm, bound)", "tl.where(norm > max_norm, norm, bound)", BOUNDS),
    Fault("the closed form where it cancels", BATCH_NORM, "tl.constexpr(2.0**-10)", "tl.constexpr(2.0**-60)", CANCELS),
    Fault("the closed form of a dx that was summed up", BATCH_NORM,
          '"SUMMED": one_launch and (recorded or bounded)', '"SUMMED": False', CANCELS),
    Fault("channels left out by the program that works alone", BATCH_NORM,
          "for block in range((num_channels + CHANNELS - 1) // CHANNELS)",
          "for block in range(num_channels // CHANNELS)", CANCELS),
    Fault("programs beside the one that works alone", BATCH_NORM,
          "last = tl.where(_cancels(dx_sq, scaled_sq), first, last)", "last = last", CANCELS),
    Fault("a second launch that always writes", BATCH_NORM,
          "last = tl.where(factor == 1.0, first, last)", "last = last", TRAFFIC),
    # -- the double batch norm
    Fault("the residual normalised by x's statistics", DOUBLE_KERNELS,
          "statistics_ptr + 3 * num_channels, residual_weight_ptr, residual_bias_ptr, None, channel",
          "statistics_ptr, residual_weight_ptr, residual_bias_ptr, None, channel", f"{DOUBLE}|triton and prelu"),
    Fault("dγ of the residual in the place of dγ", DOUBLE_KERNELS,
          "dz_xhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)\n        dx = tl.where",
          "dz_rhat / channel_size, scale, rstd, COMPUTE, ROWS, RUNS)\n        dx = tl.where",
          f"{DOUBLE}|triton and prelu"),
    Fault("one sum for both dγ, C++", CPU,
          "kDzResidualDeviation, kDresidualSquares", "kDzDeviation, kDresidualSquares", f"{DOUBLE}|cpu and relu"),
    Fault("the statistics of both in one place, C++", CPU,
          "residual_norm_, call_.statistics + 3 * channels_);\n    }\n    const auto each_channel",
          "residual_norm_, call_.statistics);\n    }\n    const auto each_channel", f"{DOUBLE}|cpu and relu"),
    Fault("the residual's statistics made of x, C++", CPU,
          "        tile.x = x_;\n", "        tile.x = pass_.call_.x;\n", f"{DOUBLE}|cpu and relu"),
    Fault("dz of all slices kept in one place, C++", CPU, "kept.get() + kept_bytes * index(i)", "kept.get()",
          f"{DOUBLE}|cpu"),
    Fault("a residual's gradient that cancels, C++", CPU,
          "any_of(inputs_.begin(), inputs_.end(), [&](const Input& input) {\n      return any(",
          "any_of(inputs_.begin(), inputs_.begin() + 1, [&](const Input& input) {\n      return any(",
          f"{DOUBLE}|cpu and cancels"),
    Fault("a tail counted in ‖dresidual‖², C++", "csrc/tiles.h",
          "select(first_lanes<R>(at.lanes), dresidual[j], Vec<R>(0))", "dresidual[j]", f"{DOUBLE}|cpu and cancels"),
    Fault("the residual's scale in float32, C++", "csrc/tiles.h",
          "    if (sizeof(T) > 2) add_product(e, kScaleLow, kShiftLow);\n", "", f"{DOUBLE}|cpu"),
    Fault("a layer with hooks computed with another", "vgkern/nn/double_batch_norm.py",
          "        and not _is_watched(layer)\n", "", f"{DOUBLE}|stays_two"),
    Fault("a shared statistic that waits", FUSION + "plan.py",
          "if any(type(m.module) is nn.SyncBatchNorm for m in (taken, match)):", "if False:",
          f"{DOUBLE}|watched_or_shared"),
    # -- Triton: norms of lists
    Fault("neighbours before a tensor counted", NORMS,
          "mask=(place >= lead) & (place < end), other=0.0", "mask=place < end, other=0.0", GRADIENTS),
    Fault("sums not scaled anew", NORMS, "                high *= ratio\n", "", GRADIENTS),
    Fault("no low parts", NORMS, 'total + tl.sum(low.to(tl.float64), axis=0), total)', "total, total)", GRADIENTS),
    Fault("NaN lost in the largest", NORMS, "nan = nan | (x != x).to(tl.int32)", "nan = nan | 0", GRADIENTS),
    Fault("an infinite part times a scale of 0", NORMS,
          'tl.where(part < float("inf"), part * _raise(ratio, power, KIND), part)', "part * _raise(ratio, power, KIND)",
          GRADIENTS),
    Fault("a factor above 1", NORMS, "tl.where(factor >= 1.0, 1.0, factor)", "factor", GRADIENTS),
    Fault("a factor of 1 that writes", NORMS, "    if factor != 1.0:\n", "    if factor > -1.0:\n", GRADIENTS),
    Fault("a tiny factor in float32", NORMS, "1.8446744073709552e19, 1.0)", "1.0, 1.0)", GRADIENTS),
    # -- Python: whole models
    Fault("fuse: a hook on an activation unseen", FUSION + "plan.py",
          "if act.module is not None and has_hooks(act.module):", "if False:", FUSE),
    Fault("fuse: alpha ignored", FUSION + "plan.py", 'elif user.kwargs.get("alpha", 1) != 1:', "elif False:", FUSE),
    Fault("fuse: an output used twice", FUSION + "plan.py", "if len(uses) > 1 and len(path) == 1:", "if False:", FUSE),
    Fault("fuse: a shared activation passed on", FUSION + "plan.py",
          "if taken[key] == len(analysis.calls[key])", "if taken[key]", FUSE),
    Fault("fuse: a module moved past a random one", FUSION + "plan.py",
          "if has_hooks(module) or isinstance(module, (_DropoutNd, nn.RReLU)):", "if has_hooks(module):", FUSE),
    Fault("fuse: members of a sequence that is opened", FUSION + "plan.py",
          "if key in opened and is_sequential(child):", "if False:", FUSE),
    Fault("fuse: broadcasting not seen at run time", FUSION + "runtime.py",
          "and x.shape == residual.shape", "and x.dim() == residual.dim()", FUSE),
    Fault("fuse: a flag not guarded", FUSION + "plan.py",
          "match.guarded = not is_sequential(match.trace.module)", "match.guarded = False", FUSE),
    Fault("fuse: no_grad lost", FUSION + "tracing.py", "if _modes() != self._modes_outside:", "if False:", FUSE),
    Fault("fuse: other answers not asked for", FUSION + "plan.py",
          "        _check_other_answers(match, matches)\n", "", FUSE),
    Fault("fuse: a PReLU's weight twice in state_dict", FUSION + "layers.py",
          "layer._prelu = (prelu,)", "layer._prelu = nn.ModuleList([prelu])", FUSE),
    Fault("fuse: plain twins left plain", FUSION + "__init__.py", "    twins.from_plain(model)\n", "",
          "tests/test_models.py"),
    Fault("unfuse: a process group lost", FUSION + "layers.py",
          'synchronised.process_group(vars(layer).pop("_group_name"))', 'vars(layer).pop("_group_name") and None',
          FUSE),
    Fault("fuse: pickled without its forward", FUSION + "rewriting.py",
          "function, arguments = _new, (base, code)", "function, arguments = base.__new__, (base,)", FUSE),
    Fault("fold: a batch norm after two uses of its layer", FUSION + "folding.py",
          "len(analysis.calls[id(module)]) == 1", "len(analysis.calls[id(module)]) >= 1", FUSE),
    Fault("half precision scaled beyond the bound", NORMS, "nearest - 5.9604644775390625e-08", "nearest", GRADIENTS),
    # -- clipping
    Fault("an unclipped gradient counted as changed", "vgkern/gradients/clipping.py",
          "        if factor != 1:\n", "        if True:\n", f"{CLIPPING}|rewritten"),
    Fault("gradients scaled before the error", "vgkern/gradients/lists.py",
          "    if not only_if_finite or total.isfinite():\n", "    if True:\n", f"{CLIPPING}|error_if_nonfinite"),
    Fault("gradients scaled before the error, C++", CPU_NORMS,
          "if (only_if_finite && !std::isfinite(all.total)) all.factor = 1;\n", "", f"{CLIPPING}|error_if_nonfinite"),
    Fault("groups of gradients out of order", "vgkern/gradients/lists.py",
          "zip(members, norms_of([gradients[i] for i in members], norm_type).unbind(), strict=True)",
          "zip(members[::-1], norms_of([gradients[i] for i in members], norm_type).unbind(), strict=True)",
          f"{CLIPPING}|order or every_kind"),
    Fault("the norm of one shard", "vgkern/gradients/lists.py",
          "        if placement.is_shard():\n            parts",
          "        if placement.is_replicate():\n            parts",
          f"{CLIPPER}|fully_sharded"),
    Fault("a changed version not noticed", HOT, "known->second.version == version_of(gradient)", "true",
          f"{CLIPPER}|changed"),
    Fault("another gradient not noticed", HOT, "known->second.address == array.data", "true", f"{CLIPPER}|changed"),
    Fault("a change behind autograd's back not noticed", HOT, "sample == known->second.sample && (", "(",
          f"{CLIPPER}|changed"),
    Fault("a beginning of zeros trusted", HOT, "(sample > 0 || array.count <= kSampled)", "true",
          f"{CLIPPER}|beginning"),
    Fault("the norm of another gradient", HOT, "known->second.norm", "known_.begin()->second.norm", CLIPPER),
    Fault("a clipped list counted as unclipped", CPU_NORMS, "  return all;\n", "  all.factor = 1;\n  return all;\n",
          CLIPPING),
    Fault("a clipped unit counted as unclipped", CPU_NORMS, "      written[i] = true;\n", "", CLIPPING),
    Fault("norms of the last step kept", "vgkern/gradients/clipper.py",
          "        self._give_back()\n        self._hot.forget()\n", "        self._give_back()\n",
          f"{CLIPPER}|accumulated"),
    Fault("norms of scaled gradients", "vgkern/gradients/clipper.py", "total = total / scale.to(total)", "pass",
          f"{CLIPPER}|grad_scaler"),
    Fault("a skipped step counted", "vgkern/gradients/clipper.py",
          "changed = changed & (skipped.to(changed.device) == 0)", "pass", f"{CLIPPER}|grad_scaler"),
    Fault("a closure's gradients not clipped", "vgkern/gradients/clipper.py",
          "            loss = given()\n            self._clip()\n", "            loss = given()\n",
          f"{CLIPPER}|closures"),
    # -- Statistics that processes share
    Fault("every process counts alike", "vgkern/ops.py",
          "offset = (counts * (means - origin)", "offset = (counts.mean(0) * (means - origin)", SYNC),
    Fault("means apart from the ranks' own", "vgkern/ops.py",
          "(squares + counts * deviations.square())", "squares", SYNC),
    Fault("no sums of the other processes", "vgkern/synchronised.py",
          'all_reduce(values, "sum", group.name)', 'all_reduce(values, "max", group.name)', SYNC),
    Fault("a bound of the process alone", "vgkern/synchronised.py",
          "norm = (sums[-1:] -", "norm = (scaled_dz_squares -", SYNC),
    Fault("a mean over the process alone", "vgkern/synchronised.py", "/ count.clamp(min=1)\n    rstd",
          "/ local[0].clamp(min=1)\n    rstd", SYNC),
    Fault("x̂ without the part of dγ", CPU, "dweight[c] = call_.mean_gradients[channels_ + c] * count_;",
          "dweight[c] = 0.0;", SYNC),
    Fault("the activation of a converted layer", "vgkern/batch_norms.py",
          "        new.__dict__.clear()\n", "        pass\n", SYNC),
    # -- Python
    Fault("a tile left out of the cut", "kernels/tuning.py",
          "num_splits = _cdiv(num_tiles, tiles_per_split)", "num_splits = max(num_tiles // tiles_per_split, 1)",
          "tests/test_triton_kernels.py|test_a_cut"),
    Fault("momentum the wrong way round", "vgkern/backends/reference.py",
          "running_var.lerp_(var, factor)", "running_var.lerp_(var, 1 - factor)", "tests/test_layers.py"),
    Fault("the gain upside down", "vgkern/gradients/record.py", "gain=input_ / output", "gain=output / input_", RECORD),
    Fault("sums and not means over backwards", "vgkern/gradients/record.py",
          'sums[f"grad_{name}_sq"] / backwards', 'sums[f"grad_{name}_sq"]', RECORD),
    Fault("a negative bound accepted", "vgkern/functional.py",
          "if not 0 <= low <= high:", "if not low <= high:", "tests/test_refusals.py tests/test_grad_norm_bounds.py"),
    Fault("a residual in another memory format", "vgkern/functional.py",
          "residual = residual.contiguous(memory_format=memory_format)", "residual = residual.contiguous()",
          "tests/test_layouts.py"),
    Fault("an expanded tensor taken for dense", "vgkern/ops.py",
          "            if stride != expected:\n", "            if stride > expected:\n",
          "tests/test_gradient_norms.py|dense"),
    Fault("a biased variance in the reference", "vgkern/backends/reference.py",
          "squares / (count - 1)", "squares / count", "tests/test_grid.py|reference"),
    # -- The monitor
    Fault("records that are not begun anew", MONITOR, "torch._foreach_zero_(taken)", "pass",
          "tests/test_monitor.py|ring"),
    Fault("a ring that does not turn", MONITOR, "self._written % self.capacity",
          "min(self._written, self.capacity - 1)", "tests/test_monitor.py|ring"),
    Fault("layers as they are registered", MONITOR, "sorted(range(len(places)), key=places.__getitem__)",
          "list(range(len(places)))", "tests/test_monitor.py|micro and cpu"),
    Fault("parameters' norms left scaled", "vgkern/gradients/history.py", "parameter_norms / unscale, NO_GRADIENT",
          "parameter_norms, NO_GRADIENT", "tests/test_monitor.py|loss_scale"),
    Fault("the living counted for dead", "vgkern/gradients/hooks.py", "(y == value).sum()", "(y != value).sum()",
          "tests/test_monitor.py|plain"),
    Fault("another module's gradient taken for dx", "vgkern/gradients/hooks.py", "if o == tuple(edge)[:2]", "if o[0]",
          "tests/test_monitor.py|plain"),
    Fault("vanishing taken for exploding", "vgkern/gradients/findings.py", "first / last if last",
          "last / first if first", "tests/test_doctor.py|planted"),
    Fault("the last layer to meet a NaN is named", "vgkern/gradients/findings.py", "index = int(bad[-1])",
          "index = int(bad[0])", "tests/test_doctor.py|root"),
    Fault("a path of zero gradient between branches is an illness", "vgkern/gradients/findings.py",
          "float(np.nanmax(gradient[:ends]))", "float(np.nanmin(gradient))", "tests/test_doctor.py|healthy"),
    # -- C++
    Fault("groups and slices swapped", CPU, "step.slices({unit(i) % groups, unit(i) / groups,",
          "step.slices({unit(i) / groups, unit(i) % groups,", CPU_KERNELS),
    Fault("a lower bound that does not bound", CPU, "std::clamp(norm, call_.min_norm, call_.max_norm)",
          "std::min(norm, call_.max_norm)", CPU_KERNELS),
    Fault("one slope's gradient of one channel", CPU, "    if (shared) gradient[0] = add_up(kActivationDweight);\n", "",
          CPU_KERNELS),
    Fault("bfloat16's exponent a bit short", CPU, "uint16_t{}, 0xff << 7", "uint16_t{}, 0x7f << 8", CPU_KERNELS),
    Fault("chunks of another scale merged unraised", CPU_NORMS, "std::pow(part->scale / whole.scale, p)",
          "part->scale / whole.scale", CPU_GRADIENTS),
    Fault("a tensor's last chunk given to the next", CPU_NORMS,
          "(arrays[i].count + kChunkElements - 1) / kChunkElements", "arrays[i].count / kChunkElements", CPU_GRADIENTS),
    Fault("a parameter listed twice counted twice", "csrc/tensors.cpp",
          "if (!seen.insert(gradient.ptr())) continue;", "seen.insert(gradient.ptr());", f"{CLIPPING}|twice"),
    Fault("the first stride not looked at", "csrc/tensors.cpp",
          "(units == 1 || strides[0] == count / units)", "true", f"{CLIPPING}|any_memory"),
    Fault("no eps in adaptive clipping", CPU_NORMS, "clip_factor * std::max(norm(weight, at), eps)",
          "clip_factor * norm(weight, at)", f"{CLIPPING}|adaptive and cpu"),
    Fault("shapes not looked at, C++", ORDINARY, " && std::equal(shape, shape + rank, view.shape)", "",
          "tests/test_refusals.py"),
    # -- what is computed for each channel
    Fault("biased running variance, C++", CHANNELS, "var * correction", "var", CPU_KERNELS),
    Fault("the first slice skipped", CHANNELS, "int64_t slice = 0; slice < slices",
          "int64_t slice = slices > 1; slice < slices", CPU_KERNELS),
    Fault("of a channel's slices the last alone", CHANNELS, "total += load_some_wide<float>(parts",
          "total = load_some_wide<float>(parts", CPU_KERNELS),
    Fault("no dβ/m in dx, C++", CHANNELS, "map<R>(mean_of, scale * dbias)", "Wide<R>(0.0)", CPU_GRID),
    Fault("the wrong sign of κ", CHANNELS, "(two - kappa) * dweight", "(two + kappa) * dweight", CPU_KERNELS),
    Fault("a mean of one part, C++", CHANNELS, "shift = bias - rest * scale", "shift = bias", CPU_GRID),
    Fault("momentum above a half the wrong way round, C++", CHANNELS, "Wide<R>(1.0 - momentum) * difference",
          "Wide<R>(momentum) * difference", "tests/test_layers.py tests/test_functional.py|running or momentum"),
    Fault("channels beside whole vectors not written", CHANNELS, "if (rest > 0) store_some",
          "if (rest >= kLanes<double>) store_some", CPU_KERNELS),
    Fault("channels beside whole vectors read as 0", CHANNELS, "rest > 0 ? load_some",
          "rest >= kLanes<double> ? load_some", CPU_KERNELS),
    Fault("a parameter's NaN with its payload", CHANNELS, "channel, plain_nan(v), lanes", "channel, v, lanes",
          CPU_KERNELS),
    Fault("a gradient's NaN with its payload", CHANNELS, "plain_nan(narrow(load_some_wide<R>(source + c, lanes)))",
          "narrow(load_some_wide<R>(source + c, lanes))", CPU_KERNELS),
    Fault("columns of a channel added up without their tail", CHANNELS, "if (i < width) total[1] +=",
          "if (false) total[1] +=", CPU_KERNELS),
    Fault("an infinite mean in two parts, Triton", BATCH_NORM, 'tl.where(tl.abs(hi) < float("inf"), values - hi, 0.0)',
          "values - hi", "tests/test_values.py|triton and infinite"),
    Fault("a scale rounded away from 0", CHANNELS, "as_int(nearest) - IntVec<float>(1)", "as_int(nearest)",
          "tests/test_values.py|cpu"),
    Fault("far channels seen in the last vector alone", CHANNELS, "any |= is_far", "any = is_far", CPU_KERNELS),
    Fault("a slice's NaN seen in the last vector alone", CHANNELS, "zero += all - all", "zero = all - all",
          CPU_KERNELS),
    Fault("channels measured from the first one's elements", CHANNELS, "gathered[lane] = elements[lane * pitch]",
          "gathered[lane] = elements[0]", CPU_KERNELS),
    Fault("a channel measured from an infinite element", CHANNELS, "select(is_finite(origin), origin, Vec<R>(R(0)))",
          "origin", "tests/test_values.py|cpu"),
    Fault("a channel measured from a single element", CHANNELS, "std::is_same_v<T, float> ? kOriginSamples : 1", "1",
          CPU_KERNELS),
    Fault("numbers of a channel's first column alone", CPU, "from + column * channels_ * size", "from", CPU_KERNELS),
    Fault("no remainder of 0 in a scale", CHANNELS,
          "select(scale_low == zero, narrow(scale * Wide<R>(0x1p-60)), scale_low)", "scale_low",
          "tests/test_values.py|cpu"),
    Fault("an infinite remainder in a shift", CHANNELS, "is_finite(shift_low) & (shift_low != zero)",
          "shift_low != zero", "tests/test_values.py|cpu"),
    Fault("a pivot that is no number taken from the mean", CHANNELS,
          "select(is_finite(pivot), mean - pivot, Vec<double>(0.0))", "mean - pivot", "tests/test_values.py|cpu"),
    # -- C++ headers
    Fault("half precision scaled to the nearest", "csrc/norm_kernels.h",
          "toward_zero<T>(narrow(Wide<R>(load(x + i)) * wide_factor))", "narrow(Wide<R>(load(x + i)) * wide_factor)",
          "tests/test_gradient_norms.py|cpu and half"),
    Fault("relu'(0) = 1", "csrc/activations.h",
          "  explicit Relu(const double*) {}\n"
          "  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return max(Vec<R>(0), z); }\n"
          "  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return ~(z <= Vec<R>(0)); }",
          "  explicit Relu(const double*) {}\n"
          "  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return max(Vec<R>(0), z); }\n"
          "  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return ~(z < Vec<R>(0)); }",
          "tests/test_values.py|cpu"),
    Fault("float16 by the processor's reciprocal as it is", "csrc/simd_math.h",
          "struct Math<float16> : Math<float> {\n",
          "struct Math<float16> : Math<float> {\n  static constexpr bool kBareReciprocal = true;\n", SIMD),
    Fault("a sigmoid that overflows where it is not 0", "csrc/simd_math.h", "Vec<R>(-24)", "Vec<R>(0)", SIMD),
    Fault("a coarse expm1 cut off below its overflow", "csrc/simd_math.h", "kExp2Max = 128.25f", "kExp2Max = 127.25f",
          SIMD),
    Fault("a coarse expm1 from beyond its overflow", "csrc/simd_math.h", "kExp2Max = 128.25f", "kExp2Max = 128.75f",
          SIMD),
    Fault("a coarse tanh from beyond its polynomials", "csrc/simd_math.h", "kTanhMax = 5;", "kTanhMax = 6;", SIMD),
    Fault("a coarse tail as a polynomial of the other quotient", "csrc/simd_math.h", "polynomial(t, M::kTail)",
          "polynomial(a * t, M::kTail)", SIMD),
    Fault("pivots not looked at", "csrc/tiles.h", "any |= bits(load(pivots + i", "any &= bits(load(pivots + i",
          CPU_KERNELS + "|far_from_0"),
    Fault("pivots looked at in the first vector alone", "csrc/tiles.h",
          "count = tile.across ? tile.width : tile.channels;",
          "count = tile.across && tile.width > 16 ? 16 : tile.channels;", CPU_KERNELS + "|far_from_0"),
    Fault("gradients by the forward's coarser functions", "csrc/tiles.h",
          "Math<std::conditional_t<sizeof(T) == 2, float16, T>>", "Math<T>", CPU_KERNELS + "|across_the_batch"),
    Fault("a bounded dx written as it comes", "csrc/tiles.h", " && tile.dx_factor == 1.0", "",
          CPU_KERNELS + "|norm_bounds"),
    Fault("a leaky slope's product cut off", "csrc/activations.h", "struct LeakyRelu : Traits<Reads::mask> {\n",
          "struct LeakyRelu : Traits<Reads::mask> {\n  static constexpr bool passes_dy = true;\n", CPU_KERNELS),
    Fault("a leaky slope lost in the backward", "csrc/activations.h",
          "select(on, dy, dy * slope)", "select(on, dy, dy)", CPU_GRID),
    Fault("a tail counted as dead", "csrc/tiles.h", "bits(mask) : bits(mask) & at.bits()", "bits(mask) : bits(mask)",
          CPU_KERNELS),
    Fault("the living of a mask counted as dead", "csrc/tiles.h", "(slopes.off == 0 ? off : 0)",
          "(slopes.off == 0 ? counted : 0)", CPU_KERNELS),
    Fault("a tail of zeros in the statistics", "csrc/tiles.h",
          "load_block<true>(x, static_cast<const T*>(pass.tile.x), at, fill)",
          "load_block<true>(x, static_cast<const T*>(pass.tile.x), at, R(0))", CPU_KERNELS),
    Fault("the wrong sign in dx, C++", "csrc/tiles.h", "fma(d.dz[j], scale[j], fma(deviation[j], slope[j], shift[j]))",
          "fma(d.dz[j], scale[j], fma(deviation[j], slope[j], -shift[j]))", CPU_GRID),
    Fault("the first half of a loaded pair twice", "csrc/vec.h", "b = spread<1>(both);", "b = spread<0>(both);",
          CPU_KERNELS),
    Fault("the bits of a pair of vectors swapped", "csrc/vec.h", "_mm512_kunpackw(high.k, low.k)",
          "_mm512_kunpackw(low.k, high.k)", CPU_KERNELS),
    Fault("a usual forward without its mask", "csrc/tiles.h", "        if (is_usual(USUAL) || pass.tile.saved_mask) {",
          "        if (!is_usual(USUAL) && pass.tile.saved_mask) {", CPU_KERNELS),
    Fault("statistics that are to be made again left out", "csrc/batch_norm.cpp", "return input.any_again(); }",
          "return false; }", "tests/test_cpu_kernels.py"),
    Fault("squares of dy that are too large for float32 not made again", "csrc/batch_norm.cpp",
          "if (row == shared ? shared_good :", "if (row == shared ? true :", CPU_KERNELS),
    Fault("squares of dy left in registers widened twice", "csrc/tiles.h", "    squares[0] = squares[1] = S(0);\n", "",
          CPU_KERNELS),
    Fault("half of each strip's squares lost", "csrc/tiles.h", "total[0] += Wide<R>(half[0] + half[1]);",
          "total[0] += Wide<R>(half[0]);", CPU_KERNELS),
    Fault("columns of a pair swapped in a sum", "csrc/tiles.h", "total[0] += Wide<R>(half[0]);",
          "total[0] += Wide<R>(half[1]);", CPU_KERNELS),
    Fault("a band's last row skipped", "csrc/tiles.h", "first_row + band < tile.runs ? first_row + band :",
          "first_row + band < tile.runs ? first_row + band - 1 :", CPU_KERNELS),
    Fault("rows of several vectors taken for rows of one", "csrc/tiles.h",
          "of_one_vector = tile.stride == kStep && tile.width == kStep &&", "of_one_vector =", CPU_KERNELS),
    Fault("a stage's last line lost", "csrc/tiles.h", "    copy(end - to);\n", "", CPU_KERNELS),
    Fault("every tie of bfloat16 rounded down", "csrc/vec.h", "constexpr int kAOrBAndC = 0xf8;",
          "constexpr int kAOrBAndC = 0xf0;", CPU_KERNELS),
    Fault("every tie of bfloat16 rounded up", "csrc/vec.h", "constexpr int kAOrBAndC = 0xf8;",
          "constexpr int kAOrBAndC = 0xfa;", CPU_KERNELS),
    Fault("a thread's first channel not set", CPU, "set_normalisation_of(input, begin, end);",
          "set_normalisation_of(input, begin + 1, end);", CPU_KERNELS),
    Fault("an outlier's new statistics not merged", CPU, "if (any(again_, begin, end)) sums_.merge(begin, end, 0, 2);",
          "", CPU_KERNELS),
    Fault("a pair's tail one lane too long", "csrc/vec.h", "(1u << 16 << lanes) - 1", "(1u << 17 << lanes) - 1",
          CPU_KERNELS),
    Fault("the first half of a pair streamed twice", "csrc/vec.h", "_mm512_extracti64x4_epi64(both, 1)",
          "_mm512_extracti64x4_epi64(both, 0)", CPU_KERNELS),
    Fault("a pair's second term with the first's deviation", "csrc/tiles.h", "b * deviation[j + 2]",
          "b * deviation[j]", CPU_KERNELS),
    Fault("squares that vanish not seen", CPU, "squares.finite && hold(squares)", "squares.finite", CPU_KERNELS),
    Fault("squares that overflow not seen", CPU, "squares.finite && hold(squares)", "hold(squares)", CPU_KERNELS),
    Fault("differences rounded before they are summed", "csrc/tiles.h", "kSumsX = std::is_same_v<T, float> &&",
          "kSumsX = false && std::is_same_v<T, float> &&", CPU_KERNELS),
    Fault("bits of small planes taken as they lie", "csrc/tiles.h", "if (!gaps) {", "if (true) {", CPU_KERNELS),
    Fault("bits of rows together taken as they lie", CPU, "tile.bits_stretch = together_ > 1 ? shape_.channels : 0",
          "tile.bits_stretch = 0", CPU_KERNELS),
    Fault("rows of a few bits that are read beyond them", CPU, "shape_.channels % 8 != 0 && rows *", "false && rows *",
          CPU_KERNELS),
    Fault("gaps between rows of one vector passed over", "csrc/tiles.h", "tile.width == kStep && !gaps",
          "tile.width == kStep", CPU_KERNELS),
    Fault("bits before a vector's cleared", "csrc/tiles.h", "(word & before) | expand_bits", "expand_bits",
          CPU_KERNELS),
    Fault("of the bits before a row's last ones a byte kept", "csrc/tiles.h",
          "    if (before > 0xff) std::memcpy(&word, row + byte, sizeof word);\n", "", CPU_KERNELS),
    Fault("bits beyond a row's end", "csrc/tiles.h", "first_byte < last_byte ? first_byte : last_byte", "first_byte",
          CPU_KERNELS + "|beyond_a_tensor"),
    Fault("stretches of bits gathered one upon the other", "csrc/vec.h", "    filled += count;\n", "", CPU_KERNELS),
    Fault("bits of two vectors that do not fit a word", "csrc/tiles.h",
          "!gaps || fit_word(2 * kStep, tile.bits_stretch)", "true", CPU_KERNELS),
    Fault("sums of columns begun with what was there", SMALL_PLANES,
          "  each(needs.sums, [&](int row) { std::fill_n(sums_ + row * padded_, padded_, 0.0); });\n", "", CPU_KERNELS),
    Fault("columns without the residual's numbers", SMALL_PLANES,
          "  each(needs.residual_parameters, [&](int row) { expand(kParameters + row); });\n", "",
          "tests/test_double_batch_norm.py " + CPU_KERNELS),
    Fault("sums of all columns lost", SMALL_PLANES,
          "planes.sums[row * planes.padded_channels] += sums_[row * padded_];", "continue;", CPU_KERNELS),
    Fault("planes of fewer bits than are read taken across", SMALL_PLANES,
          "tile.channels * mask_bytes(tile.width) >= 8", "true", CPU_KERNELS),
    Fault("a few planes that are left streamed", CPU,
          "    tile.outputs = Outputs::cached;  // a few planes", "    // a few planes", CPU_KERNELS),
    Fault("columns streamed where they are not whole lines", CPU,
          "elements * size_ % kLineBytes == 0", "true", CPU_KERNELS),
    Fault("z of columns without its scale", CPU, "evaluates_z() ? kReadForZ : set_of(kPivot)", "set_of(kPivot)",
          CPU_KERNELS),
    Fault("z of columns without its scale, a second time", CPU,
          "kernels == &kernels_ && !tile.dz && evaluates_z() ? kReadForZ : 0", "0", CPU_KERNELS),
    Fault("a slope's gradient not made of columns", CPU,
          "    if (call_.activation_weight.data) needs.sums |= set_of(kActivationDweight);\n", "", CPU_KERNELS),
    Fault("frozen statistics' dx of columns without its scale", CPU, "(tile.dx ? scaled : 0)", "0", CPU_KERNELS),
    Fault("‖dx‖ of columns that cancel not made", CPU, "any_cancels ? set_of(kDxSquares, kDresidualSquares) : 0", "0",
          "tests/test_grad_record.py tests/test_double_batch_norm.py"),
    Fault("whole vectors streamed where none is aligned", CPU,
          "return shape_.spatial % lanes() == 0", "return true", CPU_KERNELS),
    Fault("rows of a bit each taken together", CPU, "    if (shape_.channels == 1) return 1;", "",
          CPU_KERNELS + "|mask_bits"),
    Fault("rows taken together that are not so many", CPU, "return height_ % rows == 0 &&", "return", CPU_KERNELS),
    Fault("sums without the second row of a pair", CPU, "      add_up_columns(tile.sums, 0, reduced_);\n", "",
          CPU_KERNELS),
    Fault("sums of columns in the wrong row", SMALL_PLANES, "planes.sums + row * planes.padded_channels",
          "planes.sums + row", CPU_KERNELS),
    Fault("dz of all runs kept in the first one's place", "csrc/tiles.h",
          "static_cast<R*>(tile.dz) + first * run + begin", "static_cast<R*>(tile.dz) + begin",
          CPU_KERNELS + "|in_parts"),
    Fault("dz of all parts of a plane kept in the first one's place", "csrc/tiles.h",
          "static_cast<R*>(tile.dz) + first * run + begin", "static_cast<R*>(tile.dz) + first * run",
          CPU_KERNELS + "|in_parts"),
    Fault("all parts of a plane begin where it does", "csrc/tiles.h",
          "part.offset = tile.offset + first * tile.stride + begin;",
          "part.offset = tile.offset + first * tile.stride;", CPU_KERNELS + "|in_parts"),
    Fault("a part goes on to the runs of the next", "csrc/tiles.h",
          "part.runs = runs < tile.runs - first ? runs : tile.runs - first;", "part.runs = tile.runs - first;",
          CPU_KERNELS + "|in_parts"),
    Fault("of a tile's dead elements those of its last part", "csrc/tiles.h", "pass.counted += derive(part);",
          "pass.counted = derive(part);", CPU_KERNELS + "|in_parts"),
    Fault("dz of all slices kept in one place by all threads", CPU, "kept.data() + kept_bytes * unit(i)", "kept.data()",
          CPU_KERNELS + "|number_of_threads"),
    Fault("memory for the dz of one group alone", CPU, "const Scratch kept(kept_bytes * groups * slices);",
          "const Scratch kept(kept_bytes * slices);", CPU_KERNELS + "|number_of_threads"),
    Fault("dz looked for where there was no memory to keep it", CPU,
          "kept.data() ? kept.data() + kept_bytes * unit(i) : nullptr", "kept.data() + kept_bytes * unit(i)",
          f"{MEMORY}|waits"),
    Fault("dz of a cheap activation kept", CPU, "half && kernels_.costly &&", "half &&", f"{MEMORY}|waits"),
    Fault("memory of dz kept for ever", CPU, "    if (block_.data) release_memory(block_);\n", "", f"{MEMORY}|waits"),
    Fault("dz kept as it was before it is rounded", CPU, "!reads_dresidual() && !rounded", "!reads_dresidual()",
          CPU_KERNELS),
    Fault("dz of a normalised residual rounded where it is not kept", "csrc/tiles.h",
          "if (tile.residual && !tile.normalises_residual) {", "if (tile.residual) {",
          "tests/test_double_batch_norm.py|no_memory"),
    Fault("rows of less than a vector taken for whole ones", "csrc/tiles.h",
          "tile.stride == kStep && tile.width == kStep", "tile.stride == kStep", CPU_KERNELS),
    Fault("every run staged for the first", "csrc/tiles.h", "stream_run(stages_[i], targets_[i] + first)",
          "stream_run(stages_[i], targets_[i] + tile_.offset)", CPU_KERNELS),
    Fault("a tile without its mask taken for a usual one", "csrc/tiles.h", "(F::reads == Reads::mask && tile.mask)",
          "F::reads == Reads::mask", CPU_KERNELS),
    Fault("two batch norms taken for a usual one", "csrc/tiles.h",
          "tile.x && tile.normalises && !tile.normalises_residual && !tile.dz", "tile.x && tile.normalises && !tile.dz",
          "tests/test_double_batch_norm.py"),
    Fault("squares that float32 does not hold", CPU, "const bool hold = squares_hold(slice.group, slice.index);",
          "const bool hold = true;", "tests/test_cpu_kernels.py|vanish"),
    Fault("an outlier as the origin", CPU, "constexpr double kFarOutlier = 15.0 / 16.0;",
          "constexpr double kFarOutlier = 2.0;", "tests/test_cpu_kernels.py|outliers"),
    Fault("a small output's memory kept for ever", OUTPUTS, "      std::free(self);\n", "", f"{MEMORY}|small"),
    Fault("all blocks at the beginning of a page", "csrc/memory_pool.cpp",
          "{begin + kOffsets[count % std::size(kOffsets)], ",
          "{begin, ", f"{MEMORY}|different_lines"),
    Fault("all blocks at one line of a page", "csrc/memory_pool.cpp", "count % std::size(kOffsets)", "0",
          f"{MEMORY}|different_lines"),
    Fault("a block shorter than it says by its offset", "csrc/memory_pool.cpp",
          "const size_t occupied = bytes + page_size();", "const size_t occupied = bytes;", MEMORY),
    Fault("a block kept for ever", OUTPUTS, "if (block.data != nullptr) release_memory(block);\n      std::free",
          "std::free", MEMORY),
    Fault("an output with the strides of another", OUTPUTS, "std::copy_n(like.strides, like.ndim, tensor->strides);",
          "std::reverse_copy(like.strides, like.strides + like.ndim, tensor->strides);",
          f"{MEMORY}|empty_like or small"),
    Fault("a large mask on the heap", OUTPUTS, "bytes < kPooled ? MemoryBlock{} : acquire_memory(bytes)",
          "MemoryBlock{}", f"{MEMORY}|mask"),
    Fault("an output with gaps", OUTPUTS, "if (in_a_format && ", "if (", MEMORY),
    Fault("integers of the pool", OUTPUTS, "code_of(view.dtype) >= 0 && ", "", MEMORY),
    Fault("small outputs by DLPack with the pool off", OUTPUTS, "memory_statistics().limit != 0 && ", "",
          f"{MEMORY}|small"),
    Fault("small outputs that torch does not fill", OUTPUTS, " && !is_deterministic()) {", ") {",
          f"{MEMORY}|leaves_out"),
    Fault("statistics and masks that torch does not fill", OUTPUTS, "is_deterministic() || ", "",
          f"{MEMORY}|leaves_out"),
    Fault("large outputs that nobody fills", OUTPUTS, "is_deterministic() && fills_what_is_empty()", "false",
          f"{MEMORY}|nobody_wrote"),
    Fault("large outputs filled against the user's will", OUTPUTS, " && fills_what_is_empty()", "",
          f"{MEMORY}|nobody_wrote"),
    Fault("a config kept for ever", NODE, "owned(PyTuple_Type.tp_new(given_once.config, arguments.ptr(), nullptr))",
          "py::reinterpret_borrow<py::object>(PyTuple_Type.tp_new(given_once.config, arguments.ptr(), nullptr))",
          UNWATCHED),
    Fault("a batch with gaps taken for channels_last", "csrc/tensors.cpp", "return follows(0) && all;", "return all;",
          f"{MEMORY}|other_tensors"),
    Fault("an undefined gradient made zeros", NODE, "materialize_grads, Py_False", "materialize_grads, Py_True",
          f"{AUTOGRAD}|undefined"),
    Fault("a node that keeps an x it does not read", NODE, "reads_x ? x : Py_None", "x", AUTOGRAD),
    Fault("a node that does not notice new running statistics", NODE,
          "given[kActivationWeight], frozen_mean, frozen_var", "given[kActivationWeight], Py_None, Py_None", AUTOGRAD),
    Fault("saved tensors that hooks changed", NODE, "hooks.is_none() ? Py_False : Py_True", "Py_False", UNWATCHED),
    Fault("no second derivative from the node", NODE, "says_yes(torch().is_grad_enabled) || ", "", AUTOGRAD),
    Fault("a backward pass that nobody sees", NODE, "is_watched() ||", "", UNWATCHED),
    Fault("a backward pass by another backend", NODE, "is_watched() ||\n      !is_backend_of_cpu()", "is_watched()",
          UNWATCHED),
    Fault("dy taken as it comes", NODE, "if (!in_format) {", "if (false) {", "tests/test_layouts.py"),
    Fault("dx that only the residual's gradient needs", NODE, "need(kX) || (shared && need(kResidual))", "need(kX)",
          AUTOGRAD),
    Fault("a gradient for no residual", NODE, "!need(kResidual) ? Py_None : shared", "shared", AUTOGRAD),
    Fault("an eps of 0 let pass", NODE, " || !(PyFloat_AS_DOUBLE(eps) > 0)", "",
          "tests/test_refusals.py tests/test_layers.py"),
    Fault("a usual call of another backend", NODE, " || !is_backend_of_cpu()) return", ") return", USUAL),
    Fault("a usual call with a residual in another format", NODE,
          "  if (views[Place::kResidual].data != nullptr && format_of(views[Place::kResidual]) != format) "
          "return py::none();\n", "", USUAL),
    Fault("a usual call with statistics that are slices", NODE,
          "  if (follow && !takes_running_statistics(views[Place::kRunningMean], views[Place::kRunningVar], "
          "given[kCounter]))\n    return py::none();\n", "", USUAL),
    Fault("a usual call that does not count", NODE,
          "  if (is_true(given[kFollow]) && !follow && given[kCounter] != Py_None) return py::none();\n", "", USUAL),
    Fault("a usual call without a graph", NODE, "bool records = false;\n  if (says_yes",
          "bool records = false;\n  if (!says_yes", USUAL),
    Fault("autograd not told of new running statistics", NODE,
          "    owned(PyObject_CallOneArg(torch().increment_version, state.ptr()));\n", "", USUAL),
    Fault("statistics in eval mode that follow", NODE, "is_true(given[kFollow]) && running_mean", "running_mean",
          USUAL),
    Fault("a learned slope left out", NODE, "is_true(row_of(given[kActivation])[kLearns]) || ", "",
          "tests/test_refusals.py tests/test_layers.py"),
    Fault("types of parameters not looked at", ORDINARY, "    if (!(view.dtype == first->dtype)) return false;\n", "",
          "tests/test_refusals.py"),
    Fault("float64 beside half precision", ORDINARY, "(half && first->dtype == kFloat32Type)", "half",
          "tests/test_refusals.py"),
    Fault("one value a channel, C++", ORDINARY,
          "  if (training && count_of(input) == input.shape[1]) return false;\n", "", "tests/test_refusals.py"),
    Fault("running statistics that want gradients, C++", ORDINARY, "  return !has_mean ||", "  return true ||",
          "tests/test_refusals.py"),
    *(Fault(f"not looked for: {name}", WATCHERS, text, "", UNWATCHED) for name, text in {
        "dispatch modes":
            '          {held("torch._C", "_len_torch_dispatch_stack"), py::int_(0).release().ptr()},\n',
        "function modes":
            '          {held("torch._C", "_len_torch_function_stack"), py::int_(0).release().ptr()},\n',
        "transforms":
            '          {held("torch._C", "_are_functorch_transforms_active"), py::bool_(false).release().ptr()},\n',
        "jit.trace": '          {held("torch._C", "_get_tracing_state"), py::none().release().ptr()},\n',
        "fx":
            '          {held("torch.fx._symbolic_trace", "is_fx_symbolic_tracing"), '
            "py::bool_(false).release().ptr()},\n",
        "forward mode": '          flag("torch.autograd.forward_ad", "_current_level", py::int_(-1)),\n',
        "the profiler": '          flag("torch.autograd.profiler", "_is_profiler_enabled", py::bool_(false)),\n',
    }.items()),
    Fault("an infinite mean refined, reference", "vgkern/backends/reference.py",
          "torch.where(mean.isfinite(), rest, 0.0)", "rest", "tests/test_values.py|reference and infinite"),
    Fault("‖dx‖ without the second row of a pair", CPU,
          "    if (any_cancels) add_up_columns(tile.sums, kDxSquares, kSums);\n", "", CPU_KERNELS),
    Fault("a pair's parameters in its first row alone", CPU,
          "column < grid_.columns_of_channel(); ++column) {\n      const int64_t i",
          "column < 1; ++column) {\n      const int64_t i", CPU_KERNELS),
    Fault("a pair's masks of one row", CPU,
          "tile.mask_stride = together_ * mask_bytes", "tile.mask_stride = mask_bytes", CPU_KERNELS),
    Fault("a slice that ends within a pair", CPU, "even(ceil_div(height_, extent))), multiple);",
          "even(ceil_div(height_, extent))), 1);",
          CPU_KERNELS),
    Fault("bits that do not fill bytes taken as they lie", CPU, "if (!mask || stretch % 8 == 0) return",
          "if (true) return", CPU_KERNELS),
    Fault("a slope of each channel taken for one", CPU, "statistics || call.activation_weight_size > 1", "statistics",
          CPU_KERNELS),
    Fault("a part of rows taken together", CPU, "group_ = together_ > 1 ?", "group_ = false ?", CPU_KERNELS),
    Fault("groups of channels whose bits share a byte", CPU, "kGroupMultiple = 64;", "kGroupMultiple = 4;",
          CPU_KERNELS),
    Fault("a bad channel that spoils its neighbours", CPU, "shared_good : stays[i - begin] != 0)",
          "shared_good : stays[i - begin] == 0)",
          "tests/test_cpu_kernels.py|bad_value"),
    Fault("a tail left out of a norm", "csrc/norm_kernels.h",
          "  if (i < count) body(kSecond, load(x + i, static_cast<int>(count - i), R(0)));\n", "", CPU_GRADIENTS),
    Fault("NaN lost in the largest, C++", "csrc/norm_kernels.h", "    nan[chain] = nan[chain] | is_nan(v);\n", "",
          CPU_GRADIENTS),
]  # fmt: skip


# -- copies of the tree ------------------------------------------------------------------------------------------------


def copy_tree(target: Path) -> None:
    """What git tracks or would, the built extension with its object files, and `kernels` under its installed name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for extension in (ROOT / "vgkern").glob("_C.*"):
        shutil.copy2(extension, target / "vgkern")
    if (ROOT / "build").is_dir():  # its object files: of these, only what is out of date is compiled
        shutil.copytree(ROOT / "build", target / "build")
    # An editable install says where vgkern.kernels is; this comes before it.
    (target / "vgkern/kernels").symlink_to("../kernels")


def build(tree: Path) -> None:
    """Compile what is out of date, into object files that later copies start from."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode or "error" in done.stderr.lower():
        raise RuntimeError(f"the extension does not build:\n{done.stderr[-3000:]}")


def rebuild(tree: Path, file: str) -> None:
    """The extension after a fault in ``file``; of a header, only the instruction set that is used is compiled anew."""
    source = tree / file
    if source.suffix == ".h":
        from vgkern.backends import cpu

        os.utime(source, (0, 0))  # older than any object file
        for compiled in (tree / "build").rglob(f"isa/{cpu.available_isas()[0]}.o"):
            compiled.unlink()
    else:
        os.utime(source)
    build(tree)


def pytest(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--no-header", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def first_failure(done: subprocess.CompletedProcess[str]) -> str:
    """The test that failed, or in which the process died; empty if all passed."""
    if done.returncode == 0:
        return ""
    if done.returncode > 0:
        found = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    else:
        found = re.findall(r"^(tests/\S+::.+?)(?: [A-Z]+ +\[ *\d+%\])?\s*$", done.stdout, re.MULTILINE)[-1:]
    if not found:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[0]


@functools.cache
def fails_anyway(pristine: Path, test: str) -> bool:
    """Whether a test fails without a fault too: asked once, for one test often catches many."""
    return bool(first_failure(pytest(pristine, test)))


def plant(fault: Fault, pristine: Path, folder: Path) -> Verdict:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        tree = Path(name, "tree")
        shutil.copytree(pristine, tree, symlinks=True)
        path = tree / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
        if fault.file.startswith("csrc/"):
            rebuild(tree, fault.file)
        paths, _, expression = fault.tests.partition("|")
        failed = first_failure(pytest(tree, *paths.split(), *(["-k", expression] if expression else [])))
        if failed and fails_anyway(pristine, failed):
            return Verdict(fault, "", time.monotonic() - begin, failed)
        return Verdict(fault, failed, time.monotonic() - begin)


def out_of_date(faults: list[Fault]) -> list[str]:
    """The faults whose text is not in its file exactly once, and names that stand twice."""
    wrong = []
    for fault in faults:
        times = (ROOT / fault.file).read_text().count(fault.old)
        if times != 1:
            wrong.append(f"{fault.name}: its text stands {times} times in {fault.file}")
        if fault.old == fault.new:
            wrong.append(f"{fault.name}: changes nothing")
    names = [fault.name for fault in FAULTS]
    return wrong + sorted({f"{name}: stands twice" for name in names if names.count(name) > 1})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Plant faults; tests must catch them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults whose name contains one of these; all if none")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="name the faults and plant none")
    args = parser.parse_args(arguments)
    faults = [f for f in FAULTS if not args.names or any(name in f.name for name in args.names)]
    if wrong := out_of_date(faults):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if args.list or not faults:
        print("\n".join(f"{fault.name}: {fault.file}; {fault.tests}" for fault in faults) or "no such fault")
        return 0 if faults else 1

    survived = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        pristine = folder / "pristine"
        copy_tree(pristine)
        if any(fault.file.startswith("csrc/") for fault in faults):
            build(pristine)
        for verdict in pool.map(lambda fault: plant(fault, pristine, folder), faults):
            outcome = f"caught by {verdict.caught_by}" if verdict.caught_by else "SURVIVED"
            if verdict.trouble:
                outcome = f"UNKNOWN: {verdict.trouble} fails without it as well"
            print(f"{verdict.fault.name} ({verdict.fault.file}): {outcome}, {verdict.seconds:.0f} s", flush=True)
            if not verdict.caught_by:
                survived.append(verdict.fault.name)
    print(f"{len(faults) - len(survived)} of {len(faults)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
