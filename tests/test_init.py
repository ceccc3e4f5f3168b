"""``vgkern.init``: gains against other sources, what each scheme's paper promises at 100 layers, what is read off.

Bounds at 100 layers: with random weights the mean square at layer l is a product of l factors. Behind a ReLU each has
the mean 1 and the variance 5 / width (He et al.'s derivation is about the mean; E[relu(z)⁴] / E[relu(z)²]² − 1 = 5). So
the logarithm of the product has, in a net of width 256, the mean −1 and the standard deviation √(500 / 256) = 1.4 at
the end: within three of them, a factor of 180. With PyTorch's default weights it is more than 10¹⁰, which a test shows.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from common import bits, torch_activation
from torch import nn
from torch.nn.utils import parametrizations

import vgkern
from vgkern.init import gain, init_weights_
from vgkern.init.structure import read
from vgkern.models import cifar_resnet, resnet18, resnet50
from vgkern.nn import AddAct, BatchNormAct1d, BatchNormAct2d

DEPTH, WIDTH, BATCH = 100, 256, 128
BOUND = 180.0

NAMES = [name for name in vgkern.activations.names() if name != "prelu"]


def _mlp(activation: str, depth: int = DEPTH, width: int = WIDTH) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), torch_activation(activation))]
    return nn.Sequential(*layers)


def _input(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(BATCH, width)


def _by_depth(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance of each layer's output, and mean square of the gradient there, for a random gradient at the end."""
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    handles = [m.register_forward_hook(keep) for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    y = net(x)
    y.backward(torch.randn_like(y))
    for handle in handles:
        handle.remove()
    variances = torch.stack([output.detach().double().var() for output in outputs])
    return variances, torch.stack([output.grad.double().square().mean() for output in outputs])


def _spread(values: torch.Tensor, end: int) -> float:
    """The largest factor between a layer and the first (or, from the end, the last) one."""
    logs = (values / values[end]).log()
    return logs.abs().max().exp().item()


# Gains ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gains_against_the_trapezoidal_rule(name):
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(torch_activation(name)(z).square() * density, z).item()
    assert gain(name) == pytest.approx(moment**-0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "torchs"),
    [
        ("identity", {}, ("linear",)),
        ("relu", {}, ("relu",)),
        ("leaky_relu", {"negative_slope": 0.3}, ("leaky_relu", 0.3)),
        ("prelu", {"init": 0.1}, ("leaky_relu", 0.1)),
    ],
)
def test_gains_that_pytorch_derives_too(name, arguments, torchs):
    assert gain(name, arguments) == pytest.approx(nn.init.calculate_gain(*torchs), rel=1e-12)


def test_gains_take_what_layers_take():
    assert gain(nn.GELU(approximate="tanh")) == gain("gelu", {"approximate": "tanh"}) != gain("gelu")
    assert gain(nn.PReLU(init=0.5)) == gain(nn.LeakyReLU(0.5))
    assert gain("selu") == pytest.approx(1.0, abs=1e-4)  # Klambauer et al. 2017 chose its constants so
    assert gain(None) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="did you mean"):
        gain("rleu")


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "orthogonal"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_hands_on_the_variance_that_it_gets(name, scheme):
    """A pre-activation of variance 1 becomes one of E = 1 (its mean square: some activations have a mean, which
    few weights see, so that they come out less exactly)."""
    act = torch_activation(name)
    net = init_weights_(nn.Sequential(act, nn.Linear(512, 512), act), scheme)
    z = net[1](act(torch.randn(2048, 512)))
    assert z.square().mean().item() == pytest.approx(
        1.0, rel=0.15 if name in ("sigmoid", "hardsigmoid", "softplus") else 0.05
    )


# What the papers promise, at 100 layers -------------------------------------------------------------------------------


