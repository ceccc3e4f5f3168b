"""The gradient record: each field against the tensors that autograd hands out, and how it accumulates and survives."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from common import NAMES, randomised
from torch.utils._python_dispatch import TorchDispatchMode

from vgkern.activations import TABLE, resolve
from vgkern.functional import batch_norm_act
from vgkern.gradients import GradStats
from vgkern.nn import AddAct, BatchNormAct1d, BatchNormAct2d

SHAPE = (4, 7, 3, 5)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Sums of float32 terms, kept in float64: what the contract allows.
TOLERANCE = 1e-5


def _close(expected: float):
    return pytest.approx(expected, rel=TOLERANCE, abs=0, nan_ok=True)


def _norm(t: torch.Tensor) -> float:
    return t.double().norm().item()


def _tensors(device: str, memory_format=torch.contiguous_format, shape=SHAPE):
    """(x, residual, dy)."""
    x, residual, dy = (torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(3))
    return x.requires_grad_(), residual.requires_grad_(), dy


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "hardsigmoid", "silu", "prelu"])
def test_every_field_against_autograd(backend, device, activation, training, memory_format):
    layer = randomised(BatchNormAct2d(7, activation=activation)).to(device).train(training)
    x, residual, dy = _tensors(device, FORMATS[memory_format])
    layer(x, residual).backward(dy)
    stats = layer.grad_stats()
    assert isinstance(stats, GradStats)
    assert stats.grad_output_norm == _close(_norm(dy))
    assert stats.grad_preact_norm == _close(_norm(residual.grad))
    assert stats.grad_input_norm == _close(_norm(x.grad))
    assert stats.grad_weight_norm == _close(_norm(layer.weight.grad))
    assert stats.grad_bias_norm == _close(_norm(layer.bias.grad))
    assert stats.gain == _close(_norm(x.grad) / _norm(dy))
    assert (stats.nonfinite, stats.backwards) == (0, 1)


@pytest.mark.parametrize("cut", ["resident", "walked"])
def test_an_epsilon_as_large_as_the_variance(request, backend, device, cut):
    """Σx̂² is then half of m, which the closed form of the norm of dx counts with where channels are walked."""
    if cut == "walked":
        request.getfixturevalue("small_blocks")
    layer = randomised(BatchNormAct2d(7, eps=1.0)).to(device)
    x, residual, dy = _tensors(device)
    layer(x, residual).backward(dy)
    assert layer.grad_stats().grad_input_norm == _close(_norm(x.grad))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_without_residual_and_parameters(backend, device, activation, affine):
    layer = randomised(BatchNormAct2d(7, affine=affine, activation=activation)).to(device)
    x, _, dy = _tensors(device)
    layer(x).backward(dy)
    stats = layer.grad_stats()
    z = torch.nn.functional.batch_norm(x.detach(), None, None, layer.weight, layer.bias, True).detach()
    z.requires_grad_()
    TABLE[activation].reference(z, *resolve(activation).args).backward(dy)
    assert stats.grad_preact_norm == _close(_norm(z.grad))
    assert stats.grad_input_norm == _close(_norm(x.grad))
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        assert getattr(stats, f"grad_{name}_norm") == (_close(_norm(parameter.grad)) if affine else 0)


@pytest.mark.parametrize("activation", NAMES)
def test_add_act(backend, device, activation):
    layer = AddAct(activation=activation).to(device)
    x, residual, dy = _tensors(device)
    layer(x, residual).backward(dy)
    stats = layer.grad_stats()
    assert stats.grad_output_norm == _close(_norm(dy))
    assert stats.grad_preact_norm == _close(_norm(residual.grad))
    assert stats.grad_input_norm == _close(_norm(x.grad))
    assert stats.grad_weight_norm == stats.grad_bias_norm == 0
    layer.reset_grad_stats()
    layer(x).backward(dy)
    assert layer.grad_stats().backwards == 1


# The norm of dx is known before dx is written, by a formula that subtracts --------------------------------------------


def _cancelling_gradient(x: torch.Tensor, noise: float) -> torch.Tensor:
    """dy = a + b·x̂ + noise in each channel: batch norm takes the first two out, and dx is what is left."""
    exact = x.detach().double()
    dims = [0, 2, 3]
    normalised = (exact - exact.mean(dims, keepdim=True)) / exact.var(dims, unbiased=False, keepdim=True).sqrt()
    a, b = torch.randn(2, 1, x.shape[1], 1, 1, dtype=torch.float64, device=x.device)
    return (a + b * normalised + noise * torch.randn_like(exact)).to(x.dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [(9, 11), (3, 5)], ids=["planes", "small planes"])
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0])
def test_cancelling_gradients(backend, device, memory_format, size, noise):
    """The record is the norm of the dx that was written, however little of dz is left in it."""
    layer = randomised(BatchNormAct2d(6, activation=None)).to(device)
    x = torch.randn(8, 6, *size, device=device).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    dy = torch.empty_like(x).copy_(_cancelling_gradient(x, noise))
    layer(x).backward(dy)
    stats = layer.grad_stats()
    assert stats.grad_input_norm < (noise + 1e-5) * stats.grad_preact_norm * 10
    assert stats.grad_input_norm == _close(_norm(x.grad))


def test_channels_that_cancel_beside_channels_that_do_not(backend, device):
    layer = BatchNormAct2d(6, activation=None).to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1e6, 1.0, 1e6, 1.0, 1e-3, 1e6]))
    x = torch.randn(8, 6, 9, 11, device=device, requires_grad=True)
    dy = _cancelling_gradient(x, 1e-6)
    dy[:, 1] = torch.randn(8, 9, 11, device=device)
    layer(x).backward(dy)
    assert layer.grad_stats().grad_input_norm == _close(_norm(x.grad))


def test_a_constant_channel(backend, device):
    """σ² is 0 there, κ is 0, and rstd is 1/√ε."""
    layer = BatchNormAct2d(3, activation=None).to(device)
    x = torch.randn(4, 3, 3, 5, device=device)
    x[:, 1] = 3.0
    x.requires_grad_()
    layer(x).backward(torch.randn(4, 3, 3, 5, device=device))
    assert layer.grad_stats().grad_input_norm == _close(_norm(x.grad))


# Magnitudes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-15, 1e18, 1e30])
def test_vanishing_and_exploding_magnitudes(backend, device, scale, memory_format):
    """Squares of these leave the range of float32; a norm of 0, or inf, would hide what the record is there to show."""
    layer = BatchNormAct2d(7, activation="relu").to(device)
    x, residual, dy = _tensors(device, FORMATS[memory_format])
    dy = dy * scale
    layer(x, residual).backward(dy)
    stats = layer.grad_stats()
    assert stats.grad_output_norm == _close(_norm(dy))
    assert stats.grad_preact_norm == _close(_norm(residual.grad))
    assert stats.grad_weight_norm == _close(_norm(layer.weight.grad))
    assert stats.grad_bias_norm == _close(_norm(layer.bias.grad))
    # dx itself is rounded to denormals at the lowest scale.
    assert stats.grad_input_norm == pytest.approx(_norm(x.grad), rel=TOLERANCE if scale > 1e-30 else 1e-3, abs=0)
    assert 0.1 < stats.gain < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(backend, device, dtype):
    layer = BatchNormAct2d(7, activation="silu").to(device, dtype)
    x, residual, dy = (t.detach().to(dtype).requires_grad_() for t in _tensors(device))
    layer(x, residual).backward(dy.detach())
    stats = layer.grad_stats()
    assert stats.grad_output_norm == _close(_norm(dy))
    rounding = 4 * torch.finfo(dtype).eps  # the tensors are rounded, the record is not
    assert stats.grad_preact_norm == pytest.approx(_norm(residual.grad), rel=rounding)
    assert stats.grad_input_norm == pytest.approx(_norm(x.grad), rel=rounding)
    assert stats.grad_weight_norm == pytest.approx(_norm(layer.weight.grad), rel=rounding)


# Dead units and what is not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["batch_norm", "add_act", "add_act with a residual"])
@pytest.mark.parametrize("activation", NAMES)
def test_dead_fraction(backend, device, activation, through):
    """Also where a smooth activation is saturated: exp(−1000) is 0 in every dtype."""
    points = torch.tensor([-1000.0, -4.0, -0.5, 0.0, 0.5, 4.0, 7.0, 1000.0, -1000.0, 0.25, 1000.0], device=device)
    x = points.repeat(6, 1).reshape(3, 2, -1).requires_grad_()
    layer = BatchNormAct1d(2, eps=0.0, activation=activation).eval() if through == "batch_norm" else None
    layer = (layer or AddAct(activation=activation)).to(device)
    y = layer(x, torch.zeros_like(x)) if through.endswith("residual") else layer(x)
    y.backward(torch.ones_like(y))
    z = points.double().requires_grad_()
    weight = () if layer.activation_weight is None else (layer.activation_weight.detach().double(),)
    row, spec = TABLE[activation], resolve(activation)
    derivative = torch.autograd.grad(row.reference(z, *spec.args, *weight).sum(), z)[0]
    assert layer.grad_stats().dead_fraction == pytest.approx((derivative == 0).double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_dead_fraction_of_relu_is_exact(backend, device, memory_format):
    layer = BatchNormAct2d(7).to(device)
    x, residual, dy = _tensors(device, FORMATS[memory_format])
    y = layer(x, residual)
    y.backward(dy)
    assert layer.grad_stats().dead_fraction == (y == 0).double().mean().item()


@pytest.mark.parametrize("residual", [True, False])
def test_slopes_of_zero_are_dead(backend, device, residual):
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0] * 5, device=device).view(5, 4).requires_grad_()
    for activation, args in (
        ("leaky_relu", {"negative_slope": 0.0}),
        ("prelu", {"init": 0.0}),
        ("elu", {"alpha": 0.0}),
    ):
        layer = AddAct(activation=activation, activation_args=args).to(device)
        layer(x, torch.zeros_like(x) if residual else None).sum().backward()
        assert layer.grad_stats().dead_fraction == 0.5, activation


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_not_finite_is_counted(backend, device, activation, memory_format):
    layer = BatchNormAct2d(7, activation=activation).to(device)
    x, residual, dy = _tensors(device, FORMATS[memory_format])
    for index, value in (
        ((0, 0, 0, 0), math.inf),
        ((1, 3, 2, 4), -math.inf),
        ((3, 6, 2, 4), math.nan),
        ((3, 6, 2, 3), math.nan),
    ):
        dy[index] = value
    layer(x, residual).backward(dy)
    stats = layer.grad_stats()
    assert stats.nonfinite == 4
    assert not math.isfinite(stats.grad_output_norm)
    assert 0 <= stats.dead_fraction < 1
    layer(x, residual).backward(torch.ones_like(dy))
    assert layer.grad_stats().nonfinite == 4
    layer.reset_grad_stats()
    layer(x, residual).backward(torch.ones_like(dy))
    assert layer.grad_stats().nonfinite == 0


# Accumulation and life ------------------------------------------------------------------------------------------------


def test_norms_are_root_mean_squares_over_backwards(backend, device):
    layer = randomised(BatchNormAct2d(7)).to(device)
    x, residual, dy = _tensors(device)
    singles = []
    for scale in (1.0, 2.0, 5.0):
        layer(x, residual).backward(dy * scale)
        singles.append(layer.grad_stats())
        layer.reset_grad_stats()
    for scale in (1.0, 2.0, 5.0):
        layer(x, residual).backward(dy * scale)
    stats = layer.grad_stats()
    assert stats.backwards == 3
    for name in ("grad_output_norm", "grad_preact_norm", "grad_input_norm", "grad_weight_norm", "grad_bias_norm"):
        squares = [getattr(single, name) ** 2 for single in singles]
        assert getattr(stats, name) == pytest.approx(math.sqrt(sum(squares) / 3), rel=1e-9)
    assert stats.gain == pytest.approx(stats.grad_input_norm / stats.grad_output_norm, rel=1e-12)
    assert stats.dead_fraction == pytest.approx(sum(single.dead_fraction for single in singles) / 3)


def test_none_before_the_first_backward_and_after_a_reset():
    layer = BatchNormAct2d(7)
    assert layer.grad_stats() is None
    y = layer(torch.randn(SHAPE))
    assert layer.grad_stats() is None
    y.sum().backward()
    assert layer.grad_stats().backwards == 1
    layer.reset_grad_stats()
    assert layer.grad_stats() is None


def test_zero_grad_leaves_the_record():
    """It is no parameter's gradient: an optimiser's step does not end a record, ``reset_grad_stats`` does."""
    layer = BatchNormAct2d(7)
    layer(torch.randn(SHAPE)).sum().backward()
    layer.zero_grad()
    torch.optim.SGD(layer.parameters(), lr=0.1).zero_grad()
    assert layer.grad_stats().backwards == 1


def test_the_gain_of_nothing_is_nan():
    layer = BatchNormAct2d(7)
    layer(torch.randn(SHAPE)).backward(torch.zeros(SHAPE))
    stats = layer.grad_stats()
    assert stats.grad_output_norm == stats.grad_input_norm == 0
    assert math.isnan(stats.gain)


def test_an_input_that_needs_no_gradient_is_recorded_all_the_same(backend, device):
    """The first layer of a net: its dx is written nowhere, and its norm is what would have been written."""
    layer = randomised(BatchNormAct2d(7, activation="silu")).to(device)
    x, residual, dy = _tensors(device)
    layer(x, residual).backward(dy)
    expected = layer.grad_stats()
    layer.reset_grad_stats()
    layer(x.detach(), residual.detach()).backward(dy)
    stats = layer.grad_stats()
    for name in GradStats.__dataclass_fields__:
        assert getattr(stats, name) == _close(getattr(expected, name))


def test_gradients_asked_for_by_name_are_not_recorded():
    """As autograd has it: ``torch.autograd.grad`` accumulates into nothing that it was not asked for."""
    layer = BatchNormAct2d(7)
    x = torch.randn(SHAPE, requires_grad=True)
    torch.autograd.grad(layer(x).sum(), x)
    assert layer.grad_stats() is None


def test_without_tracking_the_gradients_are_the_same(backend, device):
    x, residual, dy = _tensors(device)
    results = []
    for track in (True, False):
        layer = BatchNormAct2d(7, activation="silu", track_grad_stats=track).to(device)
        y = layer(x, residual)
        results.append([y, *torch.autograd.grad(y, [x, residual, *layer.parameters()], dy)])
        y = layer(x, residual)
        y.backward(dy)
        assert (layer.grad_stats() is not None) is track
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to("cpu"),
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.double(),
        lambda layer: layer.to(torch.float16).float(),
        lambda layer: layer.to(memory_format=torch.channels_last),
        lambda layer: layer.eval().train(),
        lambda layer: layer.requires_grad_(False).requires_grad_(True),
        lambda layer: torch.nn.Sequential(layer).half()[0],
        lambda layer: layer.share_memory(),
    ],
)
def test_the_record_survives(change):
    layer = BatchNormAct2d(7)
    layer(torch.randn(SHAPE)).backward(torch.randn(SHAPE) * 1e-25)
    before = layer.grad_stats()
    assert before.grad_output_norm > 0
    changed = change(layer)
    assert changed.grad_stats() == before
    dtype = changed.weight.dtype
    changed(torch.randn(SHAPE, dtype=dtype)).sum().backward()
    assert changed.grad_stats().backwards == 2


def test_a_record_does_not_leave_for_meta():
    layer = BatchNormAct2d(7)
    layer(torch.randn(SHAPE)).sum().backward()
    assert layer.to("meta").grad_stats() is None


def test_the_record_of_a_graph_of_the_backward(backend, device):
    """``create_graph=True`` runs another implementation; what it reports is the same."""
    layer = randomised(BatchNormAct2d(7, activation="prelu")).to(device)
    x, residual, dy = _tensors(device)
    layer(x, residual).backward(dy)
    expected = layer.grad_stats()
    layer.reset_grad_stats()
    inputs = [x, residual, *layer.parameters()]
    with warnings.catch_warnings():  # PyTorch warns of the cycle once a process
        warnings.simplefilter("ignore")
        layer(x, residual).backward(dy, create_graph=True, inputs=[*inputs, layer._probe])
    stats = layer.grad_stats()
    for name in GradStats.__dataclass_fields__:
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), rel=TOLERANCE)
    for t in (*inputs, layer._probe):
        t.grad = None  # the cycle that the warning is about


def test_it_is_frozen_and_made_of_floats():
    layer = BatchNormAct2d(7)
    layer(torch.randn(SHAPE)).sum().backward()
    stats = layer.grad_stats()
    assert all(type(getattr(stats, name)) is float for name in GradStats.__dataclass_fields__)
    with pytest.raises(AttributeError):
        stats.gain = 1.0


class _FullSizeOperations(TorchDispatchMode):
    """The operations that touch a tensor of at least ``numel`` elements, and those that read a value on the host."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(result if isinstance(result, tuple) else (result,))) if torch.is_tensor(t)]
        view = function in (torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten.alias.default)
        if function is torch.ops.aten._local_scalar_dense.default or (
            not view and any(t.numel() >= self.numel for t in tensors)
        ):
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "silu", "prelu"])
def test_recording_adds_no_pass_over_a_tensor_and_no_synchronisation(activation, memory_format):
    for layer in (BatchNormAct2d(7, activation=activation), BatchNormAct2d(7, grad_norm_bounds=(0.1, 1.0))):
        x, residual, dy = _tensors("cpu", FORMATS[memory_format])
        with _FullSizeOperations(x.numel()) as operations:
            layer(x, residual).backward(dy)
        assert operations.seen == ["vgkern.batch_norm_act_forward.default", "vgkern.batch_norm_act_backward.default"]


def test_functions_report_nothing_and_need_nothing():
    x = torch.randn(SHAPE, requires_grad=True)
    batch_norm_act(x, None, None, training=True).sum().backward()
    assert x.grad is not None
