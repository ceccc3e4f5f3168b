"""The Triton kernels: what the grid that all backends share cannot see.

Cuts into many tiles, programs and splits; what is read and written, to the byte; the order of programs; and compilation
for the GPUs that are not here. The kernels run on a GPU if there is one, else on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import inspect
import itertools
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from vgkern.kernels import activations, batch_norm, tuning

import vgkern
from vgkern import ops
from vgkern.backends import reference
from vgkern.backends import triton as backend
from vgkern.verify import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(not batch_norm.INTERPRETED, reason="looks into the interpreter; this run has a GPU")

ALL = (True,) * 6
INF = math.inf


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles of a few elements: every tensor is many tiles, programs and splits, and no channel fits one program."""

    def use(elements: int = 64, inner: int = 16, programs: int = 64, splits: int = 4, resident: int = 0) -> None:
        for layout, width in list(tuning.TABLE):
            limits = tuning.Limits(inner if layout == "planes" else 8, elements, resident, programs, splits, 512)
            monkeypatch.setitem(tuning.TABLE, (layout, width), limits)

    use()
    return use


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []
    kind = type(batch_norm.forward_apply_kernel)
    run = kind.run

    def counted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names


class Problem:
    """One call of both operators, with inputs from a fixed seed."""

    def __init__(
        self, shape=(6, 3, 34), layout="planes", mode="batch", activation="relu", residual=True,
        dtype=torch.float32, bounds=(0.0, INF), wanted=ALL, mean=0.0, scale=1.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def activations_of(values):
            values = values.to(DEVICE, dtype)
            return values.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else values

        channels = shape[1]
        spec = vgkern.activations.resolve(activation)
        self.x = activations_of(normal(*shape) + mean)
        self.residual = activations_of(normal(*shape)) if residual else None
        self.dy = activations_of(normal(*shape) * scale)
        normalise = mode != "none"
        self.weight, self.bias = normal(2, channels).to(DEVICE, dtype) if normalise else (None, None)
        self.running = (None, None)
        if mode == "running":
            self.running = (normal(channels) + mean).to(DEVICE), normal(channels).square().add(0.5).to(DEVICE)
        self.slope = normal(channels).to(DEVICE, dtype) if spec.row.learnable else None
        self.training = mode == "batch"
        self.activation = activation, list(spec.args)
        self.bounds = bounds
        present = (True, residual, normalise, normalise, spec.row.learnable, True)
        self.wanted = [a and b for a, b in zip(present, wanted, strict=True)]

    def forward(self, implementation=backend):
        return implementation.batch_norm_act_forward(
            self.x, self.residual, self.weight, self.bias, *self.running, self.slope, self.training, 1e-5,
            *self.activation, True,
        )  # fmt: skip

    def backward(self, statistics, mask, implementation=backend):
        reads_z = vgkern.activations.TABLE[self.activation[0]].backward_reads == "z"
        return implementation.batch_norm_act_backward(
            self.dy, self.x, self.residual if reads_z else None, mask if mask.numel() else None,
            statistics if statistics.numel() else None, self.weight, self.bias, self.slope, self.training, 1e-5,
            *self.activation, *self.bounds, self.wanted,
        )  # fmt: skip

    def run(self, implementation=backend):
        """(y, statistics, mask, dx, dresidual, dweight, dbias, dactivation_weight, record)."""
        y, statistics, mask = self.forward(implementation)
        return y, statistics, mask, *self.backward(statistics, mask, implementation)


def assert_close(ours, theirs, rtol=2e-5, atol=2e-6):
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True)


def bits(tensors):
    return [t.contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in tensors if t.numel()]


# -- how a tensor is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "width"), tuning.TABLE)
@pytest.mark.parametrize("live", [0, 1, 2])
def test_a_cut_covers_the_tensor_and_fits_the_machine(layout, width, live):
    sizes = (1, 2, 7, 31, 32, 33, 1000, 2**20 + 1)
    for outer, channels, spatial in itertools.product(sizes, sizes, (1, 49, 3136, 2**31 + 5)):
        inner = channels if layout == "rows" else spatial
        blocks = tuning.choose(layout == "rows", width, outer, channels, inner, live)
        for n in (blocks.runs, blocks.inner, blocks.channels, blocks.num_warps):
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
        tile, channel, num_outer, num_channels, inner_size, ROWS, RUNS, INNER, INNER if ROWS else 1
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


@pytest.mark.parametrize("channels", [2, 9])
def test_several_channels_a_program_of_planes(small_blocks, channels):
    small_blocks(elements=256, programs=2)
    assert tuning.choose(False, 0, 5, channels, 7, 0).channels > 1 or channels == 2
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


def _pages_before_and_behind(like: torch.Tensor, at_end: bool) -> torch.Tensor:
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


