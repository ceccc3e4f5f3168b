"""GradientClipper: every training loop ends where clip_grad_norm_ before each step would have brought it."""

from __future__ import annotations

import contextlib
import copy
import io
import math

import pytest
import torch
import world
from common import bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vgkern
from vgkern.backends import cpu
from vgkern.gradients import GradientClipper, clip_grad_norm_, get_grad_norms, hot_norms

OPTIMISERS = {
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


@pytest.fixture(autouse=True, params=["small", "large"])
def _pending(request, monkeypatch):
    """Norms taken for each gradient by itself, and all at the step."""
    monkeypatch.setattr(hot_norms, "_PENDING_ELEMENTS", 1 if request.param == "small" else 1 << 18)


def _net() -> nn.Module:
    """In float64: where a gradient is nearly 0, Adam makes much of float32's last place."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3)).double()


def _data(step: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _loss(net: nn.Module, step: int) -> torch.Tensor:
    return net(_data(step)).square().sum() * (1e-6 if step == 1 else 1)


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def _count_measured(monkeypatch) -> list[int]:
    """How many gradients are measured in each call that is not made by a hook."""
    counts = []
    original = hot_norms.lists.measure

    def measure(gradients, *args):
        counts.append(len(gradients))
        return original(gradients, *args)

    monkeypatch.setattr(hot_norms.lists, "measure", measure)
    return counts


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_is_that_with_clip_grad_norm(name, accumulate, set_to_none, monkeypatch):
    net = _net()
    other = copy.deepcopy(net)
    optimizer, plain = OPTIMISERS[name](net.parameters()), OPTIMISERS[name](other.parameters())
    clipper = GradientClipper(optimizer, 2.0)
    measured = _count_measured(monkeypatch)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, plain)]
    clipped = 0
    for step in range(4):
        for one, opt in ((net, optimizer), (other, plain)):
            opt.zero_grad(set_to_none=set_to_none)
            for micro in range(accumulate):
                (_loss(one, step) * (1 + micro)).backward()
        norm = clip_grad_norm_(other.parameters(), 2.0)
        clipped += norm.item() > 2
        optimizer.step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        assert clipper.total_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert not hasattr(optimizer, "grad_scale")
        _assert_same(net, other)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)
    assert 0 < clipped < 4
    assert (clipper.steps, clipper.clipped) == (4, clipped)
    assert measured == []  # every norm was known when the optimiser stepped


def test_the_hooks_norms_are_those_of_what_is_accumulated(monkeypatch):
    """Two backward passes, of which the second reaches only one layer: each parameter counts once, as it stands."""
    net = _net()
    clipper = GradientClipper(torch.optim.SGD(net.parameters(), lr=0.0), 1e9)
    _loss(net, 0).backward()
    net[2](torch.ones(2, 300, dtype=torch.float64)).sum().backward()
    expected = get_grad_norms(net.parameters()).norm().item()
    measured = _count_measured(monkeypatch)
    clipper.optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(expected, rel=1e-12)
    assert measured == []
    clipper.optimizer.step()  # once more without a backward pass: nothing is known, all is measured
    assert clipper.total_norm.item() == pytest.approx(expected, rel=1e-12)
    assert measured == [4]


def _masked(g):
    g[:, ::2] = 0


def _replaced_behind_the_beginning(p):
    replacement = p.grad.clone()
    replacement.data[200:] *= 3.0  # of the same version
    p.grad = replacement


CHANGES = {
    "in place": lambda net: net[0].weight.grad.mul_(3.0),
    "in place, behind what is sampled": lambda net: _masked(net[0].weight.grad[200:]),
    "data": lambda net: net[0].weight.grad.data.mul_(3.0),
    "replaced": lambda net: setattr(net[0].weight, "grad", torch.ones(300, 6, dtype=torch.float64)),
    "replaced by one that begins alike": lambda net: _replaced_behind_the_beginning(net[0].weight),
    "unscaled": lambda net: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad for p in net.parameters()], torch.zeros(()), torch.full((), 0.25)
    ),
    "clipped": lambda net: clip_grad_norm_(net.parameters(), 0.5),
    "dropped": lambda net: setattr(net[2].bias, "grad", None),
    "zeroed": lambda net: net.zero_grad(set_to_none=False),
    "zeroed through data": lambda net: net[0].weight.grad.data.zero_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_gradient_that_changed_is_measured_again(name):
    net = _net()
    clipper = GradientClipper(torch.optim.SGD(net.parameters(), lr=0.1, fused=True), 1e9)
    _loss(net, 0).backward()
    CHANGES[name](net)
    expected = get_grad_norms(net.parameters()).norm().item()
    clipper.optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(expected, rel=1e-12)


def test_forget_has_everything_measured_anew():
    net = _net()
    clipper = GradientClipper(torch.optim.SGD(net.parameters(), lr=0.1), 1e9)
    _loss(net, 0).backward()
    clipper._hot._flush()
    net[0].weight.grad.data[290:] = 1.0  # nothing shows of this
    expected = get_grad_norms(net.parameters()).norm().item()
    clipper.forget()
    clipper.optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(expected, rel=1e-12)


def test_a_gradient_whose_beginning_is_zero_is_measured_again():
    """Of an embedding, say: the first elements cannot tell whether the rest has been scaled."""
    weight = nn.Parameter(torch.randn(4000))
    clipper = GradientClipper(torch.optim.SGD([weight], lr=0.1), 1e9)
    weight[2000:].sum().backward()
    clipper._hot._flush()
    weight.grad.data.mul_(2.0)
    clipper.optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(2 * math.sqrt(2000))


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("name", ["fused SGD", "SGD", "LBFGS"])
def test_closures(name, how):
    make = OPTIMISERS.get(name, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    net = _net()
    other = copy.deepcopy(net)
    optimizer, plain = make(net.parameters()), make(other.parameters())
    clipper = GradientClipper(optimizer, 2.0)
    evaluated = 0

    def closure():
        nonlocal evaluated
        evaluated += 1
        optimizer.zero_grad()
        loss = _loss(net, 0)
        loss.backward()
        return loss

    def clipping_closure():
        plain.zero_grad()
        loss = _loss(other, 0)
        loss.backward()
        clip_grad_norm_(other.parameters(), 2.0)
        return loss

    for _ in range(2):
        loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        torch.testing.assert_close(loss, plain.step(clipping_closure), rtol=1e-4, atol=1e-6)
        _assert_same(net, other)
    assert clipper.steps == evaluated
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_grad_scaler(name, unscale):
    """The norm that counts is that of the unscaled gradients, whoever unscales them; a skipped step counts no clip."""
    net = _net()
    other = copy.deepcopy(net)
    optimizer, plain = OPTIMISERS[name](net.parameters()), OPTIMISERS[name](other.parameters())
    clipper = GradientClipper(optimizer, 2.0)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    clipped = 0
    for step in range(4):
        for one, opt, scaler in ((net, optimizer, scalers[0]), (other, plain, scalers[1])):
            opt.zero_grad()
            scaler.scale(_loss(one, step)).backward()
            if step == 2:
                one[0].bias.grad[0] = math.inf
        if unscale:
            scalers[0].unscale_(optimizer)
        scalers[0].step(optimizer)
        scalers[1].unscale_(plain)
        norm = clip_grad_norm_(other.parameters(), 2.0)
        scalers[1].step(plain)
        for scaler in scalers:
            scaler.update()
        if step != 2:
            assert clipper.total_norm.item() == pytest.approx(norm.item(), rel=1e-5)
            clipped += norm.item() > 2
        _assert_same(net, other)
        assert not hasattr(optimizer, "grad_scale")
    assert 0 < clipped < 3
    assert clipper.clipped == clipped


def test_parameter_groups_that_are_added_later(monkeypatch):
    net = _net()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 1e9)
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.01})
    measured = _count_measured(monkeypatch)
    for expected in ([2], [2]):
        optimizer.zero_grad()
        _loss(net, 0).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()
        optimizer.step()
        assert clipper.total_norm.item() == pytest.approx(norm, rel=1e-12)
        assert measured == expected  # the first time only


def test_nothing_to_clip_and_nothing_at_all():
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 1e9)
    assert clipper.total_norm is None
    optimizer.step()
    assert clipper.total_norm.item() == 0
    _loss(net, 0).backward()
    gradients = [p.grad for p in net.parameters()]
    before, versions = bits(*gradients), [g._version for g in gradients]
    optimizer.step()
    assert bits(*gradients) == before
    assert [g._version for g in gradients] == versions
    assert clipper.clipped == 0


@pytest.mark.parametrize("name", ["fused SGD", "SGD"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_does_as_pytorch_has_it(name, bad):
    net = _net()
    other = copy.deepcopy(net)
    clipper = GradientClipper(OPTIMISERS[name](net.parameters()), 1.0)
    for one in (net, other):
        _loss(one, 0).backward()
        one[2].bias.grad[1] = bad
    clip_grad_norm_(other.parameters(), 1.0)
    clipper.optimizer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)
    assert clipper.clipped == 1


def test_a_factor_whose_inverse_float32_does_not_hold():
    weight = nn.Parameter(torch.zeros(50))
    clipper = GradientClipper(torch.optim.SGD([weight], lr=1.0, fused=True), 1e-10)
    weight.grad = torch.full((50,), 1e30)
    clipper.optimizer.step()
    assert weight.detach().double().norm().item() == pytest.approx(1e-10, rel=1e-5)


def test_a_step_that_raises_leaves_nothing_behind():
    net = _net()
    optimizer = OPTIMISERS["fused SGD"](net.parameters())
    clipper = GradientClipper(optimizer, 1e-3)
    _loss(net, 0).backward()
    net[0].weight.requires_grad_(False)
    handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step()
    handle.remove()
    expected = get_grad_norms(net.parameters()).norm().item()
    optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(expected)  # not divided by what was left
    assert not hasattr(optimizer, "grad_scale")


def test_close_takes_all_hooks_away():
    net = _net()
    optimizer = OPTIMISERS["fused SGD"](net.parameters())
    with GradientClipper(optimizer, 1e-6) as clipper:
        _loss(net, 0).backward()
        optimizer.step()
    assert clipper.clipped == 1
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    _loss(net, 0).backward()
    optimizer.step()
    assert max((p - b).abs().max().item() for p, b in zip(net.parameters(), before, strict=True)) > 1e-3
    assert clipper.steps == 1


def test_counts_are_checkpointed():
    net = _net()
    clipper = GradientClipper(OPTIMISERS["fused Adam"](net.parameters()), 0.5)
    for step in range(3):
        clipper.optimizer.zero_grad()
        _loss(net, step).backward()
        clipper.optimizer.step()
    state = clipper.state_dict()
    assert state == {"max_norm": 0.5, "steps": 3, "clipped": clipper.clipped}
    buffer = io.BytesIO()
    torch.save({"net": net, "clipper": state}, buffer)  # hooks on parameters do not travel
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert not any(p._post_accumulate_grad_hooks for p in loaded["net"].parameters())
    again = GradientClipper(OPTIMISERS["fused Adam"](loaded["net"].parameters()), 7.0)
    again.load_state_dict(loaded["clipper"])
    assert again.state_dict() == state
    _loss(loaded["net"], 0).backward()
    again.optimizer.step()
    assert (again.steps, again.clipped) == (4, state["clipped"] + 1)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_limits_are_checked(bad):
    net = _net()
    with pytest.raises(ValueError, match="max_norm"):
        GradientClipper(torch.optim.SGD(net.parameters()), bad)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    clipper = GradientClipper(torch.optim.SGD(net.parameters()), 1)
    with pytest.raises(ValueError, match="max_norm"):
        clipper.max_norm = bad
    assert clipper.max_norm == 1.0


def test_a_forced_backend_and_sparse_gradients():
    embedding = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        embedding(torch.tensor([3, 3, 7])).sum().backward()
        optimizer.step()
        assert clipper.total_norm.item() == pytest.approx(math.sqrt(4 * (2**2 + 1)))
    clipper.close()
    net = _net()
    clipper = GradientClipper(OPTIMISERS["fused SGD"](net.parameters()), 0.5)
    with vgkern.backends.use("reference"):
        _loss(net, 0).backward()
        clipper._hot._flush()
        assert not clipper._hot._known
        expected = get_grad_norms(net.parameters()).norm().item()
        clipper.optimizer.step()
    assert clipper.total_norm.item() == pytest.approx(expected)


# -- several processes -------------------------------------------------------------------------------------------------

_WORLD = 2
_STEPS = 3
_DDP = {
    "step": ({}, False),
    "bucket": ({}, True),
    "bucket views": ({"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3}, True),
    "static graph": ({"static_graph": True, "bucket_cap_mb": 1e-3}, True),  # which takes no no_sync at first
    "unused": ({"find_unused_parameters": True, "bucket_cap_mb": 1e-3}, True),
}


class _WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = _net(), nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


def _rank_loss(net, rank: int, step: int) -> torch.Tensor:
    return net(_data(10 * step + rank)).square().sum() * (1e-3 if step % 5 == 1 else 1)


def _ddp(rank: int) -> dict:
    results = {}
    for key, (options, bucket) in _DDP.items():
        net = _WithUnused() if key == "unused" else _net()
        ddp = DistributedDataParallel(net, **options)
        optimizer = OPTIMISERS["fused SGD"](net.parameters())
        clipper = GradientClipper(optimizer, 2.0)
        if bucket:
            clipper.register_comm_hook(ddp)
        measured, original = [], hot_norms.lists.measure

        def measure(gradients, *args, measured=measured, original=original):
            measured.append(len(gradients))
            return original(gradients, *args)

        hot_norms.lists.measure = measure
        norms = []
        for step in range(_STEPS):
            optimizer.zero_grad()
            with contextlib.nullcontext() if key == "static graph" else ddp.no_sync():
                _rank_loss(ddp, rank, step).backward()
            _rank_loss(ddp, rank, step + 5).backward()
            optimizer.step()
            norms.append(clipper.total_norm.item())
        hot_norms.lists.measure = original
        results[key] = {"state": net.state_dict(), "norms": norms, "measured": measured}
    return results


def _fsdp(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (_WORLD,))
    results = {}
    for key in ("clip", "clipper", "adaptive", "value"):
        net = _net()
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        clipper = GradientClipper(optimizer, 2.0) if key == "clipper" else None
        norms = []
        for step in range(_STEPS):
            optimizer.zero_grad()
            _rank_loss(net, rank, step).backward()
            norms.append(get_grad_norms(net.parameters()).norm().item())
            if key == "clip":
                total = clip_grad_norm_(net.parameters(), 2.0)
                assert isinstance(total, DTensor)
                norms[-1] = (norms[-1], total.full_tensor().item())
            if key == "adaptive":
                vgkern.gradients.adaptive_clip_grad_(net.parameters(), 0.02)
            if key == "value":
                vgkern.gradients.clip_grad_value_(net.parameters(), 0.05)
            optimizer.step()
            if clipper:
                norms[-1] = (norms[-1], clipper.total_norm.item())
        results[key] = {"state": {name: p.full_tensor() for name, p in net.named_parameters()}, "norms": norms}
    return results


def _work(rank: int) -> dict:
    return _ddp(rank) | _fsdp(rank)


def _alone(clip, steps: tuple[int, ...], **options) -> tuple[nn.Module, list[float]]:
    """One process on the mean of both ranks' gradients."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **options)
    norms = []
    for step in range(_STEPS):
        optimizer.zero_grad()
        for rank in range(_WORLD):
            for more in steps:
                (_rank_loss(net, rank, step + more) / _WORLD).backward()
        norms.append(get_grad_norms(net.parameters()).norm().item())
        clip(net.parameters())
        optimizer.step()
    return net, norms


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each rank ended with."""
    return world.run(_work, _WORLD, tmp_path_factory.mktemp("clipper"))


def _assert_state(state: dict, net: nn.Module) -> None:
    for name, p in net.named_parameters():
        got = state[name] if name in state else state[f"net.{name}"]
        torch.testing.assert_close(got, p.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("key", _DDP)
def test_distributed_data_parallel(trained, key):
    """Accumulation with no_sync: the norm is that of the reduced sum, and with a bucket hook nothing is read again."""
    net, norms = _alone(lambda p: clip_grad_norm_(p, 2.0), (0, 5), momentum=0.9)
    assert min(norms) < 2 < max(norms)
    for rank in trained:
        assert rank[key]["norms"] == pytest.approx(norms, rel=1e-5)
        assert rank[key]["measured"] == ([] if _DDP[key][1] else [4] * _STEPS)
        _assert_state(rank[key]["state"], net)


@pytest.mark.parametrize("key", ["clip", "clipper", "adaptive", "value"])
def test_fully_sharded(trained, key):
    clip = {
        "adaptive": lambda p: vgkern.gradients.adaptive_clip_grad_(p, 0.02),
        "value": lambda p: torch.nn.utils.clip_grad_value_(p, 0.05),
    }.get(key, lambda p: clip_grad_norm_(p, 2.0))
    net, norms = _alone(clip, (0,))
    for rank in trained:
        for got, expected in zip(rank[key]["norms"], norms, strict=True):
            assert got == pytest.approx((expected, expected) if key in ("clip", "clipper") else expected, rel=1e-5)
        _assert_state(rank[key]["state"], net)


def test_what_is_sampled_is_what_c_reads():
    assert cpu.sample_norms(cpu.read([torch.ones(5000)]), 1) == [math.sqrt(cpu.SAMPLED)]
