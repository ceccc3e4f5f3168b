"""What PyTorch trains with, around a net of fused layers, gives the numbers of eager training.

``torch.compile`` and ``torch.export`` have test_compile.py; checkpoints, autocast's dtypes, accumulation and
``functional_call`` test_autograd.py; copies and pickles test_layers.py; SyncBatchNormAct by itself
test_sync_batch_norm.py.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import world
from common import Plain, randomised
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import vgkern
from vgkern.nn import AddAct, BatchNormAct1d, BatchNormAct2d, SyncBatchNormAct


class Net(nn.Module):
    """A residual block and a head."""

    def __init__(self, kind: type[nn.Module] = BatchNormAct2d) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1, self.bn2 = kind(4), kind(4, activation="prelu")
        self.end = AddAct(activation="silu")
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.end(self.bn2(self.conv2(x), x), x)
        return self.fc(x.mean((2, 3)))


def _net(kind: type[nn.Module] = BatchNormAct2d) -> Net:
    torch.manual_seed(5)
    return Net(kind)


def _data(step: int, samples: int = 4) -> torch.Tensor:
    return torch.randn(samples, 3, 6, 8, generator=torch.Generator().manual_seed(step))


def _optimiser(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def _train(net, call=None, steps=3, autocast=False, scaler=None, memory_format=torch.contiguous_format):
    """The losses of a few steps; ``call`` is the net as it is called."""
    optimiser, losses = _optimiser(net), []
    for step in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = (net if call is None else call)(_data(step).contiguous(memory_format=memory_format))
        loss = y.float().square().mean()
        losses.append(loss.item())
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimiser.step()
        else:
            scaler.step(optimiser)
            scaler.update()
    return losses


def _assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


# One process ----------------------------------------------------------------------------------------------------------


def _compile_first(rank: int) -> float:
    layer = BatchNormAct2d(3)
    step = torch.compile(lambda x: layer(x, x).sum(), fullgraph=True, backend="aot_eager")
    step(torch.randn(2, 3, 4, 4, requires_grad=True)).backward()
    return layer.grad_stats().backwards


def test_a_process_may_compile_before_it_has_run_anything(tmp_path):
    """What is computed once and kept must not be something at which tracing breaks."""
    assert world.run(_compile_first, 1, tmp_path) == [1.0]


def test_compiled_training_under_autocast():
    torch._dynamo.reset()
    net, eager = _net(), _net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert _train(net, compiled, autocast=True) == pytest.approx(_train(eager, autocast=True), rel=1e-5)
    _assert_same(net, eager)
    assert net.bn1.grad_stats().gain == pytest.approx(eager.bn1.grad_stats().gain, rel=1e-5)


def test_a_scaled_loss_trains_alike():
    net, eager = _net(), _net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert _train(net, scaler=scaler) == pytest.approx(_train(eager), rel=1e-5)
    _assert_same(net, eager)
    stats, expected = net.bn1.grad_stats(), eager.bn1.grad_stats()
    assert stats.grad_output_norm == pytest.approx(2**10 * expected.grad_output_norm, rel=1e-5)  # as it arrived
    assert stats.gain == pytest.approx(expected.gain, rel=1e-5)


def test_a_scale_that_overflows_skips_the_step_and_shows_in_the_record():
    net = _net()
    before = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    optimiser = _optimiser(net)
    scaler.scale(net(_data(0)).square().sum() * 100).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() < 3e38
    for ours, theirs in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert net.bn2.grad_stats().nonfinite > 0


def test_training_in_channels_last():
    net, eager = _net().to(memory_format=torch.channels_last), _net()
    formats = []
    net.end.register_forward_hook(lambda _, __, y: formats.append(y.is_contiguous(memory_format=torch.channels_last)))
    assert _train(net, memory_format=torch.channels_last) == pytest.approx(_train(eager), rel=1e-5)
    _assert_same(net, eager)
    assert formats == [True] * 3
    assert net.conv2.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_exponential_average_of_a_model():
    net = _net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    expected = None
    for step in range(3):
        _train(net, steps=1)
        averaged.update_parameters(net)
        state = {name: t.detach().clone() for name, t in net.state_dict().items() if t.is_floating_point()}
        expected = state if step == 0 else {name: 0.75 * expected[name] + 0.25 * t for name, t in state.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(averaged.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    averaged(_data(0)).sum().backward()
    assert averaged.module.bn1.grad_stats().backwards >= 1


@pytest.mark.parametrize("as_tuples", [True, False])
def test_update_bn_gives_the_statistics_that_torchs_gives_a_plain_net(as_tuples):
    layer = randomised(BatchNormAct2d(3, activation="relu", momentum=0.3))
    net = nn.Sequential(layer, nn.BatchNorm2d(3), nn.Dropout(0.0)).train()
    plain = nn.Sequential(Plain(layer), nn.BatchNorm2d(3))
    net[2].eval()
    loader = [(_data(step), step) if as_tuples else _data(step) for step in range(3)]
    torch.optim.swa_utils.update_bn(loader, plain)
    vgkern.update_bn(loader, net, device="cpu")
    for ours, theirs in ((net[0], plain[0].bn), (net[1], plain[1])):
        for name, tensor in theirs.named_buffers():
            torch.testing.assert_close(getattr(ours, name), tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert (layer.momentum, layer.training, net[2].training) == (0.3, True, False)
    assert layer.grad_stats() is None


def test_update_bn_leaves_momenta_and_modes_when_the_loader_fails():
    net = nn.Sequential(BatchNormAct2d(3)).eval()
    with pytest.raises(ValueError, match="4D"):
        vgkern.update_bn([torch.randn(4, 3)], net)
    assert (net[0].momentum, net[0].training) == (0.1, False)
    vgkern.update_bn([object()], nn.Sequential(nn.ReLU()))  # nothing to do: the loader is left alone


class _Transformed(Dataset):
    """A data set that runs a fused layer in the worker."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, i: int) -> torch.Tensor:
        return self.layer(_data(i)[0].reshape(3, 48).T.contiguous())


