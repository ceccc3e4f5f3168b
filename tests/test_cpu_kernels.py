"""What is particular to the C++ kernels: the same bits on any number of threads, every instruction set, memory bounds.

That they compute the right thing in general is ``test_grid.py``'s part.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from common import bits

import vgkern
from vgkern import ops
from vgkern.activations import TABLE, resolve
from vgkern.backends import cpu, reference
from vgkern.verify import Case

_C = pytest.importorskip("vgkern._C", reason="not run: the package was built without a C++ compiler")

DTYPES = tuple(cpu._DTYPE)
MODES = ("batch", "running", "none")

# Small planes are summed across a batch of sixteen or more; rows of 24 channels are taken two at a time.
WALKS = pytest.mark.parametrize(
    ("times", "rows", "channels"),
    [(1, False, 20), (1, True, 20), (8, False, 20), (1, True, 24)],
    ids=["planes", "rows", "small planes", "paired rows"],
)


@pytest.fixture(params=cpu.available_isas())
def isa(request) -> Iterator[str]:
    before = cpu.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def _arguments(shape, dtype, *, mode="batch", activation="relu", rows=False, residual=True, parameters=None):
    """(forward's tensors and settings, dy) with numbers that differ from channel to channel."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def like_x() -> torch.Tensor:
        t = normal(*shape)
        return t.contiguous(memory_format=torch.channels_last) if rows and t.dim() == 4 else t

    channels, parameters = shape[1], parameters or dtype
    weight, bias, running_mean = (normal(channels, dtype=parameters) for _ in range(3))
    running_var = normal(channels, dtype=parameters).square() + 0.5
    if mode == "none":
        weight = bias = None
    if mode != "running":
        running_mean = running_var = None
    activation_weight = normal(channels, dtype=parameters) if TABLE[activation].learnable else None
    spec = resolve(activation)
    tensors = (like_x(), like_x() if residual else None, weight, bias, running_mean, running_var, activation_weight)
    return (*tensors, mode == "batch", 1e-5, spec.name, list(spec.args), True), like_x()


def _forward_and_backward(arguments, dy, *, bounds=(0.0, math.inf), wanted=(True,) * 6, backend=cpu):
    """All that both operators return, by name."""
    x, residual, weight, bias, _, _, activation_weight, training, eps, activation, args, _ = arguments
    y, statistics, mask = map(_or_empty, backend.batch_norm_act_forward(*arguments))
    reads_z = TABLE[activation].backward_reads == "z"
    there = (True, True, weight is not None, bias is not None, activation_weight is not None, True)
    gradients = backend.batch_norm_act_backward(
        dy, x, residual if reads_z or not mask.numel() else None, mask if mask.numel() else None,
        statistics if statistics.numel() else None, weight, bias, activation_weight,
        training, eps, activation, args, *bounds,
        [w and t for w, t in zip(wanted, there, strict=True)],
    )  # fmt: skip
    names = ("dx", "dresidual", "dweight", "dbias", "dactivation_weight", "record")
    gradients = map(_or_empty, gradients)
    return {"y": y, "statistics": statistics, "mask": mask, **dict(zip(names, gradients, strict=True))}


def _or_empty(tensor: torch.Tensor | None) -> torch.Tensor:
    """As the operators hand on what a backend did not make."""
    return torch.empty(0) if tensor is None else tensor


def _bits(results: dict[str, torch.Tensor]) -> dict[str, bytes | None]:
    return {name: bits(tensor.contiguous() if tensor.dim() < 4 else tensor)[0] for name, tensor in results.items()}


def _record(results) -> dict[str, float]:
    return dict(zip(ops.RECORD_FIELDS, results["record"].tolist(), strict=True))


# ---- Determinism ---------------------------------------------------------------------------------------------------

# Few channels of many elements, more channels than threads, planes larger than a slice, small ones across the batch, in
# one slice and in several, and rows: wide, narrow, and some taken together.
THREADED = [
    ((8, 3, 70, 71), False),
    ((4, 40, 33, 31), False),
    ((1, 2, 300, 301), False),
    ((40, 21, 7, 7), False),
    ((900, 18, 5, 3), False),
    ((8, 20, 60, 61), True),
    ((6, 300, 13, 14), True),
    ((150, 700), True),
    ((16, 24, 41, 40), True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows"), THREADED, ids=str)
@pytest.mark.parametrize(
    ("mode", "activation", "residual"),
    [("batch", "relu", True), ("batch", "prelu", True), ("batch", "gelu", False), ("running", "silu", True)],
)
def test_same_bits_on_any_number_of_threads(shape, rows, dtype, mode, activation, residual):
    """A thread may take a group through both passes, and keep what is made twice where all share each pass."""
    arguments, dy = _arguments(shape, dtype, mode=mode, activation=activation, rows=rows, residual=residual)
    wanted = (True, residual, True, True, True, True)
    bounds = (0.0, 1e-3 if residual else math.inf)  # with a bound the backward writes dx a second time
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 2, 3, 5, 8, 16):
            torch.set_num_threads(threads)
            seen.append(_bits(_forward_and_backward(arguments, dy, bounds=bounds, wanted=wanted)))
    finally:
        torch.set_num_threads(before)
    assert all(results == seen[0] for results in seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 40, 40), (2, 300, 24, 24), (2, 40, 33, 31)], ids=str)
