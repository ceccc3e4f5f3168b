"""``fuse``, ``unfuse``, ``fusion_report``: what is fused, what is left and why, and that all else stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
import random
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import bits, randomised
from torch import nn
from torch.nn.utils import parametrizations, prune

import vgkern
from vgkern.nn import AddAct, BatchNormAct1d, BatchNormAct2d, SyncBatchNormAct

C = 4
SHAPE = (5, C, 6, 7)


def random_values(model):
    """Every module's own parameters and statistics at random."""
    for module in model.modules():
        if not list(module.children()):
            randomised(module)
    return model


class Module(nn.Module):
    """A batch norm, a second one, a convolution, an activation; the forward is what a test is about."""

    def __init__(self, forward=None, **modules):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.bn2 = nn.BatchNorm2d(C)
        self.act = nn.ReLU()
        for name, module in modules.items():
            setattr(self, name, module)
        random_values(self)


def make(body: str, /, **modules) -> nn.Module:
    """A module whose forward, of ``x``, is this source."""
    namespace = {"torch": torch, "F": F, "random": random, "nn": nn}
    exec("def forward(self, x):\n" + textwrap.indent(textwrap.dedent(body), "    "), namespace)
    kind = type("Made", (Module,), {"forward": namespace["forward"]})
    return kind(**modules)


