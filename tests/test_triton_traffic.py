"""What the Triton kernels move and in how many launches, counted in the interpreter; memory and order of programs."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_problems import INF, Problem, bits, interpreted
from vgkern.kernels import batch_norm

import vgkern
from benchmarks.interpreter import count_bytes, permute_programs
from vgkern.backends import triton as backend

aten = torch.ops.aten

# -- bytes -------------------------------------------------------------------------------------------------------------

MASK = {torch.float32: 1 / 32, torch.bfloat16: 1 / 16, torch.float16: 1 / 16, torch.float64: 1 / 64}
NO_DRESIDUAL = (True, False, True, True, True, True)
NO_DWEIGHT = (True, True, False, True, False, False)

# Of each problem: u of every launch, forward and backward; "m" is the mask.
TRAFFIC = [
    # The bars: a channel fits one program, and it does not.
    ({}, "resident", ["3m"], ["4m", "0"]),
    ({}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"layout": "rows"}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"layout": "rows", "dtype": torch.bfloat16}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"dtype": torch.float16}, "resident", ["3m"], ["4m", "0"]),
    ({"dtype": torch.float64}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"mode": "running"}, "walked", ["3m"], ["4m", "0"]),  # x is read for dγ
    ({"mode": "running", "wanted": NO_DWEIGHT}, "walked", ["3m"], ["3m", "0"]),
    ({"mode": "none"}, "walked", ["3m"], ["3m", "0"]),
    # Without a residual z is recomputed from x and there is no mask.
    ({"residual": False}, "resident", ["2"], ["3", "0"]),
    ({"residual": False}, "walked", ["1", "2"], ["2", "3"]),
    # dresidual is written only where it is wanted.
    ({"wanted": NO_DRESIDUAL}, "resident", ["3m"], ["3m", "0"]),
    ({"wanted": NO_DRESIDUAL}, "walked", ["1", "3m"], ["2m", "3m"]),
    # An activation whose backward reads z reads the residual again.
    ({"activation": "silu"}, "resident", ["3"], ["5", "0"]),
    ({"activation": "silu"}, "walked", ["1", "3"], ["3", "5"]),
    # Bounds cost nothing while the norm is within them, and where dx was written before, dx again outside.
    ({"bounds": (0.0, 1e9)}, "resident", ["3m"], ["4m", "0"]),
    ({"bounds": (0.0, 1e9)}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"bounds": (0.0, 1e-3)}, "walked", ["1", "3m"], ["2m", "4m"]),
    ({"bounds": (0.0, 1e9), "mode": "running"}, "walked", ["3m"], ["4m", "0"]),
    ({"bounds": (0.0, 1e-3), "mode": "running"}, "walked", ["3m"], ["4m", "2m"]),
    ({"bounds": (0.0, 1e-3)}, "resident", ["3m"], ["4m", "3m"]),
]


@interpreted
@pytest.mark.parametrize(("options", "cut", "forward", "backward"), TRAFFIC, ids=str)
def test_bytes_are_the_stated_units(small_blocks, options, cut, forward, backward):
    """What the interpreter's loads and stores touch, workspaces and parameters included, is within 2 % of the units."""
    small_blocks(elements=4096, inner=2048, programs=8, splits=2, resident=65536 if cut == "resident" else 0)
    problem = Problem((8, 8, 1040), **options)
    u = problem.x.numel() * problem.x.element_size()
    with count_bytes() as traffic:
        _, launches = backend.forward_launches(*problem.forward_args())
        results = problem.forward()
        backward_launches = backend.backward_launches(*problem.backward_args(*results[1:]))[1]
        problem.backward(*results[1:])
    for launch, stated in zip([*launches, *backward_launches], [*forward, *backward], strict=True):
        units = float(stated.rstrip("m")) + MASK[problem.x.dtype] * stated.endswith("m")
        if not launch.conditional:
            assert batch_norm.units(launch) == pytest.approx(units, rel=1e-12), launch.name
        assert traffic.bytes(launch.name) / u == pytest.approx(units, rel=0.02, abs=0.02), launch.name
        # Beside the tensors, each program reads its channels' first elements.
        of_tensors = traffic.bytes(launch.name, launch.moved) / u
        assert of_tensors == pytest.approx(units, rel=2e-3), launch.name


def test_every_kernel_states_its_units():
    kernels = {name: kernel for name, kernel in vars(batch_norm).items() if name.endswith("_kernel")}
    assert set(kernels) == set(batch_norm.TENSORS)
    for name, kernel in kernels.items():
        assert "Units: " in kernel.fn.__doc__, name
        arguments = kernel.arg_names
        assert set(batch_norm.TENSORS[name]) <= set(arguments)


# -- launches ----------------------------------------------------------------------------------------------------------

