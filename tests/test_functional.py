"""The functions: ``F.batch_norm``'s arguments, state handed in and changed in place, dtypes that promote."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from common import bits, randomised, unchanged

from vgkern.functional import add_act, batch_norm_act
from vgkern.nn import AddAct, BatchNormAct2d

SHAPE = (4, 7, 3, 5)


def test_the_arguments_are_those_of_f_batch_norm():
    theirs = list(inspect.signature(F.batch_norm).parameters.values())
    ours = list(inspect.signature(batch_norm_act).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    keywords = {p.name: p.default for p in ours[len(theirs) :]}
    assert keywords == {
        "residual": None,
        "activation": "relu",
        "activation_args": None,
        "activation_weight": None,
        "grad_norm_bounds": None,
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert list(inspect.signature(add_act).parameters) == [
        "input", "residual", "activation", "activation_args", "activation_weight",
    ]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu"])
def test_a_layer_is_the_function_of_its_state(backend, device, activation, training):
    layer = randomised(BatchNormAct2d(7, activation=activation)).to(device).train(training)
    x, residual = torch.randn(2, *SHAPE, device=device)
    running = layer.running_mean.clone(), layer.running_var.clone()
    ours = batch_norm_act(
        x, *running, layer.weight, layer.bias, training, layer.momentum, layer.eps,
        residual=residual, activation=activation, activation_weight=layer.activation_weight,
    )  # fmt: skip
    assert bits(ours) == bits(layer(x, residual))
    assert bits(*running) == bits(layer.running_mean, layer.running_var)
    added = AddAct(activation=activation).to(device)
    plain = add_act(x, residual, activation=activation, activation_weight=added.activation_weight)
    assert bits(plain) == bits(added(x, residual))


@pytest.mark.parametrize("momentum", [0.1, 0, 1.0, 2.5, -0.5])
def test_running_statistics_change_in_place_in_training_only(backend, device, momentum):
    x = torch.randn(SHAPE, device=device) + 3
    ours, theirs = ([torch.zeros(7, device=device), torch.ones(7, device=device)] for _ in range(2))
    versions = [t._version for t in ours]
    batch_norm_act(x, *ours, training=True, momentum=momentum)
    F.batch_norm(x, *theirs, training=True, momentum=momentum)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(t._version > before for t, before in zip(ours, versions, strict=True))
    with unchanged(x, *ours):
        batch_norm_act(x, *ours, training=False, momentum=momentum)
        batch_norm_act(x, None, None, training=True, momentum=momentum)
    with torch.no_grad():
        before = bits(*ours)
        batch_norm_act(2 * x + 1, *ours, training=True, momentum=0.5)
        assert all(a != b for a, b in zip(bits(*ours), before, strict=True))


def test_inputs_are_left_alone(backend, device):
    x, residual, dy = torch.randn(3, *SHAPE, device=device)
    weight, bias = torch.randn(2, 7, device=device)
    given = [t.requires_grad_() for t in (x, residual, weight, bias)]
    with unchanged(*given, dy):
        for activation in ("relu", "silu", "identity"):
            y = batch_norm_act(x, None, None, weight, bias, True, residual=residual, activation=activation)
            y.backward(dy)
            add_act(x, residual, activation=activation).backward(dy)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_shapes_of_the_activation_weight(backend, device, shape):
    """A slope, or one a channel; its gradient has its shape."""
    x = torch.randn(SHAPE, device=device)
    slope = torch.rand(shape, device=device).requires_grad_()
    twin = slope.detach().clone().requires_grad_()
    dy = torch.randn_like(x)
    y = batch_norm_act(x, None, None, training=True, activation="prelu", activation_weight=slope)
    z = F.batch_norm(x, None, None, training=True)
    expected = F.prelu(z, twin if shape else twin.reshape(1))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.backward(dy)
    expected.backward(dy)
    assert slope.grad.shape == shape
    torch.testing.assert_close(slope.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_a_weight_alone_and_a_bias_alone(backend, device):
    x = torch.randn(SHAPE, device=device)
    per_channel = torch.randn(7, device=device)
    for weight, bias in ((per_channel, None), (None, per_channel)):
        ours, theirs = (
            torch.autograd.functional.vjp(f, (x, per_channel), torch.ones_like(x))
            for f in (
                lambda x, p, w=weight, b=bias: batch_norm_act(
                    x, None, None, p if w is not None else None, p if b is not None else None, True, activation="silu"
                ),
                lambda x, p, w=weight, b=bias: F.silu(
                    F.batch_norm(x, None, None, p if w is not None else None, p if b is not None else None, True)
                ),
            )
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.float32, torch.int64, torch.bool], ids=str)
def test_dtypes_promote_as_the_sum_does(input_dtype, residual_dtype):
    x, residual = torch.randn(SHAPE).to(input_dtype), (torch.randn(SHAPE) * 3).to(residual_dtype)
    running = torch.zeros(7, dtype=input_dtype), torch.ones(7, dtype=input_dtype)
    weight = torch.ones(7, dtype=input_dtype)
    y = batch_norm_act(x, *running, weight, None, True, residual=residual)
    expected = F.relu(F.batch_norm(x, None, None, weight, None, True) + residual)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)  # PyTorch rounds the normalised x to bfloat16 first
    assert running[0].dtype is input_dtype
    assert (running[1] != 1).all()
    assert add_act(x, residual).dtype is (x + residual).dtype


def test_parameters_as_tensors_that_are_no_parameters():
    """Views, slices and results of other operations, with gradients that go on."""
    table = torch.randn(2, 14, requires_grad=True)
    weight, bias = table[0, ::2], table[1].reshape(2, 7).mean(0)
    x = torch.randn(SHAPE)
    dy = torch.randn(SHAPE)
    ours = torch.autograd.grad(batch_norm_act(x, None, None, weight, bias, True), table, dy)[0]
    weight, bias = table[0, ::2], table[1].reshape(2, 7).mean(0)
    theirs = torch.autograd.grad(F.batch_norm(x, None, None, weight, bias, True).relu(), table, dy)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_running_statistics_that_are_views():
    """As of a model whose buffers live in one flat tensor."""
    flat = torch.zeros(28)
    running = flat[0:14:2], flat[14:28:2]
    running[1].fill_(1)
    x = torch.randn(SHAPE) + 2
    batch_norm_act(x, *running, training=True, momentum=1.0)
    torch.testing.assert_close(running[0], x.mean((0, 2, 3)))
    torch.testing.assert_close(running[1], x.transpose(0, 1).flatten(1).var(1))
    assert (flat[1:14:2] == 0).all()
    y = batch_norm_act(x, *running, activation=None)
    torch.testing.assert_close(y, F.batch_norm(x, *running), rtol=1e-5, atol=1e-5)


def test_tensors_of_parameter_type_and_subclasses_are_inputs_like_others():
    x = torch.nn.Parameter(torch.randn(SHAPE))
    batch_norm_act(x, None, None, training=True).sum().backward()
    assert x.grad.shape == SHAPE
    assert type(add_act(x, x)) is torch.Tensor
