"""The layers as modules: construction, state, loading, modes. What ``nn.BatchNorm*d`` does is what they must do."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from common import FUSED, NAMES, PLAIN, SHAPES, Plain, bits, randomised, torch_activation, unchanged
from torch import nn

from vgkern.nn import AddAct, BatchNormAct2d

DIMS = tuple(FUSED)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dim", DIMS)
def test_the_first_arguments_are_those_of_batch_norm(dim):
    ours = list(inspect.signature(FUSED[dim]).parameters.values())
    theirs = [p for p in inspect.signature(PLAIN[dim]).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for mine, other in zip(ours, theirs[:7], strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    keywords = {p.name: p.default for p in ours[7:]}
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[7:])
    contract = {"activation": "relu", "activation_args": None, "grad_norm_bounds": None, "track_grad_stats": True}
    assert keywords.items() >= contract.items()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("dim", DIMS)
def test_state_dicts_exchange_strictly_both_ways(dim, tracked, affine):
    layer = randomised(FUSED[dim](7, affine=affine, track_running_stats=tracked, activation="gelu"))
    plain = randomised(PLAIN[dim](7, affine=affine, track_running_stats=tracked))
    state = layer.state_dict()
    assert list(state) == list(plain.state_dict())
    assert state._metadata == plain.state_dict()._metadata
    for source, target in ((layer, plain), (plain, layer)):
        randomised(source)
        target.load_state_dict(source.state_dict(), strict=True)
        for name, tensor in source.state_dict().items():
            assert tensor.dtype == target.state_dict()[name].dtype
            assert bits(tensor) == bits(target.state_dict()[name])


@pytest.mark.parametrize("activation", [nn.PReLU(7), "prelu"])
def test_a_learnable_activation_adds_one_key(activation):
    layer = BatchNormAct2d(7, activation=activation)
    plain = nn.BatchNorm2d(7)
    assert list(layer.state_dict()) == ["weight", "bias", "activation_weight", *list(plain.state_dict())[2:]]
    layer.load_state_dict(layer.state_dict() | {"activation_weight": torch.full_like(layer.activation_weight, 0.5)})
    assert (layer.activation_weight == 0.5).all()
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["activation_weight"]
    assert plain.load_state_dict(layer.state_dict(), strict=False).unexpected_keys == ["activation_weight"]


def test_an_old_state_dict_without_num_batches_tracked_loads():
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = BatchNormAct2d(3)
    layer(torch.randn(4, 3, 2, 2))
    layer.load_state_dict(old, strict=True)
    assert torch.equal(layer.running_mean, old["running_mean"])


def test_a_state_dict_of_other_channels_is_refused():
    layer = BatchNormAct2d(3)
    with unchanged(layer), pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("dim", DIMS)
def test_running_statistics(backend, device, dim):
    """running_var is the unbiased variance; the normalisation uses the biased one."""
    layer = FUSED[dim](7, momentum=1.0, activation=None, eps=1e-3).to(device)
    x = torch.randn(SHAPES[dim], device=device) * 3 + 2
    y = layer(x).detach()
    values = x.double().movedim(1, 0).flatten(1)
    _close(layer.running_mean.double(), values.mean(1))
    _close(layer.running_var.double(), values.var(1, unbiased=True))
    normalised = y.double().movedim(1, 0).flatten(1)
    biased = values.var(1, unbiased=False)
    _close(normalised.var(1, unbiased=False), biased / (biased + 1e-3))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 1, 7.0, -1.0, True, None, math.nan])
@pytest.mark.parametrize("dim", DIMS)
def test_momentum_may_be_any_number(dim, momentum):
    layer, plain = FUSED[dim](7, momentum=momentum).double(), PLAIN[dim](7, momentum=momentum).double()
    for _ in range(3):
        x = torch.randn(SHAPES[dim], dtype=torch.float64) + 1
        layer(x)
        plain(x)
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(layer, name), getattr(plain, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert layer.num_batches_tracked == plain.num_batches_tracked == 3


def test_the_cumulative_average_is_as_exact_as_the_statistics():
    """1/3 in float32 would leave an error of 1e-8 in a float64 layer, and a count beyond 65504 is inf in float16."""
    layer, means = BatchNormAct2d(3, momentum=None).double(), []
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64) + 10
        means.append(x.mean((0, 2, 3)))
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), rtol=1e-14, atol=0)
    half = BatchNormAct2d(3, momentum=None).half()
    half.num_batches_tracked.fill_(70_000)
    half.running_mean.fill_(1.0)
    half(torch.full((4, 3, 2, 2), 60_000.0, dtype=torch.float16))
    assert (half.running_mean > 1.5).all()


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dim", DIMS)
def test_a_layer_trains_as_the_three_modules_do(dim, activation):
    layer = randomised(FUSED[dim](7, activation=activation)).train()
    plain = Plain(layer)
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.05) for module in (layer, plain)]
    target = torch.randn(SHAPES[dim])
    for step in range(4):
        x, residual = torch.randn(SHAPES[dim]), torch.randn(SHAPES[dim]) if step % 2 else None
        for module, optimiser in zip((layer, plain), optimisers, strict=True):
            optimiser.zero_grad()
            (module(x, residual) - target).square().mean().backward()
            optimiser.step()
    state = {name.removeprefix("bn.").replace("act.", "activation_"): t for name, t in plain.state_dict().items()}
    assert set(state) == set(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-5)
    x = torch.randn(SHAPES[dim])
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)


def test_gamma_keeps_its_sign():
    layer = BatchNormAct2d(3, activation=None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-2.0, 0.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    x = torch.randn(4, 1, 2, 2).expand(4, 3, 2, 2)
    y = layer(x)
    assert torch.equal(y[:, 0], -y[:, 2])
    assert (y[:, 1] == 5).all()
    assert layer.state_dict()["weight"].tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_a_layer(dtype):
    layer = BatchNormAct2d(3, activation="prelu").to(dtype)
    assert layer.num_batches_tracked.dtype is torch.int64
    others = [t for name, t in layer.state_dict().items() if name != "num_batches_tracked"]
    assert all(t.dtype is dtype for t in others)
    y = layer(torch.randn(4, 3, 2, 2, dtype=dtype))
    y.sum().backward()
    assert y.dtype is layer.weight.grad.dtype is layer.activation_weight.grad.dtype is layer.running_var.dtype is dtype
    assert layer.grad_stats().backwards == 1


def test_half_data_with_float32_parameters():
    for dtype in (torch.float16, torch.bfloat16):
        layer = BatchNormAct2d(3, activation="silu")
        x = torch.randn(4, 3, 2, 2, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype is x.grad.dtype is dtype
        assert layer.weight.grad.dtype is layer.running_mean.dtype is torch.float32


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch(backend, device, shape):
    layer = BatchNormAct2d(3, activation="prelu").to(device)
    x, residual = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    with unchanged(layer.running_mean, layer.running_var):
        y = layer(x, residual)
        y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == shape
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    plain = nn.BatchNorm2d(3)
    plain(torch.empty(shape))
    assert layer.num_batches_tracked == plain.num_batches_tracked
    stats = layer.grad_stats()
    assert stats.backwards == 1
    assert stats.grad_input_norm == stats.grad_weight_norm == stats.nonfinite == 0
    assert layer.eval()(x).shape == shape


def test_no_channels():
    layer = BatchNormAct2d(0)
    x = torch.empty(4, 0, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_tracking_can_be_switched_off_and_on_later():
    layer, plain = BatchNormAct2d(3), nn.BatchNorm2d(3)
    steps = [(True, True), (False, True), (False, False), (False, True), (True, False), (True, True), (True, False)]
    for tracked, training in steps:
        x = torch.randn(4, 3, 5, 5) + 1
        for module in (layer, plain):
            module.track_running_stats = tracked
            module.train(training)
        _close(layer(x), plain(x).relu())
        for (name, ours), theirs in zip(layer.state_dict().items(), plain.state_dict().values(), strict=True):
            assert ours.dtype == theirs.dtype, name
            _close(ours, theirs)


def test_statistics_of_none_make_eval_use_the_batch():
    layer = BatchNormAct2d(3, track_running_stats=False)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer.running_mean is None
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("training", [True, False])
def test_without_bias(dim, training):
    layer = FUSED[dim](7, bias=False).train(training)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    with torch.no_grad():
        layer.weight.fill_(-2.0)
    x = torch.randn(SHAPES[dim], requires_grad=True)
    y = layer(x)
    _close(y, nn.functional.batch_norm(x, torch.zeros(7), torch.ones(7), layer.weight, None, training).relu())
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.grad_stats().grad_bias_norm == 0


def test_bias_can_be_left_out_as_in_torch():
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:  # torch before 2.13
        pytest.skip("not run: this torch's BatchNorm2d takes no bias=False")
    plain, layer = nn.BatchNorm2d(3, bias=False), BatchNormAct2d(3, bias=False)
    layer.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(layer.state_dict(), strict=True)


def test_only_a_weight_takes_part_where_the_bias_is_set_to_none():
    layer = BatchNormAct2d(3)
    layer.bias = None
    layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_resets():
    layer = randomised(BatchNormAct2d(3))
    layer(torch.randn(4, 3, 2, 2))
    layer.reset_running_stats()
    assert (layer.running_mean.sum(), layer.running_var.sum(), layer.num_batches_tracked) == (0, 3, 0)
    layer.reset_parameters()
    assert (layer.weight.sum(), layer.bias.sum()) == (3, 0)


def test_meta_construction_and_loading_by_assignment():
    source = randomised(BatchNormAct2d(3, activation="prelu"))
    layer = BatchNormAct2d(3, activation="prelu", device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    for momentum in (0.1, None):
        layer.momentum = momentum
        meta = layer(torch.empty(4, 3, 5, 5, device="meta"), residual=torch.empty(4, 3, 5, 5, device="meta"))
        assert meta.is_meta
        assert meta.shape == (4, 3, 5, 5)
    layer.momentum = source.momentum
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    _close(layer(x), source(x))
    layer(x).sum().backward()
    assert layer.grad_stats().backwards == 1


def test_meta_construction_and_to_empty():
    layer = BatchNormAct2d(3, device="meta").to_empty(device="cpu")
    layer.load_state_dict(BatchNormAct2d(3).state_dict())
    layer(torch.randn(4, 3, 5, 5)).sum().backward()
    assert layer.grad_stats().backwards == 1


def _copies():
    def through_pickle(layer):
        return pickle.loads(pickle.dumps(layer))

    def through_torch(layer):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return [copy.deepcopy, through_pickle, through_torch]


@pytest.mark.parametrize("make_copy", _copies())
@pytest.mark.parametrize("recorded", [True, False])
def test_copies_are_equal_and_independent(make_copy, recorded):
    layer = randomised(BatchNormAct2d(3, activation=nn.PReLU(3), grad_norm_bounds=(None, 1.0)))
    x = torch.randn(4, 3, 5, 5)
    if recorded:
        layer(x).sum().backward()
    twin = make_copy(layer)
    assert str(twin) == str(layer)
    assert twin.grad_norm_bounds == layer.grad_norm_bounds
    assert twin.grad_stats() == layer.grad_stats()
    with unchanged(layer):
        before = layer.grad_stats()
        twin(x).square().sum().backward()
        with torch.no_grad():
            twin.weight.zero_()
        assert twin.grad_stats() != before
        assert layer.grad_stats() == before
    twin.load_state_dict(layer.state_dict())
    assert bits(twin.eval()(x)) == bits(layer.eval()(x))


def test_what_iterating_over_parameters_shows():
    layer = BatchNormAct2d(3, activation="prelu")
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "activation_weight"]
    assert [name for name, _ in BatchNormAct2d(3).named_parameters()] == ["weight", "bias"]
    assert "_probe" not in layer.state_dict()


def test_it_says_what_it_is():
    args = {"negative_slope": 0.2}
    layer = BatchNormAct2d(3, activation="leaky_relu", activation_args=args, grad_norm_bounds=(None, 2.0))
    assert repr(layer).startswith(f"BatchNormAct2d({nn.BatchNorm2d(3).extra_repr()}")
    assert "leaky_relu(negative_slope=0.2)" in repr(layer)
    assert "grad_norm_bounds=(None, 2.0)" in repr(layer)
    assert repr(AddAct(activation="gelu")) == "AddAct(activation=gelu)"


def test_converters_of_torch_leave_it_alone():
    """They replace every ``_BatchNorm`` and would drop the activation without a word."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, activation="silu"))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[1]) is BatchNormAct2d


