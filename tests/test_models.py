"""The models: torchvision's keys, the published sizes, one function with the twin of torch.nn, the options."""

from __future__ import annotations

import functools

import pytest
import torch
from common import bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vgkern
from vgkern.models import cifar_resnet
from vgkern.nn import BasicBlock, BatchNormAct2d, Bottleneck, DropPath, PreActBasicBlock, PreActBottleneck
from vgkern.nn.plain import PlainAddAct, PlainBatchNormAct2d

#: torchvision: blocks of each stage, convolutions of a block, parameters (its documentation of each model).
TORCHVISION = {
    "resnet18": ((2, 2, 2, 2), 2, 11_689_512),
    "resnet34": ((3, 4, 6, 3), 2, 21_797_672),
    "resnet50": ((3, 4, 6, 3), 3, 25_557_032),
    "resnet101": ((3, 4, 23, 3), 3, 44_549_160),
    "resnet152": ((3, 8, 36, 3), 3, 60_192_808),
}
#: The source's table 6, in millions, and for the pre-activation bottlenecks arXiv 1603.05027's table 4.
CIFAR = [(20, {}, 0.27), (32, {}, 0.46), (44, {}, 0.66), (56, {}, 0.85), (110, {}, 1.7), (1202, {}, 19.4),
         (164, {"bottleneck": True, "preactivation": True}, 1.7)]  # fmt: skip

#: Options that change what is computed; each makes a net that trains.
OPTIONS = {
    "none": {},
    "bottleneck": {"bottleneck": True},
    "preactivation": {"preactivation": True},
    "preactivation and bottleneck": {"preactivation": True, "bottleneck": True},
    "plain": {"shortcut": False},
    "plain preactivation": {"shortcut": False, "preactivation": True},
    "stochastic depth": {"stochastic_depth": 0.5},
    "stochastic depth and preactivation": {"stochastic_depth": 0.5, "preactivation": True},
    "leaky": {"activation": "leaky_relu", "activation_args": {"negative_slope": 0.2}},
    "prelu": {"activation": "prelu", "stochastic_depth": 0.3},
    "gelu": {"activation": nn.GELU(approximate="tanh")},
    "zero gamma": {"zero_init_residual": True},
}


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _norm_keys(prefix: str, channels: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": (channels,) for name in names} | {f"{prefix}.num_batches_tracked": ()}


def _torchvision_state(blocks: tuple[int, ...], convolutions: int) -> dict[str, tuple[int, ...]]:
    """Every key of torchvision's ResNet with its shape, in its order, as its resnet.py lays them out."""
    keys = {"conv1.weight": (64, 3, 7, 7)} | _norm_keys("bn1", 64)
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}"
            if convolutions == 2:
                shapes = [(width, channels, 3, 3), (width, width, 3, 3)]
            else:
                shapes = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for number, shape in enumerate(shapes, start=1):
                keys[f"{prefix}.conv{number}.weight"] = shape
                keys |= _norm_keys(f"{prefix}.bn{number}", shape[0])
            outputs = shapes[-1][0]
            if block == 0 and (stage > 0 or outputs != channels):
                keys[f"{prefix}.downsample.0.weight"] = (outputs, channels, 1, 1)
                keys |= _norm_keys(f"{prefix}.downsample.1", outputs)
            channels = outputs
    return keys | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_keys_and_shapes_are_torchvisions(name, fused):
    blocks, convolutions, parameters = TORCHVISION[name]
    with torch.device("meta"):
        net = getattr(vgkern.models, name)(fused=fused)
    assert _parameters(net) == parameters
    found = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    expected = _torchvision_state(blocks, convolutions)
    assert list(found) == list(expected)
    assert found == expected
    if name == "resnet50":
        assert {"layer1.0.downsample.1.running_mean", "layer4.2.bn3.weight", "layer3.5.conv2.weight"} < set(found)


def test_torchvision_state_loads_strictly_both_ways():
    blocks, convolutions, _ = TORCHVISION["resnet18"]
    state = {key: torch.rand(shape) for key, shape in _torchvision_state(blocks, convolutions).items()}
    state = {key: torch.tensor(3) if key.endswith("tracked") else value for key, value in state.items()}
    fused, plain = vgkern.models.resnet18(), vgkern.models.resnet18(fused=False)
    fused.load_state_dict(state)
    plain.load_state_dict(fused.state_dict())
    assert bits(*plain.state_dict().values()) == bits(*state.values())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("depth", "options", "millions"), CIFAR)