def test_without_a_scheme_variances_leave_the_bounds():
    net = _mlp("relu")
    for layer in net[::2]:
        nn.init.zeros_(layer.bias)
    variances, gradients = _by_depth(net.double(), _input().double())
    assert _spread(variances, 0) > 1e10
    assert _spread(gradients, -1) > 1e10


@pytest.mark.parametrize("scheme", ["kaiming_uniform", "kaiming_normal", "orthogonal", "auto"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu"])
def test_rectifiers_keep_variance_and_gradient(name, scheme):
    """He et al. 2015, section 2.2: neither direction grows or shrinks exponentially."""
    variances, gradients = _by_depth(init_weights_(_mlp(name), scheme), _input())
    assert len(variances) == DEPTH
    assert _spread(variances, 0) < BOUND
    assert _spread(gradients, -1) < BOUND


@pytest.mark.parametrize("scheme", ["xavier_uniform", "xavier_normal", "auto"])
def test_xavier_keeps_variance_and_gradient_where_tanh_is_linear(scheme):
    """Glorot & Bengio 2010, section 4.2.1, suppose that units are in their linear regime: so is a small input."""
    variances, gradients = _by_depth(init_weights_(_mlp("tanh"), scheme), 0.05 * _input())
    assert _spread(variances, 0) < 10
    assert _spread(gradients, -1) < 10


@pytest.mark.parametrize("scheme", ["xavier_uniform", "xavier_normal"])
def test_xavier_decays_no_faster_than_one_over_depth_where_tanh_bends(scheme):
    """q ← E[tanh²(√q z)] ≈ q − 2q² has the solution 1 / (2 l): 0.005 at layer 100."""
    variances, gradients = _by_depth(init_weights_(_mlp("tanh"), scheme), _input())
    assert 0.5 / (2 * DEPTH) < variances[-1] < 2 / (2 * DEPTH)
    assert _spread(gradients, -1) < 1000


def test_orthogonal_nets_are_isometries():
    """Saxe et al. 2014, section 3: every singular value of the product of 100 linear layers is 1."""
    net = init_weights_(_mlp("identity", width=64), "orthogonal").double()
    product = net(torch.eye(64, dtype=torch.float64))
    assert torch.linalg.svdvals(product).sub(1).abs().max() < 1e-4
    gaussian = init_weights_(_mlp("identity", width=64), "kaiming_normal").double()
    assert torch.linalg.cond(gaussian(torch.eye(64, dtype=torch.float64))) > 1e4


@pytest.mark.parametrize("name", ["identity", "relu", "selu", "gelu", "silu", "hardswish", "tanh", "sigmoid"])
def test_lsuv_gives_every_layer_unit_variance(name):
    """Mishkin & Matas 2016, algorithm 1; they stop within 0.1. For data not seen, as well as a batch can tell."""
    sample = _input()
    net = init_weights_(_mlp(name), "lsuv", sample=sample)
    variances, _ = _by_depth(net, sample)
    assert (variances - 1).abs().max() < 1e-3
    if name in ("relu", "selu", "tanh"):  # where the variance of 1 is stable
        variances, _ = _by_depth(net, _input())
        assert _spread(variances, 0) < 1.5


def test_lsuv_gives_rectifiers_gradients_within_the_bounds():
    sample = _input()
    _, gradients = _by_depth(init_weights_(_mlp("relu"), "lsuv", sample=sample), sample)
    assert _spread(gradients, -1) < BOUND


class _Residual(nn.Module):
    """100 layers in 50 branches, and a head; no normalisation."""

    def __init__(self, blocks: int = 50, width: int = WIDTH, head: int = 10) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, head)

    def forward(self, x):
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(F.relu(first(F.relu(x))))
        return self.head(x)


def _sums(net: _Residual, x: torch.Tensor) -> torch.Tensor:
    """Mean square of the input, and of the sum after each block."""
    sums = [x]
    for first, second in zip(net.first, net.second, strict=True):
        sums.append(sums[-1] + second(F.relu(first(F.relu(sums[-1])))))
    return torch.stack([each.double().square().mean() for each in sums])


def test_depth_scaling_keeps_residual_sums_bounded():
    """(1 + c / L)^L stays below e^c; without the scaling (1 + c)^L is 10¹⁰ and more."""
    x, net = _input(), _Residual()
    assert _sums(init_weights_(net, "kaiming_normal"), x)[-1] > 1e10
    init_weights_(net, "auto")
    assert _sums(net, x).max() < math.e**2
    # The gradient that reaches the sums, from head to input.
    inputs = x.clone().requires_grad_()
    y = net(inputs)
    seed = torch.randn_like(y)
    y.backward(seed)
    at_head = (seed @ net.head.weight).square().mean()
    assert 0.2 < (inputs.grad.square().mean() / at_head).item() < math.e**2


def test_fixup_updates_do_not_grow_with_depth():
    """Zhang et al. 2019: identity at the start, and what a step of SGD changes is of the order of the learning rate,
    whatever the depth."""
    x, labels = _input(), torch.randint(10, (BATCH,))

    def change(blocks: int, scheme: str, steps: int = 5) -> float:
        torch.manual_seed(1)
        net = init_weights_(_Residual(blocks), scheme)
        if scheme == "fixup":
            assert torch.equal(_sums(net, x), x.double().square().mean().expand(blocks + 1))
            assert not net(x).any()
        before = net(x).detach()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
        return (net(x) - before).square().mean().sqrt().item()

    shallow, deep = change(5, "fixup"), change(50, "fixup")
    assert shallow > 0.01
    assert 0.3 < deep / shallow < 3
    assert not change(50, "kaiming_normal") < 1e3  # NaN too


def test_fixup_scales_by_branches_and_their_layers():
    net = init_weights_(_Residual(16), "fixup")
    for first, second in zip(net.first, net.second, strict=True):
        assert first.weight.std().item() == pytest.approx(math.sqrt(2 / WIDTH) / 4, rel=0.05)  # 16^(-1/(2·2-2))
        assert not second.weight.any()
    assert not net.head.weight.any()


def _gradient_that_arrives(net: nn.Module) -> float:
    """At the stem, relative to the last block's end."""
    net(torch.randn(16, 3, 8, 8)).square().sum().backward()
    return net.bn1.grad_stats().grad_output_norm / net.layer3[-1].bn2.grad_stats().grad_output_norm


def test_zero_gamma_keeps_the_gradient_through_98_layers():
    """Goyal et al. 2017: every block starts as its shortcut, so nothing but the two halvings changes the gradient."""
    net, plain = cifar_resnet(98, width=8), cifar_resnet(98, width=8, shortcut=False)
    init_weights_(net, "auto")
    assert all(not block.bn2.weight.any() for stage in (net.layer1, net.layer2, net.layer3) for block in stage)
    assert 0.2 < _gradient_that_arrives(net) < 5
    init_weights_(net, "auto", zero_init_residual=False)
    assert all((block.bn2.weight == 1).all() for stage in (net.layer1, net.layer2, net.layer3) for block in stage)
    with_gamma, without_shortcuts = _gradient_that_arrives(net), _gradient_that_arrives(init_weights_(plain))
    assert with_gamma < 200 < 1000 < without_shortcuts


# What is read off a model ---------------------------------------------------------------------------------------------


def _follows(net: nn.Module) -> dict[str, str]:
    names = {module: name for name, module in net.named_modules()}
    return {names[layer]: str(spec) for layer, spec in read(net).follows.items()}


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = (nn.Linear(4, 4) for _ in range(7))
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        x = F.leaky_relu(self.a(x), 0.2, inplace=True)
        x = torch.tanh(self.b(x))
        x = F.gelu(self.c(x), approximate="tanh")
        x = self.d(x).sigmoid()
        x = F.softplus(self.e(x), 2.0)
        x = F.prelu(self.f(x), self.slope)
        return self.g(x).softmax(-1)


def test_activations_as_functions_and_methods():
    assert _follows(_Functional()) == {
        "a": "leaky_relu(negative_slope=0.2)", "b": "tanh", "c": "gelu(approximate='tanh')", "d": "sigmoid",
        "e": "softplus(beta=2.0)", "f": "leaky_relu(negative_slope=0.25)", "g": "identity",
    }  # fmt: skip


def test_activations_through_fused_layers_norms_and_pooling():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, activation="silu"), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(),
        nn.MaxPool2d(2), nn.PReLU(init=0.5), nn.ConvTranspose2d(4, 4, 3), BatchNormAct2d(4, activation=None), AddAct(),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    assert _follows(net) == {
        "0": "silu", "2": "leaky_relu(negative_slope=0.5)", "7": "relu", "11": "identity",
    }  # fmt: skip


