"""DistributedDataParallel over two gloo processes: the record is the rank's own, the buffers are the first rank's."""

from __future__ import annotations

import copy

import pytest
import torch
import world
from common import randomised
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vgkern.gradients import GradStats
from vgkern.nn import AddAct, BatchNormAct2d

_WORLD = 2
_STEPS = 3


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = BatchNormAct2d(4, activation="prelu")
        self.end = AddAct(activation="silu")

    def forward(self, x):
        x = self.conv(x)
        return self.end(self.bn(x, x), x)


def _net() -> _Net:
    torch.manual_seed(0)
    return randomised(_Net())


def _data(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(10 * step + rank)) * (rank + 1)


#: What changes how DDP treats parameters and buffers.
_OPTIONS = {
    "defaults": {},
    "static graph": {"static_graph": True, "gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
}


def _train(rank: int) -> dict:
    results = {}
    for key, options in _OPTIONS.items():
        net = _net()
        if rank:  # the first rank's parameters and buffers must reach the others
            randomised(net)
        ddp = DistributedDataParallel(net, **options)
        optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(_STEPS):
            optimiser.zero_grad()
            ddp(_data(rank, step)).square().mean().backward()
            optimiser.step()
        results[key] = {
            "state": net.state_dict(),
            "stats": {name: getattr(net, name).grad_stats() for name in ("bn", "end")},
            "probe": (net.bn._probe.is_leaf, net.bn._probe.requires_grad),
        }
    return results


def _train_alone() -> tuple[list[dict[str, GradStats]], dict[str, torch.Tensor]]:
    """Both ranks in one process: replicas that share the mean of their gradients."""
    replicas = [_net() for _ in range(_WORLD)]
    for step in range(_STEPS):
        for rank, replica in enumerate(replicas):
            replica.load_state_dict(copy.deepcopy(replicas[0].state_dict()))
            replica.zero_grad()
            replica(_data(rank, step)).square().mean().backward()
        with torch.no_grad():
            for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
                mean = sum(p.grad for p in parameters) / _WORLD
                for parameter in parameters:
                    parameter -= 0.1 * mean
    stats = [{name: getattr(replica, name).grad_stats() for name in ("bn", "end")} for replica in replicas]
    return stats, replicas[0].state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each rank ended with, for every set of options."""
    return world.run(_train, _WORLD, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("options", _OPTIONS)
def test_distributed_data_parallel(trained, options):
    ranks = [results[options] for results in trained]
    stats, state = _train_alone()
    for name, tensor in state.items():
        torch.testing.assert_close(ranks[0]["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        if not name.startswith("bn.running"):  # those of the other ranks are overwritten at the next forward
            torch.testing.assert_close(ranks[1]["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for rank, expected in zip(ranks, stats, strict=True):
        assert rank["probe"] == (True, True)
        for layer, record in expected.items():
            assert rank["stats"][layer].backwards == _STEPS
            for field in GradStats.__dataclass_fields__:
                wanted = pytest.approx(getattr(record, field), rel=1e-4)
                assert getattr(rank["stats"][layer], field) == wanted, (layer, field)
    assert ranks[0]["stats"]["bn"].grad_output_norm != ranks[1]["stats"]["bn"].grad_output_norm


def test_averaged_models():
    """``AveragedModel`` copies a model and then writes into its buffers, those that are in no state dict included."""
    net = _net()
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    for step in range(2):
        net(_data(0, step)).sum().backward()
        averaged.update_parameters(net)
    averaged(_data(0, 2)).sum().backward()
    assert averaged.module.bn.grad_stats().backwards >= 1
    assert net.bn.grad_stats().backwards == 2