def test_small_image_nets_have_the_published_sizes(depth, options, millions):
    with torch.device("meta"):
        net = cifar_resnet(depth, **options)
    digits = 1 if millions >= 1 else 2
    assert round(_parameters(net) / 1e6, digits) == millions
    weighted = [m for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downs" not in name]
    assert len(weighted) == depth


def test_the_plain_net_has_the_same_parameters_and_no_shortcut():
    net, plain = cifar_resnet(20), cifar_resnet(20, shortcut=False)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert not torch.allclose(net(x), plain(x), atol=0.1)
    with torch.no_grad():  # a branch that is nothing leaves nothing of a plain net, and all of the other
        for block in (*net.layer1, *plain.layer1):
            block.conv2.weight.zero_()
    assert (plain.layer1(x := torch.rand(4, 16, 8, 8)) == 0).all()
    assert torch.equal(net.layer1(x), x)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_twin_of_torch_nn_is_the_same_function(options):
    """In float64: outputs, all gradients, running statistics; in training and in evaluation."""
    options = OPTIONS[options]
    torch.manual_seed(0)
    fused = cifar_resnet(20 if options.get("bottleneck") else 14, 5, in_channels=2, width=4, **options).double()
    twin = cifar_resnet(20 if options.get("bottleneck") else 14, 5, in_channels=2, width=4, fused=False, **options)
    twin.double().load_state_dict(fused.state_dict())
    assert not any(isinstance(module, BatchNormAct2d) for module in twin.modules())
    x = torch.randn(6, 2, 12, 12, dtype=torch.float64)
    weights = torch.randn(6, 5, dtype=torch.float64)
    for mode in (True, False):
        results = []
        for net in (fused, twin):
            net.train(mode)
            net.zero_grad()
            torch.manual_seed(1)  # which samples skip a block
            y = net(x)
            (y * weights).sum().backward()
            gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
            results.append((y, gradients, dict(net.named_buffers())))
        # Sums of a net of a dozen layers; a wrong activation or shortcut is off by 1.
        tolerance = {"rtol": 1e-8, "atol": 1e-8}
        torch.testing.assert_close(results[0][0], results[1][0], **tolerance)
        torch.testing.assert_close(results[0][1], results[1][1], **tolerance)
        for name, buffer in results[1][2].items():
            torch.testing.assert_close(results[0][2][name], buffer, **tolerance, msg=name)


@pytest.mark.parametrize("depth", [-4, 0, 7, 19, 21, 111])
def test_a_wrong_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2 weight layers .* nearest to {depth}: \d+"):
        cifar_resnet(depth)


def test_the_nearest_depths_are_named():
    with pytest.raises(ValueError, match="nearest to 21: 20 or 26"):
        cifar_resnet(21)
    with pytest.raises(ValueError, match="nearest to 3: 8"):
        cifar_resnet(3)
    with pytest.raises(ValueError, match="nearest to 163: 155 or 164"):
        cifar_resnet(163, bottleneck=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cifar_resnet(8, shortcut=False, stochastic_depth=0.1), "drop_path"),
        (lambda: cifar_resnet(8, shortcut=False, zero_init_residual=True), "zero_init_residual"),
        (lambda: cifar_resnet(8, stochastic_depth=1.0), "p: expected a probability"),
        (lambda: cifar_resnet(8, fused=False, grad_norm_bounds=(None, 1.0)), "grad_norm_bounds"),
        (lambda: cifar_resnet(8, activation="rellu"), "did you mean 'relu'"),
        (lambda: BasicBlock(4, 4, shortcut="identity"), "shortcut: expected one of"),
        (lambda: BasicBlock(8, 4, shortcut="pad"), "cannot make 4 channels of 8"),
        (lambda: DropPath(-0.1), "p: expected"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_batch_norm_is_a_fused_layer_and_holds_the_options():
    net = vgkern.models.resnet50(7, in_channels=1, activation="silu", grad_norm_bounds=(None, 2.0))
    norms = [module for module in net.modules() if isinstance(module, BatchNormAct2d)]
    assert len(norms) == 53
    assert all(norm.grad_norm_bounds == (None, 2.0) for norm in norms)
    activated = [norm.activation.name for name, norm in net.named_modules() if norm in norms and "downs" not in name]
    assert set(activated) == {"silu"}
    assert net.layer1[0].downsample[1].activation.name == "identity"
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_gradient_bounds_hold():
    net = cifar_resnet(8, width=4, grad_norm_bounds=(None, 1e-3))
    net(torch.randn(8, 3, 8, 8)).square().sum().backward()
    stats = [module.grad_stats() for module in net.modules() if isinstance(module, BatchNormAct2d)]
    assert max(each.grad_input_norm for each in stats) == pytest.approx(1e-3, rel=1e-5)


def test_zero_gamma_makes_every_block_its_shortcut():
    net = cifar_resnet(20, zero_init_residual=True)
    ends = [name for name, value in net.state_dict().items() if name.endswith(".weight") and not value.any()]
    assert ends == [f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3) for block in (0, 1, 2)]
    x = torch.rand(4, 16, 8, 8)
    assert torch.equal(net.layer1(x), x)
    assert not torch.equal(cifar_resnet(20).layer1(x), x)


def test_the_join_of_a_block_is_inside_its_last_layer(monkeypatch):
    """The sum costs no operation of its own: the layer is handed the shortcut."""
    given = []
    original = BatchNormAct2d.forward

    def forward(self, input, residual=None):
        given.append(residual)
        return original(self, input, residual)

    monkeypatch.setattr(BatchNormAct2d, "forward", forward)
    x = torch.rand(2, 8, 4, 4)
    BasicBlock(8, 8)(x)
    Bottleneck(8, 2)(x)
    assert [residual is x for residual in given] == [False, True, False, False, True]


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["projection", "pad", None])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck])
def test_blocks_by_their_definition(block, shortcut):
    """Against the formula, written with torch's functions."""

    def norm(layer, x, *, activated=True):
        z = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        return z.relu() if activated else z

    made = block(6, 8, stride=2, shortcut=shortcut).double()
    x = torch.randn(5, 6, 7, 7, dtype=torch.float64)
    convs = [getattr(made, f"conv{number}") for number in range(1, len(made.convolutions) + 1)]
    norms = [getattr(made, f"bn{number}") for number in range(1, len(convs) + 1)]
    strides = [conv.stride[0] for conv in convs]
    assert strides == ([2, 1] if len(convs) == 2 else [1, 2, 1])
    pre = made.preactivation
    y = x
    for layer, conv in zip(norms, convs, strict=True):
        last = conv is convs[-1]
        y = conv(norm(layer, y)) if pre else norm(layer, conv(y), activated=not last)
    source = norm(norms[0], x) if pre else x
    if shortcut == "projection":
        assert all(parameter.dim() in (1, 4) for parameter in made.downsample.parameters())
        y = y + (made.downsample(source) if pre else norm(made.downsample[1], made.downsample[0](x), activated=False))
    elif shortcut == "pad":
        assert not list(made.downsample.parameters())
        padding = torch.zeros(5, y.shape[1] - 6, 4, 4, dtype=torch.float64)
        y = y + torch.cat([source[:, :, ::2, ::2], padding], 1)
    torch.testing.assert_close(made(x), y if pre else y.relu())