class _GuardedMemory(TorchDispatchMode):
    """Every tensor made inside ends (or begins) at a page that cannot be accessed, and is filled with NaN."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return _pages_before_and_behind(result, self.at_end)
        return result


def _guarded(problem: Problem, at_end: bool) -> Problem:
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            setattr(problem, name, _pages_before_and_behind(value, at_end).copy_(value))
    problem.running = tuple(t if t is None else _pages_before_and_behind(t, at_end).copy_(t) for t in problem.running)
    return problem


@interpreted
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("cut", ["small", "resident"])
@pytest.mark.parametrize(
    "problem",
    [
        {"layout": "planes"},
        {"layout": "rows", "bounds": (0.0, 0.1)},
        {"layout": "planes", "mode": "running", "activation": "prelu", "dtype": torch.bfloat16},
        {"layout": "rows", "activation": "silu", "residual": False, "dtype": torch.float64},
        {"layout": "rows", "mode": "none"},
    ],
    ids=str,
)
def test_nothing_outside_the_tensors_is_touched(request, problem, cut, at_end):
    """An unmasked access would end the process; an element that is read unwritten, or left unwritten, shows as NaN."""
    if cut == "small":
        request.getfixturevalue("small_blocks")
    expected = Problem((3, 9, 13), **problem).run()
    guarded = _guarded(Problem((3, 9, 13), **problem), at_end)
    with _GuardedMemory(at_end):
        results = guarded.run()
    assert bits(results) == bits(expected)
    for got in results[:1] + results[3:]:
        assert got.isfinite().all()


@interpreted
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize(
    "problem",
    [{"layout": "planes", "bounds": (0.0, 0.1)}, {"layout": "rows"}, {"mode": "running", "activation": "prelu"}],
    ids=str,
)
def test_the_order_of_programs_does_not_matter(small_blocks, monkeypatch, problem, order):
    problem = Problem((3, 5, 34), **problem)
    expected = problem.run()
    builder = type(interpreter.interpreter_builder)
    set_grid_idx = builder.set_grid_idx
    largest = 0

    def permuted(self, x, y, z):
        nonlocal largest
        programs = self.grid_dim[0]
        largest = max(largest, programs)
        if order == "reversed":
            x = programs - 1 - x
        else:
            x = torch.randperm(programs, generator=torch.Generator().manual_seed(programs)).tolist()[x]
        set_grid_idx(self, x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", permuted)
    assert bits(problem.run()) == bits(expected)
    assert largest >= 4


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


# -- launches ----------------------------------------------------------------------------------------------------------

LAUNCHES = {
    ("batch", "resident", False): (["forward_channel"], ["backward_channel", "backward_finish"]),
    ("batch", "walked", False): (
        ["forward_statistics", "forward_apply"],
        ["backward_reduce", "backward_apply", "backward_finish"],
    ),
    ("batch", "walked", True): (
        ["forward_statistics", "forward_apply"],
        ["backward_reduce", "backward_apply", "backward_finish", "backward_apply"],
    ),
    ("running", "walked", False): (["forward_apply"], ["backward_reduce", "backward_finish"]),
    ("running", "walked", True): (["forward_apply"], ["backward_reduce", "backward_finish", "backward_reduce"]),
    ("none", "walked", False): (["forward_apply"], ["backward_reduce", "backward_finish"]),
}


@pytest.mark.parametrize(("mode", "cut", "bounded"), LAUNCHES)
def test_launches(request, launches, mode, cut, bounded):
    if cut == "walked":
        request.getfixturevalue("small_blocks")
    problem = Problem((2, 3, 20), mode=mode, bounds=(0.0, 1.0 if bounded else INF))
    _, statistics, mask = problem.forward()
    forward, launches[:] = launches[:], []
    problem.backward(statistics, mask)
    expected = [[f"{name}_kernel" for name in names] for names in LAUNCHES[mode, cut, bounded]]
    assert [forward, launches] == expected


# -- the module's own promises -----------------------------------------------------------------------------------------


def test_no_atomics_and_no_import_of_the_package():
    for module in (activations, batch_norm, tuning):
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

TARGETS = {"cuda:80": ("cuda", 80, 32), "cuda:90": ("cuda", 90, 32), "hip:gfx942": ("hip", "gfx942", 64)}

# Every kernel, both layouts, all dtypes; 10 seconds a target or so.
COMPACT = [
    {"shape": (32, 3, 3136)},
    {"shape": (10, 40, 10), "layout": "rows", "activation": "gelu", "residual": False, "dtype": torch.bfloat16},
    {"shape": (64, 40, 100), "layout": "rows", "activation": "prelu", "dtype": torch.float16, "bounds": (0.0, 1.0)},
    {"shape": (20, 40, 49), "mode": "running", "activation": "mish", "dtype": torch.float64},
    {"shape": (4, 1, 9)},  # sizes of 1 are constants to the compiler
    {"shape": (1, 1, 1), "mode": "none"},
]


def _everything():
    """Each activation in every dtype and mode; channels that fit a program, and channels that do not."""
    for activation, dtype in itertools.product(activations.TABLE, ops.FLOATING_DTYPES):
        common = {"activation": activation, "dtype": dtype}
        yield {"shape": (20, 40, 49), "residual": False, **common}
        yield {"shape": (64, 16, 3136), "layout": "rows", "bounds": (0.0, 1.0), **common}
        yield {"shape": (20, 40, 49), "mode": "running", **common}
        yield {"shape": (20, 40, 16), "mode": "none", "layout": "rows", "residual": False, **common}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["compact", pytest.param("everything", marks=pytest.mark.slow)])
def test_kernels_compile_for(target, which, tmp_path):
    """The launchers run as on that GPU, with a driver that compiles down to machine code and launches nothing."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # read when triton is imported: hence a process of its own
    result = subprocess.run(
        [sys.executable, __file__, target, which], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    names = {line.split()[0] for line in result.stdout.splitlines()}
    assert names == {name for name in vars(batch_norm) if name.endswith("_kernel")}


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
    batch_norm.on_device = lambda x: contextlib.nullcontext()
    global DEVICE
    DEVICE = "cpu"  # only the addresses' alignment matters
    for problem in COMPACT if which == "compact" else _everything():
        Problem(**problem).run()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    _compile(*sys.argv[1:])
