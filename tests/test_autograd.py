"""What autograd does with the fused operation: graphs, what is saved, second derivatives, transforms, checkpoints."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from common import NAMES, Plain, randomised
from torch.utils.checkpoint import checkpoint

from vgkern.activations import TABLE, resolve
from vgkern.functional import add_act, batch_norm_act
from vgkern.nn import AddAct, BatchNormAct2d

SHAPE = (4, 7, 3, 5)
NUMEL = 4 * 7 * 3 * 5
MASKED = [name for name in NAMES if TABLE[name].backward_reads == "mask"]
READ_Z = [name for name in NAMES if TABLE[name].backward_reads == "z"]


def _inputs(device: str, requires_grad: tuple[bool, ...] = (True,) * 4, dtype: torch.dtype = torch.float32):
    """(x, residual, weight, bias)."""
    shapes = (SHAPE, SHAPE, (7,), (7,))
    return [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_(needed)
        for shape, needed in zip(shapes, requires_grad, strict=True)
    ]


def _fused(x, residual, weight, bias, activation="relu", training=True, **kwargs):
    running = (None, None) if training else (torch.zeros_like(weight), torch.ones_like(weight))
    return batch_norm_act(
        x, *running, weight, bias, training=training, residual=residual, activation=activation, **kwargs
    )


def _torchs(x, residual, weight, bias, activation="relu", training=True):
    running = (None, None) if training else (torch.zeros_like(weight), torch.ones_like(weight))
    z = F.batch_norm(x, *running, weight, bias, training) + residual
    return TABLE[activation].reference(z, *resolve(activation).args)


# Which gradients are computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_every_subset_of_requires_grad(backend, device, needs, activation, training):
    inputs = _inputs(device, needs)
    wanted = [t for t in inputs if t.requires_grad]
    y = _fused(*inputs, activation=activation, training=training)
    assert y.requires_grad == any(needs)
    if not wanted:
        assert y.grad_fn is None
        return
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(_torchs(*inputs, activation=activation, training=training), wanted, dy)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(t.grad is None for t in inputs)


@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
def test_every_subset_of_requires_grad_of_add_act(backend, device, needs, activation):
    inputs = [torch.randn(SHAPE, device=device, requires_grad=need) for need in needs]
    wanted = [t for t in inputs if t.requires_grad]
    y, dy = add_act(*inputs, activation=activation), torch.randn(SHAPE, device=device)
    expected = torch.autograd.grad(TABLE[activation].reference(sum(inputs), *resolve(activation).args), wanted, dy)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
def test_a_weight_of_the_activation_with_and_without_gradient(backend, device, needs):
    x = torch.randn(SHAPE, device=device, requires_grad=needs[0])
    weight = torch.full((7,), 0.25, device=device, requires_grad=needs[1])
    for call in (
        lambda: batch_norm_act(x, None, None, training=True, activation="prelu", activation_weight=weight),
        lambda: add_act(x, x.detach(), activation="prelu", activation_weight=weight),
    ):
        wanted = [t for t in (x, weight) if t.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in torch.autograd.grad(call().sum(), wanted))


def test_gradients_that_nobody_wants_are_not_handed_out(backend, device):
    x, residual, weight, bias = _inputs(device)
    y = _fused(x, residual, weight, bias)
    assert torch.autograd.grad(y.sum(), [residual])[0].shape == SHAPE
    assert x.grad is weight.grad is bias.grad is None


# What is saved --------------------------------------------------------------------------------------------------------


def _saved_by(call) -> list[torch.Tensor]:
    """The tensors that autograd keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


def _bytes_beyond(saved: list[torch.Tensor], known: list[torch.Tensor]) -> int:
    """Bytes in storages that ``known`` does not hold already."""
    held = {t.untyped_storage().data_ptr() for t in known}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    return sum(size for pointer, size in new.items() if pointer not in held)


def test_nothing_is_saved_without_a_graph(backend, device):
    layer = BatchNormAct2d(7).to(device).requires_grad_(False)
    x = torch.randn(SHAPE, device=device)
    for call in (lambda: layer(x, x), lambda: layer.eval()(x, x), lambda: add_act(x, x), lambda: AddAct()(x, x)):
        outputs = []
        assert _saved_by(lambda call=call, outputs=outputs: outputs.append(call())) == []
        assert not outputs[0].requires_grad
        assert outputs[0].grad_fn is None
    layer.requires_grad_().train()
    with torch.no_grad():
        assert _saved_by(lambda: layer(x, x)) == []
        assert not layer(x, x).requires_grad
    with torch.inference_mode():
        assert _saved_by(lambda: layer(x, x)) == []
    assert layer.grad_stats() is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "hardsigmoid", "silu", "prelu", "identity"])