def test_a_block_of_other_layers():
    made = BasicBlock(4, 8, norm=functools.partial(BatchNormAct2d, activation="prelu"))
    slopes = [name for name, _ in made.named_parameters() if name.endswith("activation_weight")]
    assert slopes == ["bn1.activation_weight", "bn2.activation_weight"]  # a slope each, none in the shortcut


# Stochastic depth -----------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    y = layer(torch.ones(4000, 3, 2))
    per_sample = y.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 1 / 0.75).all(1)).all()
    # 4,000 samples: a standard deviation of 0.0068 of the share
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert y.mean().item() == pytest.approx(1.0, abs=0.04)
    x = torch.randn(3, 4)
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert layer.train()(x.half()).dtype is torch.float16


def test_stochastic_depth_follows_the_linear_decay_rule():
    net = cifar_resnet(20, stochastic_depth=0.9)
    rates = [module.p for module in net.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * (block + 1) for block in range(9)])
    assert not any(isinstance(module, DropPath) for module in cifar_resnet(20).modules())


def test_a_dropped_sample_passes_by_the_shortcut():
    block = BasicBlock(4, 4, drop_path=0.5)
    x = torch.rand(64, 4, 5, 5)
    skipped = (block(x) == x).flatten(1).all(1)  # x ≥ 0: the ReLU after the sum leaves it
    assert 10 < skipped.sum() < 54
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x))))
    torch.manual_seed(3)
    y = block(x)
    kept = ~(y == x).flatten(1).all(1)
    torch.testing.assert_close(y[kept], (2 * branch + x).relu()[kept])