def results(model, *inputs):
    """Output, gradients and buffers of a step in training, and the output in eval."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = model.train()(*inputs)
    loss = y if y.dim() == 0 else (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum()
    loss.backward()
    found = {"output": y, **{f"input {i}": x.grad for i, x in enumerate(inputs)}}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: t for name, t in model.state_dict().items() if "running" in name or "tracked" in name}
    found["eval"] = model.eval()(*inputs)
    model.train()
    return {name: t.detach().clone() for name, t in found.items()}


def assert_same(model, fused, *inputs):
    """The same training step and evaluation, in float64."""
    ours = results(copy.deepcopy(fused).double(), *[x.double() for x in inputs])
    theirs = results(copy.deepcopy(model).double(), *[x.double() for x in inputs])
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-7, msg=name)


def operations(model) -> dict[str, tuple[str, ...]]:
    return {row.name: row.operations for row in vgkern.fusion_report(model).fused}


def left(model) -> dict[str, str]:
    return {row.name: row.reason for row in vgkern.fusion_report(model).left}


def x(*shape):
    return torch.randn(shape or SHAPE)


BN, ADD = "batch norm", "residual"
TAKES, WAITS = "residual's batch norm", (BN, "with the one that it is added to")  # of act(bn1(x) + bn2(residual))
ALONE = {"bn2": (BN,)}

# Forwards of one batch norm, `bn`, and what becomes of it. `bn2` is not called where it is not written.
FUSED = {
    "return self.act(self.bn(x))": (BN, "relu"),
    "return F.relu(self.bn(self.conv(x)), inplace=True)": (BN, "relu"),
    "return torch.relu(self.bn(x))": (BN, "relu"),
    "return self.bn(x).relu()": (BN, "relu"),
    "y = self.bn(x)\ny.relu_()\nreturn y": None,  # used twice: by relu_ and by the return
    "return self.bn(x).relu_()": (BN, "relu"),
    "return F.relu6(self.bn(x))": (BN, "relu6"),
    "return F.leaky_relu(self.bn(x), 0.2)": (BN, "leaky_relu(negative_slope=0.2)"),
    "return F.leaky_relu(self.bn(x), negative_slope=0.2, inplace=True)": (BN, "leaky_relu(negative_slope=0.2)"),
    "return F.elu(self.bn(x), 0.5)": (BN, "elu(alpha=0.5)"),
    "return F.celu(self.bn(x))": (BN, "celu"),
    "return F.selu(self.bn(x))": (BN, "selu"),
    "return F.gelu(self.bn(x), approximate='tanh')": (BN, "gelu(approximate='tanh')"),
    "return F.silu(self.bn(x))": (BN, "silu"),
    "return F.mish(self.bn(x))": (BN, "mish"),
    "return F.hardswish(self.bn(x))": (BN, "hardswish"),
    "return F.hardsigmoid(self.bn(x))": (BN, "hardsigmoid"),
    "return torch.sigmoid(self.bn(x))": (BN, "sigmoid"),
    "return self.bn(x).tanh()": (BN, "tanh"),
    "return F.softplus(self.bn(x), 2.0, 10.0)": (BN, "softplus(beta=2.0, threshold=10.0)"),
    # Not surely an activation of ours: the batch norm alone.
    "return self.bn(x).clamp(min=0)": (BN,),
    "return F.relu(self.bn(x) * 2)": (BN,),
    "return F.dropout(self.bn(x), 0.0, self.training)": (BN,),
    "return self.conv(self.bn(x))": (BN,),
    # Sums.
    "return self.act(self.bn(self.conv(x)) + x)": (BN, ADD, "relu"),
    "return self.act(x + self.bn(self.conv(x)))": (BN, ADD, "relu"),
    "return F.gelu(torch.add(self.bn(self.conv(x)), x))": (BN, ADD, "gelu"),
    "return torch.add(x, self.bn(self.conv(x)), alpha=1)": (BN, ADD),
    "return torch.add(input=x, other=self.bn(self.conv(x)))": (BN, ADD),
    "return self.bn(self.conv(x)).add(x).relu()": (BN, ADD, "relu"),
    "return self.bn(self.conv(x)).add_(x).relu_()": (BN, ADD, "relu"),
    "y = self.bn(self.conv(x))\ny += x\nreturn F.silu(y)": (BN, ADD, "silu"),
    "y = self.bn(self.conv(x)) + x\nreturn F.relu(y) + y": (BN, ADD),
    "y = self.act(self.bn(self.conv(x)))\nreturn self.act(y + x)": (BN, "relu"),
    "y = self.act(self.bn(self.conv(x)))\nreturn self.act(y * 2)": (BN, "relu"),
    # It changes the other operand, which the caller may see.
    "y = self.conv(x)\nz = y * 1\nz += self.bn(y)\nreturn z": (BN,),
}  # fmt: skip


@pytest.mark.parametrize("body", FUSED)
def test_forwards(body):
    model = make(body)
    fused = vgkern.fuse(model)
    assert operations(fused).get("bn") == FUSED[body]
    if FUSED[body] is None:
        assert "its output is used 2 times" in left(fused)["bn"]
    assert type(fused.bn2) is nn.BatchNorm2d
    assert_same(model, fused, x())
    assert bits(*fused.state_dict().values()) == bits(*model.state_dict().values())
    assert type(vgkern.unfuse(fused)) is type(model)


LEFT = {
    "y = self.bn(x)\nreturn F.relu(y) + y": "its output is used 2 times",
    "y = self.bn(x)\nreturn y + y": "its output is used 2 times",
    "return self.bn(x), self.bn(x * 2)": "it is called 2 times",
    "return x": "no forward that can be traced calls it",
    "return F.relu(torch.add(self.bn(x), x, alpha=2))": "alpha=2",
    "return F.relu(self.bn(x) + 1)": "adds the number 1",
    "return F.relu(self.bn(x) + self.bn2.weight.view(-1, 1, 1))": None,
    "return F.relu(self.bn(x) + self.scale)": "adds scale, which broadcasts",
    "return self.act(self.bn(x)) if x.sum() > 0 else x": "cannot be traced",
    "return self.act(self.bn(x)) if self.training else x": "cannot be traced",
    "return self.bn(x) * random.random()": "it draws random numbers itself",
    "return self.act(self.bn(x)) * torch.rand(())": "it makes a tensor of its own",
    "return self.bn(x) * torch.ones(1)": "it makes a tensor of its own",
    "self.seen = self.bn(x)\nreturn F.relu(self.seen)": "its forward sets the attribute 'seen'",
    "y = self.conv(x)\nwith torch.no_grad():\n    z = self.bn(y)\nreturn F.relu(z) + y": "under no_grad",
    "return F.relu(self.bn(x) + (x if x is None else x))": "asks whether an argument is None",
    "return F.relu(self.bn(x) + (x if isinstance(x, torch.Tensor) else x))": "asks whether an argument is None",
}  # fmt: skip


@pytest.mark.parametrize("body", LEFT)
def test_forwards_that_are_left(body):
    model = make(body, scale=nn.Parameter(torch.randn(C, 1, 1)))
    fused = vgkern.fuse(model)
    if LEFT[body] is None:  # a shape that only the call shows
        assert_same(model, fused, x())
        fused(x())
        assert "does not fit" in left(fused)["bn"]
        assert "bn" not in operations(fused)
        return
    assert LEFT[body] in left(fused)["bn"]
    assert left(fused) == left(model)
    assert type(fused.bn) is nn.BatchNorm2d
    assert type(fused) is type(model)
    if not any(word in body for word in ("rand", "self.bn(x), self", "return x")):
        assert_same(model, fused, x())


def _hooked(module, register):
    getattr(module, register)(lambda *args: None)
    return module


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def _replaced():
    module = nn.BatchNorm2d(C)
    module.forward = lambda input: input
    return module


def _old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.BatchNorm2d(C), dim=None)


@pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("bn", "reason"),
    [
        (lambda: _hooked(nn.BatchNorm2d(C), "register_forward_hook"), "a hook on it would see"),
        (lambda: _hooked(nn.BatchNorm2d(C), "register_forward_pre_hook"), "a hook on it would see"),
        (lambda: _hooked(nn.BatchNorm2d(C), "register_full_backward_hook"), "a hook on it would see"),
        (lambda: OwnForward(C), "OwnForward is a subclass"),
        (lambda: nn.LazyBatchNorm2d(), "lazy"),
        (lambda: torch.jit.script(nn.BatchNorm2d(C)), "scripted"),
        (_replaced, "its forward was replaced on the instance"),
        (lambda: parametrizations.weight_norm(nn.BatchNorm2d(C), dim=None), "parametrised"),
        (_old_weight_norm, "pruning, or weight normalisation"),
        (lambda: prune.l1_unstructured(nn.BatchNorm2d(C), "weight", 0.5), "pruning"),
    ],
)
def test_batch_norms_that_are_left(bn, reason):
    model = Module()
    model.__class__ = type("Made", (Module,), {"forward": lambda self, x: self.act(self.bn(x))})
    model.bn = bn()
    before = type(model.bn)
    fused = vgkern.fuse(model, inplace=True)  # some of them cannot be copied
    assert reason in left(fused)["bn"]
    assert type(fused.bn) is before
    assert type(fused.act) is nn.ReLU
    report = str(vgkern.fusion_report(fused))
    assert "0 of 2 batch norms fused" in report
    assert " ".join(reason.split()) in " ".join(report.split())


def test_quantised_and_prepared_modules_are_left():
    model = make("return self.act(self.bn(x))")
    model.bn.qconfig = "any"
    assert "quantisation" in left(vgkern.fuse(model))["bn"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_a_hook_on_a_swallowed_activation_leaves_its_batch_norm(register):
    model = make("return self.act(self.bn(x))")
    seen = []
    getattr(model.act, register)(lambda *args: seen.append(1))
    fused = vgkern.fuse(model)
    assert "a hook on the activation act" in left(fused)["bn"]
    fused(x().requires_grad_()).sum().backward()
    assert seen


def test_hooks_on_what_stays_still_run():
    """On a batch norm alone, on a block whose forward is replaced, and on its convolution."""
    model = make("y = self.bn(self.conv(x)) + x\nreturn F.relu(y) + self.bn2(x).mean()")
    seen = []
    for name in ("bn2", "conv", ""):
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.append((name, y.sum())))
    fused = vgkern.fuse(model)
    assert operations(fused) == {"bn": (BN, ADD, "relu"), "bn2": (BN,)}
    data = x()
    model(data)
    theirs, seen[:] = list(seen), []
    fused(data)
    assert [name for name, _ in seen] == [name for name, _ in theirs]
    for (_, ours), (_, other) in zip(seen, theirs, strict=True):
        torch.testing.assert_close(ours, other)


def test_a_hook_on_a_block_that_ends_with_a_batch_norm_keeps_the_sum_out_of_it():
    body = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    model = make("return x + self.body(x)", body=body)
    assert operations(vgkern.fuse(model))["body.1"] == (BN, ADD)
    body.register_forward_hook(lambda *args: None)
    assert operations(vgkern.fuse(model))["body.1"] == (BN,)


def test_a_shared_batch_norm_is_left_and_a_shared_activation_is_not():
    act = nn.ReLU(inplace=True)
    bn = nn.BatchNorm2d(C)
    model = nn.Sequential(bn, act, nn.BatchNorm2d(C), act, bn)
    fused = vgkern.fuse(model)
    assert "it is shared: 0, 4" in left(fused)["0"]
    assert operations(fused) == {}  # the activation has a call that nothing takes over
    assert "shared with other places" in left(fused)["2"]
    assert_same(model, fused, x())
    all_of_it = vgkern.fuse(nn.Sequential(nn.BatchNorm2d(C), act, nn.BatchNorm2d(C), act))
    assert operations(all_of_it) == {"0": (BN, "relu"), "2": (BN, "relu")}
    assert all_of_it[1] is all_of_it[3]


def test_a_block_that_is_called_twice_is_fused_inside():
    block = make("return self.act(self.bn(self.conv(x)))")
    model = nn.Sequential(block, block)
    fused = vgkern.fuse(model)
    assert operations(fused) == {"0.bn": (BN, "relu")}
    assert_same(model, fused, x())


class Taps(nn.Module):
    """Reads a sequence member by member."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == 1:
                taps.append(x)
        return taps[0] + x