def test_bytes_saved(backend, device, activation, residual, memory_format):
    """x, which is there anyhow, statistics of a channel, and a bit an element: never a second copy of anything."""
    layer = BatchNormAct2d(7, activation=activation).to(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True).contiguous(memory_format=memory_format)
    added = torch.randn(SHAPE, device=device).contiguous(memory_format=memory_format) if residual else None
    saved = _saved_by(lambda: layer(x, added))
    known = [x, *layer.parameters(), *layer.buffers()]
    if activation in READ_Z and residual:
        known.append(added)  # not copied either
    runs, inner = (4 * 3 * 5, 7) if memory_format is torch.channels_last else (4 * 7, 3 * 5)
    mask = runs * ((inner + 7) // 8) if residual and activation in MASKED else 0
    assert _bytes_beyond(saved, known) == 3 * 7 * 8 + mask


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_bytes_saved_in_half_precision_are_those_of_the_input(backend, device, activation):
    layer = BatchNormAct2d(7, activation=activation).to(device)
    x, added = (torch.randn(SHAPE, device=device).bfloat16().requires_grad_() for _ in range(2))
    saved = _saved_by(lambda: layer(x, added))
    mask = 4 * 7 * 2 if activation == "relu" else 0
    assert _bytes_beyond(saved, [x, added, *layer.parameters(), *layer.buffers()]) == 3 * 7 * 8 + mask


def test_eval_saves_the_running_statistics_and_not_copies_of_x(backend, device):
    layer = BatchNormAct2d(7).to(device).eval()
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    saved = _saved_by(lambda: layer(x))
    assert _bytes_beyond(saved, [x, *layer.parameters(), *layer.buffers()]) <= 3 * 7 * 8


@pytest.mark.parametrize("activation", [*MASKED, "identity"])
def test_add_act_saves_no_input_that_its_backward_does_not_read(backend, device, activation):
    """The mask is enough, and identity needs nothing; PyTorch's own add keeps neither of its inputs."""
    x, added = (torch.randn(SHAPE, device=device, requires_grad=True) for _ in range(2))
    saved = _saved_by(lambda: add_act(x, added, activation=activation))
    assert sum(t.numel() * t.element_size() for t in saved) <= 4 * 7 * 2
    for residual in (added, None):
        if residual is None and activation != "identity":
            continue  # z is x, which is kept
        y = add_act(x, residual, activation=activation)
        reference = TABLE[activation].reference(x if residual is None else x + residual, *resolve(activation).args)
        given = [x] if residual is None else [x, residual]
        dy = torch.randn_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, given, dy), torch.autograd.grad(reference, given, dy), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


# The rules of the graph -----------------------------------------------------------------------------------------------