# The plain layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vgkern.activations.names())
def test_plain_layers_are_the_fused_ones(name):
    x, residual = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    fused, plain = BatchNormAct2d(3, activation=name).double(), PlainBatchNormAct2d(3, activation=name).double()
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain(x), fused(x))
    torch.testing.assert_close(plain(x, residual), fused(x, residual))
    joined = vgkern.nn.AddAct(activation=name).double()
    before = x.clone()
    twin = PlainAddAct(activation=name).double()
    torch.testing.assert_close(twin(x, residual), joined(x, residual))
    torch.testing.assert_close(twin(x), joined(x))
    assert torch.equal(x, before)


class _Operations(TorchDispatchMode):
    """The names of the operations that run, in order."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__.split(".")[0])
        return func(*args, **kwargs or {})


def test_plain_layers_overwrite_what_is_their_own():
    """As torchvision's ResNets do, so that comparisons are fair; and nothing else."""
    x, residual = torch.randn(2, 4, 3, 5, 5)
    with _Operations() as operations:
        PlainBatchNormAct2d(3).eval()(x, residual)
    assert [name for name in operations.seen if name in ("add", "add_", "relu", "relu_")] == ["add_", "relu_"]
    with _Operations() as operations:
        PlainAddAct()(x, residual)
    assert [name for name in operations.seen if "detach" not in name] == ["add", "relu_"]
    layer = PlainBatchNormAct2d(3).bfloat16()
    assert layer(x.bfloat16(), residual).dtype is BatchNormAct2d(3).bfloat16()(x.bfloat16(), residual).dtype
    y = PlainAddAct(inplace=True)(x)
    assert y.data_ptr() == x.data_ptr()
    assert (x >= 0).all()


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_every_plain_layer_becomes_the_fused_one(kind):
    name = f"BatchNormAct{kind}d"
    twin = getattr(vgkern.nn.plain, f"Plain{name}")(3, activation="leaky_relu", activation_args={"negative_slope": 0.2})
    fused = vgkern.fuse(nn.Sequential(twin))[0]
    assert type(fused) is getattr(vgkern.nn, name)
    assert type(vgkern.unfuse(nn.Sequential(fused))[0]) is type(twin)
    x, residual = torch.randn(2, 4, 3, 5, 6, 7)[(..., *[0] * (3 - kind))]
    torch.testing.assert_close(fused(x, residual), twin(x, residual))


def test_a_plain_resnet_is_fused_and_a_fused_one_unfused():
    for net in (vgkern.models.resnet50(fused=False), vgkern.models.resnet50()):
        fused = vgkern.fuse(net)
        report = vgkern.fusion_report(fused)
        assert report.fused_batch_norms == report.batch_norms == 53
        assert sum(type(module) is BatchNormAct2d for module in fused.modules()) == 53
    unfused = vgkern.unfuse(net)
    assert not any(hasattr(module, "grad_stats") for module in unfused.modules())
    assert type(unfused.bn1) is type(vgkern.models.resnet18(fused=False).bn1)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)  # one pixel a channel at the end, where two samples would cancel
    torch.testing.assert_close(unfused.double()(x), net.double()(x))


# PyTorch's tools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_a_whole_net_compiles_without_a_graph_break(backend):
    """Outputs, gradients and running statistics of a training step."""
    torch._dynamo.reset()
    eager, compiled = (cifar_resnet(20, width=4, activation="silu").double() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    step = torch.compile(compiled, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    outputs = [net(x) for net in (eager, step)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))


def test_channels_last_passes_through():
    net = cifar_resnet(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    seen = []
    for module in net.modules():
        if isinstance(module, BatchNormAct2d):
            module.register_forward_hook(
                lambda _, __, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    net(x).sum().backward()
    assert len(seen) == 7
    assert all(seen)


def test_a_net_that_is_trained_learns():
    torch.manual_seed(0)
    net = cifar_resnet(8, 2, in_channels=1, width=4)
    images = torch.randn(32, 1, 8, 8)
    labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]