class UntraceableTaps(Taps):
    def forward(self, x):
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == 1 and x.sum() > -1e9:
                taps.append(x)
        return taps[0] + x


def test_members_of_a_sequence_that_are_read_one_by_one():
    model = random_values(Taps())
    fused = vgkern.fuse(model)
    assert left(fused) == {"features.1": "its output is used 2 times"}
    assert operations(fused) == {"features.3": (BN, "relu")}
    assert_same(model, fused, x())
    model = random_values(UntraceableTaps())
    fused = vgkern.fuse(model)
    assert set(left(fused)) == {"features.1", "features.3"}
    assert all("UntraceableTaps reads its members" in reason for reason in left(fused).values())
    assert_same(model, fused, x())


class ControlFlow(nn.Module):
    """Untraceable; its blocks are not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
        self.blocks = nn.ModuleList([make("return self.act(self.bn(self.conv(x)) + x)") for _ in range(2)])
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x, mask=None):
        if x.shape[0] > 100:
            raise ValueError("too many")
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.relu(self.norm(x)) if mask is None else x


def test_a_model_that_cannot_be_traced_is_fused_module_by_module():
    model = ControlFlow()
    fused = vgkern.fuse(model)
    assert set(operations(fused)) == {"stem.1", "blocks.0.bn", "blocks.1.bn"}
    assert "the forward of ControlFlow cannot be traced" in left(fused)["norm"]
    assert_same(model, fused, x())


class Getter(nn.ModuleDict):
    """A container with a forward of its own, as torchvision's IntermediateLayerGetter."""

    def __init__(self):
        super().__init__({"conv": nn.Conv2d(C, C, 1), "bn": nn.BatchNorm2d(C), "act": nn.ReLU()})
        self["block"] = make("return self.act(self.bn(self.conv(x)) + x)")

    def forward(self, x):
        kept = {}
        for name, module in self.items():
            x = module(x)
            kept[name] = x
        return kept["act"] + kept["block"]


