"""Special values: inf, NaN, signed zeros and kinks, as PyTorch's scalar path has them and wherever an element lies."""

from __future__ import annotations

import math

import pytest
import torch
from common import NAMES, bits

import vgkern
from vgkern.activations import TABLE, resolve
from vgkern.functional import add_act, batch_norm_act

# Runs of 37 elements: whole vectors of every instruction set, and a tail.
RUN = 37
_ORDINARY = (1e-30, 0.5, 1.0, 8.0, 30.0, 89.0, 1e4, 1e30, 3e38)


def _points(activation: str, dtype: torch.dtype) -> list[float]:
    """Special values first, then kinks with their neighbours, then ordinary ones."""
    kinks = torch.tensor(resolve(activation).row.kinks(*resolve(activation).args), dtype=dtype)
    beside = [torch.nextafter(kinks, torch.full_like(kinks, side)) for side in (-math.inf, math.inf)]
    # The neighbours of 0 among normal numbers: bfloat16's denormals are 0 on some hardware.
    tiny = torch.finfo(dtype).tiny
    beside = [torch.where(kinks == 0, side * tiny, b) for side, b in zip((-1, 1), beside, strict=True)]
    ordinary = [sign * v for v in _ORDINARY for sign in (-1, 1)]
    return [
        -math.inf, math.inf, math.nan, -0.0, 0.0, *kinks.tolist(), *beside[0].tolist(), *beside[1].tolist(), *ordinary,
    ]  # fmt: skip


