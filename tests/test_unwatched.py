"""The way past the dispatcher: taken where nothing has to see an operator, never elsewhere, and short."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from common import bits, randomised
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vgkern import backends, functional, ops
from vgkern.backends import cpu, reference
from vgkern.functional import add_act, batch_norm_act
from vgkern.nn import AddAct, BatchNormAct2d

SHAPE = (4, 7, 3, 5)
FORWARD, BACKWARD = "vgkern.batch_norm_act_forward.default", "vgkern.batch_norm_act_backward.default"


@pytest.fixture
def ways(monkeypatch):
    """What was called, in order: ``forward`` and ``backward`` past the dispatcher, ``op`` for either operator."""
    called, inside = [], []

    def counted(name, function):
        def call(*args):
            if not inside:  # an operator ends in the same functions
                called.append(name)
            inside.append(name)
            try:
                return function(*args)
            finally:
                inside.pop()

        return call

    def counted_from_outside(name, function):
        """What calls others in C++, or else comes back with nothing, or with an operator's results."""

        def call(*args):
            before = len(called)
            result = function(*args)
            if result is not None and len(called) == before:
                called.append(name)
            return result

        return call

    node = functional._BatchNormActDirect
    monkeypatch.setattr(node, "forward", counted("forward", node.forward))
    monkeypatch.setattr(node._backward_cls, "apply", counted_from_outside("backward", cpu.node_backward))
    monkeypatch.setattr(cpu, "node_forward", counted("forward", cpu.node_forward))
    monkeypatch.setattr(cpu, "node_step", counted_from_outside("forward", cpu.node_step))
    for name in ("batch_norm_act_forward", "batch_norm_act_backward"):
        monkeypatch.setattr(ops, name, counted("op", getattr(ops, name)))
    return called


def _step(layer, x, residual):
    layer(x, residual).sum().backward()


def _inputs():
    return [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]