def test_two_forwards_before_one_backward(backend, device):
    layer = randomised(BatchNormAct2d(7, activation="silu")).to(device)
    plain = Plain(layer).to(device)
    first, second = (torch.randn(SHAPE, device=device) * scale for scale in (1, 3))
    for module in (layer, plain):
        (module(first, second).square().sum() + module(second, first).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, plain.bn.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.running_var, plain.bn.running_var, rtol=1e-5, atol=1e-6)
    assert layer.grad_stats().backwards == 2


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
def test_a_change_in_place_of_what_is_saved_raises(backend, device, name):
    inputs = dict(zip(("x", "residual", "weight", "bias"), _inputs(device), strict=True))
    copies = {name: t.clone() for name, t in inputs.items()}  # of leaves, so that they may be changed
    y = _fused(**copies, activation="silu")
    copies[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_in_place_of_the_output_is_harmless(backend, device):
    """Nothing of the output is read by the backward pass."""
    inputs = _inputs(device)
    expected = torch.autograd.grad(_fused(*inputs).sum() * 2, inputs)
    y = _fused(*inputs)
    y.mul_(2)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_eval_then_train_then_backward_of_the_first_raises(backend, device):
    """The training step changes the running statistics that the backward pass of the eval step needs."""
    layer = BatchNormAct2d(7).to(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer.eval()(x).sum().backward()


def test_train_then_train_then_backward_of_the_first(backend, device):
    """Batch statistics are the step's own: what happens to the running ones does not matter."""
    layer = BatchNormAct2d(7).to(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    y = layer(x)
    layer(torch.randn(SHAPE, device=device))
    layer.eval()(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(F.batch_norm(x, None, None, training=True).relu(), x, dy)[0], rtol=1e-4, atol=1e-5
    )


def test_a_second_backward_raises_unless_the_graph_is_retained(backend, device):
    inputs = _inputs(device)
    y = _fused(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), inputs)


def test_saved_tensors_on_the_cpu(backend, device):
    inputs = _inputs(device)
    expected = torch.autograd.grad(_fused(*inputs).sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        y = _fused(*inputs)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_input_that_is_its_own_residual(backend, device):
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    dy = torch.randn(SHAPE, device=device)
    for activation in ("relu", "silu"):
        ours, theirs = (
            torch.autograd.grad(f(x, x, *torch.ones(2, 7, device=device), activation=activation), x, dy)[0]
            for f in (_fused, _torchs)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hooks_see_and_change_the_gradients(backend, device):
    x, residual, weight, bias = _inputs(device)
    seen = []
    x.register_hook(lambda g: seen.append(g) or g * 2)
    _fused(x, residual, weight, bias).sum().backward()
    assert torch.equal(x.grad, seen[0] * 2)


def test_both_gradients_of_add_act_may_be_changed_by_their_owners(backend, device):
    """dx and dresidual are equal; a user who scales one in place must not scale the other."""
    for activation in ("identity", "relu", "silu"):
        inputs = [torch.randn(SHAPE, device=device, requires_grad=True) for _ in range(2)]
        add_act(*inputs, activation=activation).sum().backward()
        kept = inputs[1].grad.clone()
        inputs[0].grad.mul_(3)
        assert torch.equal(inputs[1].grad, kept)


def test_an_undefined_gradient_stays_undefined(backend, device):
    """What PyTorch's own operations hand on where nothing came; and the record counts no pass."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    layer = BatchNormAct2d(SHAPE[1]).to(device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    Stop.apply(layer(x)).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    assert layer.grad_stats() is None


def test_accumulation_into_grad(backend, device):
    inputs = _inputs(device)
    once = torch.autograd.grad(_fused(*inputs).sum(), inputs)
    for _ in range(3):
        _fused(*inputs).sum().backward()
    for t, expected in zip(inputs, once, strict=True):
        torch.testing.assert_close(t.grad, expected * 3)


def test_backward_in_another_thread():
    """As autograd of a GPU tensor, and as a user's own worker."""
    import threading

    layer = BatchNormAct2d(7)
    x = torch.randn(SHAPE, requires_grad=True)
    y = layer(x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None
    assert layer.grad_stats().backwards == 1


# Second derivatives ---------------------------------------------------------------------------------------------------


def _smooth_case(activation: str, training: bool, residual: bool):
    """Inputs in float64 such that no z lies near a kink, and the function of them."""
    row, spec = TABLE[activation], resolve(activation)
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 2, 2)
    running = torch.tensor([[0.1, -0.2], [0.7, 1.3]], dtype=torch.float64)

    def function(x, weight, bias, *rest):
        rest = list(rest)
        return batch_norm_act(
            x, *((None, None) if training else running.to(x.device)), weight, bias, training=training,
            residual=rest.pop(0) if residual else None, activation=activation,
            activation_weight=rest.pop(0) if row.learnable else None,
        )  # fmt: skip

    while True:
        shapes = [shape, (2,), (2,), *([shape] if residual else []), *([(2,)] if row.learnable else [])]
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) * 2 for s in shapes]
        x, weight, bias = inputs[:3]
        z = F.batch_norm(x, *((None, None) if training else running), weight, bias, training)
        z = z + inputs[3] if residual else z
        if all(((z - kink).abs() > 0.05).all() for kink in row.kinks(*spec.args)):
            return function, [t.requires_grad_() for t in inputs]


def _kind_of_gradcheck(activation: str) -> dict:
    # PyTorch's hardsigmoid multiplies by a 1/6 in float32: 3e-8 off in its own float64 backward.
    return {"atol": 1e-5, "rtol": 1e-4} if activation == "hardsigmoid" else {"atol": 1e-7, "rtol": 1e-5}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_gradcheck(backend, activation, training, residual):
    function, inputs = _smooth_case(activation, training, residual)
    assert torch.autograd.gradcheck(function, inputs, **_kind_of_gradcheck(activation))


@pytest.mark.parametrize(("training", "residual"), [(True, True), (False, False)])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradcheck_of_the_gpu_kernels(backend, device, activation, training, residual):
    """Along random directions, for the interpreter is slow."""
    function, inputs = _smooth_case(activation, training, residual)
    if device != "cpu":
        inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, **_kind_of_gradcheck(activation))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", NAMES)
def test_gradgradcheck(activation, training, residual):
    """The second derivative is made of differentiable operations, the same for every backend."""
    function, inputs = _smooth_case(activation, training, residual)
    assert torch.autograd.gradgradcheck(function, inputs, **_kind_of_gradcheck(activation))


@pytest.mark.parametrize("activation", NAMES)
def test_gradgradcheck_of_add_act(activation):
    row = TABLE[activation]
    inputs = [torch.tensor([-4.3, -1.2, 0.7, 2.1, 7.5], dtype=torch.float64), torch.randn(5, dtype=torch.float64) * 0.1]
    inputs += [torch.full((1,), 0.25, dtype=torch.float64)] if row.learnable else []
    inputs = [t.requires_grad_() for t in inputs]

    def function(x, residual, weight=None):
        return add_act(x, residual, activation=activation, activation_weight=weight)

    assert torch.autograd.gradcheck(function, inputs, **_kind_of_gradcheck(activation))
    assert torch.autograd.gradgradcheck(function, inputs, **_kind_of_gradcheck(activation))


def test_a_gradient_penalty(backend, device):
    """The mixed use: first derivatives by the kernels' formulas, the second through a graph of them."""
    layer = randomised(BatchNormAct2d(7, activation="softplus")).to(device)
    plain = Plain(layer).to(device)
    x = torch.randn(SHAPE, device=device)
    grads = []
    for module in (layer, plain):
        given = x.clone().requires_grad_()
        dx = torch.autograd.grad(module(given).square().sum(), given, create_graph=True)[0]
        (dx.norm() - 1).square().backward()
        weight = module.weight if module is layer else module.bn.weight
        grads.append((dx.detach(), given.grad, weight.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_create_graph_gives_the_kernels_values(backend, device):
    for activation in ("relu", "silu", "prelu"):
        layer = randomised(BatchNormAct2d(7, activation=activation)).to(device)
        x, residual, *_ = _inputs(device)
        wanted = [x, residual, *layer.parameters()]
        y = layer(x, residual)
        dy = torch.randn_like(y)
        kernels = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        composite = torch.autograd.grad(y, wanted, dy, create_graph=True)
        for ours, theirs in zip(kernels, composite, strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Transforms -----------------------------------------------------------------------------------------------------------


def _transformed(kind):
    x = torch.randn(SHAPE)
    running = (torch.zeros(7), torch.ones(7))
    layer = BatchNormAct2d(7).eval()
    return {
        "layer": (layer, x),
        "batch_norm_act, training": (lambda x: batch_norm_act(x, None, None, training=True, activation="silu"), x),
        "batch_norm_act, eval": (lambda x: batch_norm_act(x, *running, activation="silu"), x),
        "add_act": (lambda x: add_act(x, x, activation="silu"), x),
    }[kind]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["layer", "batch_norm_act, training", "batch_norm_act, eval", "add_act"])
def test_forward_mode_is_right_or_raises(backend, kind, grad):
    """A tangent that is dropped without a word is a wrong derivative."""
    function, x = _transformed(kind)
    tangent = torch.randn_like(x)
    expected = (function((x + 1e-3 * tangent).double().float()) - function(x - 1e-3 * tangent)) / 2e-3

    def through_dual_numbers():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    def through_func():
        return torch.func.jvp(function, (x,), (tangent,))[1]

    for transform in (through_dual_numbers, through_func):
        with torch.set_grad_enabled(grad):
            try:
                result = transform()
            except NotImplementedError:
                continue
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["layer", "batch_norm_act, training", "batch_norm_act, eval", "add_act"])
def test_vmap_is_right_or_raises(backend, kind, grad):
    function, x = _transformed(kind)
    batch = torch.stack([x, x * 2 + 1])
    expected = torch.stack([function(each) for each in batch])
    with torch.set_grad_enabled(grad):
        try:
            result = torch.func.vmap(function)(batch)
        except RuntimeError as error:
            assert "vmap" in str(error)  # noqa: PT017  either is right
            return
    torch.testing.assert_close(result, expected)


def test_batched_gradients_are_right_or_raise(backend, device):
    inputs = _inputs(device)
    y = _fused(*inputs, activation="silu")
    dys = torch.randn(2, *SHAPE, device=device)
    expected = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True)
    for ours, theirs in zip(batched, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-5)


def test_func_grad_and_functional_call(backend, device):
    layer = randomised(BatchNormAct2d(7, activation="prelu")).to(device)
    x = torch.randn(SHAPE, device=device)
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in layer.named_buffers() if not name.startswith("_")}
    before = {name: t.clone() for name, t in layer.state_dict().items()}

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, buffers, x)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(lambda x: add_act(x, x).sum())(x), (x > 0) * 2.0)