@pytest.mark.parametrize("start", ["fork", "forkserver"])  # inherited; pickled, as by spawn
def test_a_layer_in_data_loader_workers(start):
    layer = randomised(BatchNormAct1d(3, activation="silu")).eval()
    data = _Transformed(layer)
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=start)
    batches = torch.cat(list(loader))
    torch.testing.assert_close(batches, torch.stack([data[i] for i in range(4)]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:A model attribute .*_probe", "ignore:.*LeafSpec")
def test_an_exported_training_forward_updates_the_statistics():
    net, eager = _net(), _net()
    program = torch.export.export(net, (_data(0),)).module()
    for step in range(2):
        torch.testing.assert_close(program(_data(step)), eager(_data(step)), rtol=1e-5, atol=1e-6)
    expected = dict(eager.named_buffers())
    for name, buffer in program.named_buffers():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert dict(program.named_buffers())["bn1.num_batches_tracked"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A model attribute .*_probe", "ignore:.*LeafSpec")
def test_aot_inductor(tmp_path):
    """A package that is loaded where vgkern is imported: it calls the operators through the dispatcher."""
    _train(net := _net())
    net.eval()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(net, (_data(0),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for samples in (2, 5):
            x = _data(1, samples)
            torch.testing.assert_close(package(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_onnx_of_the_unfused_twin(tmp_path):
    """ONNX has no fused operator: what is exported are PyTorch's own, with the weights and statistics of training."""
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    _train(net := _net())
    net.eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(vgkern.unfuse(net), (_data(0),), dynamo=True, verbose=False).save(path)
    onnx.checker.check_model(path)
    model = reference.ReferenceEvaluator(str(path))
    (y,) = model.run(None, {model.input_names[0]: _data(1).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(_data(1)), rtol=1e-5, atol=1e-6)


# Two processes --------------------------------------------------------------------------------------------------------

_WORLD = 2


def _shard(net: Net) -> Net:
    for child in net.children():
        if list(child.parameters()):
            fully_shard(child)
    return fully_shard(net)


def _step(net, call, optimiser, step: int, rank: int | None, micro_batches: int = 1) -> None:
    """One step on a rank's half of a batch, or on all of it."""
    half = 8 // _WORLD
    x = _data(step, 8) if rank is None else _data(step, 8)[half * rank : half * (rank + 1)]
    optimiser.zero_grad()
    for i in range(micro_batches):
        last = i == micro_batches - 1
        if isinstance(call, DistributedDataParallel):
            call.require_backward_grad_sync = last  # what no_sync() sets
        call(x + i).square().mean().backward()
    optimiser.step()


def _fsdp_and_its_checkpoint(rank: int, folder: Path) -> dict:
    """Two steps, a checkpoint, a third step; and the third step of a net that was loaded from the checkpoint."""
    states = []
    net = _shard(_net(SyncBatchNormAct))
    optimiser = _optimiser(net)
    for step in range(2):
        _step(net, net, optimiser, step, rank)
    stats = net.bn1.grad_stats()
    model_state, optimiser_state = get_state_dict(net, optimiser)
    checkpoint.save({"model": model_state, "optimiser": optimiser_state}, checkpoint_id=folder / "checkpoint")

    torch.manual_seed(100)
    loaded = _shard(randomised(Net(SyncBatchNormAct)))
    loaded_optimiser = _optimiser(loaded)
    model_state, optimiser_state = get_state_dict(loaded, loaded_optimiser)
    state = {"model": model_state, "optimiser": optimiser_state}
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(
        loaded, loaded_optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"]
    )  # fmt: skip
    for one, its_optimiser in ((net, optimiser), (loaded, loaded_optimiser)):
        _step(one, one, its_optimiser, 2, rank)
        full = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in one.state_dict().items()}
        states.append(full)
    return {"states": states, "stats": stats}


def _accumulated_under_data_parallel(rank: int, folder: Path) -> dict:
    net = _net(SyncBatchNormAct)
    ddp, optimiser = DistributedDataParallel(net), _optimiser(net)
    for step in range(2):
        _step(net, ddp, optimiser, step, rank, micro_batches=2)
    return {"states": [net.state_dict()], "stats": net.bn1.grad_stats()}


def _compiled(rank: int, folder: Path) -> dict:
    """The collectives inside of one graph; gradients are averaged by hand."""
    net = _net(SyncBatchNormAct)
    compiled, optimiser = torch.compile(net, fullgraph=True, backend="aot_eager"), _optimiser(net)
    for step in range(2):
        optimiser.zero_grad()
        compiled(_data(step, 8)[4 * rank : 4 * (rank + 1)]).square().mean().backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
            parameter.grad /= _WORLD
        optimiser.step()
    return {"states": [net.state_dict()], "stats": net.bn1.grad_stats()}


_DISTRIBUTED = {
    function.__name__: (function, steps, micro_batches)
    for function, steps, micro_batches in (
        (_fsdp_and_its_checkpoint, 3, 1),
        (_accumulated_under_data_parallel, 2, 2),
        (_compiled, 2, 1),
    )
}


def _work(folder: Path, rank: int) -> dict:
    return {name: function(rank, folder) for name, (function, *_) in _DISTRIBUTED.items()}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """(folder, what each rank ended with)."""
    folder = tmp_path_factory.mktemp("world")
    return folder, world.run(functools.partial(_work, folder), _WORLD, folder)


@pytest.mark.parametrize("name", _DISTRIBUTED)
def test_two_processes_train_as_one(distributed, name):
    _, steps, micro_batches = _DISTRIBUTED[name]
    net = _net()
    optimiser = _optimiser(net)
    for step in range(steps):
        _step(net, net, optimiser, step, None, micro_batches)
    for results in distributed[1]:
        for state in results[name]["states"]:
            assert list(state) == list(net.state_dict())
            for key, tensor in net.state_dict().items():
                torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
        assert results[name]["stats"].backwards == 2 * micro_batches
    # Each rank's record is its own.
    assert len({results[name]["stats"].grad_output_norm for results in distributed[1]}) == _WORLD


def test_a_resumed_step_is_the_uninterrupted_one_to_the_bit(distributed):
    for results in distributed[1]:
        uninterrupted, resumed = results["_fsdp_and_its_checkpoint"]["states"]
        for name, tensor in uninterrupted.items():
            assert torch.equal(resumed[name], tensor), name


def test_a_distributed_checkpoint_loads_into_one_process(distributed):
    folder, _ = distributed
    net = randomised(_net())
    state = {"model": net.state_dict()}
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    net.load_state_dict(state["model"], strict=True)
    optimiser = _optimiser(expected := _net())
    for step in range(2):
        _step(expected, expected, optimiser, step, None)
    _assert_same(net, expected)
