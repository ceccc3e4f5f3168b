"""``act(batch_norm(x) + batch_norm(residual))`` as one operation: its numbers, and where it stands for two layers."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from common import bits, randomised
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from triton_problems import DoubleProblem, assert_close, interpreted
from vgkern.kernels import double_batch_norm as kernels

import vgkern
from benchmarks.interpreter import count_bytes, permute_programs
from vgkern import memory
from vgkern.backends import cpu, reference, triton
from vgkern.nn import BatchNormAct2d
from vgkern.nn.double_batch_norm import Held, add_held, hold, hold_batch_norm
from vgkern.testing import compare
from vgkern.verify import DTYPES, LAYOUTS, Case

C = 6
double = vgkern.functional.double_batch_norm_act


class Operators(TorchDispatchMode):
    """The names of this package's operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vgkern":
            self.seen.append(function._opname.removesuffix("_forward"))
        return function(*args, **(kwargs or {}))


def randomised_net(net):
    for module in net.modules():
        if hasattr(module, "running_var"):
            randomised(module)
    return net


def layers(activation="relu", **options):
    """The layer that adds and that of its residual."""
    norm = randomised(BatchNormAct2d(C, activation=activation, eps=1e-4))
    return norm, randomised(BatchNormAct2d(C, activation=None, momentum=0.3, **options))


def inputs(dtype=torch.float32, shape=(4, C, 5, 3)):
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]


def as_one(norm, shortcut, x, residual):
    return add_held(norm, x, hold_batch_norm(shortcut, residual))


def as_two(norm, shortcut, x, residual):
    return norm(x, shortcut(residual))


def everything(run, norm, shortcut, x, residual):
    """Output, gradients, buffers and records of copies of the layers."""
    norm, shortcut = copy.deepcopy((norm, shortcut))
    x, residual = (t.detach().clone().requires_grad_() for t in (x, residual))
    y = run(norm, shortcut, x, residual)
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    found = [y.detach(), x.grad, residual.grad]
    for layer in (norm, shortcut):
        found += [p.grad for p in layer.parameters()] + [b for b in layer.buffers() if not b.requires_grad]
        found += [] if layer._probe is None else [layer._probe.grad]
    return found


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "prelu", "identity"])
def test_grid(backend, activation):
    """Also what the grid of all activations leaves out for the interpreter's sake."""
    grid = itertools.product(DTYPES, LAYOUTS, (True, False))
    if backend == "triton":
        grid = [
            ("float64", "channels_last", True),
            ("float16", "contiguous", False),
            ("bfloat16", "channels_last", True),
        ]
    for dtype, layout, training in grid:
        Case(activation, dtype, layout, training, layer="double_batch_norm_act").assert_passes(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 70, 1, 1), (2, 3, 31, 33), (40, 67, 9, 10), (20, 37, 5, 5), (5, 16, 64, 64)])
def test_shapes_on_the_cpu(shape, layout):
    """Of slices of one plane and of many, that fit the caches together and that do not, with tails of every kind; of
    planes that are summed across the batch."""
    for activation, dtype in (("relu", "float32"), ("gelu", "bfloat16"), ("prelu", "float64")):
        Case(activation, dtype, layout, shape=shape, mean=100.0, layer="double_batch_norm_act").assert_passes("cpu")


def test_half_precision_beside_float32_parameters(backend):
    Case("relu", "bfloat16", parameters="float32", layer="double_batch_norm_act").assert_passes(backend)