def test_bounds_and_recording_are_off_on_request():
    layer = BatchNormAct2d(3, track_grad_stats=False)
    layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert layer.grad_stats() is None
    layer.reset_grad_stats()


def test_a_layer_of_another_device_argument_and_dtype():
    layer = BatchNormAct2d(3, device="cpu", dtype=torch.float64, activation="prelu")
    assert {t.dtype for t in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(2, 3, 2, 2, dtype=torch.float64)).dtype is torch.float64


# AddAct ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", NAMES)
def test_add_act_is_the_two_modules(activation):
    layer = AddAct(activation=activation)
    act = torch_activation(activation)
    if layer.activation_weight is not None:
        act.weight.data.copy_(layer.activation_weight.data)
    for shape in ((), (5,), (4, 3), (4, 3, 5), (2, 3, 4, 5, 2, 2)):
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        for residual in (True, False):
            y = layer(*inputs) if residual else layer(inputs[0])
            expected = act(inputs[0] + inputs[1] if residual else inputs[0])
            _close(y, expected)
            dy = torch.randn_like(y)
            given = inputs if residual else inputs[:1]
            for ours, theirs in zip(
                torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True
            ):
                _close(ours, theirs)


def test_add_act_state():
    assert list(AddAct().state_dict()) == []
    layer = AddAct(activation=nn.PReLU(3), device="cpu")
    assert list(layer.state_dict()) == ["activation_weight"]
    layer(torch.randn(4, 3, 5), torch.randn(4, 3, 5)).sum().backward()
    assert layer.activation_weight.grad.shape == (3,)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert twin.grad_stats() == layer.grad_stats()
    assert AddAct(track_grad_stats=False).grad_stats() is None