def test_one_pass_takes_many_channels_to_the_bits_of_each_alone(shape, dtype):
    """Long runs of planes, aligned and not; the last group of channels is smaller."""
    arguments, _ = _arguments(shape, dtype, mode="running")
    y, _, mask = cpu.batch_norm_act_forward(*arguments)
    mask = mask.view(shape[0], shape[1], -1)
    for c in range(shape[1]):
        x, residual = (t[:, c : c + 1].contiguous() for t in arguments[:2])
        of_channel = [None if t is None else t[c : c + 1] for t in arguments[2:6]]
        y_of_channel, _, mask_of_channel = cpu.batch_norm_act_forward(x, residual, *of_channel, *arguments[6:])
        assert torch.equal(y[:, c : c + 1], y_of_channel)
        assert torch.equal(mask[:, c], mask_of_channel)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dz_is_rounded_to_the_nearest(isa, dtype, rows):
    """Also where it is dy or 0, and there is nothing to round; over whole vectors, and what is left of one."""
    activations = [("relu", {}), ("relu6", {}), ("leaky_relu", {"negative_slope": 0.3}), ("hardsigmoid", {})]
    for (activation, given), width in itertools.product(activations, (64, 75)):
        spec = resolve(activation, given)
        shape = (3, width, 2, 2) if rows else (3, 5, 1, width)
        arguments, dy = _arguments(shape, dtype, activation=activation, rows=rows)
        arguments = (*arguments[:10], list(spec.args), True)
        got = _forward_and_backward(arguments, dy)["dresidual"]
        slopes = torch.tensor(TABLE[activation].slopes(*spec.args), dtype=torch.float32)
        on, off = (slope * dy.float() for slope in slopes)
        assert ((got == on.to(dtype)) | (got == off.to(dtype))).all()
        assert len(got.unique()) > 5


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_wanted_does_not_change_what_is_computed(rows):
    """dx is made from dz as it was written, or again from dy: to the same bits."""
    for activation, dtype in itertools.product(("relu", "gelu", "identity"), DTYPES):
        arguments, dy = _arguments((3, 21, 5, 7), dtype, activation=activation, rows=rows)
        everything = _bits(_forward_and_backward(arguments, dy))
        for i, name in enumerate(("dx", "dresidual", "dweight", "dbias", None, "record")):
            wanted = [j == i for j in range(6)]
            got = _forward_and_backward(arguments, dy, wanted=wanted)
            empty = [other for other in ("dx", "dresidual", "dweight", "dbias", "record") if other != name]
            assert all(got[other].shape == (0,) for other in empty)
            if name == "record":  # ‖dx‖² is then of the closed form alone
                everything_record = _forward_and_backward(arguments, dy)["record"]
                torch.testing.assert_close(got["record"], everything_record, rtol=1e-6, atol=0)
            elif name is not None:
                assert _bits(got)[name] == everything[name], (activation, dtype, name)