def test_a_layer_without_parameters_or_statistics(backend):
    """Each batch norm has its own: here one has everything, and the other nothing."""
    x, residual = inputs()
    for bare in range(2):
        pair = [randomised(BatchNormAct2d(C, activation=a)) for a in ("silu", None)]
        pair[bare] = BatchNormAct2d(C, affine=False, track_running_stats=False, activation=pair[bare].activation.name)
        rows = compare(pair[0], x, residual, shortcut=pair[1])
        assert all(row.ok for row in rows), rows
        assert ("grad_residual_weight" in {row.name for row in rows}) == (bare == 0)
        with Operators() as operators:
            as_one(*pair, x, residual)
        assert operators.seen == ["double_batch_norm_act"]


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_instruction_sets(isa):
    before = cpu.isa()
    try:
        cpu._C.use_isa(isa)
        for activation, layout in itertools.product(("relu", "silu"), LAYOUTS):
            for dtype in DTYPES:
                Case(activation, dtype, layout, layer="double_batch_norm_act").assert_passes("cpu")
    finally:
        cpu._C.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_bits_for_every_number_of_threads(activation, memory_format, dtype):
    norm, shortcut = (layer.to(dtype) for layer in layers(activation))
    for shape in ((16, C, 56, 56), (37, C, 7, 7)):
        data = [t.detach().contiguous(memory_format=memory_format) for t in inputs(dtype, shape)]
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found.append(bits(*everything(as_one, norm, shortcut, *data)))
        finally:
            torch.set_num_threads(before)
        assert all(other == found[0] for other in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_same_bits_where_dz_has_no_memory_to_wait_in(dtype):
    """Then the second pass of a backward makes it again."""
    norm, shortcut = (layer.to(dtype) for layer in layers("silu"))
    data = [t.detach().contiguous(memory_format=torch.channels_last) for t in inputs(dtype, (16, C, 56, 56))]
    kept = everything(as_one, norm, shortcut, *data)
    limit = memory.limit()
    memory.set_limit(0)
    try:
        again = everything(as_one, norm, shortcut, *data)
    finally:
        memory.set_limit(limit)
    assert bits(*again) == bits(*kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["silu", "prelu", "relu"])
def test_first_and_second_derivatives(activation, training):
    x, residual = inputs(torch.float64, (3, 2, 2, 2))
    parameters = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    running = [torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(4)]
    slope = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) if activation == "prelu" else None

    def run(x, residual, *given):
        stats = (None,) * 4 if training else running
        more = {"activation": activation, "activation_weight": given[4] if slope is not None else None}
        return double(x, residual, *stats, *given[:4], training, eps=0.1, residual_eps=0.2, **more)

    given = (x, residual, *parameters, *([] if slope is None else [slope]))
    assert gradcheck(run, given, fast_mode=True)
    assert gradgradcheck(run, given, fast_mode=True)


def test_records_of_what_is_not_finite(backend):
    norm, shortcut = layers()
    x, residual = (t.detach().requires_grad_() for t in inputs())
    found = []
    for run in (as_one, as_two):
        pair = copy.deepcopy((norm, shortcut))
        y = run(*pair, x, residual)
        dy = torch.ones_like(y)
        dy[0, 0], dy[1, 1, 2, 2], dy[2, 3] = torch.inf, torch.nan, -torch.inf
        y.backward(dy)
        found.append([layer.grad_stats() for layer in pair])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.nonfinite, ours.dead_fraction, ours.backwards) == (
            theirs.nonfinite, theirs.dead_fraction, theirs.backwards,
        )  # fmt: skip
        assert ours.nonfinite > 0
    assert found[0][0].nonfinite > found[0][1].nonfinite  # what is dead has no gradient


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, C, 16, 10), (4, C, 13, 11), (30, C, 3, 5)], ids=["whole vectors", "tails", "small planes"]
)
def test_the_norm_of_a_gradient_that_cancels(backend, shape, of_x):
    """dz along x̂, or r̂, of which that batch norm leaves little, and the other what it will."""
    norm, shortcut = (BatchNormAct2d(C, activation=None, eps=1e-12) for _ in range(2))
    x, residual = inputs(shape=shape)
    along = (x if of_x else residual).detach()
    dy = 1.0 + along + 1e-3 * torch.randn(shape)
    as_one(norm, shortcut, x, residual).backward(dy)
    for layer, gradient in ((norm, x.grad), (shortcut, residual.grad)):
        expected = gradient.double().norm().item()
        assert layer.grad_stats().grad_input_norm == pytest.approx(expected, rel=1e-5)
    assert (x if of_x else residual).grad.norm() < 0.01 * dy.norm()


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_one_leaf_alone(backend, training):
    norm, shortcut = (layer.train(training) for layer in layers("prelu"))
    x, residual = inputs()
    leaves = {"x": x, "residual": residual}
    leaves |= {f"{of}.{n}": p for of, m in (("norm", norm), ("shortcut", shortcut)) for n, p in m.named_parameters()}
    y = as_one(norm, shortcut, x, residual)
    dy = torch.randn_like(y)
    every = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    for name, leaf in leaves.items():
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(as_one(norm, shortcut, x, residual), leaf, dy)
        torch.testing.assert_close(alone, every[name], rtol=1e-6, atol=1e-6, msg=name)


