"""``GradientMonitor``: its norms against autograd's, in every way of training, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
import world
from common import randomised
from test_grad_record import _FullSizeOperations
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vgkern
from vgkern.gradients import GradientMonitor, GradRecord
from vgkern.nn import AddAct, BatchNormAct2d


class _Net(nn.Module):
    """Two fused layers between convolutions, registered in another order than they are called."""

    def __init__(self, blocks_checkpointed: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.bn = BatchNormAct2d(4, activation="silu")
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.end = AddAct()
        self.checkpointed = blocks_checkpointed

    def body(self, x):
        x = self.bn(self.conv(x))
        return self.end(self.conv2(x), x)

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x.mean((2, 3)))


class _Plain(nn.Module):
    """Without fused layers; one ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(36, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def _net(kind=_Net, *args) -> nn.Module:
    torch.manual_seed(0)
    return randomised(kind(*args))


def _batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def _loss(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def _close(value: float):
    return pytest.approx(value, rel=1e-5, abs=0)


def _norm(*tensors: torch.Tensor) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _arriving(net: nn.Module, names: list[str], batches: list[torch.Tensor]) -> dict[str, float]:
    """Root mean square, over the batches, of the norm of the gradient that reaches each layer's output."""
    norms: dict[str, list[float]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(module, args, y, name=name):
            y.register_hook(lambda g: norms[name].append(_norm(g)))

        handles.append(net.get_submodule(name).register_forward_hook(keep))
    for x in batches:
        _loss(net(x)).backward()
    for handle in handles:
        handle.remove()
    return {name: math.sqrt(sum(v**2 for v in values) / len(values)) for name, values in norms.items()}


def _assert_parameters(records: list[GradRecord], net: nn.Module) -> None:
    """That the records hold the norms of what ``.grad`` holds."""
    for record in records:
        own = dict(net.get_submodule(record.layer).named_parameters(recurse=False))
        for name in ("weight", "bias"):
            if name in own:
                assert getattr(record, f"grad_{name}_norm") == _close(_norm(own[name].grad))
        if own:
            assert record.grad_norm == _close(_norm(*(p.grad for p in own.values())))
        else:
            assert math.isnan(record.grad_norm)


@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [("cpu", False), ("cpu", True), ("reference", False), ("triton", False)],
    indirect=["backend"],
)
def test_norms_are_autograds_over_four_micro_batches(backend, checkpointed):
    net = _net(_Net, checkpointed)
    batches = [_batch(i) for i in range(4)]
    expected = _arriving(_net(), ["bn", "end"], batches)
    with GradientMonitor(net) as monitor:
        for x in batches:
            _loss(net(x)).backward()
        monitor.step()
    records = {record.layer: record for record in monitor.records()}
    assert list(records) == ["conv", "bn", "conv2", "end", "head"]  # as they were called
    _assert_parameters(list(records.values()), net)
    for name, norm in expected.items():
        assert records[name].source == "kernel"
        assert records[name].backwards == 4
        assert records[name].grad_output_norm == _close(norm)
    assert records["conv"].source == "gradients"
    assert math.isnan(records["conv"].gain)


def test_compiled_whole_and_fullgraph():
    net = _net()
    monitor = GradientMonitor(net)
    torch._dynamo.utils.counters.clear()  # of tests before this one
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in (1, 2):
        expected = _arriving(_net(), ["bn", "end"], [_batch(step)])
        net.zero_grad()
        _loss(compiled(_batch(step))).backward()
        monitor.step()
        records = [record for record in monitor.records() if record.step == step]
        _assert_parameters(records, net)
        found = {record.layer: record.grad_output_norm for record in records if record.source == "kernel"}
        if step == 1:  # the running statistics have moved on since
            assert found == {name: _close(norm) for name, norm in expected.items()}
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert GradientMonitor(compiled).model is net


def test_a_plain_model_is_watched_by_hooks():
    net = _net(_Plain)
    names = [f"layers.{i}" for i in (0, 1, 2, 3, 4, 6)]
    expected = _arriving(_net(_Plain), names, [_batch(0)])
    monitor = GradientMonitor(net)
    assert monitor.hooked
    _loss(net(_batch(0))).backward()
    monitor.step()
    records = {record.layer: record for record in monitor.records()}
    assert list(records) == names
    _assert_parameters(list(records.values()), net)
    for name in names:
        assert records[name].source == "hooks"
        assert records[name].grad_output_norm == _close(expected[name])
    for before, name in itertools.pairwise(names):  # a chain: what one hands on arrives at the next
        assert records[name].grad_input_norm == _close(expected[before])
        assert records[name].gain == _close(expected[before] / expected[name])
    assert math.isnan(records["layers.0"].gain)  # the input of the net needs no gradient
    probe = _net(_Plain)
    z = probe.layers[1](probe.layers[0](_batch(0)))
    assert records["layers.2"].dead_fraction == _close((z <= 0).double().mean().item())
    assert math.isnan(records["layers.1"].dead_fraction)
    assert "hooks" in str(monitor.report())


def test_hooks_leave_gradients_copies_and_pickles_alone():
    plain, watched = _net(_Plain), _net(_Plain)
    monitor = GradientMonitor(watched)
    for net in (plain, watched, copy.deepcopy(watched), pickle.loads(pickle.dumps(watched))):
        _loss(net(_batch(0))).backward()
        for mine, wanted in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, wanted.grad)
    monitor.step()
    assert monitor.records()[0].backwards == 1  # of the copies nothing
    monitor.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert copy.deepcopy(_net()).bn.grad_stats() is None


def test_a_compiled_plain_model_is_known_by_its_parameters():
    net = _net(_Plain)
    monitor = GradientMonitor(net)
    _loss(torch.compile(net, fullgraph=True, backend="aot_eager")(_batch(0))).backward()
    monitor.step()
    _assert_parameters([record for record in monitor.records() if not math.isnan(record.grad_norm)], net)
    assert all(record.backwards == 0 for record in monitor.records())


class _HostReads(_FullSizeOperations):
    def __init__(self) -> None:
        super().__init__(10**9)


def test_a_step_reads_nothing_on_the_host():
    net = _net()
    monitor = GradientMonitor(net)
    for _ in range(2):
        _loss(net(_batch(0))).backward()
        with _HostReads() as reads:
            monitor.step()
        assert reads.seen == []


def test_the_ring_keeps_the_latest_rows_and_each_begins_anew():
    net = _net()
    monitor = GradientMonitor(net, capacity=3)
    expected = []
    for step in range(5):
        net.zero_grad()
        _loss((step + 1) * net(_batch(step))).backward()
        expected.append(net.bn.grad_stats().grad_output_norm)
        monitor.step()
        assert net.bn.grad_stats() is None
    found = [(r.step, r.grad_output_norm) for r in monitor.records() if r.layer == "bn"]
    assert found == [(step + 1, _close(expected[step])) for step in (2, 3, 4)]
    assert all(r.backwards == 1 for r in monitor.records() if r.layer == "bn")
    assert len(monitor) == 3
    halved = [r.grad_output_norm for r in monitor.records(unscale=2.0) if r.layer == "bn"]
    assert halved == [_close(norm / 2) for norm in expected[2:]]
    gains = [[r.gain for r in monitor.records(unscale) if r.layer == "bn"] for unscale in (1.0, 2.0)]
    assert gains[0] == gains[1]


def test_every_third_step_covers_the_passes_since():
    net = _net()
    monitor = GradientMonitor(net, every=3)
    for step in range(7):
        _loss(net(_batch(step))).backward()
        monitor.step()
    assert [(r.step, r.backwards) for r in monitor.records() if r.layer == "bn"] == [(3, 3), (6, 3)]


def test_missing_frozen_and_shared_parameters():
    net = _net()
    net.conv.requires_grad_(False)
    net.head.weight.grad = None
    monitor = GradientMonitor(net)
    y = net.body(_batch(0)).mean((2, 3)) @ torch.ones(4, 3) + net.head.bias
    _loss(y).backward()
    monitor.step()
    records = {r.layer: r for r in monitor.records()}
    assert "conv" not in records
    assert math.isnan(records["head"].grad_weight_norm)
    assert records["head"].grad_norm == records["head"].grad_bias_norm == _close(_norm(net.head.bias.grad))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    monitor = GradientMonitor(shared)
    shared(torch.randn(2, 4)).sum().backward()
    monitor.step()
    assert monitor.report().total_norm[1] == _close(_norm(*(p.grad for p in shared.parameters())))


def test_sparse_and_half_precision_gradients():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4, sparse=True)
            self.low = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.high = nn.Linear(4, 1, dtype=torch.float64)

        def forward(self, x):
            return self.high(self.low(self.embedding(x).bfloat16()).double())

    model = Model()
    monitor = GradientMonitor(model)
    model(torch.tensor([1, 1, 3])).sum().backward()
    monitor.step()
    records = {r.layer: r for r in monitor.records()}
    assert records["embedding"].grad_norm == _close(_norm(model.embedding.weight.grad.to_dense()))
    for name in ("low", "high"):
        assert records[name].grad_weight_norm == _close(_norm(model.get_submodule(name).weight.grad))


