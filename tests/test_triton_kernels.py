"""The Triton kernels: what the grid that all backends share cannot see.

Cuts into many tiles, programs and splits; what is read and written, to the byte; the order of programs; and compilation
for the GPUs that are not here. The kernels run on a GPU if there is one, else on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
import triton_problems
from triton_problems import DEVICE, INF, DoubleProblem, Problem, assert_close, bits
from vgkern.kernels import activations, batch_norm, double_batch_norm, launching, tuning

from vgkern import ops
from vgkern.backends import reference
from vgkern.backends import triton as backend
from vgkern.verify import Case

# -- how a tensor is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "element"), sorted({row[:2] for row in tuning.TABLE}))
@pytest.mark.parametrize("live", [0, 1, 2])
def test_a_cut_covers_the_tensor_and_fits_the_machine(layout, element, live):
    sizes = (1, 2, 7, 31, 32, 33, 1000, 2**20 + 1)
    for outer, channels, spatial in itertools.product(sizes, sizes, (1, 49, 3136, 2**31 + 5)):
        inner = channels if layout == "rows" else spatial
        blocks = tuning.choose(layout == "rows", element, outer, channels, inner, live)
        for n in (blocks.runs, blocks.inner, blocks.channels, blocks.group, blocks.num_warps):
            assert n & (n - 1) == 0
        outer_block = blocks.runs if layout == "rows" else blocks.runs // blocks.channels
        per_run = 1 if layout == "rows" else -(-spatial // blocks.inner)
        assert blocks.num_tiles == -(-outer // outer_block) * per_run
        assert (blocks.num_splits - 1) * blocks.tiles_per_split < blocks.num_tiles
        assert blocks.num_tiles <= blocks.num_splits * blocks.tiles_per_split
        assert blocks.programs == -(-channels // blocks.channels) * blocks.num_splits < 2**31
        assert blocks.inner % 8 == 0
        assert layout == "planes" or blocks.inner == blocks.channels
        assert blocks.runs * blocks.inner <= 2**20  # Triton's largest block
        assert blocks.num_warps <= 16
        if blocks.resident:
            assert blocks.num_tiles == blocks.num_splits == 1


@triton.jit
def _offsets_kernel(
    out_ptr, tile, channel, num_outer, num_channels, inner_size,
    ROWS: tl.constexpr, RUNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    _, _, _, offset, inside = batch_norm._tile(
        tile, channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, INNER if ROWS else 1, 1
    )
    place = tl.arange(0, RUNS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    tl.store(out_ptr + place, tl.where(inside, offset, -1))


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(False, (40000, 3, 50021)), (False, (3, 2, 2**31 + 3)), (True, (2**26 + 3, 37, 37)), (True, (2**31 + 1, 5, 5))],
)
def test_offsets_reach_past_31_bits(rows, sizes):
    outer, channels, inner = sizes
    runs, width = 4, 8
    first_channel = channels - channels % 8 if rows else channels - 1
    per_run = 1 if rows else -(-inner // width)
    last_tile = -(-outer // runs) * per_run - 1
    out = torch.empty(runs, width, dtype=torch.int64, device=DEVICE)
    _offsets_kernel[(1,)](out, last_tile, first_channel, outer, channels, inner, rows, runs, width)
    expected = torch.full((runs, width), -1, dtype=torch.int64)
    for i, j in itertools.product(range(runs), range(width)):
        if rows:
            row, column = last_tile * runs + i, first_channel + j
            place = row * channels + column
        else:
            row, column = (outer - 1) // runs * runs + i, (per_run - 1) * width + j
            place = (row * channels + first_channel) * inner + column
        if row < outer and column < inner:
            expected[i, j] = place
    assert out.max() > 2**31
    assert torch.equal(out.cpu(), expected)


# -- many tiles, programs and splits -----------------------------------------------------------------------------------

# Sizes about a block of 16 (planes) or 8 (rows) elements and of 4 or 8 runs.
MANY_TILES = [
    Case(shape=(5, 3, 17)),
    Case(shape=(4, 2, 16), residual=False),
    Case(shape=(9, 2, 5, 3), activation="silu"),
    Case(shape=(3, 9, 1, 33), layout="channels_last"),
    Case(shape=(33, 8), activation="gelu", residual=False),
    Case(shape=(31, 17), activation="prelu"),
    Case(shape=(5, 3, 31), activation="prelu", training=False, dtype="bfloat16"),
    Case(shape=(4, 7, 3, 5), layout="channels_last", training=False, affine=False),
    Case(shape=(3, 5, 2, 17), layout="channels_last", dtype="float16", activation="hardsigmoid"),
    Case(shape=(3, 5, 18), dtype="float64", activation="mish", mean=1e4),
    Case(shape=(2, 3, 47), layer="add_act"),
    Case(shape=(2, 3, 47), layer="add_act", activation="prelu"),
]


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_many_tiles(small_blocks, case):
    case.assert_passes("triton")


# One less, as many, and one more than a block of 16 (planes) or 8 channels (rows), of one tile and of several; and than
# the 256 elements that a program of test_sizes_about_the_largest_resident_channel keeps.
@pytest.mark.parametrize("size", [7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize(("layout", "mode"), [("planes", "batch"), ("rows", "batch"), ("planes", "none")])
def test_sizes_about_a_block(small_blocks, layout, mode, size):
    for outer in (4, 5) if layout == "planes" else (8, 9):
        shape = (outer, 3, size) if layout == "planes" else (outer, size, 1)
        problem = Problem(shape, layout, mode, activation="leaky_relu")
        assert_close(problem.run(), problem.run(reference))


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("size", [16, 17, 32, 33])
def test_sizes_about_the_largest_resident_channel(small_blocks, layout, size):
    """With 8 samples, 16 elements a plane fit the backward's program and 32 the forward's; in rows half as many."""
    small_blocks(resident=256)
    problem = Problem((8, 3, size) if layout == "planes" else (size, 9, 1), layout)
    assert_close(problem.run(), problem.run(reference))


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_more_splits_than_a_merge_reads_at_once(small_blocks, layout):
    small_blocks(programs=512, splits=64)
    problem = Problem((8, 1, 300) if layout == "planes" else (300, 1, 1), layout, activation="prelu", bounds=(0.0, 0.1))
    _, launches = backend.forward_launches(*problem.forward_args())
    assert launches[-1].args["num_splits"] > launches[-1].args["SPLITS"]
    assert_close(problem.run(), problem.run(reference))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mean_of_1e4_costs_no_accuracy(small_blocks, layout, dtype):
    small_blocks(elements=1024, inner=128)
    Case(dtype=dtype, layout=layout, mean=1e4, activation="gelu").assert_passes("triton")


@pytest.mark.parametrize("channels", [2, 9])
def test_several_channels_a_program_of_planes(small_blocks, channels):
    small_blocks(elements=256, programs=2)
    assert tuning.choose(False, "interpreted", 5, channels, 7, 0).channels > 1 or channels == 2
    Case(shape=(5, channels, 7), activation="leaky_relu").assert_passes("triton")
    small_blocks(elements=256, programs=2, resident=4096)
    Case(shape=(5, channels, 7), activation="prelu").assert_passes("triton")


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_accuracy_does_not_depend_on_the_cut(small_blocks, layout):
    """Mean 1e4, standard deviation 1; and constant channels, y = bias + residual to the bit."""
    small_blocks(elements=512, inner=128, splits=3)
    problem = Problem((6, 4, 300), layout, activation="identity", mean=1e4)
    y, statistics, *_ = problem.run()
    x = problem.x.double()
    mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
    view = (1, -1, 1)
    weight, bias = problem.weight.double().view(view), problem.bias.double().view(view)
    exact = (x - mean.view(view)) / (var + 1e-5).sqrt().view(view) * weight + bias + problem.residual.double()
    assert (y - exact).abs().max() <= 2e-6
    torch.testing.assert_close(statistics[0], mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics[2], x.var((0, 2)), rtol=1e-6, atol=0)
    for c, value in enumerate((1e4, -1e8, 3e38, 0.1)):
        problem.x[:, c] = value
    y, statistics, _, dx, *_ = problem.run()
    assert torch.equal(statistics[0], problem.x[0, :, 0].double())
    assert torch.equal(y, problem.bias.view(view) + problem.residual)
    assert dx.isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e15])
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_squares_neither_vanish_nor_overflow(small_blocks, layout, scale):
    problem = Problem(layout=layout, activation="silu", scale=scale)
    record = problem.run()[-1]
    expected = problem.run(reference)[-1]
    assert expected[:5].min() > 0
    torch.testing.assert_close(record, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cancelling", [False, True])
@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_the_norm_of_the_record_is_that_of_the_dx_written(small_blocks, layout, cancelling):
    """By the closed form; and, where dy is almost constant and that form cancels, summed up from dx."""
    problem = Problem(layout=layout, activation="identity", residual=False)
    if cancelling:
        problem.dy[:, ::2] = problem.dy[:, ::2] * 1e-3 + 1.0
    for bounds in ((0.0, INF), (0.0, 0.01), (100.0, INF)):
        problem.bounds = bounds
        *_, record = results = problem.run()
        norm = results[3].double().square().sum()
        torch.testing.assert_close(record[2], norm, rtol=1e-6, atol=0)
        assert bounds[0] * (1 - 1e-6) <= norm.sqrt() <= bounds[1] * (1 + 1e-6)


@pytest.mark.parametrize("bounds", [(0.0, INF), (5.0, INF), (0.0, 1e-12)], ids=str)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("cut", ["walked", "resident"])
@pytest.mark.parametrize("noise", [0.1, 0.03, 1e-4, 0.0])
def test_a_gradient_that_cancels(request, cut, layout, noise, bounds):
    """dz = 1 − x̂/2 + noise, of which batch norm leaves the noise, or its own rounding. The record knows which."""
    if cut == "walked":
        request.getfixturevalue("small_blocks")(elements=128, inner=32)
    problem = Problem((6, 3, 40), layout, activation="relu6", bounds=bounds)
    problem.residual.fill_(3.0)  # so that no element is off
    problem.weight.fill_(0.5)
    problem.bias.zero_()
    _, statistics, mask = problem.forward()
    view = (1, -1, 1)
    normalised = (problem.x.double() - statistics[0].view(view)) * statistics[1].view(view)
    problem.dy.copy_(1 - normalised / 2 + noise * problem.dy.double())
    dx, dresidual, *_, record = problem.backward(statistics, mask)
    norm = dx.double().norm()
    assert torch.equal(dresidual, problem.dy)
    assert record[2].sqrt().item() == pytest.approx(norm.item(), rel=1e-6)
    if bounds == (0.0, INF):
        assert norm < (noise + 1e-5) * problem.dy.norm()
    else:
        assert norm.item() == pytest.approx(bounds[0] or bounds[1], rel=1e-6)


@pytest.mark.parametrize("cut", ["walked", "resident"])
@pytest.mark.parametrize("mode", ["batch", "running"])
def test_bounds_leave_alone_what_is_zero_or_not_finite(request, mode, cut):
    if cut == "walked":
        request.getfixturevalue("small_blocks")
    problem = Problem((4, 3, 40), mode=mode, activation="identity", residual=False, bounds=(5.0, INF))
    unbounded = Problem((4, 3, 40), mode=mode, activation="identity", residual=False)
    for value in (0.0, INF):
        problem.dy = unbounded.dy = torch.full_like(problem.dy, value)
        assert bits(problem.run()) == bits(unbounded.run())


@pytest.mark.parametrize("mode", ["batch", "running", "none"])
def test_scalars_keep_their_53_bits(small_blocks, mode):
    """ε, arguments of the activation and bounds that float32 would round, beside float64 data."""
    problem = Problem(mode=mode, activation="elu", dtype=torch.float64, bounds=(0.0, 0.1))
    problem.activation = "elu", [1 / 3]
    assert_close(problem.run(), problem.run(reference), rtol=1e-12, atol=1e-14)


# -- what is read and written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("mode", ["batch", "running"])
@pytest.mark.parametrize("wanted", range(6))
def test_what_is_not_wanted_is_empty(layout, mode, wanted):
    only = tuple(i == wanted for i in range(6))
    problem = Problem((3, 9, 5), layout, mode, activation="prelu")
    everything = problem.run()[3:]
    problem.wanted = list(only)
    for i, (got, full) in enumerate(zip(problem.run()[3:], everything, strict=True)):
        if only[i]:
            assert_close([got], [full])
        else:
            assert got.shape == (0,)


def test_x_is_not_read_where_the_mask_suffices():
    problem = Problem(mode="running", wanted=(True, True, False, True, False, False))
    _, statistics, mask = problem.forward()
    expected = problem.backward(statistics, mask)
    problem.x = torch.full_like(problem.x, math.nan)
    assert bits(problem.backward(statistics, mask)) == bits(expected)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_the_same_bits_from_run_to_run(small_blocks, layout):
    problem = Problem(layout=layout, activation="gelu")
    assert bits(problem.run()) == bits(problem.run())


def test_halves_are_rounded_to_nearest_even():
    values = torch.tensor([1.0, 1.0, -1.0, 3.0, 3.3895e38, INF, math.nan, 0.1])
    addends = torch.tensor([2**-8, 3 * 2**-9, -(2**-8), 2**-6 + 2**-7, 3.3895e38, 1.0, 1.0, 0.7])
    for dtype in (torch.bfloat16, torch.float16):
        x, residual = values.to(DEVICE, dtype), addends.to(DEVICE, dtype)
        y, *_ = backend.batch_norm_act_forward(
            x, residual, None, None, None, None, None, False, 1e-5, "identity", [], False
        )
        torch.testing.assert_close(y, x + residual, rtol=0, atol=0, equal_nan=True)


# -- the module's own promises -----------------------------------------------------------------------------------------


def test_no_atomics_and_no_import_of_the_package():
    for module in (activations, batch_norm, double_batch_norm, tuning):
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                assert "atomic" not in node.attr
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "vgkern" for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                assert (node.module or "").split(".")[0] != "vgkern"


def test_the_record_has_the_fields_of_the_contract():
    assert len(ops.RECORD_FIELDS) == Problem((2, 3, 4)).run()[-1].numel()


@pytest.mark.parametrize("x", [torch.ones(2, dtype=torch.int32), torch.ones(2, device="meta")], ids=str)
def test_tensors_that_are_refused(x):
    assert str(x.dtype) in backend.refuses(x) or x.device.type in backend.refuses(x)


def test_why_it_is_unavailable(monkeypatch):
    assert backend.unavailable() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(batch_norm, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in backend.unavailable()
    assert "CPU tensor" in backend.refuses(torch.ones(2))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backend.unavailable()


# -- compilation ahead of time -----------------------------------------------------------------------------------------

TARGETS = {
    "cuda:80": ("cuda", 80, 32),
    "cuda:90": ("cuda", 90, 32),
    "cuda:100": ("cuda", 100, 32),
    "hip:gfx942": ("hip", "gfx942", 64),
}

# Every kernel, both layouts, all dtypes; 10 seconds a target or so.
COMPACT = [
    {"shape": (32, 3, 3136)},
    {"shape": (10, 40, 10), "layout": "rows", "activation": "gelu", "residual": False, "dtype": torch.bfloat16},
    {"shape": (64, 40, 100), "layout": "rows", "activation": "prelu", "dtype": torch.float16, "bounds": (0.0, 1.0)},
    {"shape": (20, 40, 49), "mode": "running", "activation": "mish", "dtype": torch.float64},
    {"shape": (4, 1, 9)},  # sizes of 1 are constants to the compiler
    {"shape": (1, 1, 1), "mode": "none"},
]


DOUBLE = [
    {"shape": (32, 3, 3136)},
    {"shape": (6, 40, 10), "layout": "rows", "activation": "gelu", "dtype": torch.bfloat16},
    {"shape": (20, 40, 49), "mode": "running", "activation": "prelu", "dtype": torch.float64},
]


def _everything():
    """Each activation in every dtype and mode; channels that fit a program, and channels that do not."""
    for activation, dtype in itertools.product(activations.TABLE, ops.FLOATING_DTYPES):
        common = {"activation": activation, "dtype": dtype}
        yield {"shape": (20, 40, 49), "residual": False, **common}
        yield {"shape": (64, 16, 3136), "layout": "rows", "bounds": (0.0, 1.0), **common}
        yield {"shape": (20, 40, 49), "mode": "running", **common}
        yield {"shape": (20, 40, 16), "mode": "none", "layout": "rows", "residual": False, **common}


@pytest.mark.parametrize(
    ("target", "which"),
    [
        ("cuda:80", "compact"),
        ("hip:gfx942", "compact"),
        *(pytest.param(target, "compact", marks=pytest.mark.slow) for target in ("cuda:90", "cuda:100")),
        *(pytest.param(target, "everything", marks=pytest.mark.slow) for target in TARGETS),
    ],
)
def test_kernels_compile_for(target, which, tmp_path):
    """The launchers run as on that GPU, with a driver that compiles down to machine code and launches nothing."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # read when triton is imported: hence a process of its own
    result = subprocess.run(
        [sys.executable, __file__, target, which], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    names = {line.split()[0] for line in result.stdout.splitlines()}
    assert names == {*batch_norm.TENSORS, *double_batch_norm.TENSORS}


def _compile(target: str, which: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget(*TARGETS[target])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    launch = JITFunction.run
    done = set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin" if target.startswith("cuda") else "hsaco"]
        if kernel.hash not in done:
            done.add(kernel.hash)
            print(self.__name__, kernel.hash, flush=True)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    launching.on_device = lambda device: contextlib.nullcontext()
    _, arch, batch_norm.LANES = TARGETS[target]
    batch_norm._capability = lambda: arch
    triton_problems.DEVICE = "cpu"  # only the addresses' alignment matters
    for given in COMPACT if which == "compact" else _everything():
        problem = Problem(**given)
        _, statistics, mask, *_ = problem.run()
        if problem.training:
            problem.input_gradient(statistics, mask)
    doubles = DOUBLE if which == "compact" else (given for given in _everything() if given.get("mode") != "none")
    for given in doubles:
        DoubleProblem(**{k: v for k, v in given.items() if k not in ("residual", "bounds")}).run()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    _compile(*sys.argv[1:])