def test_one_tensor_twice_and_no_tensor_at_all(backend):
    norm, shortcut = layers()
    x, _ = inputs()
    x.grad = None
    as_one(norm, shortcut, x, x).sum().backward()
    again = x.detach().requires_grad_()
    as_two(norm, shortcut, again, again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    empty = torch.empty(0, C, 5, 3, requires_grad=True)
    count = shortcut.num_batches_tracked.item()
    y = as_one(norm, shortcut, empty, empty.detach())
    y.sum().backward()
    assert y.shape == empty.shape == empty.grad.shape
    assert shortcut.num_batches_tracked == count + 1
    assert shortcut.grad_stats().backwards == 3


def test_other_dtypes_and_formats_beside_each_other():
    x, residual = inputs()
    mixed = residual.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = double(x, mixed, None, None, None, None, training=True)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert mixed.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, double(x, mixed.float(), None, None, None, None, training=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": None}, TypeError, "residual"),
        ({"residual": torch.ones(4, C, 5, 1)}, RuntimeError, "residual"),
        ({"residual_weight": torch.ones(C + 1)}, RuntimeError, "residual_weight"),
        ({"residual_bias": torch.ones(C).double()}, RuntimeError, "residual_bias.*mixed dtype"),
        ({"residual_running_mean": torch.ones(C)}, ValueError, "running_mean and running_var"),
        ({"residual_eps": 0.0}, ValueError, "eps"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"training": False}, RuntimeError, "running_mean must be defined"),
        ({"activation": "prelu"}, ValueError, "activation_weight"),
        ({"input": torch.ones(1, C, 1, 1), "residual": torch.ones(1, C, 1, 1)}, ValueError, "more than 1 value"),
        ({"input": torch.ones(4, C, 5, 3).int()}, NotImplementedError, "int32"),
    ],
    ids=str,
)
def test_refusals(change, error, message):
    given = {"input": torch.ones(4, C, 5, 3), "residual": torch.ones(4, C, 5, 3), "training": True}
    given |= {f"{of}running_{name}": None for of in ("", "residual_") for name in ("mean", "var")}
    with pytest.raises(error, match=message):
        double(**given | change)


# -- in the place of two layers ----------------------------------------------------------------------------------------

SHARED = {
    "a hook on the layer": lambda norm, shortcut: norm.register_forward_hook(lambda *_: None),
    "a hook on the shortcut": lambda norm, shortcut: shortcut.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda norm, shortcut: shortcut.register_full_backward_hook(lambda *_: None),
    "bounds": lambda norm, shortcut: setattr(shortcut, "grad_norm_bounds", (0.0, 1.0)),
    "bounds of the layer": lambda norm, shortcut: setattr(norm, "grad_norm_bounds", (0.0, 1.0)),
    "one in eval": lambda norm, shortcut: shortcut.eval(),
    "an activation of its own": lambda norm, shortcut: setattr(shortcut, "activation", norm.activation),
}