# ---- Instruction sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_instruction_set_against_float64(isa, layout, dtype):
    assert cpu.isa() == isa
    for activation, training in itertools.product(("relu", "leaky_relu", "prelu", "gelu"), (True, False)):
        Case(activation, dtype, layout, training).assert_passes("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_rows_of_many_channels(isa, dtype):
    """Columns of vectors in pairs, and one that is left over and has a tail; several bands of rows."""
    for activation, training in itertools.product(("relu", "prelu", "gelu"), (True, False)):
        Case(activation, dtype, "channels_last", training, shape=(5, 71, 9, 3)).assert_passes("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_rows_together(isa, dtype):
    """Two make whole cache lines, or up to 32; other numbers of them, and long ones that are few, are taken singly."""
    shapes = [(32, 8, 9, 30), (16, 24, 30, 30), (6, 88, 9, 30), (3, 80, 8, 4), (5, 24, 9, 3), (2, 200, 5, 3)]
    shapes += [(8, 12, 7, 8), (4, 20, 6, 4), (8, 3, 16, 8), (2, 33, 8, 8)]  # whose bits do not fill bytes
    for activation, shape in itertools.product(("relu", "prelu", "gelu"), shapes):
        Case(activation, dtype, "channels_last", True, shape=shape).assert_passes("cpu")
    long_and_many = (2, 516, 24, 24) if dtype == "float64" else (4, 104, 52, 100)
    Case("relu", dtype, "channels_last", True, shape=long_and_many).assert_passes("cpu")
    Case("relu", dtype, "channels_last", False, shape=shapes[1]).assert_passes("cpu")
    Case("relu", dtype, "channels_last", shape=shapes[1], layer="double_batch_norm_act").assert_passes("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(17, 1301), (24, 2500), (150, 70), (3, 1100, 2, 2), (1, 300, 3, 3)], ids=str)
def test_many_channels_of_few_elements(isa, dtype, shape):
    """Of whole vectors and not; groups of channels, and slices that threads share evenly or one alone."""
    layout = "channels_last" if len(shape) == 4 else "contiguous"
    for activation in ("relu", "prelu", "silu"):
        Case(activation, dtype, layout, True, shape=shape).assert_passes("cpu")
    Case("relu", dtype, layout, False, shape=shape).assert_passes("cpu")
    Case("relu", dtype, layout, shape=shape, layer="double_batch_norm_act").assert_passes("cpu")
    Case("relu", dtype, layout, shape=shape, layer="add_act").assert_passes("cpu")
    if len(shape) == 4:
        Case("relu", dtype, "contiguous", True, shape=shape).assert_passes("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_small_planes_across_the_batch(isa, dtype):
    """Whole vectors of columns and tails, whole bytes of a mask and not, several bands; planes that are left alone."""
    shapes = [
        (17, 19, 5, 5),
        (33, 32, 2, 4),
        (16, 3, 3, 3),
        (20, 40, 1, 2),
        (70, 35, 7, 7),
        (32, 9, 14, 14),
        (9, 260, 2, 2),
    ]
    for activation, shape in itertools.product(("relu", "prelu", "gelu"), shapes):
        Case(activation, dtype, "contiguous", True, shape=shape).assert_passes("cpu")
    Case("relu", dtype, "contiguous", False, shape=shapes[0]).assert_passes("cpu")
    Case("gelu", dtype, "contiguous", True, residual=False, shape=shapes[0]).assert_passes("cpu")
    Case("silu", dtype, "contiguous", shape=shapes[0], layer="double_batch_norm_act").assert_passes("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_smooth_backward_in_parts(isa, dtype, residual):
    """Planes that are several parts, one, and of which several make one; rows; dz kept for the second pass, and not."""
    planes = [(2, 2, 110, 101), (3, 2, 61, 90), (2, 37, 20, 21), (9, 21, 14, 13), (3, 70, 7, 7)]
    rows = [(3, 70, 14, 13), (2, 600, 7, 7), (3, 24, 30, 31)]
    for layout, shapes in (("contiguous", planes), ("channels_last", rows)):
        for activation, shape in itertools.product(("gelu", "softplus"), shapes):
            Case(activation, dtype, layout, True, residual=residual, shape=shape).assert_passes("cpu")
        Case("silu", dtype, layout, False, residual=residual, shape=shapes[0]).assert_passes("cpu")
        Case("silu", dtype, layout, shape=shapes[0], layer="double_batch_norm_act").assert_passes("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, 16, 33])
def test_mask_bits_and_the_gradient_made_from_them(isa, dtype, batch):
    """In mode "none" z is x + residual to the bit, so the mask must be the reference's, for every width of a tail."""
    widths = (49, 130, 196) if batch == 33 else (*range(1, 35), 63, 64)
    for activation, rows, width in itertools.product(("relu", "hardsigmoid"), (False, True), widths):
        shape = (batch, 3 if batch == 2 else 35, 1, width)
        if rows:
            shape = (batch, width, 2, 2) if width > 1 else (4 * batch, 1)
        arguments, dy = _arguments(shape, dtype, mode="none", activation=activation, rows=rows)
        ours = _forward_and_backward(arguments, dy)
        theirs = _forward_and_backward(arguments, dy, backend=reference)
        assert ours["mask"].shape == theirs["mask"].shape == (*_mask_shape(arguments[0]),)
        assert torch.equal(ours["mask"], theirs["mask"]), (shape, rows)
        no_mask = (*arguments[:-1], False)
        assert torch.equal(_forward_and_backward(no_mask, dy)["dx"], ours["dx"])


def _mask_shape(x: torch.Tensor) -> tuple[int, int]:
    outer, inner = ops.mask_geometry(x)
    return outer, (inner + 7) // 8


def _run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_environment_variable_chooses_the_instruction_set():
    for name in cpu.available_isas():
        result = _run_python("from vgkern.backends import cpu; print(cpu.isa())", VGKERN_CPU_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_environment_variable_with_an_unknown_instruction_set():
    code = """
import torch, vgkern
from vgkern.backends import reference

print(vgkern.backends.available()["cpu"])
print(vgkern.backends.name_of("cpu"))
run = reference.batch_norm_act_forward
reference.batch_norm_act_forward = lambda *args: print("by reference") or run(*args)
vgkern.nn.BatchNormAct2d(2)(torch.randn(2, 2, 3, 3, requires_grad=True)).sum().backward()
vgkern.functional.add_act(torch.randn(2, 2))
"""
    result = _run_python(code, VGKERN_CPU_ISA="mmx")
    reason, backend, *ran = result.stdout.splitlines()
    assert "mmx" in reason
    assert "baseline" in reason
    assert backend == "reference"
    assert ran == ["by reference"] * 2


# ---- The process ---------------------------------------------------------------------------------------------------

_PARALLEL_STEP = """
import os, sys, torch, vgkern
torch.set_num_threads(4)
torch.randn(2000, 2000).sum()
x = torch.randn(8, 16, 50, 50, requires_grad=True)
layer = vgkern.nn.BatchNormAct2d(16)
def step():
    x.grad = None
    layer(x).square().sum().backward()
    return x.grad
with vgkern.backends.use("cpu"):
    before = step()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="not run: no /proc here")
def test_one_openmp_runtime():
    code = """
paths = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1] and ".so" in line}
print(len({os.path.realpath(path) for path in paths}), paths)
"""
    result = _run_python(_PARALLEL_STEP + code)
    assert result.stdout.startswith("1 "), result.stdout + result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not run: no fork here")
def test_a_forked_child_finishes():
    # The child sees the parent's memory, so it can compare; only its gradient of x is computed anew.
    code = """
child = os.fork()
if child == 0:
    with vgkern.backends.use("cpu"), torch.autograd.set_multithreading_enabled(False):
        args = (x.detach(), None, None, None, None, None, None, True, 1e-5, "relu", [], False)
        y = vgkern.backends.cpu.batch_norm_act_forward(*args)[0]
    os._exit(0 if torch.isfinite(y[0, 0, 0, 0]) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = _run_python(_PARALLEL_STEP + code)
    assert result.stdout.strip() == "0", result.stdout + result.stderr


# ---- Outputs past the caches ---------------------------------------------------------------------------------------


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Every tensor is too large for the caches."""
    before = _C.set_cache_bytes(0)
    yield
    _C.set_cache_bytes(before)


# Planes of whole cache lines; small ones that do not begin at one, in groups that the last does not fill; some that
# fill a stage, and one that does not fit; small ones across the batch, of whole lines, not, and with a few that are
# left; rows, the same, and some that make whole lines together alone.
PAST_CACHES = [
    ((3, 4, 8, 8), False),
    ((3, 37, 7, 7), False),
    ((5, 6, 14, 15), False),
    ((2, 3, 39, 41), False),
    ((1, 2, 91, 95), False),
    ((16, 32, 5, 5), False),
    ((17, 37, 3, 5), False),
    ((9, 44, 4, 6), False),
    ((4, 32, 3, 3), True),
    ((4, 13, 3, 3), True),
    ((4, 24, 3, 3), True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows"), PAST_CACHES, ids=str)
def test_outputs_past_the_caches(isa, shape, rows, dtype, no_cache):
    """Written past the caches, by way of a stage or not, they are the same bits."""
    for mode, activation, residual in itertools.product(MODES, ("relu", "silu"), (True, False)):
        arguments, dy = _arguments(shape, dtype, mode=mode, activation=activation, rows=rows, residual=residual)
        past = _bits(_forward_and_backward(arguments, dy))
        _C.set_cache_bytes(2**40)
        assert past == _bits(_forward_and_backward(arguments, dy)), (mode, activation, residual)
        _C.set_cache_bytes(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rows"), PAST_CACHES, ids=str)
def test_outputs_of_two_batch_norms_past_the_caches(isa, shape, rows, dtype, no_cache):
    def step() -> list[bytes | None]:
        (x, residual, *_), dy = _arguments(shape, dtype, rows=rows)
        leaves = x.requires_grad_(), residual.requires_grad_()
        y = vgkern.functional.double_batch_norm_act(*leaves, None, None, None, None, training=True)
        return bits(y, *torch.autograd.grad(y, leaves, dy))

    past = step()
    _C.set_cache_bytes(2**40)
    assert past == step()


# ---- Memory --------------------------------------------------------------------------------------------------------


class _Guarded:
    """Memory between two pages that must not be touched: an access beyond either end is a segmentation fault."""

    PROT_NONE = 0

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def like(self, t: torch.Tensor, *, at_end: bool) -> torch.Tensor:
        """An uninitialised tensor of t's shape, dtype and strides that ends, or begins, at the edge."""
        page, size = mmap.PAGESIZE, t.numel() * t.element_size()
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for edge in (address, address + page + inner):
            protect = self.libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), self.PROT_NONE)
            assert protect == 0, os.strerror(ctypes.get_errno())
        offset = page + (inner - size if at_end else 0)
        flat = torch.frombuffer(memory, dtype=t.dtype, offset=offset, count=t.numel())
        return flat.as_strided(t.shape, t.stride())

    def holds(self, t: torch.Tensor) -> bool:
        starts = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self.maps)
        return any(start <= t.data_ptr() < start + len(memory) for start, memory in zip(starts, self.maps, strict=True))


@pytest.fixture
def tensors_made_by_torch() -> Iterator[None]:
    """Outputs, statistics and masks are made as without torch's table of functions: by torch.empty and empty_like."""
    _C.use_tensor_types(type("Tensor", (), {"grad": None}), torch.nn.Parameter)
    yield
    _C.use_tensor_types(torch.Tensor, torch.nn.Parameter)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("past_caches", [False, True], ids=["", "past the caches"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_or_written_beyond_a_tensor(isa, dtype, past_caches, at_end, monkeypatch, request):
    if past_caches:
        request.getfixturevalue("no_cache")
    guarded = _Guarded()

    def copy(t):
        return t if t is None or not isinstance(t, torch.Tensor) else guarded.like(t, at_end=at_end).copy_(t)

    empty = torch.empty

    def guarded_empty(*size, **options):  # statistics and masks
        t = empty(*size, **options)
        return guarded.like(t, at_end=at_end) if t.numel() else t

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded.like(t, at_end=at_end))
    request.getfixturevalue("tensors_made_by_torch")
    walks = (2, False), (2, True), (16, False), (16, True)
    cases = itertools.product(("relu", "silu", "prelu"), MODES, walks, (1, 2, 7, 8, 9, 15, 16, 17, 31, 33))
    for activation, mode, (batch, rows), width in cases:
        shape = (batch, width, 1, 2) if rows else (batch, 2, 1, width)
        arguments, dy = _arguments(shape, dtype, mode=mode, activation=activation, rows=rows)
        guarded.maps.clear()
        guarded_arguments = tuple(copy(argument) for argument in arguments)
        results = _forward_and_backward(guarded_arguments, copy(dy))
        assert all(guarded.holds(t) for t in results.values() if t.numel())
        assert not any(t.isnan().any() for name, t in results.items() if name not in ("statistics", "mask"))
        with monkeypatch.context() as plain:
            plain.undo()
            expected = _forward_and_backward(arguments, dy)
        assert _bits(results) == _bits(expected)


# ---- Numbers -------------------------------------------------------------------------------------------------------


@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_channel_gives_the_bias_to_the_bit(isa, dtype, times, rows, channels):
    constants = [0.0, -0.0, 1e-3, 1.0, 1e4] + [1e8, 3e38] * (dtype != torch.float16)
    constants = list(itertools.islice(itertools.cycle(constants), channels))
    arguments, dy = _arguments((4 * times, channels, 5, 5), dtype, activation="identity", rows=rows)
    x, residual, _, bias = arguments[:4]
    x.copy_(torch.tensor(constants, dtype=dtype).view(1, -1, 1, 1).expand_as(x))
    results = _forward_and_backward(arguments, dy)
    assert torch.equal(results["y"], (bias.view(1, -1, 1, 1) + residual))
    assert torch.equal(results["statistics"][0], torch.tensor(constants, dtype=dtype).double())
    assert not results["statistics"][2].any()
    assert results["dx"].isfinite().all()


@WALKS
@pytest.mark.parametrize("far", [0, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_channel_far_from_0(isa, dtype, times, rows, channels, far):
    """Half precision leaves x − 0 out where all channels that are worked on together are measured from 0."""
    arguments, dy = _arguments((4 * times, channels, 5, 5), dtype, rows=rows)
    near = _forward_and_backward(arguments, dy)
    x, residual, _, bias = arguments[:4]
    x[:, far] = 100.0
    results = _forward_and_backward(arguments, dy)
    assert torch.equal(results["y"][:, far], (bias[far] + residual[:, far]).relu())
    assert results["dweight"][far] == 0
    others = [c for c in range(channels) if c != far % channels]
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(results[name][:, others], near[name][:, others])


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((16, 5, 30, 31), False), ((16, 5, 30, 31), True), ((99, 5, 7, 9), False), ((200, 37, 5, 4), True)],
)
@pytest.mark.parametrize(("mean", "outlier", "outlying"), [(1e6, 0.0, 5), (0.0, 1e4, 5), (0.0, 1e4, 1), (-1e4, 0.0, 5)])
def test_statistics_of_large_means_and_outliers(isa, mean, outlier, outlying, shape, rows):
    """An outlier among the elements asked first moves the value from which the statistics measure; one channel too."""
    arguments, _ = _arguments(shape, torch.float32, rows=rows)
    x = arguments[0].add_(mean)
    area = shape[2] * shape[3]
    sampled = shape[0] * area // 16  # the first of the eight elements that the statistics ask
    x[sampled // area, :outlying, sampled % area // shape[3], sampled % shape[3]] += outlier
    mean_, rstd, var = cpu.batch_norm_act_forward(*arguments)[1]
    exact = x.double().movedim(1, 0).reshape(shape[1], -1)
    # Squares are float32's, and so is the sum of a few of them before float64 takes over; the mean is all float64.
    assert ((mean_ - exact.mean(1)).abs() <= 1e-12 * exact.std(1)).all()
    torch.testing.assert_close(var, exact.var(1), rtol=4e-7, atol=0)
    torch.testing.assert_close(rstd, (exact.var(1, correction=0) + 1e-5).rsqrt(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("shape", "rows"), [((8, 2048, 1, 1), True), ((32, 2048, 1, 1), True), ((2, 2048, 4, 4), False)]
)
def test_statistics_of_few_elements(isa, shape, rows):
    """Of thousands of channels some have elements far from their mean, from which the others must not be measured."""
    arguments, _ = _arguments(shape, torch.float32, rows=rows)
    var = cpu.batch_norm_act_forward(*arguments)[1][2]
    exact = arguments[0].double().movedim(1, 0).reshape(shape[1], -1)
    torch.testing.assert_close(var, exact.var(1), rtol=3e-7, atol=0)


@pytest.mark.parametrize(("channels", "rows"), [(6, False), (6, True), (24, True)])
@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recorded_norm_is_that_of_the_dx_that_was_written(dtype, noise, channels, rows):
    """dz nearly in the span of 1 and x̂: what is left of it after both are taken out is a small difference."""
    arguments, dy = _arguments((8, channels, 12, 11), dtype, activation="identity", rows=rows)
    dy = (dy * noise + 3 * arguments[0] + 2).contiguous(
        memory_format=torch.channels_last if rows else torch.contiguous_format
    )
    for bounds in ((0.0, math.inf), (0.0, 1e-3), (1e3, math.inf)):
        results = _forward_and_backward(arguments, dy, bounds=bounds)
        norm = results["dx"].double().norm().item()
        assert math.sqrt(_record(results)["grad_input_sq"]) == pytest.approx(norm, rel=1e-6, abs=0)


@pytest.mark.parametrize("mode", MODES)
@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_bounds_scale_dx_and_nothing_else(dtype, times, rows, channels, mode):
    arguments, dy = _arguments((4 * times, channels, 5, 6), dtype, mode=mode, rows=rows)
    free = _forward_and_backward(arguments, dy)
    norm = free["dx"].double().norm().item()
    for low, high in ((0.0, norm / 3), (norm * 3, math.inf), (norm / 2, norm * 2)):
        bounded = _forward_and_backward(arguments, dy, bounds=(low, high))
        wanted = min(max(norm, low), high)
        tolerance = 1e-6 if torch.finfo(dtype).eps < 1e-6 else 1e-3
        assert bounded["dx"].double().norm().item() == pytest.approx(wanted, rel=tolerance)
        assert math.sqrt(_record(bounded)["grad_input_sq"]) == pytest.approx(wanted, rel=tolerance)
        cosine = torch.nn.functional.cosine_similarity(bounded["dx"].double().ravel(), free["dx"].double().ravel(), 0)
        assert cosine.item() == pytest.approx(1, abs=tolerance)
        for name in ("dresidual", "dweight", "dbias"):
            assert _bits(bounded)[name] == _bits(free)[name]
        if low < norm < high:
            assert _bits(bounded) == _bits(free)


@WALKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_record_counts_dead_and_nonfinite_elements(isa, dtype, times, rows, channels):
    arguments, dy = _arguments((4 * times, channels, 5, 3), dtype, mode="none", rows=rows)
    x, residual = arguments[:2]
    dy[0, 0, 0, 0], dy[1, 5, 2, 1], dy[2, 18, 4, 2] = math.inf, -math.inf, math.nan
    dy[1, 6, 0, 0] = torch.finfo(dtype).max  # finite, if only just
    record = _record(_forward_and_backward(arguments, dy))
    assert record["nonfinite"] == 3
    assert record["dead"] == (x.float() + residual.float() <= 0).sum().item()
    assert record["elements"] == x.numel()
    assert record["backwards"] == 1


@pytest.mark.parametrize("rows", [False, True])
def test_dead_elements_of_a_smooth_backward_in_parts(isa, rows):
    """Where z is evaluated each part of a tile is counted by itself. The slope of hardswish is 0 up to −3."""
    arguments, dy = _arguments((7, 20, 31, 30), torch.float32, mode="none", activation="hardswish", rows=rows)
    x, residual = arguments[:2]
    x.mul_(4)
    assert _record(_forward_and_backward(arguments, dy))["dead"] == (x + residual <= -3).sum().item()


@WALKS
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25])
def test_squares_neither_vanish_nor_overflow(isa, scale, times, rows, channels):
    for mode in MODES:
        arguments, dy = _arguments((4 * times, channels, 5, 6), torch.float32, mode=mode, rows=rows)
        plain, scaled = (_record(_forward_and_backward(arguments, dy * factor)) for factor in (1.0, scale))
        for name in ("grad_output_sq", "grad_preact_sq", "grad_input_sq", "grad_weight_sq", "grad_bias_sq"):
            assert scaled[name] == pytest.approx(plain[name] * scale**2, rel=1e-5, abs=0)
        assert scaled["nonfinite"] == 0


@WALKS
def test_a_dy_whose_square_overflows_where_nothing_passes_changes_the_record_alone(isa, times, rows, channels):
    arguments, dy = _arguments((4 * times, channels, 5, 6), torch.float32, rows=rows)
    clean = _forward_and_backward(arguments, dy)
    off = tuple((clean["dresidual"] == 0).nonzero()[5].tolist())
    dy[off] = 1e25
    results = _forward_and_backward(arguments, dy)
    assert _record(results)["grad_output_sq"] == pytest.approx(1e50, rel=1e-6)
    for name in ("dx", "dresidual", "dweight", "dbias"):
        assert _bits(results)[name] == _bits(clean)[name]


@WALKS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_channel(isa, times, rows, channels, bad):
    arguments, dy = _arguments((4 * times, channels, 5, 6), torch.float32, rows=rows)
    clean = _forward_and_backward(arguments, dy)
    arguments[0][1, 3, 2, 5] = bad
    spoilt = _forward_and_backward(arguments, dy)
    others = [c for c in range(channels) if c != 3]
    for name in ("y", "dx", "dresidual"):
        assert torch.equal(spoilt[name][:, others], clean[name][:, others])
    for name in ("dweight", "dbias"):
        assert torch.equal(spoilt[name][others], clean[name][others])
    assert spoilt["statistics"][0, 3].isfinite().item() is False


def test_parameters_in_float32_and_of_one_element(isa):
    """float32 parameters beside a half-precision x; a PReLU with one slope for all channels."""
    for dtype in (torch.bfloat16, torch.float16):
        arguments, dy = _arguments((4, 19, 5, 3), dtype, activation="prelu", parameters=torch.float32)
        arguments = (*arguments[:6], torch.tensor([0.3]), *arguments[7:])
        ours = _forward_and_backward(arguments, dy)
        theirs = _forward_and_backward(arguments, dy, backend=reference)
        for name in ("dweight", "dbias", "dactivation_weight"):
            assert ours[name].dtype == torch.float32
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-4)
        assert ours["dactivation_weight"].shape == (1,)


@pytest.mark.parametrize("rows", [False, True])
def test_results_are_rounded_to_the_nearest_bfloat16(isa, rows):
    """Every kind of upper half with every kind of lower one: ties, carries, denormals, infinities and NaNs of them."""
    upper = torch.arange(0, 2**16, 1 if rows else 17, dtype=torch.int64)
    upper = torch.cat([upper, torch.tensor([0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0xFF7F, 0xFF80, 0xFFC0, 0xFFFF])])
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    patterns = (upper[:, None] * 2**16 + lower).flatten()
    bias = torch.where(patterns < 2**31, patterns, patterns - 2**32).to(torch.int32).view(torch.float32)
    channels = len(bias)
    # Four whole vectors and a tail, then one vector and a tail.
    for shape in ((2, channels),) if rows else ((1, channels, 69), (1, channels, 21)):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        zeros = torch.zeros(channels)
        settings = (None, False, 0.0, "identity", [], False)
        y = cpu.batch_norm_act_forward(x, None, zeros, bias, zeros, zeros + 1, *settings)[0]
        wanted = bias.to(torch.bfloat16)  # zeros as they are, for -0.0 + 0.0 is 0.0
        for column in y.view(channels, -1).T if not rows else y:
            torch.testing.assert_close(column, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_nan_of_all_ones_stays_nan_in_bfloat16(isa):
    """Rounding its bits up would make -0 of it."""
    ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    arguments, dy = _arguments((2, 2, 9), torch.float32, activation="identity", parameters=torch.bfloat16)
    dy[0, :, 3] = ones
    got = _forward_and_backward(arguments, dy)
    assert got["dbias"].isnan().all()
    assert got["dweight"].isnan().all()


def test_the_table_of_types_is_that_of_the_contract():
    assert set(DTYPES) == set(ops.FLOATING_DTYPES)
    assert vgkern.backends.available()["cpu"] == "usable"
    assert cpu.refuses(torch.ones(2)) is None
    assert "float" in cpu.refuses(torch.ones(2, dtype=torch.int32))
    assert "meta" in cpu.refuses(torch.ones(2, device="meta"))