@contextlib.contextmanager
def _without_exchange_table():
    """As with torch 2.9, whose type of tensors has no table of functions that describe them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
        ops.use_tensor_types(torch.Tensor, nn.Parameter)
        yield
    ops.use_tensor_types(torch.Tensor, nn.Parameter)


# Where it is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [BatchNormAct2d(7), BatchNormAct2d(7, activation="prelu"), AddAct()], ids=repr)
def test_an_ordinary_step_goes_past_the_dispatcher(ways, layer):
    _step(layer, *_inputs())
    assert ways == ["forward", "backward"]


def test_ordinary_calls_of_every_kind_go_past_the_dispatcher(ways):
    x, residual = _inputs()
    layer = BatchNormAct2d(7)
    calls = [
        lambda: batch_norm_act(x, None, None, training=True, residual=residual),
        lambda: add_act(x, residual, activation="gelu"),
        lambda: layer.eval()(x),
        lambda: layer.train()(x.detach().contiguous(memory_format=torch.channels_last)),
        lambda: layer(x.transpose(2, 3)),
        lambda: BatchNormAct2d(7, dtype=torch.bfloat16)(x.bfloat16(), residual.half()),
    ]
    contexts = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]
    contexts.append(lambda: torch.autocast("cpu", torch.bfloat16))
    for context in contexts:
        for call in calls:
            with context():
                call()
    assert ways == ["forward"] * len(contexts) * len(calls)
    with torch.inference_mode():
        layer.eval()(torch.randn(SHAPE))
    assert ways[-1] == "forward"


@pytest.mark.parametrize("activation", ["relu", "silu", "prelu"])
def test_both_ways_give_the_same_bits(backend, device, activation):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    layer = randomised(BatchNormAct2d(7, activation=activation)).to(device)
    results = []
    for context in (contextlib.nullcontext, Watching):
        twin = copy.deepcopy(layer)
        inputs = [t.to(device).detach().requires_grad_() for t in torch.randn(2, *SHAPE, generator=_seeded())]
        with context():
            y = twin(*inputs)
            y.backward(torch.ones_like(y))
        results.append(bits(y, *(t.grad for t in (*inputs, *twin.parameters(), twin._probe))))
    assert results[0] == results[1]


def _seeded():
    return torch.Generator().manual_seed(3)


# Where it is not ------------------------------------------------------------------------------------------------------


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(ways):
    for layer in (BatchNormAct2d(7), AddAct()):
        with _Seen() as seen:
            _step(layer, *_inputs())
        assert [name for name in seen.names if name.startswith("vgkern")] == [FORWARD, BACKWARD]
    assert ways == ["op"] * 4


def test_a_dispatch_mode_around_one_pass_sees_that_pass(ways):
    layer, inputs = BatchNormAct2d(7), _inputs()
    y = layer(*inputs)
    with _Seen() as seen:
        y.sum().backward()
    assert BACKWARD in seen.names
    with _Seen() as seen:
        y = layer(*inputs)
    y.sum().backward()
    assert FORWARD in seen.names
    # What went through the operator forward does so backward: its tensors may be unlike any that a kernel takes.
    assert ways == ["forward", "op", "op", "op"]


def test_a_function_mode_sees_the_operator(ways):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        BatchNormAct2d(7)(torch.randn(SHAPE))
    assert FORWARD in seen
    assert ways == ["op"]


def test_fake_tensors_stay_fake(ways):
    with FakeTensorMode():
        layer, x = BatchNormAct2d(7), torch.randn(SHAPE, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert isinstance(y, FakeTensor)
    assert isinstance(x.grad, FakeTensor)
    assert isinstance(layer(x), FakeTensor)  # outside of the mode
    assert ways == ["op"] * 3


def test_meta_tensors_stay_meta(ways):
    x = torch.empty(SHAPE, device="meta", requires_grad=True)
    BatchNormAct2d(7, device="meta")(x).sum().backward()
    assert x.grad.is_meta
    assert ways == ["op", "op"]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_traces_the_operator(ways, pre_dispatch):
    x = torch.randn(SHAPE)
    graph = make_fx(lambda x: add_act(x, x), pre_dispatch=pre_dispatch)(x).graph
    assert FORWARD in {str(node.target) for node in graph.nodes}
    assert ways == ["op"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_is_not_bypassed(ways):
    torch.jit.trace(lambda x: add_act(x, x), torch.randn(SHAPE), check_trace=False)
    assert ways == ["op"]


def test_transforms_of_torch_func_take_the_functional_form(ways):
    x = torch.randn(SHAPE)
    torch.func.grad(lambda x: add_act(x, x).sum())(x)
    with contextlib.suppress(RuntimeError):
        torch.func.vmap(add_act)(torch.stack([x, x]))
    with contextlib.suppress(RuntimeError):
        torch.func.jvp(add_act, (x,), (x,))
    with forward_ad.dual_level(), contextlib.suppress(RuntimeError):
        add_act(forward_ad.make_dual(x, x))
    assert set(ways) == {"op"}


def test_transforms_and_traces_watch_what_they_do_not_wrap_too():
    x, seen = torch.randn(SHAPE), []

    class Traced(nn.Module):
        def forward(self, z):
            seen.append(ops.unwatched(x))
            return z + 1

    torch.func.grad(lambda z: Traced()(z).sum())(torch.ones(2))
    torch.fx.symbolic_trace(Traced())
    assert seen == [False, False]
    assert ops.unwatched(x)


def test_a_tensor_that_outlived_its_transform(ways):
    kept = []
    x = torch.randn(SHAPE)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    assert torch.equal(add_act(kept[0]), F.relu(x))
    assert ways == ["op"]


def test_batched_gradients_take_the_operator(ways):
    x = torch.randn(SHAPE, requires_grad=True)
    y = add_act(x)
    torch.autograd.grad(y, x, torch.randn(2, *SHAPE), is_grads_batched=True)
    assert ways == ["forward", "op"]


def test_the_profiler_shows_the_operators(ways):
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        _step(BatchNormAct2d(7), *_inputs())
    names = {event.name for event in profile.function_events}
    assert {"vgkern::batch_norm_act_forward", "vgkern::batch_norm_act_backward"} <= names
    assert ways == ["op", "op"]


def test_subclasses_see_the_operators(ways):
    seen = []

    class Functional(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    class Dispatching(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            result = function(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
            return cls(result) if function is torch.ops.aten.detach.default else result

    x = torch.randn(SHAPE)
    for arguments in ((x.as_subclass(Functional),), (x, x.as_subclass(Functional)), (Dispatching(x),)):
        seen.clear()
        add_act(*arguments)
        assert FORWARD in seen
    layer = BatchNormAct2d(7)
    layer.weight = nn.Parameter(Dispatching(torch.ones(7)))
    seen.clear()
    layer(x)
    assert FORWARD in seen
    assert set(ways) == {"op"}


def test_saved_tensors_that_hooks_may_have_changed_take_the_operator(ways):
    with torch.autograd.graph.save_on_cpu():
        y = add_act(torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE))
    y.sum().backward()
    assert ways == ["forward", "op"]


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize(
    "make",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
        torch._to_functional_tensor,
        torch._neg_view,
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        lambda x: x.to("meta"),
        lambda x: x[:0],
        lambda x: x.tolist(),
    ],
)
def test_what_a_kernel_cannot_read_is_not_ordinary(make):
    x = torch.randn(3, 4)
    for context in (contextlib.nullcontext, _without_exchange_table):
        with context():
            assert ops.unwatched(x, None, nn.Parameter(x))
            assert not ops.unwatched(x, None, make(x))


def test_an_error_that_is_no_answer_is_handed_on():
    class Broken:
        grad = property()

        @property
        def dtype(self):
            raise KeyError("dtype")

    ops.use_tensor_types(Broken, Broken)
    try:
        with pytest.raises(KeyError):
            ops.are_unwatched((Broken(),))
    finally:
        ops.use_tensor_types(torch.Tensor, nn.Parameter)


def test_lazy_negatives(ways):
    """Tensors whose memory does not hold their values, in every place."""
    x, weight = torch.randn(SHAPE), torch.rand(7) + 0.5
    negated = batch_norm_act(torch._neg_view(x), None, None, torch._neg_view(weight), training=True)
    torch.testing.assert_close(negated, batch_norm_act(-x, None, None, -weight, training=True), rtol=0, atol=0)
    given = x.clone().requires_grad_()
    gradient = torch.autograd.grad(add_act(given), given, torch._neg_view(x))[0]
    assert torch.equal(gradient, torch.where(x > 0, -x, 0.0))
    assert ways == ["op", "forward", "forward", "op"]


# The checks' short cut ------------------------------------------------------------------------------------------------


def test_the_short_cut_of_the_checks_refuses_nothing_and_finds_what_is_common(monkeypatch):
    """That what it lets pass is right is shown by tests/test_refusals.py."""
    for name in ("check", "check_batch_norm"):
        monkeypatch.setattr(ops, name, lambda *args: pytest.fail("the checks were run"))
    x, residual = _inputs()
    for dtype in ops.FLOATING_DTYPES:
        layer = BatchNormAct2d(7, dtype=dtype)
        layer(x.to(dtype), residual.to(dtype))
        layer.eval()(x.to(dtype))
    BatchNormAct2d(7, affine=False, track_running_stats=False, activation="gelu")(x)


# The usual call in one ------------------------------------------------------------------------------------------------


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


_ITSELF = object()


class _Call:
    """A layer, how it is used, and whether that is usual."""

    def __init__(self, name, usual, *, x=lambda x: x, residual=lambda r: r, dtype=torch.float32, use=None, **options):
        self.name, self.usual, self.x, self.residual, self.dtype, self.use = name, usual, x, residual, dtype, use
        self.options = options

    def results(self):
        """Bits of all that two calls leave behind, and how often autograd was told of what they changed."""
        torch.manual_seed(0)
        layer = randomised(BatchNormAct2d(7, **self.options)).to(self.dtype)
        context = contextlib.nullcontext()
        if self.use is not None:
            context = self.use(layer) or context
        results, versions = [], [t._version for t in layer.state_dict().values()]
        with context:
            for generator in (_seeded(), _seeded()):
                leaves = [t.to(self.dtype).requires_grad_() for t in torch.randn(2, *SHAPE, generator=generator)]
                x = self.x(leaves[0])
                y = layer(x, x if self.residual is _ITSELF else self.residual(leaves[1]))
                assert y.requires_grad == torch.is_grad_enabled()
                if y.requires_grad:
                    y.backward(torch.randn(y.shape, generator=_seeded()).to(y.dtype))
                results += [y, *(t.grad for t in leaves)]
        results += [*layer.state_dict().values(), *(p.grad for p in layer.parameters())]
        results.append(None if layer._probe is None else layer._probe.grad)
        versions = [t._version - v for t, v in zip(layer.state_dict().values(), versions, strict=True)]
        return bits(*results), versions


def _with_buffer(name, change):
    def use(layer):
        layer._buffers[name] = change(layer._buffers[name])

    return use


CALLS = [
    _Call("float32", True),
    _Call("bfloat16", True, dtype=torch.bfloat16),
    _Call("float64", True, dtype=torch.float64),
    _Call("bfloat16 beside float32", True, x=torch.Tensor.bfloat16, residual=torch.Tensor.bfloat16),
    _Call("float16 beside float32", True, x=torch.Tensor.half, residual=torch.Tensor.half),
    _Call("channels_last", True, x=_channels_last, residual=_channels_last),
    _Call("without a residual", True, residual=lambda r: None),
    _Call("the input as residual", True, residual=_ITSELF),
    _Call("smooth", True, activation="gelu"),
    _Call("with an argument", True, activation="leaky_relu", activation_args={"negative_slope": 0.3}),
    _Call("no activation", True, activation=None),
    _Call("bounds", True, grad_norm_bounds=(0.5, 0.6)),
    _Call("no record", True, track_grad_stats=False),
    _Call("no parameters", True, affine=False),
    _Call("no running statistics", True, track_running_stats=False),
    _Call("another momentum", True, momentum=0.75),
    _Call("in eval mode", True, use=lambda layer: layer.eval() and None),
    _Call("without gradients", True, use=lambda layer: torch.no_grad()),
    _Call("in eval mode without gradients", True, use=lambda layer: layer.eval() and torch.no_grad()),
    _Call("frozen parameters", True, use=lambda layer: layer.requires_grad_(False) and None),
    _Call("no counter", True, use=_with_buffer("num_batches_tracked", lambda counter: None)),
    _Call("residual in another format", False, residual=_channels_last),
    _Call("residual of another type", False, residual=lambda r: r.bfloat16()),
    _Call("input in no format", False, x=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    _Call("a batch with gaps", False, x=lambda x: _channels_last(x.repeat_interleave(2, 0))[::2]),
    _Call("prelu", False, activation="prelu"),
    _Call("the average of all batches", False, momentum=None),
    _Call("a momentum that is no float", False, momentum=1),
    _Call("a float counter", False, use=_with_buffer("num_batches_tracked", torch.Tensor.double)),
    _Call("running statistics that are slices", False,
          use=_with_buffer("running_var", lambda t: torch.stack([t, t], 1)[:, 1])),
    _Call("statistics that are not tracked, counted", False,
          use=lambda layer: layer._buffers.update(running_mean=None, running_var=None)),
    _Call("another backend", False, use=lambda layer: backends.use("reference")),
    _Call("under a dispatch mode", False, use=lambda layer: _Seen()),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_the_usual_call_in_one_gives_the_same_bits(call, monkeypatch):
    results, answers = [], []

    def seen(*args, step=cpu.node_step):
        y = step(*args)
        answers.append(y is not None)
        return y

    for step in (seen, lambda *_: None):
        monkeypatch.setattr(cpu, "node_step", step)
        results.append(call.results())
    assert results[0] == results[1]
    assert answers == [call.usual] * 2


def _errors(layer, x, residual):
    with contextlib.suppress(RuntimeError):
        layer(x, residual[:, :, 1:])


@pytest.mark.parametrize(
    "step",
    [
        lambda layer, x, residual: torch.autograd.grad(layer(x, residual).sum(), [x, residual, *layer.parameters()]),
        lambda layer, x, residual: torch.autograd.grad(layer(x).sum(), x, create_graph=True),
        lambda layer, x, residual: layer.eval()(x.detach(), residual.detach()),
        _errors,
    ],
    ids=["both passes", "second order", "eval mode", "refused"],
)
def test_a_step_keeps_no_reference(step):
    """What C++ forgets to give back shows in the counts of what every step takes."""
    layer = BatchNormAct2d(7, activation="leaky_relu", activation_args={"negative_slope": 0.3})
    x, residual = _inputs()
    things = [
        layer.weight, layer.bias, layer.running_mean, layer.num_batches_tracked, layer._probe, x, residual,
        layer.activation.args, layer._bounds, layer.momentum, layer.eps, functional._Config, functional._config,
        torch.contiguous_format, backends, None, True, False,
    ]  # fmt: skip
    for _ in range(20):
        step(layer, x, residual)
    gc.collect()
    objects, counts = len(gc.get_objects()), [sys.getrefcount(thing) for thing in things]
    for _ in range(200):
        step(layer, x, residual)
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert max(sys.getrefcount(thing) - count for thing, count in zip(things, counts, strict=True)) < 50


def test_training_of_any_truth_is_training(monkeypatch):
    x = torch.randn(SHAPE)
    expected = batch_norm_act(x, None, None, training=True)
    for step in (cpu.node_step, lambda *_: None):
        monkeypatch.setattr(cpu, "node_step", step)
        assert torch.equal(batch_norm_act(x, None, None, training=1), expected)


def test_a_function_has_no_average_of_all_batches():
    with pytest.raises(TypeError, match="momentum"):
        batch_norm_act(torch.randn(SHAPE), torch.zeros(7), torch.ones(7), training=True, momentum=None)


@pytest.mark.parametrize("wrong", [(), (None,) * 8, (*(None,) * 7, (1, 2))])
def test_the_node_refuses_what_is_not_its_own(wrong):
    with pytest.raises(TypeError):
        cpu.node_forward(*wrong)


def _steps(shape, dtype, activation):
    """Bits of all that two steps in training and one in eval mode make, the last with a variance that is a slice."""
    layer = randomised(BatchNormAct2d(shape[1], activation=activation, dtype=dtype))
    results = []
    for training, memory_format in (
        (True, torch.contiguous_format), (True, torch.channels_last), (False, torch.contiguous_format),
    ):  # fmt: skip
        if not training:
            layer.running_var = torch.stack([layer.running_var] * 2, 1)[:, 1]
        inputs = [t.to(dtype).requires_grad_() for t in torch.randn(2, *shape, generator=_seeded())]
        y = layer.train(training)(inputs[0].contiguous(memory_format=memory_format), inputs[1])
        y.backward(torch.ones_like(y))
        results += bits(y, *(t.grad for t in inputs), *layer.state_dict().values(), layer._probe.grad)
    return results + bits(*(p.grad for p in layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tensors_described_by_their_attributes_give_the_same_bits(ways, dtype):
    results = []
    for context in (contextlib.nullcontext, _without_exchange_table):
        torch.manual_seed(0)
        with context():
            results.append(_steps(SHAPE, dtype, "prelu" if dtype is torch.float32 else "relu"))
    assert results[0] == results[1]
    assert ways == ["forward", "backward"] * 6


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 0.5, 0.9, 1.0, 1, -1.0, float("nan"), None])
def test_running_statistics_by_both_ways(dtype, momentum):
    statistics = torch.randn(3, 70, dtype=torch.float64).abs()
    given = [torch.randn(70).to(dtype), torch.rand(70).to(dtype), torch.tensor(4)]
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    versions = [t._version for t in ours]
    cpu.update_running_statistics(*ours, statistics, momentum)
    assert all(t._version > version for t, version in zip(ours, versions, strict=True))
    reference.update_running_statistics(*theirs, statistics, momentum)
    eps = torch.finfo(dtype).eps
    for one, other in zip(ours[:2], theirs[:2], strict=True):  # the reference rounds statistics, difference and sum
        torch.testing.assert_close(one, other, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    factor = torch.tensor(1 / 5 if momentum is None else momentum, dtype=torch.float64)
    for one, old, new in zip(ours[:2], given[:2], statistics[::2], strict=True):
        expected = torch.lerp(old.double(), new, factor).to(dtype)
        rounding = eps * (4 if momentum is None else 1)
        torch.testing.assert_close(one, expected, rtol=rounding, atol=rounding, equal_nan=True)
    assert ours[2] == theirs[2] == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_mean", lambda: torch.zeros(7, 2)[:, 0]),
        ("running_var", lambda: torch.ones(7, 2)[:, 0]),
        ("num_batches_tracked", lambda: torch.tensor(0.0)),
    ],
)
def test_running_statistics_that_are_slices_and_a_counter_of_another_type(name, value):
    layer, plain = BatchNormAct2d(7), nn.BatchNorm2d(7)
    setattr(layer, name, value())
    x = torch.randn(SHAPE)
    for module in (layer, plain):
        module(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 1
    assert layer.num_batches_tracked.dtype is (torch.float32 if name == "num_batches_tracked" else torch.int64)


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_parameters_that_are_slices(backend, device):
    """(C,) with a stride, forward and backward, of parameters and of statistics."""
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    columns = torch.rand(7, 4, device=device) + 0.5
    results = []
    for make in (torch.Tensor.clone, lambda t: t):
        mean, var, weight, bias = (make(columns[:, i]) for i in range(4))
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        y = batch_norm_act(x, mean, var, weight, bias, activation="silu")
        results.append(bits(y, *torch.autograd.grad(y.square().sum(), [x, weight, bias])))
    assert results[0] == results[1]


def test_parameters_that_are_computed():
    """A parametrisation or pruning takes the parameter out of the module's own dictionary."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    x = torch.randn(SHAPE)
    layer = BatchNormAct2d(7, activation=None)
    expected = layer(x) * 2
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), expected)
    pruned = prune.random_unstructured(BatchNormAct2d(7, activation=None), "weight", amount=3)
    assert (pruned(x).flatten(2) == 0).all(2).all(0).sum() == 3