# Autocast -------------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _dtype_or_error(call, autocast):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        try:
            return call().dtype
        except RuntimeError:
            return None


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_dtypes_are_those_of_the_three_operations(activation, autocast):
    """With and without autocast, for every mix of input, residual and parameters that PyTorch takes."""
    row, spec = TABLE[activation], resolve(activation)
    compared = 0
    mixes = [(dtype, added, dtype) for dtype, added in itertools.product(_DTYPES, (None, *_DTYPES))]
    mixes += [(dtype, None, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    for dtype, added, parameters in mixes:
        x = torch.randn(4, 3, 5).to(dtype)
        residual = None if added is None else torch.randn(4, 3, 5).to(added)
        weight = torch.ones(3, dtype=parameters)
        slope = {"activation_weight": weight} if row.learnable else {}

        def eager(z, residual, slope):
            return row.reference(z if residual is None else z + residual, *spec.args, *slope.values())

        normalised = F.batch_norm(x, None, None, weight, weight, True)
        options = {"activation": activation, **slope}
        for z, ours in (
            (normalised, partial(batch_norm_act, x, None, None, weight, weight, True, residual=residual, **options)),
            (x, partial(add_act, x, residual, **options)),
        ):
            expected = _dtype_or_error(partial(eager, z, residual, slope), autocast)
            if expected is not None:
                compared += 1
                assert _dtype_or_error(ours, autocast) is expected
    assert compared >= 8  # PyTorch's prelu takes few mixes


@pytest.mark.parametrize("activation", ["relu", "prelu", "silu"])
def test_gradients_under_autocast_have_the_dtypes_of_their_tensors(activation):
    layer = BatchNormAct2d(7, activation=activation)
    conv = torch.nn.Conv2d(7, 7, 1)
    x = torch.randn(SHAPE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(conv(x), x)
    y.float().sum().backward()
    assert x.grad.dtype is layer.weight.grad.dtype is conv.weight.grad.dtype is torch.float32
    assert layer.running_mean.dtype is torch.float32


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32], ids=str)
def test_mixed_residuals_get_gradients_of_their_own_dtype(backend, device, residual_dtype):
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    residual = (torch.randn(SHAPE, device=device) * 3).to(residual_dtype)
    residual.requires_grad_(residual.is_floating_point())
    weight, bias = torch.ones(7, device=device), torch.zeros(7, device=device)
    y, expected = _fused(x, residual, weight, bias), _torchs(x, residual, weight, bias)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    wanted = [t for t in (x, residual) if t.requires_grad]
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(backend, device, use_reentrant):
    layer = randomised(BatchNormAct2d(7, activation="silu", momentum=None)).to(device)
    twin = copy.deepcopy(layer)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    dy = torch.randn_like(y)
    dx = torch.autograd.grad(twin(x), x, dy)[0]
    layer.zero_grad()
    y.backward(dy)
    assert torch.equal(x.grad, dx)
    twin.zero_grad()
    twin.reset_grad_stats()
    twin(x).backward(dy)
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    assert layer.grad_stats() == twin.grad_stats()