class _ByData(nn.Module):
    """Cannot be traced: it looks at its input. Its activation is a function, its block a module that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.act = nn.Mish()
        self.block = _Block()
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.act(self.stem(x))
        if x.sum() > 0:
            x = x * 2
        return self.head(self.block(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = BatchNormAct1d(8, activation="tanh")

    def forward(self, x):
        return self.norm(self.outer(F.silu(self.inner(x))), x)


def test_a_model_that_cannot_be_traced_is_read_by_submodules_and_order():
    net = _ByData()
    assert _follows(net) == {"block.inner": "silu", "block.outer": "tanh", "stem": "mish", "head": "identity"}
    (branch,) = read(net).branches
    assert branch.end is net.block.norm
    assert read(net).last is net.head
    init_weights_(net)
    assert not net.block.norm.weight.any()


def _ends(net: nn.Module) -> list[str]:
    names = {module: name for name, module in net.named_modules()}
    return [names[branch.end] for branch in read(net).branches]


def test_residual_branches_of_the_models():
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(2)]
    assert _ends(cifar_resnet(14)) == [f"{block}.bn2" for block in blocks]
    assert _ends(cifar_resnet(14, fused=False)) == [f"{block}.bn2" for block in blocks]
    assert _ends(cifar_resnet(14, stochastic_depth=0.2)) == [f"{block}.bn2" for block in blocks]
    assert _ends(cifar_resnet(14, preactivation=True)) == [f"{block}.conv2" for block in blocks]
    assert _ends(cifar_resnet(14, shortcut=False)) == []
    with torch.device("meta"):
        net = resnet50()
        assert len(_ends(net)) == 16
        assert all(end.endswith("bn3") for end in _ends(net))
        layers = [len(branch.layers) for branch in read(net).branches]
    assert layers == [3] * 16  # no shortcut's convolution among them
    assert len(_ends(resnet18(activation="prelu"))) == 8


class _Torchvision(nn.Module):
    """A block as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class _TwoPaths(nn.Module):
    """A sum of two equal paths has no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) + self.b(x) + 1


class _SwappedJoin(nn.Module):
    """The fused layer normalises the projection, and the branch comes as its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.project = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.branch_norm, self.join = BatchNormAct2d(4, activation=None), BatchNormAct2d(4)

    def forward(self, x):
        return self.join(self.project(x), residual=self.branch_norm(self.conv2(self.conv1(x).relu())))


