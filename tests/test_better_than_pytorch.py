"""Where PyTorch's batch norm is wrong and this one is right; each test names what PyTorch 2.13 does on the CPU.

More rows of the same list are tested elsewhere: eval, train, backward (test_autograd), refused calls and empty batches
of the wrong width (test_refusals), ``momentum=None`` under ``torch.compile`` and on meta (test_compile, test_layers),
PyTorch's converter of batch norms (test_layers).
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from common import NAMES, bits, randomised

import vgkern
from vgkern.activations import TABLE, resolve
from vgkern.functional import batch_norm_act, double_batch_norm_act
from vgkern.nn import BatchNormAct1d, BatchNormAct2d

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _size(backend: str, full: tuple[int, ...], small: tuple[int, ...]) -> tuple[int, ...]:
    """The interpreter takes a second for what a kernel does in a microsecond."""
    return small if backend == "triton" and not torch.cuda.is_available() else full


def _exact(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    view = (1, -1, *[1] * (x.dim() - 2))
    return (x.double() - mean.double().view(view)) * (var.double() + eps).rsqrt().view(view)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, biased variance) of each channel in float64."""
    values = x.double().movedim(1, 0).flatten(1)
    return values.mean(1), values.var(1, unbiased=False)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_mean_of_1e4(backend, device, memory_format):
    """PyTorch: 7.5e-4 off contiguous, 9.2e-2 off channels_last."""
    shape = _size(backend, (32, 16, 56, 56), (8, 3, 9, 9))
    x = (torch.randn(shape, device=device) + 1e4).contiguous(memory_format=FORMATS[memory_format])
    y = batch_norm_act(x, None, None, training=True, activation=None)
    assert (y.double() - _exact(x, *_moments(x))).abs().max() <= 2e-6


@pytest.mark.parametrize(("dtype", "place", "rounding"), [(torch.bfloat16, 64.0, 2**-8), (torch.float16, 8.0, 2**-11)])
def test_a_mean_between_neighbours_of_half_precision(backend, device, dtype, place, rounding):
    """One x in thousands is the next number above 1e4, and no float32 is near enough to the mean. PyTorch: y is 0."""
    x = torch.full((3000, 1), 9984.0, dtype=dtype, device=device)
    x[7] += place
    nothing = (None,) * 4
    exact = _exact(x, *_moments(x))
    for y in (
        batch_norm_act(x, None, None, training=True, activation=None),
        double_batch_norm_act(x, torch.zeros_like(x), *nothing, training=True, activation=None),
        double_batch_norm_act(torch.zeros_like(x), x, *nothing, training=True, activation=None),
    ):
        assert ((y.double() - exact).abs() <= 1.01 * rounding * exact.abs()).all()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_variance_at_a_mean_of_1e6(backend, device, memory_format):
    """PyTorch: 3.7e-5 off contiguous, 9.6e4 times too big channels_last (relative errors)."""
    shape = _size(backend, (32, 16, 56, 56), (8, 3, 9, 9))
    x = (torch.randn(shape, device=device) + 1e6).contiguous(memory_format=FORMATS[memory_format])
    layer = BatchNormAct2d(shape[1], momentum=1.0).to(device)
    layer(x)
    mean, biased = _moments(x)
    count = x.numel() // x.shape[1]
    var = biased * count / (count - 1)
    assert ((layer.running_var.double() - var) / var).abs().max() <= 1e-6
    assert ((layer.running_mean.double() - mean) / mean).abs().max() <= 1e-6


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("count", [2**21, pytest.param(2**25, marks=pytest.mark.slow)])
def test_many_values_a_channel(memory_format, count):
    """PyTorch, 2²⁵ values of N(100, 1), channels_last: the mean 17.8 % off, the variance 309 times too big."""
    x = torch.empty(count // 2**12, 2, 64, 64).contiguous(memory_format=FORMATS[memory_format]).normal_(100, 1)
    layer = BatchNormAct2d(2, momentum=1.0)
    layer(x)
    mean, var = _moments(x)
    assert ((layer.running_mean.double() - mean) / mean).abs().max() <= 1e-6
    assert (layer.running_var.double() - var * (count / (count - 1))).abs().max() <= 1e-6


_CONSTANTS = (0.0, -7.3, 0.1, 1e4, 1e8, -3e38, 3e38, 1e-30, 1e-42)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_constant_channels_are_the_bias_to_the_bit(backend, device, dtype, memory_format):
    """PyTorch: y up to 0.027, 484 and inf where it should be the bias, for 1e4, 1e8 and 3e38."""
    for n, height, width in ((3, 7, 5), (1, 3, 1), _size(backend, (32, 56, 56), (2, 16, 16))):
        constants = torch.tensor(_CONSTANTS, dtype=dtype, device=device).view(1, -1, 1, 1)
        x = constants.repeat(n, 1, height, width).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
        residual = torch.randn_like(x)
        for added in (None, residual):
            layer = randomised(BatchNormAct2d(len(_CONSTANTS), activation=None)).to(device, dtype)
            y = layer(x, added)
            wanted = layer.bias.view(1, -1, 1, 1).expand_as(x) if added is None else None
            if added is not None:
                wanted = layer.bias.detach().view(1, -1, 1, 1) + residual
            assert torch.equal(y, wanted)
            x.grad = None
            y.backward(torch.randn_like(y))
            for t in (x, layer.weight, layer.bias):
                assert t.grad.isfinite().all()


@pytest.mark.parametrize("activation", NAMES)
def test_a_constant_channel_is_the_activated_bias(backend, device, activation):
    layer = randomised(BatchNormAct1d(4, activation=activation)).to(device)
    x = torch.tensor([1e4, 1e8, 3e38, 0.1], device=device).repeat(9, 1)
    weight = () if layer.activation_weight is None else (layer.activation_weight.double(),)
    wanted = TABLE[activation].reference(layer.bias.double(), *resolve(activation).args, *weight)
    y = layer(x)
    assert len(set(bits(*y))) == 1
    torch.testing.assert_close(y[0].double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_eval_at_a_running_mean_of_1e4(backend, device, memory_format):
    """PyTorch: 2.6e-4 off, for it folds the mean into the bias."""
    shape = _size(backend, (8, 16, 28, 28), (4, 3, 9, 9))
    x = (torch.randn(shape, device=device) + 1e4).contiguous(memory_format=FORMATS[memory_format])
    mean, var = torch.randn(shape[1], device=device) * 0.1 + 1e4, torch.rand(shape[1], device=device) + 0.5
    y = batch_norm_act(x, mean, var, activation=None)
    assert (y.double() - _exact(x, mean, var)).abs().max() <= 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_with_a_gradient_in_another_format(backend, device, training):
    """PyTorch, fp16 data with fp32 parameters: dx is all inf or NaN."""
    layer = randomised(BatchNormAct2d(7)).to(device).train(training)
    x = torch.randn(4, 7, 3, 5, device=device).half()
    for memory_format, other in (FORMATS.values(), reversed(FORMATS.values())):
        given = x.contiguous(memory_format=memory_format).requires_grad_()
        y = layer(given)
        dy = torch.randn_like(x).contiguous(memory_format=other)
        dx = torch.autograd.grad(y, given, dy)[0]
        exact = x.double().requires_grad_()
        running = (layer.running_mean.double(), layer.running_var.double()) if not training else (None, None)
        z = F.batch_norm(exact, *running, layer.weight.double(), layer.bias.double(), training).relu()
        wanted = torch.autograd.grad(z, exact, dy.double())[0]
        assert dx.isfinite().all()
        torch.testing.assert_close(dx.double(), wanted, rtol=2e-3, atol=2e-3)


# The number of threads ------------------------------------------------------------------------------------------------


@pytest.fixture
def _threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _everything(shape, memory_format, dtype, training, activation):
    """All that one forward and backward pass compute."""
    torch.manual_seed(0)
    kind = {2: BatchNormAct1d, 4: BatchNormAct2d}[len(shape)]
    layer = kind(shape[1], activation=activation, grad_norm_bounds=(None, 0.1)).train(training)
    x, residual, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    y = layer(x, residual)
    y.backward(dy)
    gradients = [t.grad for t in (x, residual, *layer.parameters(), layer._probe)]
    return bits(y, *gradients, layer.running_mean, layer.running_var)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 24, 28, 28), torch.contiguous_format),
        ((8, 24, 28, 28), torch.channels_last),
        ((2, 3, 128, 128), torch.contiguous_format),  # fewer channels than threads
        ((2, 3, 128, 128), torch.channels_last),
        ((1000, 67), torch.contiguous_format),
    ],
)
def test_the_number_of_threads_changes_no_bit(shape, memory_format, training):
    """PyTorch: channels_last differs by 1e-5, even under ``use_deterministic_algorithms(True)``."""
    with vgkern.backends.use("cpu"):
        for dtype, activation in ((torch.float32, "relu"), (torch.bfloat16, "prelu")):
            results = []
            for threads in (1, 1, 2, 3, 7, 16, 16):
                torch.set_num_threads(threads)
                results.append(_everything(shape, memory_format, dtype, training, activation))
            assert all(result == results[0] for result in results)


