"""``torch.compile``, ``torch.export`` and the checks of ``torch.library`` on the operators themselves."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from common import bits, randomised
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import vgkern
from vgkern.activations import TABLE, resolve
from vgkern.functional import add_act, batch_norm_act
from vgkern.gradients import GradStats
from vgkern.nn import AddAct, BatchNormAct2d


class Net(nn.Module):
    """A residual block: every layer of the package, a cumulative average, a learnable activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(n, 4, 3, padding=1, bias=False) for n in (3, 4))
        self.bn1 = BatchNormAct2d(4)
        self.bn2 = BatchNormAct2d(4, momentum=None, activation="prelu", grad_norm_bounds=(None, 0.5))
        self.end = AddAct(activation="silu")

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.end(self.bn2(self.conv2(x), x), x)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _assert_trains_alike(compiled, module, eager, inputs) -> None:
    """Outputs, gradients, statistics and records of a few steps."""
    for x in inputs:
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
        for model in (compiled, eager):
            model(x).square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=name)
    for (name, ours), theirs in zip(module.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
    layers = [name for name, layer in eager.named_modules() if hasattr(layer, "grad_stats")]
    assert layers
    for name in layers:
        ours, theirs = module.get_submodule(name).grad_stats(), eager.get_submodule(name).grad_stats()
        for field in GradStats.__dataclass_fields__:
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-5, nan_ok=True), (name, field)


# Inductor's own convolutions hold for one height and width only, whatever follows them.
@pytest.mark.parametrize(
    ("backend", "sizes"),
    [("inductor", [(2, 3, 6, 8), (4, 3, 6, 8)]), ("aot_eager", [(2, 3, 6, 8), (4, 3, 5, 7), (3, 3, 9, 10)])],
)
def test_a_net_compiles_without_a_break_and_once(backend, sizes):
    net = Net()
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    _assert_trains_alike(compiled, net, eager, [torch.randn(size) for size in sizes[:1]])
    with torch.compiler.set_stance("fail_on_recompile"):
        _assert_trains_alike(compiled, net, eager, [torch.randn(size) for size in sizes[1:]])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
def test_layers_compile_in_training_and_eval(activation, memory_format):
    layer = randomised(BatchNormAct2d(4, activation=activation))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        for module in (layer, eager):
            module.train(training).zero_grad()
        x = [torch.randn(2, 4, 5, 5).contiguous(memory_format=memory_format) for _ in range(2)]
        _assert_trains_alike(compiled, layer, eager, x)
        given = x[0].requires_grad_()
        for model in (compiled, eager):
            y = model(given, x[1])
            assert y.stride() == x[0].stride()
            assert torch.autograd.grad(y.sum(), given)[0].stride() == x[0].stride()