class ReadsMembers(nn.Module):
    """Untraceable, and goes past the forward of its container."""

    def __init__(self):
        super().__init__()
        self.body = Getter()

    def forward(self, x):
        if x.shape[0] > 100:
            raise ValueError("too many")
        return self.body["bn"](x)


def test_a_container_with_a_forward_of_its_own_is_read_and_one_that_others_read_is_left():
    model = Getter()
    fused = vgkern.fuse(model)
    assert operations(fused) == {"bn": (BN, "relu"), "block.bn": (BN, ADD, "relu")}
    assert_same(model, fused, x())
    model = ReadsMembers()
    assert "the forward of ReadsMembers cannot be traced" in left(vgkern.fuse(model))["body.bn"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def encode(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return F.gelu(self.bn(self.conv(x)))


class Private(Encoder):
    def _inner(self, x):
        return F.gelu(self.bn(self.conv(x)))

    encode = None

    def forward(self, x):
        return self._inner(x)


def test_a_method_beside_the_forward_keeps_its_meaning():
    model = Encoder()
    fused = vgkern.fuse(model)
    assert "Encoder.encode calls it as well" in left(fused)["bn"]
    data = x()
    assert bits(fused.encode(data)) == bits(model.encode(data))
    assert operations(vgkern.fuse(Private())) == {"bn": (BN, "gelu")}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.scale, self.flag = nn.BatchNorm2d(C), 1.0, False

    def forward(self, x):
        y = F.relu(self.bn(x) + x)
        return y * self.scale if self.flag else y


class Optional(Module):
    """Without a mask the activation is not applied: a stand-in for the mask does not show it."""

    def forward(self, x, mask=None):
        y = self.bn(self.conv(x))
        if mask is None:
            return y
        return self.act(y) * mask


class OptionalEnd(Module):
    def forward(self, x, mask=None):
        y = self.act(self.bn(self.conv(x)))
        return self.bn2(y) if mask is None else y * mask


class Listed(Module):
    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, list) else x
        return self.act(self.bn(x))


class Typed(Module):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y) if not isinstance(x, torch.Tensor) else y


class Behind(Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.act(self.inner(x))


class MaybeNorm(Module):
    def forward(self, x, mask=None):
        return self.conv(x) if mask is None else self.bn(x)


def test_forwards_that_ask_what_their_arguments_are():
    for kind, fused in ((Optional, False), (OptionalEnd, True), (Listed, True), (Typed, False)):
        model = kind()
        assert (operations(vgkern.fuse(model)).get("bn") == (BN, "relu")) is fused, kind
        if not fused:
            assert "asks for types" in left(model)["bn"]
        assert_same(model, vgkern.fuse(model), x())
    model = Behind(MaybeNorm())
    assert "asks for types" in left(model)["inner.bn"]
    assert_same(model, vgkern.fuse(model), x())
    model = Optional()
    data, mask = x(), x()
    torch.testing.assert_close(vgkern.fuse(model)(data, mask), copy.deepcopy(model)(data, mask))


class Flagged(Module):
    activated = True

    def forward(self, x):
        y = self.bn(x)
        return self.act(y) if self.activated else y


def test_a_flag_that_decides_on_the_activation_must_not_change_unseen():
    fused = vgkern.fuse(Flagged())
    assert operations(fused) == {"bn": (BN, "relu")}
    fused(x())
    fused.activated = False
    with pytest.raises(RuntimeError, match="activated was True"):
        fused(x())


def test_an_attribute_that_the_forward_has_settled_must_not_change_unseen():
    fused = vgkern.fuse(Scaled())
    fused(x())
    fused.flag = True
    with pytest.raises(RuntimeError, match="flag was False when vgkern"):
        fused(x())
    plain = vgkern.unfuse(fused)
    assert_same(plain, vgkern.fuse(plain), x())


def test_a_replaced_layer_is_not_used_as_if_it_were_fused():
    fused = vgkern.fuse(make("return self.act(self.bn(self.conv(x)) + x)"))
    fused.bn = nn.BatchNorm2d(C)
    with pytest.raises(RuntimeError, match="the fused layer was replaced by BatchNorm2d"):
        fused(x())


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (5, C, 1, 1), (C, 1, 1), (5, 1, 6, 7)])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_residual_that_broadcasts_is_right(shape, in_place):
    class Two(Module):
        def forward(self, x, r):
            y = self.bn(x)
            if in_place:
                y += r
            else:
                y = y + r
            return F.silu(y)

    model = Two()
    fused = vgkern.fuse(model)
    assert operations(fused)["bn"] == (BN, ADD, "silu")
    assert_same(model, fused, x(), x(*shape))