def _weight(activation: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor | None:
    return torch.full((1,), 0.25, dtype=dtype, device=device) if TABLE[activation].learnable else None


def _scalar_path(activation: str, point: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and derivative that PyTorch computes for a tensor of one element."""
    z = torch.tensor([point], dtype=dtype, requires_grad=True)
    weight = _weight(activation, dtype)
    y = TABLE[activation].reference(z, *resolve(activation).args, *(() if weight is None else (weight,)))
    return y.detach(), torch.autograd.grad(y, z, torch.ones_like(y))[0]


def _expected(activation: str, points: list[float], dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(values, derivatives) in ``dtype`` and in float64."""
    columns = ([_scalar_path(activation, point, d) for point in points] for d in (dtype, torch.float64))
    return [tuple(torch.cat(part) for part in zip(*column, strict=True)) for column in columns]


def _through_add_act(x, activation, weight):
    return add_act(x, activation=activation, activation_weight=weight)


def _through_a_residual(x, activation, weight):
    return add_act(x, torch.zeros_like(x), activation=activation, activation_weight=weight)


def _through_batch_norm(x, activation, weight):
    """In eval mode with statistics of the identity."""
    zeros, ones = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return batch_norm_act(x, zeros, ones, eps=0.0, activation=activation, activation_weight=weight)


@pytest.mark.parametrize("through", [_through_add_act, _through_a_residual, _through_batch_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_special_values(backend, device, activation, dtype, through):
    points = _points(activation, dtype)
    column = torch.tensor(points, dtype=dtype, device=device)
    points = column.tolist()  # as the dtype has them
    (values, slopes), (values64, slopes64) = _expected(activation, points, dtype)
    weight = _weight(activation, dtype, device)
    # A point fills a plane of one channel, then a row of channels: every position of a body and of a tail.
    for x in (column.view(-1, 1, 1).repeat(1, 1, RUN), column.view(-1, 1).repeat(1, RUN)):
        x.requires_grad_()
        y = through(x, activation, weight)
        dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        for what, got, theirs, exact in (("value", y, values, values64), ("derivative", dx, slopes, slopes64)):
            got = got.detach().cpu().reshape(len(points), RUN)
            for at, row in zip(points, got, strict=True):
                same = row.isnan().all() if row.isnan().any() else len(set(bits(*row))) == 1
                assert same, f"{what} at {at} differs between body and tail: {row}"
            _assert_as_scalar_path(what, points, got[:, 0], theirs, exact)


def _assert_as_scalar_path(what, points, got, theirs, exact) -> None:
    eps = torch.finfo(got.dtype).eps
    for at, ours, torchs, true in zip(points, got.tolist(), theirs.tolist(), exact.tolist(), strict=True):
        message = f"{what} at {at}: {ours}, PyTorch's {torchs}, exact {true}"
        if not math.isfinite(at):
            # At NaN the derivatives of elu and celu are 1 on PyTorch's scalar path and NaN on its vector path.
            assert str(ours) == str(torchs) or (what == "derivative" and math.isnan(at) and math.isnan(ours)), message
        elif not math.isfinite(torchs):
            assert str(ours) == str(torchs) or abs(ours - true) <= 4 * eps * abs(true), message  # better than PyTorch
        else:
            assert abs(ours - true) <= abs(torchs - true) + 2 * eps * max(1.0, abs(true)), message


@pytest.mark.parametrize("activation", NAMES)
def test_the_sign_of_zero_is_kept(backend, device, activation):
    x = torch.tensor([-0.0, 0.0] * RUN, device=device)
    y = add_act(x, activation=activation, activation_weight=_weight(activation, torch.float32, device))
    wanted = torch.cat([_scalar_path(activation, point, torch.float32)[0] for point in (-0.0, 0.0)] * RUN)
    assert bits(y) == bits(wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity", "silu"])
def test_what_is_not_finite_stays_in_its_channel(backend, device, activation, memory_format, training):
    channels, poisoned = 7, [1, 4]
    clean = [c for c in range(channels) if c not in poisoned]

    def run(x, residual, dy):
        layer = vgkern.nn.BatchNormAct2d(channels, activation=activation).to(device).train(training)
        x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = layer(x, residual)
        y.backward(dy)
        elements = [t.detach().cpu().movedim(1, 0) for t in (y, x.grad, residual.grad)]
        per_channel = (layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
        return *elements, *(t.detach().cpu() for t in per_channel)

    tensors = [torch.randn(3, channels, 3, 5, device=device).contiguous(memory_format=memory_format) for _ in range(3)]
    expected = run(*tensors)
    for into in range(3):  # x, the residual, the gradient that arrives
        given = [t.clone() for t in tensors]
        for channel, value in zip(poisoned, (math.inf, math.nan), strict=True):
            given[into][1, channel, 1, 2] = value
        got = run(*given)
        assert not torch.isfinite(got[2 if into == 2 else 0][poisoned]).all()
        for ours, theirs in zip(got, expected, strict=True):
            assert bits(ours[clean]) == bits(theirs[clean])
        if not training:  # each element by itself
            for ours, theirs in zip(got[:3], expected[:3], strict=True):
                same = (ours == theirs) | (ours.isnan() & theirs.isnan())
                assert same.sum() >= same.numel() - len(poisoned)


def test_an_infinite_value_is_not_turned_into_a_finite_one(backend, device):
    x = torch.randn(4, 2, 3, 3, device=device)
    x[:2, 0] = math.inf  # the first element, and some of those in the middle
    layer = vgkern.nn.BatchNormAct2d(2, activation=None).to(device)
    y = layer(x)
    assert y[:, 0].isnan().all()  # x − mean is inf − inf or −inf, and rstd is 0 or NaN, as in PyTorch
    assert layer.running_mean[0] == math.inf  # as in PyTorch: an infinite first element is no origin
    assert y[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_bias_or_running_mean_gives_an_infinite_z(backend, device, dtype):
    """As in PyTorch: of numbers that are kept in two parts the second is no number there."""
    layer = vgkern.nn.BatchNormAct2d(3, activation=None).to(device, dtype).eval()
    with torch.no_grad():
        layer.bias[0] = math.inf
        layer.running_mean[1] = math.inf
    x = torch.randn(4, 3, 5, 7).to(device, dtype)
    y = layer(x)
    assert (y[:, 0] == math.inf).all()
    assert (y[:, 1] == -math.inf).all()
    assert y[:, 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_x_gives_an_infinite_z(backend, device, dtype):
    """With running statistics, as in PyTorch; whatever a scale, which is more than a float holds, is rounded to."""
    channels = 64
    layer = vgkern.nn.BatchNormAct2d(channels, activation=None).to(device, dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels))
        layer.running_var.copy_(torch.rand(channels) + 0.5)
    x = torch.tensor([math.inf, -math.inf], dtype=dtype, device=device).view(2, 1, 1, 1).repeat(1, channels, 1, 3)
    assert torch.equal(layer(x), x * layer.weight.view(1, -1, 1, 1).sign())
