"""Memory formats: of the input, of the residual, of the gradient that arrives; what comes back keeps the input's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import bits

import vgkern
from vgkern.functional import batch_norm_act

CL, CL3D = torch.channels_last, torch.channels_last_3d


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


# What kernels receive as it is: dense tensors, planes or rows.
DENSE = {
    "contiguous": lambda: _randn(4, 7, 3, 5),
    "channels_last": lambda: _randn(4, 7, 3, 5).to(memory_format=CL),
    "storage offset": lambda: _randn(421)[1:].view(4, 7, 3, 5),
    "channels_last, storage offset": lambda: _randn(421)[1:].view(4, 3, 5, 7).permute(0, 3, 1, 2),
    "one image": lambda: _randn(1, 7, 3, 5),
    "one image, channels_last": lambda: _randn(1, 7, 3, 5).to(memory_format=CL),
    "N1HW": lambda: _randn(4, 1, 3, 5),
    "N1HW, channels_last": lambda: _randn(4, 1, 3, 5).as_strided((4, 1, 3, 5), (15, 1, 5, 1)),
    "NC11": lambda: _randn(4, 7, 1, 1),
    "NC11, channels_last": lambda: _randn(4, 7, 1, 1).as_strided((4, 7, 1, 1), (7, 1, 7, 7)),
    "NC": lambda: _randn(4, 7),
    "NCL": lambda: _randn(4, 7, 5),
    "NC1": lambda: _randn(4, 7, 1),
    "NCDHW": lambda: _randn(4, 7, 3, 5, 2),
    "NCDHW, channels_last_3d": lambda: _randn(4, 7, 3, 5, 2).to(memory_format=CL3D),
    "six dimensions": lambda: _randn(4, 7, 2, 3, 2, 2),
}
# What is made dense first, in the format that PyTorch suggests.
STRIDED = {
    "permuted": lambda: _randn(4, 3, 7, 5).permute(0, 2, 1, 3),
    "batch and channels exchanged": lambda: _randn(7, 4, 3, 5).permute(1, 0, 2, 3),
    "transposed": lambda: _randn(4, 7, 5, 3).transpose(2, 3),
    "channels_last, transposed": lambda: _randn(4, 7, 5, 3).to(memory_format=CL).transpose(2, 3),
    "step 2": lambda: _randn(4, 7, 3, 10)[..., ::2],
    "step 2 in channels": lambda: _randn(4, 14, 3, 5)[:, ::2],
    "step 2 in the batch": lambda: _randn(8, 7, 3, 5)[::2],
    "channels_last, step 2": lambda: _randn(4, 7, 3, 10).to(memory_format=CL)[..., ::2],
    "channels_last, some channels": lambda: _randn(4, 9, 3, 5).to(memory_format=CL)[:, 1:8],
    "expanded batch": lambda: _randn(1, 7, 3, 5).expand(4, 7, 3, 5),
    "expanded channels": lambda: _randn(4, 1, 3, 5).expand(4, 7, 3, 5),
    "expanded planes": lambda: _randn(4, 7, 1, 1).expand(4, 7, 3, 5),
    "NLC": lambda: _randn(4, 5, 7).transpose(1, 2),
    "CN": lambda: _randn(7, 4).t(),
}
LAYOUTS = DENSE | STRIDED
AMBIGUOUS = ("N1HW, channels_last", "NC11, channels_last")


def _gradients(like: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = {
        "contiguous": torch.randn(like.shape),
        "expanded": torch.randn(1).expand(like.shape),
        "expanded batch": torch.randn(1, *like.shape[1:]).expand(like.shape),
        "transposed": torch.randn(like.shape[::-1]).permute(*range(like.dim())[::-1]),
    }
    if like.dim() in (4, 5):
        gradients["channels_last"] = gradients["contiguous"].to(memory_format={4: CL, 5: CL3D}[like.dim()])
    return gradients


def _torch_in_float64(x, residual, weight, bias, dy):
    inputs = [t.detach().cpu().double().contiguous().requires_grad_() for t in (x, residual, weight, bias)]
    y = F.relu(F.batch_norm(inputs[0], None, None, *inputs[2:], training=True) + inputs[1])
    return [y, *torch.autograd.grad(y, inputs, dy.cpu().double())]


def _check_values(x: torch.Tensor, residual: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight, bias = (torch.randn(x.shape[1], device=x.device, requires_grad=True) for _ in range(2))
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = batch_norm_act(x, None, None, weight, bias, training=True, residual=residual)
    got = [y, *torch.autograd.grad(y, (x, residual, weight, bias), dy)]
    for ours, theirs in zip(got, _torch_in_float64(x, residual, weight, bias, dy), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-5, atol=2e-5)
    return tuple(got)


@pytest.mark.parametrize("layout", DENSE)
def test_dense_layouts(backend, device, layout):
    x = DENSE[layout]()
    if device != "cpu":
        x = torch.empty_strided(x.shape, x.stride(), device=device).copy_(x)
    residual = torch.empty_like(x).normal_()
    y, dx, dresidual, *_ = _check_values(x, residual, torch.empty_like(x).normal_())
    assert y.stride() == dx.stride() == dresidual.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_gradients(layout):
    x = LAYOUTS[layout]()
    residuals = [torch.empty_like(x).normal_(), LAYOUTS[layout](), torch.randn(x.shape)]
    for i, dy in enumerate(_gradients(x).values()):
        y, dx, *_ = _check_values(x, residuals[i % len(residuals)], dy)
        _check_strides(layout, x, y, dx, dy)


def _check_strides(layout, x, y, dx, dy) -> None:
    twin = x.detach().requires_grad_()
    theirs = F.batch_norm(twin, None, None, training=True)
    if layout in AMBIGUOUS:
        # PyTorch forgets the format where sizes of 1 make it ambiguous; here it goes on to the next convolution.
        assert y.stride() == dx.stride() == x.stride() != theirs.stride()
    else:
        assert y.stride() == theirs.stride()
        assert dx.stride() == torch.autograd.grad(theirs, twin, dy)[0].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "silu", "prelu"])
def test_eval_and_add_act(layout, activation):
    """Without batch statistics every element is by itself: the layout cannot change a bit."""
    x = LAYOUTS[layout]()
    layer = vgkern.nn.BatchNormAct1d(x.shape[1], activation=activation).eval()
    layer._ranks = (x.dim(),)
    plain = vgkern.nn.AddAct(activation=activation)
    for module in (layer, plain):
        for residual in (None, LAYOUTS[layout](), torch.randn(x.shape)):
            results = []
            for make in (lambda t: t, lambda t: None if t is None else t.contiguous()):
                given, added = make(x).detach().requires_grad_(), make(residual)
                y = module(given, added)
                results.append((y, torch.autograd.grad(y.sum(), given)[0]))
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_of_a_view_is_that_of_its_copy(layout):
    """To the bit: what is made dense has the same values in the same order."""
    x = LAYOUTS[layout]()
    results = []
    for given in (x, x.contiguous(memory_format=vgkern.functional._memory_format(x))):
        given = given.detach().requires_grad_()
        y = batch_norm_act(given, None, None, training=True)
        results.append((y, torch.autograd.grad(y.square().sum(), given)[0]))
    assert bits(*results[0]) == bits(*results[1])


@pytest.fixture
def _unfilled_memory():
    """Memory is not filled with NaN, which would touch every page of a huge tensor."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_unfilled_memory")