def test_a_residual_of_another_dtype_is_right():
    class Two(Module):
        def forward(self, x, r):
            y = self.bn(x)
            y += r
            return F.relu(y)

    model = Two()
    fused = vgkern.fuse(model)
    wide = torch.randn(SHAPE, dtype=torch.float64)
    data = x()
    ours, theirs = fused(data, wide), model(data, wide)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


# Across modules.


def test_a_sum_outside_the_module_that_ends_with_the_batch_norm():
    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Identity()

        def forward(self, x):
            return self.last(self.norm(self.conv(x)))

    model = make("return F.relu(x + self.body(x))", body=nn.Sequential(nn.Sequential(nn.ReLU(), ConvNorm())))
    fused = vgkern.fuse(model)
    assert operations(fused) == {"body.0.1.norm": (BN, ADD, "relu")}
    assert_same(model, fused, x())
    sliced = fused.body[:1]
    assert type(sliced) is nn.Sequential
    assert isinstance(fused.body, nn.Sequential)
    assert len(fused.body) == 1
    fused.body.append(nn.Conv2d(C, C, 1))
    with pytest.raises(RuntimeError, match="was put behind"):
        fused(x())
    plain = vgkern.unfuse(vgkern.fuse(model))
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]


def test_an_activation_outside_the_module_that_ends_with_the_batch_norm():
    model = make("return self.act(self.body(x))", body=nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    fused = vgkern.fuse(model)
    assert operations(fused) == {"body.1": (BN, "relu")}
    assert type(fused) is type(model), "no forward needs to be another"
    assert_same(model, fused, x())


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.ReLU(inplace=True)])
def test_a_module_is_not_moved_past_another_that_could_tell(dropout):
    body = nn.Sequential(dropout, nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
    shortcut = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(C, C, 1))
    model = make("y = self.body(x * 1)\nz = self.shortcut(x)\ny += z\nreturn y", body=body, shortcut=shortcut)
    fused = vgkern.fuse(model)
    moved = isinstance(dropout, nn.ReLU)
    assert operations(fused)["body.2"] == ((BN, ADD) if moved else (BN,))
    data = x()
    torch.manual_seed(3)
    theirs = model(data)
    torch.manual_seed(3)
    torch.testing.assert_close(fused(data), theirs)


def test_a_batch_norm_does_not_wait_for_what_changes_its_input():
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(C, C, 1))
    model = make("x = x * 1\nreturn self.bn(x) + self.body(x)", body=body).eval()
    fused = vgkern.fuse(model)
    assert operations(fused)["bn"] == (BN,)
    data = x()
    with torch.no_grad():
        torch.testing.assert_close(fused(data), model(data))
    model = make("y = x * 1\nreturn self.bn(x) + y.view(-1).mul_(2).view_as(x)")
    assert operations(vgkern.fuse(model))["bn"] == (BN,)


def test_a_sum_of_two_batch_norms_takes_both():
    model = make("return self.act(self.bn(x) + self.bn2(x))")
    fused = vgkern.fuse(model)
    assert operations(fused) == {"bn": WAITS, "bn2": (BN, TAKES, "relu")}
    assert_same(model, fused, x())


def test_a_sum_with_an_activation_and_no_batch_norm():
    for body in ("return self.act(self.conv(x) + x)", "y = self.conv(x)\ny += x\nreturn self.act(y)"):
        model = make(body)
        fused = vgkern.fuse(model)
        assert type(fused.act) is AddAct
        assert operations(fused) == {"act": (ADD, "relu")}
        assert_same(model, fused, x())
        fused(x()).sum().backward()
        assert fused.act.grad_stats().backwards == 1
        assert type(vgkern.unfuse(fused).act) is nn.ReLU
    for body in (
        "return F.leaky_relu(self.conv(x) + x, 0.3)",
        "return F.silu(self.conv(x) + self.conv(x).mean((2, 3), True))",
    ):
        model = make(body)
        fused = vgkern.fuse(model)
        assert type(fused) is not type(model)
        assert_same(model, fused, x())


