"""``grad_norm_bounds``: the gradient handed on has a norm within them, its direction kept, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from common import bits, randomised

from vgkern.functional import batch_norm_act
from vgkern.nn import BatchNormAct2d

SHAPE = (4, 7, 3, 5)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _norm(t: torch.Tensor) -> float:
    return t.double().norm().item()


def _run(device, bounds, *, dy=None, training=True, memory_format=torch.contiguous_format, dtype=torch.float32):
    """(dx, the other gradients, the record) of one backward pass, the same inputs each time."""
    torch.manual_seed(0)
    layer = randomised(BatchNormAct2d(7, activation="silu", grad_norm_bounds=bounds)).to(device, dtype).train(training)
    x, residual, random = (
        torch.randn(SHAPE, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        for _ in range(3)
    )
    layer(x, residual).backward(random.detach() if dy is None else dy(random.detach()))
    return x.grad, [residual.grad, layer.weight.grad, layer.bias.grad], layer.grad_stats()


def _assert_direction_kept(dx: torch.Tensor, free: torch.Tensor, atol: float = 1e-7) -> None:
    torch.testing.assert_close(dx.double() / _norm(dx), free.double() / _norm(free), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (None, 0.5, 0.5),  # as shares of the norm without bounds
        (2.0, None, 2.0),
        (0.25, 0.75, 0.75),
        (1.5, 3.0, 1.5),
        (0.5, 0.5, 0.5),
        (1e-10, 1e-9, 1e-9),
        (1e10, None, 1e10),
    ],
)
def test_the_norm_lies_within(backend, device, low, high, wanted, training, memory_format):
    options = {"training": training, "memory_format": FORMATS[memory_format]}
    free, others, stats = _run(device, None, **options)
    size = _norm(free)
    bounds = tuple(None if share is None else share * size for share in (low, high))
    dx, bounded_others, bounded_stats = _run(device, bounds, **options)
    assert _norm(dx) == pytest.approx(wanted * size, rel=1e-5)
    _assert_direction_kept(dx, free)
    assert bits(*bounded_others) == bits(*others)  # only dx is scaled
    assert bounded_stats.grad_input_norm == pytest.approx(_norm(dx), rel=1e-5)
    assert bounded_stats.grad_preact_norm == stats.grad_preact_norm
    assert bounded_stats.gain == pytest.approx(stats.gain * wanted, rel=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bounds", [(None, None), (0, None), (0, math.inf), (1e-3, None), (None, 1e3), (1e-3, 1e3)])
def test_within_the_bounds_nothing_changes_to_the_bit(backend, device, bounds, memory_format):
    options = {"memory_format": FORMATS[memory_format]}
    free, others, stats = _run(device, None, **options)
    dx, bounded_others, bounded_stats = _run(device, bounds, **options)
    assert bits(dx, *bounded_others) == bits(free, *others)
    # The record may come from the closed formula on one side and from the dx that was written on the other.
    assert bounded_stats.grad_input_norm == pytest.approx(stats.grad_input_norm, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_zero_gradient_is_left_alone(backend, device, training):
    dx, _, stats = _run(device, (1.0, 2.0), dy=torch.zeros_like, training=training)
    assert torch.equal(dx, torch.zeros_like(dx))
    assert stats.grad_input_norm == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_that_is_not_finite_is_left_alone(backend, device, training, value):
    def poisoned(dy):
        dy[1, 2, 0, 0] = value
        return dy

    free, *_ = _run(device, None, dy=poisoned, training=training)
    for bounds in ((1e-3, 1e-2), (1e3, 1e4)):
        dx, *_ = _run(device, bounds, dy=poisoned, training=training)
        assert torch.equal(dx.isnan(), free.isnan())
        assert torch.equal(dx.nan_to_num(), free.nan_to_num())


def test_an_upper_bound_of_zero(backend, device):
    dx, others, _ = _run(device, (None, 0.0))
    assert torch.equal(dx, torch.zeros_like(dx))
    assert all(_norm(t) > 0 for t in others)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_near_the_end_of_the_range(backend, device, scale, training):
    """Their squares are 0 or inf in float32; the norm that is bounded is not."""
    dx, *_ = _run(device, (1.0, 1.0), dy=lambda dy: dy * scale, training=training)
    free, *_ = _run(device, None, dy=lambda dy: dy * scale, training=training)
    assert _norm(dx) == pytest.approx(1.0, rel=1e-5)
    _assert_direction_kept(dx, free)


def test_a_gradient_that_cancels(backend, device):
    """The norm that bounds is that of what is left, not of what went in."""

    def constant_per_channel(dy):
        return dy.mean((0, 2, 3), keepdim=True).expand_as(dy) + 1e-3 * dy

    layers = [BatchNormAct2d(7, activation=None, grad_norm_bounds=b).to(device) for b in (None, (1.0, 1.0))]
    x = torch.randn(SHAPE, device=device)
    dy = constant_per_channel(torch.randn(SHAPE, device=device))
    gradients = []
    for layer in layers:
        given = x.clone().requires_grad_()
        layer(given).backward(dy)
        gradients.append(given.grad)
    assert _norm(gradients[1]) == pytest.approx(1.0, rel=1e-5)
    # What is left is a thousandth of what went in, so it is right to a thousand times the rounding of float32.
    _assert_direction_kept(gradients[1], gradients[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(backend, device, dtype):
    dx, _, stats = _run(device, (1.0, 1.0), dtype=dtype)
    assert stats.grad_input_norm == pytest.approx(1.0, rel=1e-5)
    assert _norm(dx) == pytest.approx(1.0, rel=4 * torch.finfo(dtype).eps)


def test_the_function_takes_them_too(backend, device):
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    for training, running in ((True, (None, None)), (False, torch.ones(2, 7, device=device))):
        y = batch_norm_act(x, *running, training=training, grad_norm_bounds=(None, 0.25))
        assert _norm(torch.autograd.grad(y, x, torch.randn_like(y))[0]) == pytest.approx(0.25, rel=1e-5)


def test_they_can_be_changed_and_taken_away():
    layer = BatchNormAct2d(7, grad_norm_bounds=(None, 0.5))
    x = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    norms = []
    for bounds in ((None, 0.5), (None, 0.25), None):
        layer.grad_norm_bounds = bounds
        assert layer.grad_norm_bounds == bounds
        norms.append(_norm(torch.autograd.grad(layer(x), x, dy)[0]))
    assert norms[:2] == pytest.approx([0.5, 0.25], rel=1e-5)
    assert norms[2] > 1


def test_the_bounds_of_a_forward_are_those_of_its_backward():
    layer = BatchNormAct2d(7, grad_norm_bounds=(None, 0.5))
    x = torch.randn(SHAPE, requires_grad=True)
    y = layer(x)
    layer.grad_norm_bounds = None
    assert _norm(torch.autograd.grad(y, x, torch.randn(SHAPE))[0]) == pytest.approx(0.5, rel=1e-5)


def test_a_graph_of_the_backward_has_them_too(backend, device):
    layer = BatchNormAct2d(7, activation="silu", grad_norm_bounds=(None, 0.5)).to(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    dy = torch.randn(SHAPE, device=device)
    dx = torch.autograd.grad(layer(x), x, dy, create_graph=True)[0]
    assert _norm(dx) == pytest.approx(0.5, rel=1e-5)
    assert torch.autograd.grad(dx.square().sum(), x)[0].isfinite().all()