def test_nothing_recompiles_from_step_to_step():
    """A counter, a cumulative average and the record change at every step; none of them is a constant of the graph."""
    layer = BatchNormAct2d(4, momentum=None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            compiled(x).sum().backward()
    assert layer.num_batches_tracked == 4
    assert layer.grad_stats().backwards == 4


def test_checkpoints_inside_a_compiled_function():
    layer = randomised(BatchNormAct2d(4, activation="silu"))
    eager = copy.deepcopy(layer)

    def through(module):
        return lambda x: checkpoint(module, x, use_reentrant=False)

    compiled = torch.compile(through(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    gradients = []
    for call in (compiled, through(eager)):
        x.grad = None
        call(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, eager.running_var)
    assert layer.grad_stats().backwards == 1
    assert layer.grad_stats().gain == pytest.approx(eager.grad_stats().gain, rel=1e-5)


def test_functions_compile():
    weight, bias, residual = torch.randn(4), torch.randn(4), torch.randn(2, 4, 5, 5)

    def function(x, running_mean, running_var):
        y = batch_norm_act(
            x, running_mean, running_var, weight, bias, training=True, residual=residual, activation="leaky_relu",
            activation_args={"negative_slope": 0.2}, grad_norm_bounds=(None, 0.1),
        )  # fmt: skip
        return add_act(y, x, activation="hardswish")

    results = []
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        running = torch.zeros(4), torch.ones(4)
        y = call(x, *running)
        results.append([y, *running, torch.autograd.grad(y.sum(), x)[0]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_under_autocast_and_without_grad():
    layer = BatchNormAct2d(4, activation="prelu")
    conv = nn.Conv2d(4, 4, 1)
    compiled = torch.compile(lambda x: layer(conv(x), x), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype is layer(conv(x), x).dtype
        compiled(x).float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    with torch.no_grad():
        assert not compiled(x).requires_grad


def test_a_compiled_forward_refuses_as_the_eager_one():
    compiled = torch.compile(BatchNormAct2d(4), backend="aot_eager")
    with pytest.raises(Exception, match="expected 4D input"):
        compiled(torch.randn(2, 4, 5))


@pytest.mark.filterwarnings("ignore:A model attribute .*_probe", "ignore:.*LeafSpec")
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_net_in_eval_mode(strict):
    net = Net().eval()
    x = torch.randn(2, 3, 6, 8)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: batch},), strict=strict)
    for program in (exported, exported.run_decompositions()):
        for size in (2, 5):
            given = torch.randn(size, 3, 6, 8)
            torch.testing.assert_close(program.module()(given), net(given))
    targets = [str(node.target) for node in exported.run_decompositions().graph.nodes]
    assert targets.count("vgkern.batch_norm_act_forward.default") == 3


# The operators --------------------------------------------------------------------------------------------------------


def _forward_arguments(activation: str, mode: str, residual: bool, memory_format, dtype, requires_grad: bool):
    x, added = (torch.randn(2, 5, 3, 3).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias, mean = (torch.randn(5) for _ in range(3))
    per_channel = [None if mode == "none" else t for t in (weight, bias)]
    running = [mean, torch.rand(5) + 0.5] if mode == "running" else [None, None]
    slope = torch.full((5,), 0.25) if TABLE[activation].learnable else None
    for t in (x, added, *per_channel, slope):
        if t is not None:
            t.requires_grad_(requires_grad)
    args = list(resolve(activation).args)
    added = added if residual else None
    return (x, added, *per_channel, *running, slope, mode == "batch", 1e-5, activation, args, True)


def _backward_arguments(forward, bounds=(0.0, float("inf")), wanted=(True,) * 6):
    with torch.no_grad():
        _, statistics, mask = torch.ops.vgkern.batch_norm_act_forward(*forward)
    x, residual, weight, bias, _, _, slope, training, eps, activation, args, _ = forward
    reads = TABLE[activation].backward_reads
    tensors = (
        torch.randn_like(x), x, residual if reads == "z" else None, mask if mask.numel() else None,
        statistics if statistics.numel() else None, weight, bias, slope,
    )  # fmt: skip
    present = (True, residual is not None, weight is not None, bias is not None, slope is not None, True)
    output_mask = [a and b for a, b in zip(wanted, present, strict=True)]
    return (*tensors, training, eps, activation, args, *bounds, output_mask)


_MODES = ("batch", "running", "none")


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("activation", ["relu", "silu", "prelu"])
def test_opcheck(activation, mode, residual):
    """Schema, fake, and a trace under AOTAutograd.

    The operators have no formula at the autograd key (it is ``vgkern.functional``'s), so what opcheck asks for there,
    given inputs that require grad, is asked without them.
    """
    formats = ((torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16))
    for (memory_format, dtype), requires_grad in itertools.product(formats, (True, False)):
        forward = _forward_arguments(activation, mode, residual, memory_format, dtype, requires_grad)
        utilities = {"test_schema", "test_faketensor"}
        if not requires_grad:
            utilities |= {"test_autograd_registration", "test_aot_dispatch_dynamic"}
        opcheck(
            torch.ops.vgkern.batch_norm_act_backward.default, _backward_arguments(forward), test_utils=tuple(utilities)
        )
        if mode == "running":  # its statistics hold NaN, and a trace is compared with ==
            utilities -= {"test_aot_dispatch_dynamic"}
        opcheck(torch.ops.vgkern.batch_norm_act_forward.default, forward, test_utils=tuple(utilities))


def test_a_trace_of_the_forward_operator_with_running_statistics():
    """What opcheck leaves out."""
    forward = _forward_arguments("relu", "running", True, torch.contiguous_format, torch.float32, False)
    op = torch.ops.vgkern.batch_norm_act_forward.default
    traced = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)(*forward)
    for ours, theirs in zip(traced, op(*forward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "prelu"])  # what their backward reads
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_results(backend, device, activation, memory_format):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode, residual, dtype in itertools.product(_MODES, (True, False), (torch.float32, torch.bfloat16)):
        if backend == "triton" and (dtype is torch.bfloat16) != residual:
            continue
        forward = _forward_arguments(activation, mode, residual, memory_format, dtype, False)
        calls = [(torch.ops.vgkern.batch_norm_act_forward, forward)]
        for wanted in ((True,) * 6, (False,) * 6, (True, False) * 3, (False, True) * 3):
            calls.append((torch.ops.vgkern.batch_norm_act_backward, _backward_arguments(forward, wanted=wanted)))
            if backend == "triton":
                break
        for op, arguments in calls:
            arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)
            results = op(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                fakes = op(*torch.utils._pytree.tree_map_only(torch.Tensor, fake.from_tensor, arguments))
            for real, imagined in zip(results, fakes, strict=True):
                assert (real.shape, real.dtype, real.stride()) == (imagined.shape, imagined.dtype, imagined.stride())


def test_inputs_of_the_operators_are_left_alone(backend, device):
    for activation, mode in itertools.product(("relu", "prelu"), _MODES):
        forward = _forward_arguments(activation, mode, True, torch.contiguous_format, torch.float32, False)
        for op, arguments in (
            (torch.ops.vgkern.batch_norm_act_forward, forward),
            (torch.ops.vgkern.batch_norm_act_backward, _backward_arguments(forward, (0.0, 0.1))),
        ):
            arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)
            tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
            before = bits(*tensors)
            results = op(*arguments)
            assert bits(*tensors) == before
            storages = {t.untyped_storage().data_ptr() for t in tensors}
            assert all(r.untyped_storage().data_ptr() not in storages for r in results if r.numel())


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_a_direct_call_with_a_gradient_wanted_does_not_give_a_wrong_one(backend):
    """The operators have no autograd formula: where PyTorch does not refuse, the gradient is right."""
    forward = _forward_arguments("silu", "batch", False, torch.contiguous_format, torch.float32, True)
    x = forward[0]
    y = torch.ops.vgkern.batch_norm_act_forward(*forward)[0]
    expected = batch_norm_act(x, None, None, forward[2], forward[3], True, activation="silu")
    dy = torch.randn_like(y)
    try:
        gradient = torch.autograd.grad(y, x, dy)[0]
    except RuntimeError:
        return
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, dy)[0], rtol=1e-4, atol=1e-5)


def test_vgkern_is_the_namespace():
    assert {name for name in dir(torch.ops.vgkern) if name.startswith("batch_norm")} == {
        "batch_norm_act_forward",
        "batch_norm_act_backward",
        "batch_norm_moments",
        "batch_norm_act_input_gradient",
    }
    assert vgkern.ops.batch_norm_act_forward is torch.ops.vgkern.batch_norm_act_forward.default