class Slopes(Module):
    def forward(self, x):
        y = self.p(self.bn(self.conv(x)))
        z = self.q(self.bn2(y) + x)
        return self.r(y + z)


def test_a_prelu_stays_under_its_own_name():
    model = Slopes(p=nn.PReLU(C), q=nn.PReLU(), r=nn.PReLU(C))
    fused = vgkern.fuse(model)
    assert operations(fused) == {"bn": (BN, "prelu"), "bn2": (BN, ADD, "prelu")}
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert fused.bn.activation_weight is fused.p.weight
    assert_same(model, fused, x())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin.bn.activation_weight is twin.p.weight
        assert_same(model, twin, x())
    broadcast = make("return self.p(self.bn(x) + x.mean((2, 3), keepdim=True))", p=nn.PReLU(C))
    assert_same(broadcast, vgkern.fuse(broadcast), x())
    plain = vgkern.unfuse(fused)
    assert type(plain.p) is nn.PReLU
    assert_same(model, plain, x())


# What stays.


def _net():
    return nn.Sequential(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), make("return self.act(self.bn(self.conv(x)) + x)")
    )


def test_in_place_keeps_parameters_buffers_and_the_optimiser():
    model = _net()
    twin = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}
    modules = list(model.modules())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    data = x(4, 3, 8, 8)
    for step in range(4):
        for net, opt in ((model, optimiser), (twin, other)):
            opt.zero_grad()
            net(data).square().mean().backward()
            opt.step()
        if step == 1:
            assert vgkern.fuse(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    for name, tensor in tensors.items():
        assert model.state_dict(keep_vars=True)[name] is tensor
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert vgkern.unfuse(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_copy_leaves_the_model_alone():
    model = _net()
    before = repr(model), bits(*model.state_dict().values()), type(model[3])
    fused = vgkern.fuse(model)
    vgkern.fusion_report(model)
    vgkern.fold(model)
    assert (repr(model), bits(*model.state_dict().values()), type(model[3])) == before
    assert fused is not model
    assert not set(map(id, fused.parameters())) & set(map(id, model.parameters()))


def test_modes_frozen_and_tied_parameters_and_dtypes():
    model = _net()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[3].bn.weight = model[3].bn2.weight
    model[3].double()
    fused = vgkern.fuse(model)
    assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    assert not fused[1].weight.requires_grad
    assert fused[3].bn.weight is fused[3].bn2.weight
    assert fused[3].bn.weight.dtype == torch.float64
    statistics = fused[1].running_mean.clone()
    fused[1](x())
    assert torch.equal(fused[1].running_mean, statistics)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"bias": False}]
)
def test_options_of_batch_norm(options):
    model = nn.Sequential(nn.BatchNorm2d(C, **options), nn.ReLU())
    fused = vgkern.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(model, fused, x())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices(device):
    model = nn.Sequential(nn.BatchNorm2d(C, device=device), nn.ReLU())
    fused = vgkern.fuse(model)
    assert fused[0].weight.device.type == fused[0]._probe.device.type == device


class Block(Module):
    """Importable, with a method of its own."""

    planes = 3

    def forward(self, x):
        out = self.act(self.bn(self.conv(x)))
        out = self.bn2(out)
        out += x
        return self.act(out)

    def describe(self):
        return f"{self.planes} planes"


def test_class_methods_copies_and_pickles():
    model = nn.Sequential(Block(), Block())
    fused = vgkern.fuse(model)
    assert isinstance(fused[0], Block)
    assert type(fused[0]) is type(fused[1]), "blocks of one kind share a class"
    assert type(fused[0]).__name__ == "Block"
    assert fused[0].describe() == "3 planes"
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    data = x()
    want = fused.eval()(data)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        assert isinstance(twin[0], Block)
        assert bits(twin.eval()(data)) == bits(want)
        assert type(vgkern.unfuse(twin)[0]) is Block


def test_fusing_twice_changes_nothing():
    fused = vgkern.fuse(_net())
    fused[1].grad_norm_bounds = (None, 1.0)
    again = vgkern.fuse(fused)
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert again[1].grad_norm_bounds == (None, 1.0)
    assert vgkern.fusion_report(again) == vgkern.fusion_report(fused)
    mixed = nn.Sequential(fused, nn.BatchNorm2d(C), nn.Tanh())
    assert operations(vgkern.fuse(mixed))["1"] == (BN, "tanh")


def test_gradient_records_of_a_fused_model():
    fused = vgkern.fuse(_net())
    fused(x(4, 3, 8, 8)).sum().backward()
    for layer in (fused[1], fused[3].bn):
        assert layer.grad_stats().backwards == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_it_compiles_without_a_break():
    torch._dynamo.reset()
    prelu = make("return self.p(self.bn(self.conv(x)) + x)", p=nn.PReLU(C))
    model = nn.Sequential(Block(), prelu, make("return x + self.body(x)", body=nn.Sequential(nn.BatchNorm2d(C))))
    fused = vgkern.fuse(model)
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    data = x()
    torch.testing.assert_close(compiled(data), eager(data))
    compiled(data).sum().backward()
    eager(data).sum().backward()
    for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# unfuse of what was built fused.


