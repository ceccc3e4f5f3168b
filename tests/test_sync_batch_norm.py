"""``SyncBatchNormAct`` over gloo against one process on the concatenated batch; and the conversion to it."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
import warnings
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
import world
from common import FUSED, PLAIN, bits, randomised
from torch import nn
from torch.library import opcheck
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vgkern
from vgkern import ops
from vgkern.gradients import GradStats
from vgkern.nn import BatchNormAct2d, SyncBatchNormAct

_WORLD = 4


@dataclass(frozen=True)
class Case:
    """One batch, cut up: ``parts[rank]`` samples go to each rank."""

    parts: tuple[int, ...]
    shape: tuple[int, ...] = (5, 3, 4)  # (C, *)
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    residual: bool = True
    needs_x: tuple[bool, ...] = (True,) * _WORLD
    mean: float = 0.5
    compiled: bool = False
    layer: dict = field(default_factory=dict)

    def batch(self) -> list[torch.Tensor]:
        """x, residual and dy of the whole batch."""
        torch.manual_seed(1)
        size = (sum(self.parts), *self.shape)
        x, residual, dy = (torch.randn(size).to(self.dtype) for _ in range(3))
        return [t.contiguous(memory_format=self.memory_format) for t in (x + self.mean, residual, dy)]

    def configured(self, kind, **options) -> nn.Module:
        torch.manual_seed(2)
        return randomised(kind(self.shape[0], **self.layer, **options))

    def part(self, rank: int) -> slice:
        first = sum(self.parts[:rank])
        return slice(first, first + self.parts[rank])


CASES = {
    **{f"{world} ranks": Case((2,) * world) for world in range(1, _WORLD + 1)},
    "uneven": Case((1, 5, 2, 3)),
    "one value a rank": Case((1, 1, 1, 1), shape=(5,)),
    "two values in all": Case((1, 1), shape=(5,)),
    "an empty rank": Case((3, 0, 2)),
    "the first rank empty": Case((0, 3), layer={"activation": "silu"}),
    "all but one empty": Case((0, 0, 2)),
    "all empty": Case((0, 0)),
    "rank 2": Case((3, 4), shape=(5,)),
    "rank 3": Case((3, 2), shape=(5, 7)),
    "rank 5": Case((1, 2), shape=(5, 2, 3, 4), memory_format=torch.channels_last_3d),
    "channels_last": Case((2, 3), memory_format=torch.channels_last),
    "channels_last, smooth": Case((2, 3), memory_format=torch.channels_last, layer={"activation": "gelu"}),
    "bfloat16": Case((2, 3), dtype=torch.bfloat16),
    "bfloat16, smooth": Case((2, 3), dtype=torch.bfloat16, layer={"activation": "silu"}),
    "float64": Case((2, 3), dtype=torch.float64, layer={"dtype": torch.float64}),
    "a large mean": Case((2, 3, 4), mean=1e4),
    "no residual": Case((2, 3), residual=False),
    "no residual, smooth": Case((2, 3), residual=False, layer={"activation": "mish"}),
    "no activation": Case((2, 3), layer={"activation": None}),
    "prelu": Case((2, 3), layer={"activation": nn.PReLU(5)}),
    "not affine": Case((2, 3), layer={"affine": False}),
    "without bias": Case((2, 3), layer={"bias": False}),
    "not tracked": Case((2, 3), layer={"track_running_stats": False}),
    "cumulative average": Case((2, 3), layer={"momentum": None}),
    "an upper bound": Case((2, 3), layer={"grad_norm_bounds": (None, 0.25)}),
    "a lower bound": Case((2, 3, 1), layer={"grad_norm_bounds": (100.0, None), "activation": "silu"}),
    "x needs no gradient on some": Case((2, 3, 2), needs_x=(True, False, True)),
    "x needs no gradient on some, not affine": Case((2, 3), needs_x=(False, True), layer={"affine": False}),
    "compiled": Case((2, 3), compiled=True),
    "compiled, x needs no gradient on some": Case((2, 2), needs_x=(False, True), compiled=True),
}


def _steps(case: Case, layer: nn.Module, inputs, needs_x: bool, call) -> dict:
    """Two training steps, the second with gradients; then eval."""
    x, residual, dy = inputs
    results = {}
    with torch.no_grad():
        call(x + 1, residual if case.residual else None)
    x, residual = x.clone().requires_grad_(needs_x), residual.clone().requires_grad_()
    y = call(x, residual if case.residual else None)
    y.backward(dy)
    results["y"], results["dx"] = y.detach(), x.grad
    results["dresidual"] = residual.grad
    results["parameters"] = {name: p.grad for name, p in layer.named_parameters()}
    results["buffers"] = {name: b.detach().clone() for name, b in layer.named_buffers() if name != "_probe"}
    results["stats"] = layer.grad_stats()
    results["format"] = y.is_contiguous(memory_format=case.memory_format)
    with torch.no_grad():
        results["eval"] = layer.eval()(x, residual if case.residual else None)
    return results


def _run_case(case: Case, rank: int, group) -> dict:
    layer = case.configured(SyncBatchNormAct, process_group=group)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if case.compiled else layer
    return _steps(case, layer, [t[case.part(rank)] for t in case.batch()], case.needs_x[rank], call)


# What else the ranks do, each in a group of two -----------------------------------------------------------------------


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d") and "wait_tensor" not in func._opname:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def _collectives(rank, group):
    layer, x = SyncBatchNormAct(3, process_group=group), torch.randn(4, 3, 2, 2)
    layer(x)
    counted = []
    for needs_x in (True, False):
        with _Collectives() as forward:
            y = layer(x.clone().requires_grad_(needs_x), x)
        with _Collectives() as backward:
            y.sum().backward()
        counted.append((forward.names, backward.names))
    with _Collectives() as evaluated:
        layer.eval()(x)
    return counted, evaluated.names


def _error(call) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def _channels_of_layers(rank, group):
    return _error(lambda: SyncBatchNormAct(3 + rank, process_group=group)(torch.randn(4, 3 + rank, 2, 2)))


def _channels_of_inputs(rank, group):
    return _error(lambda: SyncBatchNormAct(3, process_group=group)(torch.randn(4, 3 + rank, 2, 2)))


def _create_graph(rank, group):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = SyncBatchNormAct(3, process_group=group)(x)
    return _error(lambda: torch.autograd.grad(y.sum(), x, create_graph=True))


def _constant_channels(rank, group):
    """Values by rank: constants and a bias, an infinity on the second rank only, and the means of their outputs."""
    layer = randomised(SyncBatchNormAct(4, process_group=group, activation=None))
    x = torch.tensor([1e4, 3e38, 1e-30, 1.0]).view(1, 4, 1).repeat(3 if rank else 2, 1, 5)
    if rank:
        x[0, 3, 0] = torch.inf
    y = layer(x)
    return y, layer.bias, layer.running_mean


def _copies(rank, group):
    """Copies belong to the same group; the layer is called again after a failed call."""
    layer = SyncBatchNormAct(3, process_group=group, track_grad_stats=False)
    results = []
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        y = copied(torch.full((2, 3, 2), float(rank)))
        y.sum().backward()
        results.append((copied.running_mean, copied.grad_stats(), repr(copied)))
    return results


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), BatchNormAct2d(4, activation="silu")

    def forward(self, x):
        x = self.bn1(self.conv(x))
        return self.bn2(x, x)


def _data(step: int) -> torch.Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))


def _train(net, module, rank, through):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        through(
            module, _data(step) if rank is None else _data(step)[3 * rank : 3 * rank + 3]
        ).square().mean().backward()
        optimiser.step()
    return net.state_dict()


_THROUGH = {
    "plainly": lambda module, x: module(x),
    "checkpoint": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "reentrant checkpoint": lambda module, x: checkpoint(module, x.requires_grad_(), use_reentrant=True),
}


def _net() -> nn.Module:
    torch.manual_seed(3)
    return _Net()


def _data_parallel(rank, group):
    results = {}
    for key, through in _THROUGH.items():
        net = vgkern.convert_sync_batchnorm(_net(), group)
        results[key] = _train(net, DistributedDataParallel(net, process_group=group), rank, through)
    return results


def _update_bn(rank, group):
    net = vgkern.convert_sync_batchnorm(_net(), group)
    vgkern.update_bn([_data(step)[3 * rank : 3 * rank + 3] for step in range(3)], net)
    return net.state_dict()


_OTHERS = {
    f.__name__: f
    for f in (
        _collectives, _channels_of_layers, _channels_of_inputs, _create_graph, _constant_channels, _copies,
        _data_parallel, _update_bn,
    )
}  # fmt: skip


def _work(rank: int) -> dict:
    warnings.filterwarnings("ignore", message="You are using a Backend")
    groups = {world: dist.new_group(range(world)) for world in range(1, _WORLD)} | {_WORLD: None}
    results = {}
    for name, case in CASES.items():
        if rank < len(case.parts):
            results[name] = _run_case(case, rank, groups[len(case.parts)])
    if rank < 2:
        for name, function in _OTHERS.items():
            results[name] = function(rank, groups[2])
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    return world.run(_work, _WORLD, tmp_path_factory.mktemp("sync"))


# Against one process --------------------------------------------------------------------------------------------------


def _close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Within 1e-6 of the largest value, or of one; in half precision, rounded to the same values but for a few ties."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
    if theirs.numel() == 0:
        return
    scale = max(1.0, theirs.abs().max().item())
    if theirs.dtype is torch.bfloat16:
        different = ours != theirs
        assert different.float().mean() <= 0.01, name
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6, msg=name)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_process_on_the_whole_batch(ranks, name):
    case = CASES[name]
    results = [results[name] for results in ranks[: len(case.parts)]]
    dim = max(1, len(case.shape) - 1)
    layer = case.configured(FUSED[dim])
    expected = _steps(case, layer, case.batch(), True, layer)
    local = not case.layer.get("track_running_stats", True)  # eval is then by each rank's own batch
    for key in ("y", "dresidual", "eval"):
        if expected[key] is not None and not (key == "eval" and local):
            _close(torch.cat([r[key] for r in results]), expected[key], key)
    for rank, result in enumerate(results):
        assert (result["dx"] is not None) is case.needs_x[rank]
        if case.needs_x[rank]:
            _close(result["dx"], expected["dx"][case.part(rank)], "dx")
        assert result["format"]
        for buffer, value in result["buffers"].items():
            _close(value, expected["buffers"][buffer], buffer)
            assert bits(value) == bits(results[0]["buffers"][buffer])
    for parameter, gradient in expected["parameters"].items():
        _close(sum(r["parameters"][parameter].double() for r in results).to(gradient.dtype), gradient, parameter)


@pytest.mark.parametrize("name", CASES)
def test_the_record_is_the_ranks_own(ranks, name):
    case = CASES[name]
    layer = case.configured(FUSED[max(1, len(case.shape) - 1)])
    expected = _steps(case, layer, case.batch(), True, layer)
    _, _, dy = case.batch()
    # Gradients in half precision are those of dx before it was rounded.
    close = partial(pytest.approx, rel=1e-5 if case.dtype.itemsize >= 4 else 3e-3, abs=1e-7)
    for rank, results in enumerate(ranks[: len(case.parts)]):
        result, part = results[name], case.part(rank)
        stats = result["stats"]
        assert stats.backwards == 1
        assert stats.grad_output_norm == close(dy[part].double().norm().item())
        dx = expected["dx"][part] if result["dx"] is None else result["dx"]
        assert stats.grad_input_norm == close(dx.double().norm().item())
        if case.residual:
            assert stats.grad_preact_norm == close(expected["dresidual"][part].double().norm().item())
        for field_name, parameter in (("grad_weight_norm", "weight"), ("grad_bias_norm", "bias")):
            gradient = result["parameters"].get(parameter)
            norm = 0.0 if gradient is None else gradient.double().norm().item()
            assert getattr(stats, field_name) == close(norm), field_name
        assert isinstance(stats, GradStats)


def test_one_collective_forward_and_one_backward(ranks):
    for rank in range(2):
        counted, evaluated = ranks[rank]["_collectives"]
        assert counted == [(["all_gather_into_tensor"], ["all_reduce"])] * 2
        assert evaluated == []


@pytest.mark.parametrize("where", ["_channels_of_layers", "_channels_of_inputs"])
def test_ranks_whose_channels_differ_all_raise_at_once(ranks, where):
    for rank in range(2):
        kind, message, seconds = ranks[rank][where]
        assert kind == "RuntimeError"
        assert "on every rank, got 3 of 3 on rank 0, 4 of " in message
        assert seconds < 10


def test_a_double_backward_raises(ranks):
    for rank in range(2):
        kind, message, _ = ranks[rank]["_create_graph"]
        assert kind == "RuntimeError"
        assert "SyncBatchNormAct: a backward pass with create_graph=True is not implemented" in message


def test_constants_and_infinities_stay_in_their_channel(ranks):
    for rank in range(2):
        y, bias, running_mean = ranks[rank]["_constant_channels"]
        for channel in range(3):
            assert torch.equal(y[:, channel], bias[channel].expand_as(y[:, channel]))
            assert running_mean[channel].isfinite()
        assert y[:, 3].isnan().any()


def test_copies_stay_in_the_group(ranks):
    for rank in range(2):
        for running_mean, stats, text in ranks[rank]["_copies"]:
            torch.testing.assert_close(running_mean, torch.full((3,), 0.05))
            assert stats is None
            assert "process_group=" in text


@pytest.mark.parametrize("through", _THROUGH)
def test_training_under_data_parallel_is_training_of_one_process(ranks, through):
    net = _net()
    alone = _train(net, net, None, _THROUGH[through])
    for rank in range(2):
        state = ranks[rank]["_data_parallel"][through]
        assert list(state) == list(alone)
        for name, tensor in alone.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_update_bn_takes_the_average_over_all_ranks(ranks):
    net = _net()
    vgkern.update_bn([_data(step) for step in range(3)], net)
    for rank in range(2):
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(ranks[rank]["_update_bn"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


# The operators --------------------------------------------------------------------------------------------------------

_FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", _FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_moments(backend, device, dtype, memory_format):
    x = (torch.randn(6, 5, 7, 3) * 2 + 100).to(device, dtype).contiguous(memory_format=memory_format)
    x[:, 1] = 3.0
    count, mean, squares = ops.batch_norm_moments(x)
    values = x.double().movedim(1, 0).flatten(1)
    assert count.tolist() == [values.shape[1]] * 5
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(squares, values.var(1, unbiased=False) * values.shape[1], rtol=1e-5, atol=0)
    assert (mean[1], squares[1]) == (3, 0)
    one = ops.batch_norm_moments(x[:1, :, :1, :1].contiguous(memory_format=memory_format))
    assert one.tolist() == [[1] * 5, x[0, :, 0, 0].double().tolist(), [0] * 5]
    assert torch.equal(ops.batch_norm_moments(x[:0]), torch.zeros_like(one))


def test_merged_moments_are_those_of_all():
    x = torch.randn(12, 3, dtype=torch.float64) + 1e6
    x[:, 2] = 1e30
    parts = torch.stack([ops.batch_norm_moments(part) for part in x.split([1, 0, 4, 7])])
    whole = ops.batch_norm_moments(x)
    merged = ops.merge_moments(parts)
    torch.testing.assert_close(merged, whole, rtol=1e-9, atol=0)  # each part's mean is rounded to 1e-10
    assert merged[:, 2].tolist() == [12, 1e30, 0]
    assert ops.merge_moments(parts[1:2]).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize("memory_format", _FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "activation"),  # in half precision what is read: a mask, or z
    [*((torch.float32, name) for name in ("identity", "relu", "silu", "prelu")),
     (torch.bfloat16, "relu"), (torch.bfloat16, "silu")],
    ids=str,
)  # fmt: skip
def test_the_input_gradient_of_one_process_is_that_of_the_backward_operator(
    backend, device, dtype, activation, memory_format
):
    x, residual, dy = (
        torch.randn(4, 5, 7, 3).to(device, dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    weight, bias = torch.randn(5, device=device), torch.randn(5, device=device)
    slope = torch.full((5,), 0.25, device=device) if activation == "prelu" else None
    for added in (residual, None):
        _, statistics, mask = ops.batch_norm_act_forward(
            x, added, weight, bias, None, None, slope, True, 1e-5, activation, [], True
        )
        saved = (added, None) if activation in ("silu", "prelu") else (None, mask if mask.numel() else None)
        backward = partial(ops.batch_norm_act_backward, dy, x, *saved, statistics)
        tail = (slope, True, 1e-5, activation, [], 0.0, float("inf"), [True, False, True, True, False, True])
        expected, _, dweight, dbias, _, record = backward(weight.double(), bias.double(), *tail)
        means = torch.stack([dbias, dweight]) / (x.numel() / 5)
        for factor in (1.0, 0.25):
            dx, dx_squares = ops.batch_norm_act_input_gradient(
                dy, x, *saved, statistics, weight, bias, slope, activation, [], means, means.new_full((1,), factor)
            )
            assert dx.stride() == x.stride()
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(dx.float(), expected.float() * factor, rtol=tolerance, atol=tolerance)
            # In half precision dx may be made of a dz that was rounded, which the closed form does not see.
            assert dx_squares.item() == pytest.approx(record[2].item() * factor**2, rel=tolerance)
            assert dx_squares.item() == pytest.approx(dx.double().square().sum().item(), rel=tolerance)


@pytest.mark.parametrize("memory_format", _FORMATS, ids=str)
def test_opcheck(memory_format):
    x, residual, dy = (torch.randn(2, 5, 3, 3).contiguous(memory_format=memory_format) for _ in range(3))
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.vgkern.batch_norm_moments.default, (x,), test_utils=utilities)
    weight = torch.randn(5)
    _, statistics, _ = ops.batch_norm_act_forward(
        x, residual, weight, None, None, None, None, True, 1e-5, "silu", [], True
    )
    arguments = (dy, x, residual, None, statistics, weight, None, None, "silu", [], torch.randn(2, 5).double())
    op = torch.ops.vgkern.batch_norm_act_input_gradient.default
    opcheck(op, (*arguments, torch.ones(1).double()), test_utils=utilities)


# Alone, and the conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2), (4, 5, 3, 2, 2)], ids=str)
def test_without_a_process_group_it_is_the_layer_of_one_process(shape):
    layer = randomised(SyncBatchNormAct(5, activation="silu"))
    twin = FUSED[max(1, len(shape) - 2)](5, activation="silu")
    twin.load_state_dict(layer.state_dict(), strict=True)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    for training in (True, False):
        results = []
        for module in (layer, twin):
            y = module.train(training)(x, x)
            results.append(bits(y, *torch.autograd.grad(y, x, dy), *module.state_dict().values()))
        assert results[0] == results[1]
    assert bits(*layer.state_dict().values()) == bits(*twin.state_dict().values())


def test_what_a_layer_of_one_process_refuses_is_refused():
    layer = SyncBatchNormAct(5)
    with pytest.raises(ValueError, match="expected 2D or 3D or 4D or 5D input"):
        layer(torch.randn(5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 5, 1))
    with pytest.raises(ValueError, match="eps"):
        SyncBatchNormAct(5, eps=-1.0)


def _model() -> nn.Module:
    shared = BatchNormAct2d(4, activation=nn.PReLU(4), grad_norm_bounds=(None, 2.0), eps=1e-3, momentum=None)
    model = nn.ModuleDict({
        "stem": nn.Sequential(nn.Conv2d(3, 4, 1), PLAIN[2](4, momentum=0.3), nn.ReLU()),
        "first": shared, "second": shared,
        "line": FUSED[1](4, activation="silu", track_grad_stats=False),
        "volume": FUSED[3](4, affine=False, track_running_stats=False),
        "end": nn.SyncBatchNorm(4, eps=1e-2),
        "flat": nn.BatchNorm1d(4, affine=False),
    })  # fmt: skip
    model["stem"].eval()
    model["first"].weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _NormBase):
            randomised(module)
    return model


def test_conversion_keeps_all_but_the_class():
    model = _model()
    model["first"](torch.randn(4, 4, 2, 2)).sum().backward()
    seen = []
    model["line"].register_forward_hook(lambda *_: seen.append("line"))
    before = {name: id(t) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    modes = {name: module.training for name, module in model.named_modules()}
    described = {name: module.extra_repr() for name, module in model.named_modules() if hasattr(module, "activation")}
    state, record = model.state_dict(), model["first"].grad_stats()
    converted = vgkern.convert_sync_batchnorm(model)
    assert converted is model
    after = {name: id(t) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    assert after.items() >= before.items()
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == state._metadata
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name in ("stem.1", "first", "second", "line", "volume", "end", "flat"):
        assert type(model.get_submodule(name)) is SyncBatchNormAct, name
    assert model["first"] is model["second"]
    assert not model["first"].weight.requires_grad
    for name, text in described.items():
        assert model.get_submodule(name).extra_repr() == text
    assert (model["stem"][1].momentum, model["end"].eps) == (0.3, 1e-2)
    assert str(model["stem"][1].activation) == str(model["flat"].activation) == "identity"
    assert model["first"].grad_stats() == record
    model["line"](torch.randn(4, 4)).sum().backward()
    assert seen == ["line"]
    assert model["line"].grad_stats() is None
    again = vgkern.convert_sync_batchnorm(model)
    assert again["line"].grad_stats() is None
    assert again["first"].grad_stats() == record


def test_a_converted_model_computes_what_it_did():
    model = _model().train()
    converted = vgkern.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(4, 3, 5, 5)
    for net in (model, converted):
        net.result = net["end"].eval()(net["second"](net["first"](net["stem"](x))))
        net.result.square().sum().backward()
    torch.testing.assert_close(converted.result, model.result)
    for (name, ours), theirs in zip(converted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], tensor, msg=name)


def test_a_batch_norm_by_itself_is_replaced():
    layer = BatchNormAct2d(3, activation="silu")
    converted = vgkern.convert_sync_batchnorm(layer)
    assert type(converted) is SyncBatchNormAct
    assert converted.weight is layer.weight
    converted.register_forward_hook(lambda *_: None)
    converted.train(False)
    assert not layer._forward_hooks
    assert layer.training


def test_what_does_more_than_normalise_is_left_and_told():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    net = nn.Sequential(WithActivation(3), nn.LazyBatchNorm2d(), BatchNormAct2d(3))
    with pytest.warns(RuntimeWarning, match=r"0 \(WithActivation\), 1 \(LazyBatchNorm2d\)"):
        vgkern.convert_sync_batchnorm(net)
    assert [type(layer) for layer in net] == [WithActivation, nn.LazyBatchNorm2d, SyncBatchNormAct]


def test_the_converter_of_torch_leaves_it_alone():
    """It replaces every ``_BatchNorm`` and would drop the activation without a word (pytorch#187298)."""
    net = nn.Sequential(SyncBatchNormAct(4, activation="silu"), BatchNormAct2d(4, activation="silu"), nn.BatchNorm2d(4))
    kinds = [type(layer) for layer in nn.SyncBatchNorm.convert_sync_batchnorm(net)]
    assert kinds == [SyncBatchNormAct, BatchNormAct2d, nn.SyncBatchNorm]