# Length ---------------------------------------------------------------------------------------------------------------


def _calls(function) -> int:
    """Python's calls, of functions in Python and in C."""
    count = 0

    def hook(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hook)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="counted with Python 3.10 to 3.13")
def test_the_calls_of_a_step_are_few():
    """No clock: beyond the kernels, calls are where a small step's time goes."""
    layer, plain = BatchNormAct2d(7), nn.BatchNorm2d(7)
    x, residual = _inputs()
    dy = torch.randn(SHAPE)
    counts = []
    for forward in (lambda: layer(x, residual), lambda: F.relu(plain(x) + residual)):
        forward().backward(dy)  # imports and caches
        y = forward()
        counts.append((_calls(forward), _calls(lambda y=y: y.backward(dy))))
    (forward, backward), (eager_forward, eager_backward) = counts
    assert forward - eager_forward <= 28  # 21 with Python 3.11 and torch 2.13; 342 by the dispatcher and all checks
    assert backward - eager_backward <= 32  # 25


@pytest.mark.parametrize(("name", "way"), [("cpu", ["forward", "backward"]), ("reference", ["op", "op"])])
def test_a_forced_backend_is_taken_and_the_cpus_by_the_short_way(ways, name, way, monkeypatch):
    called = []
    for direction in ("forward", "backward"):
        run = getattr(reference, f"batch_norm_act_{direction}")
        monkeypatch.setattr(
            reference, f"batch_norm_act_{direction}", lambda *args, run=run: called.append("reference") or run(*args)
        )
    with backends.use(name):
        _step(BatchNormAct2d(7), *_inputs())
        add_act(torch.ones(2))
    assert ways == [*way, way[0]]
    assert called == ["reference"] * 3 * (name == "reference")


def test_a_backend_that_is_forced_between_the_passes_computes_the_second(ways):
    y = BatchNormAct2d(7)(*_inputs())
    with backends.use("reference"):
        y.sum().backward()
    assert ways == ["forward", "op"]


def test_what_the_method_of_the_base_class_calls():
    assert functional._apply_direct.__self__ is functional._BatchNormActDirect