def test_residual_branches_of_other_models():
    assert _ends(_Torchvision()) == ["bn2"]
    assert _follows(_Torchvision()) == {"conv1": "relu", "conv2": "relu", "downsample.0": "relu"}
    assert _ends(_TwoPaths()) == []
    assert _ends(_SwappedJoin()) == ["branch_norm"]


# Details --------------------------------------------------------------------------------------------------------------


def test_recipes_are_those_of_torch_nn_init():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for scheme, recipe in {
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
        "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu" if len(w) == 8 else "linear"),
        "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu" if len(w) == 8 else "linear"),
        "orthogonal": lambda w: nn.init.orthogonal_(w, math.sqrt(2) if len(w) == 8 else 1),
    }.items():
        torch.manual_seed(7)
        expected = [recipe(torch.empty(8, 6)), recipe(torch.empty(3, 8))]
        torch.manual_seed(7)
        assert init_weights_(net, scheme) is net
        torch.testing.assert_close([net[0].weight.detach(), net[2].weight.detach()], expected, msg=scheme)
        assert not net[0].bias.any()


def test_auto_takes_the_activations_recipe():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU())
    torch.manual_seed(7)
    expected = [
        nn.init.xavier_normal_(torch.empty(8, 6)),
        nn.init.kaiming_normal_(torch.empty(6, 8), nonlinearity="linear") * gain("gelu"),
    ]
    torch.manual_seed(7)
    init_weights_(net)
    torch.testing.assert_close([net[0].weight.detach(), net[2].weight.detach()], expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, groups=4),
        nn.ConvTranspose1d(64, 128, 3),
        nn.Conv2d(64, 32, 3, groups=4),
    ],
)
def test_convolutions_of_every_kind_keep_variance(layer):
    init_weights_(nn.Sequential(layer), "kaiming_normal")
    x = torch.randn(16, 64, *(16,) * (layer.weight.dim() - 2))
    y = layer(x)
    inside = y[:, :, 4:-4] if y.dim() == 3 else y[:, :, 4:-4, 4:-4]
    assert inside.var().item() == pytest.approx(1.0, rel=0.15)


