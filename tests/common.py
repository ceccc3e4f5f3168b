"""Shared by the test modules: layers by rank, the three operations by PyTorch itself, snapshots to the bit."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import vgkern

FUSED = {
    1: vgkern.nn.BatchNormAct1d,
    2: vgkern.nn.BatchNormAct2d,
    3: vgkern.nn.BatchNormAct3d,
}
PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
#: A small input for each of them; 7 channels and planes of 5 or 15 elements are no multiple of any vector.
SHAPES = {1: (4, 7, 5), 2: (4, 7, 3, 5), 3: (4, 7, 3, 5, 2)}

NAMES = vgkern.activations.names()
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The script examples/``name``.py as a module, which finds what is beside it as it does when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


class Plain(nn.Module):
    """What a fused layer replaces: ``act(batch_norm(x) + residual)`` by three modules of PyTorch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        dim = next(dim for dim, kind in FUSED.items() if isinstance(layer, kind))
        self.bn = PLAIN[dim](
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats,
            dtype=next((t.dtype for t in layer.parameters()), None),
        )  # fmt: skip
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "activation_weight"}
        self.bn.load_state_dict(state)
        self.act = torch_activation(layer.activation.name, layer.activation.keywords())
        if layer.activation_weight is not None:
            self.act.weight = nn.Parameter(layer.activation_weight.detach().clone())
        self.train(layer.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.bn(x)
        return self.act(z if residual is None else z + residual)


def torch_activation(name: str, keywords: dict | None = None) -> nn.Module:
    """The module of ``torch.nn`` that computes the activation."""
    return vgkern.activations.TABLE[name].module(**(keywords or {}))


def randomised(layer: nn.Module) -> nn.Module:
    """The layer with parameters and statistics that differ from channel to channel; signs of both kinds."""
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name == "running_var":
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_()
    return layer


def bits(*tensors: Tensor | None) -> list[bytes | None]:
    """The exact contents of tensors, NaN payloads and signs of zero included."""
    return [
        None if t is None else t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for t in tensors
    ]


def state_bits(layer: nn.Module) -> dict[str, bytes]:
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: bits(tensor)[0] for name, tensor in state.items()}


@contextlib.contextmanager
def unchanged(*things):
    """Asserts that modules and tensors hold the same bits after the block as before it."""

    def has_bits(thing) -> bool:
        return (
            type(thing) is Tensor
            and thing.layout is torch.strided
            and not (thing.is_nested or thing.is_quantized or thing.is_meta)
        )

    def snapshot():
        modules = [state_bits(thing) for thing in things if isinstance(thing, nn.Module)]
        return modules, [bits(thing) for thing in things if has_bits(thing)]

    before = snapshot()
    yield
    assert snapshot() == before