def test_one_operation_is_two_layers(backend):
    norm, shortcut = layers("gelu")
    x, residual = inputs()
    with Operators() as operators:
        ours = everything(as_one, norm, shortcut, x, residual)
    assert operators.seen[0] == "double_batch_norm_act"
    assert not any(name.startswith("batch_norm_act") for name in operators.seen)
    theirs = everything(as_two, norm, shortcut, x, residual)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("what", SHARED)
def test_what_stays_two_operations(what):
    pair = layers()
    SHARED[what](*pair)
    x, residual = inputs()
    with Operators() as operators:
        y = as_one(*copy.deepcopy(pair), x, residual)
    assert operators.seen == ["batch_norm_act"] * 2
    torch.testing.assert_close(y, as_two(*pair, x, residual))


def test_shapes_that_do_not_fit_are_refused_as_by_two_layers():
    norm, shortcut = layers()
    x, residual = inputs()
    with pytest.raises(RuntimeError, match="residual: expected the shape of input"):
        as_one(norm, shortcut, x, residual[:, :, :1])


def test_statistics_that_processes_share_are_not_held():
    shortcut = vgkern.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(C, activation=None)))[0]
    assert isinstance(hold_batch_norm(shortcut, inputs()[0]), torch.Tensor)


def test_a_sequence_is_held_back_unless_somebody_watches_it():
    projection = nn.Sequential(nn.Conv2d(C, C, 1), BatchNormAct2d(C, activation=None))
    x, _ = inputs()
    assert type(hold(projection, x)) is Held
    projection.register_forward_hook(lambda *_: None)
    assert type(hold(projection, x)) is torch.Tensor


@pytest.mark.parametrize("block", [vgkern.nn.BasicBlock, vgkern.nn.Bottleneck])
def test_blocks_with_a_projection(block):
    made = randomised_net(block(8, 4, stride=2))
    plain = vgkern.unfuse(made)
    x = torch.randn(4, 8, 6, 6)
    with Operators() as operators:
        y = made(x)
    assert operators.seen[-1] == "double_batch_norm_act"
    assert len(operators.seen) == len(block.convolutions)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    monitored = vgkern.gradients.GradientMonitor(made)
    made(x).square().sum().backward()
    monitored.step()
    assert {"downsample.1", f"bn{len(block.convolutions)}"} <= {layer.name for layer in monitored.history().layers}
    assert made.downsample[1].num_batches_tracked == plain.downsample[1].num_batches_tracked + 1


