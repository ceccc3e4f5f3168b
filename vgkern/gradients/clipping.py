"""Clipping of gradients: by the norm of all, by value, and adaptively by the norm of each unit.

The first two have the signatures and the semantics of ``torch.nn.utils``. What differs is written in their docstrings.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import cpu
from . import lists, units

__all__ = ["adaptive_clip_grad_", "clip_grad_norm_", "clip_grad_value_", "get_grad_norms"]


@torch.no_grad()
def get_grad_norms(parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of each parameter's gradient: one read of each gradient, and no wait for the device.

    Args:
        parameters: T parameters, or one. A parameter without a gradient has norm 0.
        norm_type: p > 0 of the p-norm, or inf.

    Returns:
        (T,) float64, on the device of the first gradient. Of a sharded gradient (DTensor), the norm of the whole.

    Raises:
        ValueError: ``norm_type`` is not above 0.

    Example:
        >>> import torch, vgkern
        >>> net = torch.nn.Linear(3, 2)
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> vgkern.gradients.get_grad_norms(net.parameters(), norm_type=1)
        tensor([6., 2.], dtype=torch.float64)
    """
    norm_type = _positive("norm_type", norm_type)
    parameters = _listed(parameters)
    present = [(i, g) for i, p in enumerate(parameters) if (g := p.grad) is not None]
    if not present:
        return torch.zeros(len(parameters), dtype=torch.float64)
    norms = lists.measure([g for _, g in present], norm_type, math.inf).norms
    if len(present) == len(parameters):
        return norms
    every = [norms.new_zeros(())] * len(parameters)
    for (i, _), norm in zip(present, norms.unbind(), strict=True):
        every[i] = norm
    return torch.stack(every)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, norm being that of all of them together.

    :func:`torch.nn.utils.clip_grad_norm_`, except that

    * the norm is accumulated in float64 and returned as such: its relative error is below 1e-7 in every dtype, and
      finite gradients have a finite norm, and one of 0 only if they are 0;
    * the norm of what is clipped does not exceed ``max_norm`` by more than 1e-6 of it, in half precision either;
    * on the CPU a gradient that need not be scaled is not written, and on a GPU neither, which finds out by itself;
    * a gradient that is listed twice counts once;
    * a negative ``max_norm``, or NaN, is refused;
    * sparse gradients, and lists that mix DTensors of several meshes with ordinary tensors, work.

    One read of each gradient, and a read and a write where they are scaled.

    Args:
        parameters: parameters whose gradients are clipped, or one. Those without a gradient are passed over.
        max_norm: what the norm may be; 0 makes every gradient 0.
        norm_type: p of the p-norm, or inf.
        error_if_nonfinite: raise where the norm is inf or NaN, which waits for the device. Without it an infinite norm
            makes finite gradients 0, and NaN makes all of them NaN.
        foreach: accepted for compatibility; True raises on a device for which PyTorch has no foreach operations.

    Returns:
        The norm before clipping, float64 (), on the device of the first gradient; replicated on the mesh, as a DTensor,
        where all gradients are DTensors of one mesh.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set. No gradient has changed.

    Example:
        >>> import torch, vgkern
        >>> net = torch.nn.Linear(4, 1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> norm = vgkern.gradients.clip_grad_norm_(net.parameters(), max_norm=1.0)
        >>> round(norm.item(), 4), round(vgkern.gradients.get_grad_norms(net.parameters()).norm().item(), 4)
        (2.2361, 1.0)

    Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
    """
    max_norm = _not_negative("max_norm", max_norm)
    norm_type = float(norm_type)
    parameters = _listed(parameters)
    if not norm_type > 0 or torch.compiler.is_compiling():
        parameters, _ = lists.without_gradientless(parameters)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    plain = lists.plain_cpu_gradients(parameters)
    gradients = plain.gradients if plain else lists.without_gradientless(parameters)[1]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    if foreach:
        _check_foreach(gradients)
    if plain and plain.arrays.dense and backends.of(gradients[0]) is cpu:
        total, factor = cpu.clip_norm_(plain, norm_type, max_norm, error_if_nonfinite)
        if factor != 1:
            torch.autograd.graph.increment_version(gradients)
    else:
        total = lists.clip_norm_(gradients, norm_type, max_norm, error_if_nonfinite)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {norm_type} of all gradients is {total.item()}, which cannot be "
            "clipped; no gradient has changed. With error_if_nonfinite=False they are scaled all the same"
        )
    return _replicated(total, gradients)


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp every element of every gradient to [-clip_value, clip_value].

    :func:`torch.nn.utils.clip_grad_value_`, except that on the CPU a gradient that has nothing to clamp is not written,
    and that a negative ``clip_value``, or NaN, is refused. On the CPU one read of each gradient, and a read and a write
    of those that have something to clamp; elsewhere PyTorch's two passes.

    Args:
        parameters: parameters whose gradients are clipped, or one. Those without a gradient are passed over.
        clip_value: the largest magnitude that an element may have.
        foreach: as :func:`torch.nn.utils.clip_grad_value_`.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.

    Example:
        >>> import torch, vgkern
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.tensor([-2.0, 0.5, 3.0])
        >>> vgkern.gradients.clip_grad_value_(weight, 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    clip_value = _not_negative("clip_value", clip_value)
    parameters = _listed(parameters)
    plain = None if torch.compiler.is_compiling() else lists.plain_cpu_gradients(parameters)
    if plain is None:
        parameters, _ = lists.without_gradientless(parameters)
    else:
        parameters, gradients = plain.parameters, plain.gradients
        if gradients:
            largest = backends.of(gradients[0]).gradient_norms(gradients, math.inf)[0].tolist()
            parameters = [p for p, most in zip(parameters, largest, strict=True) if not most <= clip_value]
    if parameters:
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> None:
    """Scale each unit of a gradient down to ``clip_factor`` times the norm of that unit's parameters.

    A unit is what one output depends on: an index of the first axis of a parameter of rank 2 or more (a row of a linear
    layer, a filter of a convolution), and the whole of a parameter of lower rank. A unit whose gradient's norm exceeds
    ``clip_factor · max(norm of the parameters, eps)`` is scaled down to it; all others stay as they are, to the bit.

    The same units and bounds as timm's ``adaptive_clip_grad``. Norms are accumulated in float64: no finite one
    overflows or vanishes, and the gradient of a unit comes down to its bound from any height. A gradient in which
    nothing exceeds its bound is not written, on the CPU. Ordinary CPU tensors take one call for the whole list, and one
    read of each tensor; others take PyTorch's operations, parameter by parameter.

    Args:
        parameters: parameters whose gradients are clipped, or one. Those without a gradient are passed over. The paper
            leaves the last linear layer out.
        clip_factor: the ratio that the norms may have; the paper's λ.
        eps: what a parameter's norm counts as at least, so that a unit that begins at 0 can leave it.
        norm_type: p > 0 of the p-norm, or inf.

    Raises:
        ValueError: ``clip_factor`` or ``eps`` is negative or NaN, or ``norm_type`` is not above 0.

    Example:
        >>> import torch, vgkern
        >>> weight = torch.eye(2, requires_grad=True)
        >>> weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.001]])
        >>> vgkern.gradients.adaptive_clip_grad_(weight)
        >>> weight.grad
        tensor([[0.0060, 0.0080],
                [0.0000, 0.0010]])

    Brock, De, Smith and Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization",
    arXiv:2102.06171.
    """
    clip_factor, eps = _not_negative("clip_factor", clip_factor), _not_negative("eps", eps)
    norm_type = _positive("norm_type", norm_type)
    parameters = _listed(parameters)
    plain = lists.plain_cpu_gradients(parameters)
    if plain and plain.gradients and cpu.are_plain(plain.parameters):
        units.clip_plain_(plain.parameters, plain.gradients, clip_factor, eps, norm_type)
    else:
        units.clip_(*lists.without_gradientless(parameters), clip_factor, eps, norm_type)


def _listed(parameters: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    found = list(parameters)
    if not found and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator: no gradient is looked at.", stacklevel=4)
    return found


def _not_negative(name: str, value: float) -> float:
    number = float(value)
    if not number >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    return number


def _positive(name: str, value: float) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return number


def _check_foreach(gradients: Sequence[Tensor]) -> None:
    from torch.utils._foreach_utils import _device_has_foreach_support

    for device in {g.device for g in gradients}:
        if not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but PyTorch has no foreach operations on {device.type}")


def _replicated(total: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """As PyTorch returns it where it takes DTensors, so that ``.full_tensor()`` works."""
    if not all(map(lists.is_dtensor, gradients)):
        return total
    from torch.distributed.tensor import DTensor, Replicate

    meshes = {g.device_mesh for g in gradients}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        return total
    (mesh,) = meshes
    return DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)