def test_norms_start_as_norms_and_other_layers_stay():
    net = nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), BatchNormAct1d(4, activation="prelu")
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    embedding, slope, mean = net[0].weight.clone(), net[4].activation_weight.clone(), net[4].running_mean.fill_(3)
    init_weights_(net)
    for norm in net[2:]:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    assert torch.equal(net[0].weight, embedding)
    assert torch.equal(net[4].activation_weight, slope)
    assert (mean == 3).all()


def test_a_parametrised_weight_is_given_back():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.ReLU())
    init_weights_(net, "orthogonal")
    w = net[0].weight
    torch.testing.assert_close(w @ w.T, 2 * torch.eye(64), atol=1e-4, rtol=1e-4)


def test_lsuv_leaves_buffers_and_hooks_as_they_were():
    net = cifar_resnet(8, width=4)
    before = [buffer.clone() for buffer in net.buffers()]
    sample = torch.randn(8, 3, 8, 8)
    init_weights_(net, "lsuv", sample=sample)
    assert bits(*net.buffers()) == bits(*before)
    assert not any(module._forward_hooks for module in net.modules())
    variances, _ = _by_depth(net, sample)
    assert (variances - 1).abs().max() < 1e-3
    init_weights_(net, "lsuv", sample=(sample,))
    with pytest.raises(ValueError, match="the output of conv1 has a standard deviation of 0"):
        init_weights_(net, "lsuv", sample=torch.zeros(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("scheme", "arguments", "message"),
    [
        ("kaiming", {}, "unknown name 'kaiming'; did you mean 'kaiming_"),
        ("lsuv", {}, "sample: scheme 'lsuv' needs it"),
        ("auto", {"sample": torch.zeros(1)}, "no other takes it"),
        ("fixup", {}, "no residual branch was found"),
    ],
)
def test_refusals(scheme, arguments, message):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = bits(*net.parameters())
    with pytest.raises(ValueError, match=message):
        init_weights_(net, scheme, **arguments)
    assert bits(*net.parameters()) == before


def test_fixup_refuses_normalised_branches():
    with pytest.raises(ValueError, match="without normalisation"):
        init_weights_(cifar_resnet(8), "fixup")
    with pytest.raises(ValueError, match="without normalisation"):
        init_weights_(cifar_resnet(8, preactivation=True), "fixup")