def test_views_with_offsets_past_2_to_the_31():
    """Elements that lie beyond 2³¹ of the storage; only their own pages are touched."""
    far = 2**31
    storage = torch.empty(far + 2**20)
    values = torch.randn(2, 7, 3, 5)
    for x in (
        storage.as_strided(values.shape, (far, 15, 5, 1)),  # the second image begins at 2³¹
        storage.as_strided(values.shape, (105, 15, 5, 1), storage_offset=far + 3),
        storage.as_strided(values.shape, (105, 1, 35, 7), storage_offset=far + 3),
    ):
        x.copy_(values)
        _check_values(x, torch.randn_like(values), torch.randn_like(values))


@pytest.mark.usefixtures("_unfilled_memory")
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "elements"),
    [
        pytest.param("cpu", "cpu", torch.float32, 2**29, id="bytes"),
        pytest.param("cpu", "cpu", torch.bfloat16, 2**31, id="elements", marks=pytest.mark.slow),
        pytest.param("triton", "cuda", torch.bfloat16, 2**31, id="elements-gpu", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL], ids=str)
def test_dense_tensors_beyond_2_to_the_31(backend, device, dtype, elements, memory_format):
    """The same image again and again: every copy must come out as the first does.

    At the operators, with x as its own gradient, so that no more than two tensors of this size are there at a time.
    """
    image = torch.randn(1, 8, 512, 256, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    batch = elements // image.numel() + 1
    x = torch.empty(batch, *image.shape[1:], device=device, dtype=dtype, memory_format=memory_format)
    x.copy_(image.expand_as(x))
    with vgkern.backends.use(backend):
        y, statistics, _ = torch.ops.vgkern.batch_norm_act_forward(
            x, None, None, None, None, None, None, True, 1e-5, "relu", [], True
        )
        values = image.double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(statistics[0], values.mean(1), rtol=1e-6, atol=2e-8)
        assert all(torch.equal(y[i], y[0]) for i in (1, batch // 2, batch - 1))
        del y
        dx, *_, record = torch.ops.vgkern.batch_norm_act_backward(
            x, x, None, None, statistics, None, None, None, True, 1e-5, "relu", [], 0.0, float("inf"),
            [True, False, False, False, False, True],
        )  # fmt: skip
    assert all(torch.equal(dx[i], dx[0]) for i in (1, batch // 2, batch - 1))
    assert record[0].item() == pytest.approx(batch * image.double().square().sum().item(), rel=1e-5)
    # The judge is float64: half precision rounds alike values alike, and the sum of dx as written is 6e-5 off.
    exact = image.double().requires_grad_()
    torch.nn.functional.batch_norm(exact, None, None, training=True).relu().backward(image.double())
    assert record[2].item() == pytest.approx(batch * exact.grad.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(dx[:1].double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