def test_a_loss_scale_is_divided_out():
    found = []
    for scale in (1.0, 1024.0):
        net = _net()
        monitor = GradientMonitor(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(_loss(net(_batch(0)))).backward()
        monitor.step()
        found.append(monitor.records(unscale=scale))
    for plain, scaled in zip(*found, strict=True):
        for name in ("grad_output_norm", "grad_input_norm", "grad_norm", "gain", "dead_fraction"):
            assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-5, nan_ok=True)


def test_refusals_and_warnings():
    net = _net()
    for arguments in ({"every": 0}, {"capacity": 0}, {"every": 1.5}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            GradientMonitor(net, **arguments)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        GradientMonitor(net.parameters())
    monitor = GradientMonitor(net)
    assert monitor.records() == []
    assert "Nothing was recorded" in str(monitor.report())
    assert not monitor.report().ok
    with pytest.raises(ValueError, match="unscale"):
        monitor.records(unscale=0.0)
    with pytest.warns(RuntimeWarning, match=r"before zero_grad\(\)") as caught:
        monitor.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()  # once is enough
    assert len(monitor) == 0
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()


# DistributedDataParallel ----------------------------------------------------------------------------------------------


def _train(rank: int) -> list[GradRecord]:
    ddp = DistributedDataParallel(_net())
    monitor = GradientMonitor(ddp)
    with ddp.no_sync():
        _loss(ddp(_batch(10 + rank))).backward()
    _loss(ddp(_batch(20 + rank))).backward()
    monitor.step()
    return monitor.records()


def test_two_ranks_report_what_arrived_locally_and_gradients_that_are_reduced(tmp_path):
    ranks = world.run(_train, 2, tmp_path)
    reduced = _net()
    expected = []
    for rank in range(2):
        alone = _net()
        expected.append(_arriving(alone, ["bn", "end"], [_batch(10 + rank), _batch(20 + rank)]))
        for p, mine in zip(reduced.parameters(), alone.parameters(), strict=True):
            p.grad = mine.grad / 2 if p.grad is None else p.grad + mine.grad / 2
    for rank, records in enumerate(ranks):
        _assert_parameters(records, reduced)
        found = {r.layer: r.grad_output_norm for r in records if r.source == "kernel"}
        assert found == {name: _close(norm) for name, norm in expected[rank].items()}
    assert expected[0] != expected[1]


@pytest.mark.gpu
def test_a_cuda_graph_is_recorded_after_its_replay():
    net = _net().cuda()
    monitor = GradientMonitor(net)
    x = _batch(0).cuda()
    for _ in range(3):  # on a side stream, as PyTorch's manual has it
        with torch.cuda.stream(torch.cuda.Stream()):
            _loss(net(x)).backward()
    torch.cuda.synchronize()
    monitor.step()
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        _loss(net(x)).backward()
        with pytest.raises(RuntimeError, match="replay"):
            monitor.step()
    for step in range(2):
        x.copy_(_batch(step))
        net.zero_grad(set_to_none=False)
        graph.replay()
        monitor.step()
    rows = [r for r in monitor.records() if r.layer == "bn"][-2:]
    assert [r.backwards for r in rows] == [1, 1]
    assert rows[0].grad_output_norm != rows[1].grad_output_norm


# What is read ---------------------------------------------------------------------------------------------------------


def _recorded(steps: int = 3) -> GradientMonitor:
    net = _net()
    monitor = GradientMonitor(net)
    for step in range(steps):
        net.zero_grad()
        _loss(net(_batch(step))).backward()
        monitor.step()
    return monitor


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = _recorded()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        monitor.write(writer, 7)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    last = {r.layer: r for r in monitor.records() if r.step == 3}
    for tag, wanted in {
        "gradients/gain/bn": last["bn"].gain,
        "gradients/dead_fraction/end": last["end"].dead_fraction,
        "gradients/grad_norm/conv": last["conv"].grad_norm,
        "gradients/total_norm": math.sqrt(sum(r.grad_norm**2 for r in last.values() if r.grad_norm == r.grad_norm)),
    }.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (7, _close(wanted))
    assert "gradients/gain/conv" not in events.Tags()["scalars"]
    assert "gradients/log10_grad_norm" in events.Tags()["histograms"]


def test_nothing_is_written_before_the_first_step():
    GradientMonitor(_net()).write(None, 0)


@pytest.mark.parametrize("dark", [False, True])
def test_the_figure_is_saved_and_has_its_panels(tmp_path, dark):
    pytest.importorskip("matplotlib")
    figure = _recorded().plot(tmp_path / "a.png", dark=dark)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    titles = [ax.get_title(loc="left") for ax in figure.subfigs[0].axes]
    wanted = ["Gradient norm against depth", "Gain of each layer", "Layer × step", "Dead units"]
    assert [title for title in titles if title] == wanted
    edges = {tuple(round(v, 6) for v in (ax.get_position().x0, ax.get_position().x1)) for ax in figure.subfigs[0].axes}
    assert len(edges) == 1  # the layers of all panels stand below each other


def test_the_figure_of_zeros_and_of_infinities(tmp_path):
    pytest.importorskip("matplotlib")
    net = _net()
    monitor = GradientMonitor(net)
    for factor in (0.0, math.inf):
        net.zero_grad()
        (factor * net(_batch(0)).sum()).backward()
        monitor.step()
    monitor.plot(tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing was recorded"):
        GradientMonitor(net).plot()


def test_the_version_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"vgkern\[monitor\]"):
        _recorded().plot()


def test_the_public_names():
    assert {"GradientMonitor", "GradRecord", "GradReport", "GradStats"} <= set(vgkern.gradients.__all__)