class Projected(nn.Module):
    """A block as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))

    def forward(self, x):
        identity = x
        out = self.bn(self.conv(x))
        identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_fuse_and_unfuse():
    model = randomised_net(Projected())
    fused = vgkern.fuse(model)
    x = torch.randn(4, C, 5, 3)
    with Operators() as operators:
        y = fused(x)
    assert operators.seen == ["double_batch_norm_act"]
    torch.testing.assert_close(y, copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)
    report = vgkern.fusion_report(fused)
    assert report == vgkern.fusion_report(model)
    assert {row.name: row.operations for row in report.fused} == {
        "bn": ("batch norm", "residual's batch norm", "relu"),
        "downsample.1": ("batch norm", "with the one that it is added to"),
    }
    assert report.fused_batch_norms == 2
    assert list(fused.state_dict()) == list(model.state_dict())
    plain = vgkern.unfuse(fused)
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    fused.downsample[1].register_forward_hook(lambda *_: None)  # later: the layer is called again
    with Operators() as operators:
        fused(x)
    assert operators.seen == ["batch_norm_act"] * 2


def test_fold_takes_both_into_their_convolutions():
    model = randomised_net(Projected()).eval()
    x = torch.randn(4, C, 5, 3)
    for given in (model, vgkern.fuse(model)):
        folded = vgkern.fold(given)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert not any(name.endswith("running_mean") for name, _ in folded.named_buffers())


def test_fuse_does_not_double_what_is_watched_or_shared():
    for name in ("bn", "downsample.1"):
        model = Projected()
        model.get_submodule(name).register_forward_hook(lambda *_: None)
        report = vgkern.fusion_report(vgkern.fuse(model))
        assert not any("residual's batch norm" in row.operations for row in report.fused)
        if name == "bn":
            assert "hook" in report.left[0].reason
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Projected())
    report = vgkern.fusion_report(model)
    assert {row.operations for row in report.fused} == {("batch norm", "residual", "relu"), ("batch norm",)}


def test_compiled():
    block = randomised_net(vgkern.nn.BasicBlock(8, 4, stride=2))
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6)
    for run in (compiled, eager):
        run(x).square().sum().backward()
    for (name, ours), theirs in zip(block.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=name)
    for name in ("bn2", "downsample.1"):
        ours, theirs = (net.get_submodule(name) for net in (block, eager))
        assert ours.grad_stats().grad_input_norm == pytest.approx(theirs.grad_stats().grad_input_norm, rel=1e-5)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


# -- Triton ------------------------------------------------------------------------------------------------------------

MASK = {torch.float32: 1 / 32, torch.bfloat16: 1 / 16}
NO_DX = (False, *(True,) * 8)

# Of each problem: u of every launch, forward and backward; "m" is the mask.
TRAFFIC = [
    ({}, "resident", ["3m"], ["5m", "0"]),
    ({}, "walked", ["2", "3m"], ["3m", "5m"]),
    ({"layout": "rows", "dtype": torch.bfloat16}, "walked", ["2", "3m"], ["3m", "5m"]),
    ({"activation": "silu"}, "walked", ["2", "3"], ["3", "5"]),
    ({"mode": "running"}, "walked", ["3m"], ["5m", "0"]),
    ({"wanted": NO_DX}, "resident", ["3m"], ["4m", "0"]),
]


@interpreted
@pytest.mark.parametrize(("options", "cut", "forward", "backward"), TRAFFIC, ids=str)
def test_bytes_are_the_stated_units(small_blocks, options, cut, forward, backward):
    small_blocks(elements=8192, inner=2048, programs=8, splits=2, resident=65536 * 2 if cut == "resident" else 0)
    problem = DoubleProblem((8, 8, 520), **options)
    u = problem.x.numel() * problem.x.element_size()
    with count_bytes() as traffic:
        _, launches = triton.double_forward_launches(*problem.forward_args())
        _, statistics, mask = problem.forward()
        _, backward_launches = triton.double_backward_launches(*problem.backward_args(statistics, mask))
        problem.backward(statistics, mask)
    assert max(len(launches), len(backward_launches)) <= 2
    for launch, stated in zip([*launches, *backward_launches], [*forward, *backward], strict=True):
        units = float(stated.rstrip("m")) + (MASK[problem.x.dtype] if stated.endswith("m") else 0)
        assert launch.bytes / u == pytest.approx(units, rel=1e-12), launch.name
        assert traffic.bytes(launch.name) / u == pytest.approx(units, rel=0.02, abs=0.02), launch.name


def test_every_kernel_states_its_units():
    found = {name: kernel for name, kernel in vars(kernels).items() if name.endswith("_kernel")}
    assert set(found) == set(kernels.TENSORS)
    for name, kernel in found.items():
        assert "Units: " in kernel.fn.__doc__, name
        assert set(kernels.TENSORS[name]) <= set(kernel.arg_names)


@interpreted
@pytest.mark.parametrize("cut", ["walked", "resident"])
@pytest.mark.parametrize(
    "options", [{"activation": "prelu"}, {"layout": "rows"}, {"mode": "running", "layout": "rows"}], ids=str
)
def test_many_programs_in_any_order(small_blocks, options, cut):
    """As the reference, and the same bits whatever order programs run in."""
    small_blocks(elements=128, splits=2, resident=4096 if cut == "resident" else 0)
    problem = DoubleProblem((4, 17, 10), **options)
    results = problem.run()
    assert_close(results, problem.run(reference))
    with permute_programs(lambda programs: random.Random(programs).sample(range(programs), programs)) as programs:
        assert bits(*problem.run()) == bits(*results)
    assert max(programs) > 2
