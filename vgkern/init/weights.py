"""``init_weights_``: every scheme is a recipe of ``torch.nn.init``, a gain, and what is done to residual branches."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..activations import ActivationSpec
from .gains import gain_of
from .structure import NORMS, WEIGHTED, Branch, Structure, read

__all__ = ["init_weights_"]

# Activations that flatten on both sides and were what Glorot & Bengio derived their variance for.
_SATURATING = {"tanh", "sigmoid", "hardsigmoid"}


def init_weights_(
    model: nn.Module,
    scheme: str = "auto",
    *,
    zero_init_residual: bool = True,
    sample: Tensor | Sequence[Any] | None = None,
) -> nn.Module:
    """Initialise every convolution and linear layer of a model in place; biases become 0, norms γ = 1 and β = 0.

    The activation that a layer's output goes to, through norms, sums and pooling, decides its gain (:func:`gain`). It
    is read through fused layers from the graph that ``torch.fx`` traces. A model that cannot be traced is read
    submodule by submodule, and where that does not tell, the next activation in the order of registration counts.

    Args:
        model: changed in place; parameters of other layers stay as they are.
        scheme: one of

            - ``"auto"``: before tanh, sigmoid and hardsigmoid ``"xavier_normal"``, else ``"kaiming_normal"``. A
              weight layer that ends a residual branch is divided by √L, L the number of branches, so that all of them
              together multiply the variance by a constant and not by 2^L (Radford et al. 2019, "Language Models
              are Unsupervised Multitask Learners", section 2.3).
            - ``"xavier_uniform"``, ``"xavier_normal"``: variance 2 / (fan_in + fan_out), for activations that are
              linear around 0 (Glorot & Bengio 2010).
            - ``"kaiming_uniform"``, ``"kaiming_normal"``: variance gain² / fan_in (He et al. 2015, arXiv 1502.01852).
            - ``"orthogonal"``: orthonormal rows or columns times the gain (Saxe et al. 2014, arXiv 1312.6120).
            - ``"lsuv"``: orthonormal, then divided so that each layer's output on ``sample`` has variance 1 (Mishkin &
              Matas 2016, arXiv 1511.06422). The one that holds for every activation and depth.
            - ``"fixup"``: for residual nets without normalisation (Zhang et al. 2019, arXiv 1901.09321): kaiming, in
              branches of m layers times L^(−1 / (2m − 2)), and 0 in the last layer of each branch and of the model.
              The paper's scalar multipliers and biases belong to the architecture and are not added.
        zero_init_residual: γ = 0 in the norm that ends a residual branch, so that each block starts as its shortcut
            (Goyal et al. 2017, arXiv 1706.02677).
        sample: for ``"lsuv"``, a batch of inputs: a tensor, or a sequence of the model's positional arguments. Running
            statistics are left as they were.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown scheme; ``sample`` missing, or given to another scheme; ``"fixup"`` on a model without
            residual branches or with a norm in one; a layer whose output on ``sample`` does not vary.

    Example:
        >>> import torch, vgkern
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
        >>> _ = vgkern.init.init_weights_(net, "lsuv", sample=torch.randn(256, 64))
        >>> round(net(torch.randn(4096, 64)).var().item())
        1

    Between layers without normalisation GELU, SiLU, Mish and hardswish keep a variance of 1, but not stably: what one
    layer is off by, the next enlarges by 8 to 22 %. In deep nets of that kind use ``"lsuv"``.
    """
    if scheme not in _SCHEMES:
        close = difflib.get_close_matches(str(scheme).lower(), _SCHEMES, n=1, cutoff=0.0)
        raise ValueError(f"scheme: unknown name {scheme!r}; did you mean {close[0]!r}? Known: {', '.join(_SCHEMES)}")
    if (sample is not None) != (scheme == "lsuv"):
        raise ValueError(f"sample: scheme 'lsuv' needs it and no other takes it; got scheme {scheme!r}, {sample=}")
    structure = read(model)
    if scheme == "fixup":
        _check_fixup(structure)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                _fill(module, "weight", nn.init.ones_)
                _fill(module, "bias", nn.init.zeros_)
        for layer, spec in structure.follows.items():
            _fill(layer, "weight", functools.partial(_SCHEMES[scheme], layer=layer, spec=spec))
            _fill(layer, "bias", nn.init.zeros_)
        if zero_init_residual:
            for branch in structure.branches:
                if isinstance(branch.end, NORMS):
                    _fill(branch.end, "weight", nn.init.zeros_)
        if scheme == "auto":
            _scale_by_depth(structure.branches)
        elif scheme == "fixup":
            _fix_up(structure)
        elif scheme == "lsuv":
            _unit_variance(model, sample)
    return model


def _fill(module: nn.Module, name: str, fill: Callable[[Tensor], Any]) -> None:
    """Fill a parameter, if there is one. What a parametrisation computes is given back to it."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    if nn.utils.parametrize.is_parametrized(module, name):
        filled = tensor.clone()
        fill(filled)
        setattr(module, name, filled)
    else:
        fill(tensor)


