"""What only a GPU can show: graphs, streams, compilation, two devices, autocast; and the grid again, on the device.

The bodies that need no device of their own run on the CPU as well, in Triton's interpreter, so that they do not fail
for a silly reason on the first GPU that they meet.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vgkern
from vgkern.verify import Case, cases

HAS_GPU = torch.cuda.is_available()
gpu = pytest.mark.gpu
#: On the GPU if there is one; always in the interpreter where there is none.
anywhere = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=gpu), *([] if HAS_GPU else [pytest.param("cpu", id="interpreter")])]
)
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with vgkern.backends.use("triton"):
        yield


class Block(nn.Module):
    """Two fused layers and a convolution: a residual block."""

    def __init__(self, channels: int = 8, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first = vgkern.nn.BatchNormAct2d(channels, **options)
        self.second = vgkern.nn.BatchNormAct2d(channels, activation="silu", **options)

    def forward(self, x):
        return self.second(self.first(self.conv(x)), residual=x)


def _step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output and every gradient of one forward and backward."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def _inputs(device: str, memory_format=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 8, 9, 9, generator=generator) for _ in range(2))
    return tuple(t.to(device, dtype).contiguous(memory_format=memory_format) for t in (x, dy))


def _same(ours, theirs, **tolerance) -> None:
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.cpu(), wanted.cpu(), **tolerance)


# -- anywhere ----------------------------------------------------------------------------------------------------------


@anywhere
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_block_on_the_device_is_the_block_of_the_reference(device, memory_format):
    model = Block()
    with vgkern.backends.use("reference"):
        expected = _step(copy.deepcopy(model), *_inputs("cpu", memory_format))
    _same(_step(model.to(device), *_inputs(device, memory_format)), expected, rtol=1e-3, atol=1e-4)


@anywhere
def test_compiled_is_eager(device):
    model = Block().to(device)
    x, dy = _inputs(device)
    expected = _step(copy.deepcopy(model), x, dy)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    _same(_step(compiled, x, dy), expected, rtol=1e-3, atol=1e-4)
    stats = model.first.grad_stats()
    assert stats is not None
    assert stats.backwards == 1


@anywhere
def test_autocast_with_a_grad_scaler(device):
    """A step with a finite scale trains; one that overflows leaves the parameters, and the record counts infinities."""
    model = Block().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    x, _ = _inputs(device)
    for scale, trains in ((256.0, True), (float("inf"), False)):
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        before = copy.deepcopy(model.state_dict())
        model.second.reset_grad_stats()
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            assert model.first(model.conv(x)).dtype == dtype
            y = model(x)  # float32, as the residual is
        scaler.scale(y.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(before[name], p) for name, p in model.named_parameters()]
        assert all(moved) if trains else not any(moved)
        assert (model.second.grad_stats().nonfinite > 0) != trains


@anywhere
def test_results_are_the_same_bits_every_time(device):
    model = vgkern.nn.BatchNormAct2d(8, grad_norm_bounds=(None, 1.0)).to(device)
    x, dy = _inputs(device)
    first = _step(copy.deepcopy(model), x, dy)
    for _ in range(3):
        _same(_step(copy.deepcopy(model), x, dy), first, rtol=0, atol=0)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("activation", vgkern.activations.names())
def test_grid(activation):
    for case in cases([activation], full=True):
        case.assert_passes("triton")


@gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 2048, 7, 7), (5, 19, 33, 31)])
def test_real_sizes(shape, dtype, memory_format):
    """Whole tiles, many programs, resident and walked channels."""
    layer = vgkern.nn.BatchNormAct2d(shape[1]).to("cuda")
    x = torch.randn(shape, device="cuda").add(100).to(dtype).contiguous(memory_format=memory_format)
    vgkern.testing.assert_matches_autograd(layer, x, residual=torch.randn_like(x))


@gpu
def test_past_two_to_the_31_elements():
    """The last elements of a tensor whose offsets need more than 31 bits: 9 GiB in bfloat16."""
    try:
        x = torch.zeros(2, 2, 2**29 + 24, device="cuda", dtype=torch.bfloat16)
        x[..., -16:] = torch.randn(2, 2, 16, device="cuda")
        y = vgkern.functional.batch_norm_act(x, None, None, training=True, activation=None)
    except torch.OutOfMemoryError:
        pytest.skip("needs 9 GiB of GPU memory")
    tail = x[..., -16:].double()
    mean = tail.sum((0, 2), keepdim=True) / (2 * x.shape[2])
    var = tail.square().sum((0, 2), keepdim=True) / (2 * x.shape[2]) - mean**2
    expected = (tail - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(y[..., -16:].double(), expected, rtol=2**-7, atol=1e-3)


@gpu
def test_capture_and_replay_in_a_cuda_graph():
    """A whole forward and backward is captured, so nothing in it waits for the host; replays give eager's values."""
    model = Block(grad_norm_bounds=(None, 0.5)).to("cuda")
    state = copy.deepcopy(model.state_dict())
    x, dy = _inputs("cuda")
    static = torch.zeros_like(x).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels and fills the caches
            torch.autograd.grad(model(static), [static, *model.parameters()], dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(static)
        gradients = torch.autograd.grad(y, [static, *model.parameters()], dy)
    for scale in (1.0, 2.0):
        model.load_state_dict(state)
        eager = copy.deepcopy(model)
        with torch.no_grad():
            static.copy_(x * scale)
        graph.replay()
        torch.cuda.synchronize()
        _same([y.detach(), *gradients], _step(eager, x * scale, dy), rtol=1e-4, atol=1e-5)


@gpu
def test_no_host_synchronisation():
    model = Block(grad_norm_bounds=(None, 0.5)).to("cuda")
    x, dy = _inputs("cuda")
    _step(model, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(model, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.first.grad_stats().backwards == 2


@gpu
def test_streams_side_by_side():
    """Two layers on two streams at once give what they give one after the other: they share no workspace."""
    models = [Block().to("cuda") for _ in range(2)]
    x, dy = _inputs("cuda")
    expected = [_step(copy.deepcopy(model), x, dy) for model in models]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    results = []
    for model, stream in zip(models, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(_step(model, x, dy))
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        _same(ours, theirs, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: needs two devices")
def test_a_device_that_is_not_the_current_one():
    model = Block()
    x, dy = _inputs("cpu")
    expected = _step(copy.deepcopy(model).to("cuda:0"), x.to("cuda:0"), dy.to("cuda:0"))
    assert torch.cuda.current_device() == 0
    _same(_step(model.to("cuda:1"), x.to("cuda:1"), dy.to("cuda:1")), expected, rtol=1e-4, atol=1e-5)


@gpu
def test_a_mean_of_1e4_on_the_device():
    for layout in ("contiguous", "channels_last"):
        Case(layout=layout, mean=1e4, shape=(32, 16, 56, 56)).assert_passes("triton")