LAUNCHES = {
    ("batch", "resident", False): (["forward_channel"], ["backward_channel", "backward_finish"]),
    ("batch", "resident", True): (["forward_channel"], ["backward_channel", "backward_apply"]),
    ("batch", "walked", False): (["forward_statistics", "forward_apply"], ["backward_reduce", "backward_apply"]),
    ("batch", "walked", True): (["forward_statistics", "forward_apply"], ["backward_reduce", "backward_apply"]),
    ("running", "walked", False): (["forward_apply"], ["backward_reduce", "backward_finish"]),
    ("running", "walked", True): (["forward_apply"], ["backward_reduce", "backward_apply"]),
    ("none", "walked", False): (["forward_apply"], ["backward_reduce", "backward_finish"]),
    ("none", "walked", True): (["forward_apply"], ["backward_reduce", "backward_apply"]),
}


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


class _Operations(TorchDispatchMode):
    """Every operation of torch that runs inside, the kernels' own launches aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "cut", "bounded"), LAUNCHES)
def test_launches(request, launches, mode, cut, bounded):
    """At most two kernels a pass make everything that the operators return; torch only allocates."""
    if cut == "walked":
        request.getfixturevalue("small_blocks")
    problem = Problem((2, 3, 20), mode=mode, bounds=(0.0, 1.0 if bounded else INF), activation="relu")
    with _Operations() as operations:
        _, forward = backend.forward_launches(*problem.forward_args())
    _, statistics, mask = problem.forward()
    assert [step.name for step in forward] == launches
    forward, launches[:] = launches[:], []
    with operations:
        _, backward = backend.backward_launches(*problem.backward_args(statistics, mask))
    problem.backward(statistics, mask)
    assert [step.name for step in backward] == launches
    expected = [[f"{name}_kernel" for name in names] for names in LAUNCHES[mode, cut, bounded]]
    assert [forward, launches] == expected
    assert max(len(forward), len(launches)) <= 2
    assert operations.seen <= {aten.empty, aten.new_empty, aten.empty_like}


def test_launches_of_meta_tensors_are_those_of_the_tensors():
    """What the audit compiles is what runs: the same kernels, grids, sizes and options."""

    def described(steps):
        return [
            (step.name, step.grid, batch_norm.units(step), step.options,
             {k: (v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for k, v in step.args.items()})
            for step in steps
        ]  # fmt: skip

    problem = Problem((5, 3, 17), activation="prelu")
    real = [backend.forward_launches(*problem.forward_args())[1]]
    _, statistics, mask = problem.forward()
    real.append(backend.backward_launches(*problem.backward_args(statistics, mask))[1])
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            setattr(problem, name, value.to("meta"))
    meta = [
        backend.forward_launches(*problem.forward_args())[1],
        backend.backward_launches(*problem.backward_args(statistics.to("meta"), mask.to("meta")))[1],
    ]
    assert [described(steps) for steps in meta] == [described(steps) for steps in real]


# -- the order of programs, and memory that cannot be left -------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("cut", ["walked", "resident"])
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "planes", "bounds": (0.0, 0.1)},
        {"layout": "rows", "activation": "silu", "dtype": torch.bfloat16},
        {"layout": "rows", "mode": "running", "bounds": (0.0, 0.1), "residual": False},
        {"mode": "running", "activation": "prelu"},
        {"mode": "none"},
    ],
    ids=str,
)
def test_the_order_of_programs_does_not_matter(small_blocks, options, cut, order):
    """The same bits, whatever order programs run in: none waits for, or overwrites, what another makes."""
    small_blocks(resident=2048 if cut == "resident" else 0)
    problem = Problem((3, 9, 34), **options)
    results = problem.run()
    assert results[-1].isfinite().all()
    expected = bits(results)

    def permuted(programs: int) -> list[int]:
        forward = list(range(programs))
        return forward[::-1] if order == "reversed" else random.Random(programs).sample(forward, programs)

    with permute_programs(permuted) as programs:
        assert bits(problem.run()) == expected
    assert max(programs) >= (4 if options.get("layout") != "rows" else 2)


def _guarded_memory(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("guarded_memory.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


@interpreted
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("relu", []),
        ("prelu", []),
        *(pytest.param(name, ["--full"], marks=pytest.mark.slow) for name in vgkern.activations.names()),
    ],
    ids=str,
)
def test_nothing_outside_the_tensors_is_touched(activation, options):
    """The grid, with every tensor against a page that cannot be accessed and NaN in all that is not written yet."""
    result = _guarded_memory(activation, *options)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}\n{result.stderr[-4000:]}"
    assert " 0 failed" in result.stdout
    assert int(result.stdout.split()[2]) > 20  # launches of several programs


@interpreted
@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_guard_page_ends_the_process(kind):
    result = _guarded_memory("fault", kind)
    assert "about to" in result.stdout
    assert result.returncode == -signal.SIGSEGV