def test_runs_repeat_to_the_bit(backend, device):
    layer = randomised(BatchNormAct2d(7, activation="gelu")).to(device)
    x, dy = (torch.randn(4, 7, 3, 5, device=device) for _ in range(2))
    results = []
    for _ in range(3):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        layer.reset_grad_stats()
        y = layer(given)
        y.backward(dy)
        results.append(bits(y, given.grad, layer.weight.grad, layer.bias.grad, layer._probe.grad))
    assert results[0] == results[1] == results[2]


_FORK = """
    import hashlib, multiprocessing, sys
    import torch, vgkern

    layer = vgkern.nn.BatchNormAct2d(32)
    x, residual, dy = torch.randn(3, 8, 32, 56, 56)

    def step(sender):
        # Nothing here but our operators works on a large tensor: PyTorch's own would hang in the child.
        layer.train()
        y = layer(x.requires_grad_(), residual)
        dx, = torch.autograd.grad(y, x, dy)
        sender.send([hashlib.sha256(t.detach().numpy()).digest() for t in (y, dx)])

    if __name__ == "__main__":
        torch.set_num_threads(4)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        step(sender)
        parent = receiver.recv()
        child = context.Process(target=step, args=(sender,))
        child.start()
        if not receiver.poll(60):
            child.kill()
            sys.exit("the child hangs")
        assert receiver.recv() == parent
        child.join()
        step(sender)  # the parent's threads are still there
        assert receiver.recv() == parent
"""


def test_a_fork_after_a_parallel_forward(tmp_path):
    """As a DataLoader's workers do. PyTorch: the child hangs."""
    script = tmp_path / "fork.py"
    script.write_text(textwrap.dedent(_FORK))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_of_eps_nan_or_negative_is_refused():
    """PyTorch: accepted at construction."""
    for eps in (-1.0, math.nan):
        torch.nn.BatchNorm2d(3, eps=eps)
        with pytest.raises(ValueError, match="eps"):
            BatchNormAct2d(3, eps=eps)