class Built(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.norm = BatchNormAct2d(C, activation="gelu")
        self.slope = BatchNormAct2d(C, activation="prelu", track_grad_stats=False)
        self.end = AddAct(activation="silu")
        self.flat = BatchNormAct1d(C, activation=None)

    def forward(self, x):
        y = self.slope(self.norm(self.conv(x), x))
        return self.flat(self.end(y, x).mean((2, 3)))


def test_layers_that_were_built_fused_have_plain_twins():
    model = Built()
    report = vgkern.fusion_report(model)
    assert report.fused_batch_norms == report.batch_norms == 3
    plain = vgkern.unfuse(model)
    assert isinstance(plain.norm, nn.BatchNorm2d)
    assert not any(hasattr(module, "grad_stats") for module in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict())
    assert bits(*plain.state_dict().values()) == bits(*model.state_dict().values())
    assert_same(plain, model, x())
    again = vgkern.fuse(plain)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert again.norm._probe is not None
    assert again.slope._probe is None
    assert_same(model, again, x())


# Batch norms over all processes.


@pytest.fixture
def process_group(tmp_path):
    """A group of one process, and not the default one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.new_group([0])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU])
def test_synchronised_batch_norms(activation):
    model = make("return self.act(self.bn(self.conv(x)) + x)", bn=nn.SyncBatchNorm(C), act=activation())
    fused = vgkern.fuse(model)
    assert isinstance(fused.bn, SyncBatchNormAct)
    assert operations(fused)["bn"][:2] == (BN, ADD)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(model, fused, x())
    plain = vgkern.unfuse(fused)
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in model.modules()]
    assert type(plain.bn) is nn.SyncBatchNorm
    assert_same(model, plain, x())
    torch.testing.assert_close(vgkern.fold(model)(data := x()), model.eval()(data), rtol=1e-4, atol=1e-4)


def test_synchronised_batch_norms_keep_their_group(process_group):
    model = nn.Sequential(nn.SyncBatchNorm(C, process_group=process_group), nn.ReLU())
    fused = vgkern.fuse(model)  # a group cannot be copied
    assert f"process_group={process_group.group_name!r}" in repr(fused[0])
    twin = pickle.loads(pickle.dumps(fused))
    assert vgkern.unfuse(twin)[0].process_group is process_group
    assert vgkern.unfuse(fused)[0].process_group is process_group
    assert model[0].process_group is process_group
    built = SyncBatchNormAct(C, process_group=process_group, track_grad_stats=False)
    plain = vgkern.unfuse(nn.Sequential(built))
    assert isinstance(plain[0], nn.SyncBatchNorm)
    assert plain[0].process_group is process_group
    again = vgkern.fuse(plain)[0]
    assert vars(again).keys() == vars(built).keys()
    data = x()
    torch.testing.assert_close(again(data, data), built(data, data))
    again(data).sum().backward()
    assert again.grad_stats() is None


# fold.


def test_other_dtypes_are_left():
    fused = vgkern.fuse(nn.Sequential(nn.BatchNorm2d(C).to(torch.float8_e4m3fn), nn.ReLU()))
    assert "float8_e4m3fn" in left(fused)["0"]


@pytest.mark.parametrize("first", ["plain", "fused"])
def test_fold(first):
    body = """
        y = self.act(self.bn(self.conv(x)))
        y = self.p(self.bn2(self.up(y)) + x)
        return self.tail(y.mean((2, 3))) + self.last(self.extra(self.act(x))).mean((2, 3))
    """
    model = make(
        body, up=nn.ConvTranspose2d(C, C, 1), p=nn.PReLU(C), extra=nn.BatchNorm2d(C),
        last=nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
        tail=nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, C), nn.BatchNorm1d(C)),
    ).double()  # fmt: skip
    model.eval()
    data = x().double()
    folded = vgkern.fold(vgkern.fuse(model) if first == "fused" else model)
    torch.testing.assert_close(folded(data), model(data), rtol=1e-9, atol=1e-9)
    kinds = {name: type(module).__name__ for name, module in folded.named_modules()}
    assert kinds["bn"] == "AddAct"
    assert kinds["bn2"] == "AddPReLU"
    assert kinds["tail.1"] == "AddAct"
    assert kinds["tail.4"] == "AddAct", "the sum outside is its own"
    assert kinds["last.1"] == "Identity"
    assert kinds["extra"] == "BatchNormAct2d"
    assert not folded.training
    twin = pickle.loads(pickle.dumps(folded.state_dict()))
    assert "bn.weight" not in twin
    assert "conv.bias" in twin


def test_fold_of_layers_that_were_built_fused():
    model = random_values(Built()).double().eval()
    data = x().double()
    folded = vgkern.fold(model)
    assert type(folded.norm) is AddAct
    assert isinstance(folded.slope, BatchNormAct2d)
    torch.testing.assert_close(folded(data), model(data), rtol=1e-9, atol=1e-9)


def test_fold_leaves_what_it_must_not_take_in():
    twice = make("return self.bn(self.conv(x)) * self.conv(x * 2)").double()
    values = x().double()
    torch.testing.assert_close(vgkern.fold(twice)(values), copy.deepcopy(twice).eval()(values), rtol=1e-9, atol=1e-9)
    shared = nn.Conv2d(C, C, 1)
    model = random_values(
        nn.Sequential(
            shared, nn.BatchNorm2d(C), shared, nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU(),
            nn.ConvTranspose2d(C, C, 1, groups=2), nn.BatchNorm2d(C),
        )
    ).double()  # fmt: skip
    data = x().double()
    torch.testing.assert_close(vgkern.fold(model)(data), copy.deepcopy(model).eval()(data), rtol=1e-9, atol=1e-9)
    assert sum(isinstance(m, BatchNormAct2d) for m in vgkern.fold(model)) == 3


# The report.


def test_the_report_is_a_table_with_and_without_rich(monkeypatch):
    model = make("y = self.bn(x)\nreturn F.relu(y) + y + self.act(self.bn2(x))")
    report = vgkern.fusion_report(model)
    text = str(report)
    monkeypatch.setitem(__import__("sys").modules, "rich.box", None)
    plain = str(report)
    assert plain != text
    assert plain.splitlines()[1:] == [
        "       1  batch norm + relu",
        "  1 left  bn                 its output is used 2 times",
    ]
    for written in (text, plain):
        for word in ("1 of 2 batch norms fused", "batch norm + relu", "left", "bn", "its output is used 2 times"):
            assert word in written


def test_the_report_says_a_reason_once():
    norms = [nn.BatchNorm2d(C) for _ in range(6)]
    for norm in norms:
        norm.qconfig = "any"
    text = str(vgkern.fusion_report(nn.Sequential(*norms)))
    assert "0 of 6 batch norms fused" in text
    assert "0, 1, 2, 3 and 2 more" in text
    assert text.count("quantisation") == 1


@pytest.mark.parametrize("function", [vgkern.fuse, vgkern.unfuse, vgkern.fusion_report, vgkern.fold])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        function(3)


def test_a_batch_norm_by_itself():
    bn = randomised(nn.BatchNorm2d(C))
    fused = vgkern.fuse(bn)
    assert type(fused) is BatchNormAct2d
    assert_same(bn, fused, x())
    assert type(vgkern.unfuse(fused)) is nn.BatchNorm2d


# Where else a fused model goes.


def test_a_fused_model_can_be_traced_by_fx():
    model = nn.Sequential(Block(), make("return F.silu(self.conv(x) + x)"), nn.Sequential(Block()))
    fused = vgkern.fuse(model)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, name: not isinstance(module, (nn.Sequential, Module))
    graph = torch.fx.GraphModule(fused, tracer.trace(fused))
    data = x()
    assert bits(graph.eval()(data)) == bits(fused.eval()(data))
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("add" in name for name in names) == 3


@pytest.mark.filterwarnings("ignore:A model attribute:UserWarning")  # the probe of the gradient record
def test_a_fused_model_exports():
    model = nn.Sequential(Block(), Slopes(p=nn.PReLU(C), q=nn.PReLU(), r=nn.PReLU(C)))
    fused = vgkern.fuse(model).eval()
    data = x()
    program = torch.export.export(fused, (data,))
    torch.testing.assert_close(program.module()(data), fused(data))


def test_parameters_given_from_outside_reach_a_shared_slope():
    fused = vgkern.fuse(Slopes(p=nn.PReLU(C), q=nn.PReLU(), r=nn.PReLU(C))).eval()
    data = x()
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    state["p.weight"] = torch.full((C,), 3.0)
    got = torch.func.functional_call(fused, state, (data,))
    fused.p.weight.data.fill_(3.0)
    torch.testing.assert_close(got, fused(data))


def test_subclasses_made_later_of_a_replaced_forward():
    """Parametrisation and FSDP put a class of their own over the one that is there."""
    fused = vgkern.fuse(Block())
    kind = type(fused)
    fused.__class__ = type(
        "Over", (kind,), {"__reduce_ex__": lambda self, protocol: kind.__reduce_ex__(self, protocol)}
    )
    data = x()
    assert bits(copy.deepcopy(fused).eval()(data)) == bits(fused.eval()(data))


def test_integers_that_are_added():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x + x)

    fused = vgkern.fuse(Sum())
    assert operations(fused) == {"act": (ADD, "relu")}
    assert torch.equal(fused(torch.tensor([-1, 2])), torch.tensor([0, 4]))