# Recipes: (weight, layer, spec) ---------------------------------------------------------------------------------------


def _xavier(fill: Callable[..., Tensor], weight: Tensor, layer: nn.Module, spec: ActivationSpec) -> None:
    fill(weight)


def _kaiming(fill: Callable[..., Tensor], weight: Tensor, layer: nn.Module, spec: ActivationSpec) -> None:
    gain, mode = gain_of(spec), "fan_in"
    if isinstance(layer, _ConvTransposeNd):
        # torch.nn.init reads fan_in off the wrong axis here: an output is a sum over in_channels / groups · kernel /
        # stride products.
        gain, mode = gain * math.sqrt(layer.groups * math.prod(layer.stride)), "fan_out"
    fill(weight, mode=mode, nonlinearity="linear").mul_(gain)


def _orthogonal(weight: Tensor, layer: nn.Module, spec: ActivationSpec) -> None:
    nn.init.orthogonal_(weight, gain_of(spec))


def _auto(weight: Tensor, layer: nn.Module, spec: ActivationSpec) -> None:
    _SCHEMES["xavier_normal" if spec.name in _SATURATING else "kaiming_normal"](weight, layer=layer, spec=spec)


def _orthonormal(weight: Tensor, layer: nn.Module, spec: ActivationSpec) -> None:
    nn.init.orthogonal_(weight)


_SCHEMES: dict[str, Callable[..., None]] = {
    "auto": _auto,
    "xavier_uniform": functools.partial(_xavier, nn.init.xavier_uniform_),
    "xavier_normal": functools.partial(_xavier, nn.init.xavier_normal_),
    "kaiming_uniform": functools.partial(_kaiming, nn.init.kaiming_uniform_),
    "kaiming_normal": functools.partial(_kaiming, nn.init.kaiming_normal_),
    "orthogonal": _orthogonal,
    "lsuv": _orthonormal,
    "fixup": functools.partial(_kaiming, nn.init.kaiming_normal_),
}


# Residual branches ----------------------------------------------------------------------------------------------------


def _scale(layer: nn.Module, factor: float) -> None:
    _fill(layer, "weight", lambda weight: weight.mul_(factor))


def _scale_by_depth(branches: list[Branch]) -> None:
    for branch in branches:
        if isinstance(branch.end, WEIGHTED):
            _scale(branch.end, len(branches) ** -0.5)


def _check_fixup(structure: Structure) -> None:
    if not structure.branches:
        raise ValueError("scheme: 'fixup' is for residual nets; no residual branch was found")
    if any(branch.normalised for branch in structure.branches):
        raise ValueError("scheme: 'fixup' is for residual nets without normalisation; use 'auto' for this one")


def _fix_up(structure: Structure) -> None:
    for branch in structure.branches:
        *inner, last = branch.layers
        for layer in inner:
            _scale(layer, len(structure.branches) ** (-1 / (2 * len(inner))))
        _fill(last, "weight", nn.init.zeros_)
    if structure.last is not None:
        _fill(structure.last, "weight", nn.init.zeros_)


# LSUV -----------------------------------------------------------------------------------------------------------------


def _unit_variance(model: nn.Module, sample: Tensor | Sequence[Any] | None) -> None:
    """One pass: each layer's output is divided by its standard deviation as soon as it is there, its weight too.

    The source repeats this per layer until the variance is within a tolerance; with biases of 0 a layer is linear, and
    once is enough.
    """
    names = {module: name for name, module in model.named_modules()}
    done: set[nn.Module] = set()

    def divide(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if layer in done:  # called twice: its first input counts
            return None
        done.add(layer)
        deviation = output.float().std().item()
        if not 0 < deviation < math.inf:
            raise ValueError(f"sample: the output of {names[layer]} has a standard deviation of {deviation} on it")
        _scale(layer, 1 / deviation)
        return output / deviation

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    handles = [layer.register_forward_hook(divide) for layer in names if isinstance(layer, WEIGHTED)]
    try:
        model(*([sample] if isinstance(sample, Tensor) else sample or ()))
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
