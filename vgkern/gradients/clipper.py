"""Clipping that is part of the optimiser's step: see :class:`GradientClipper`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from .. import ops
from . import lists
from .hot_norms import HotNorms

__all__ = ["GradientClipper"]

#: Optimisers whose fused step divides the gradients by a tensor, ``grad_scale``, as it reads them.
_FUSED = (SGD, Adam, AdamW, Adagrad)
#: Factors whose inverse float32 holds, which is what ``grad_scale`` is.
_SMALLEST_FACTOR = 1 / torch.finfo(torch.float32).max


class GradientClipper:
    """Clips by the norm of all gradients whenever the optimiser steps.

    ``optimizer.step()`` sees gradients scaled by ``min(1, max_norm / (norm + 1e-6))``, norm being the L2 norm of all
    gradients of the optimiser together: what :func:`vgkern.gradients.clip_grad_norm_` before each step would give,
    without its passes over memory:

    * on the CPU norms are taken as the backward pass produces the gradients, while these are in the cache. On other
      devices they are taken at once when the optimiser steps, in one read of each gradient;
    * fused optimisers (``SGD``, ``Adam``, ``AdamW``, ``Adagrad`` with ``fused=True``) divide by the factor's inverse as
      they read the gradients. With any other optimiser the gradients are scaled in place before the step, where the
      factor is not 1.

    The training loop stays as it is; gradient accumulation, closures, learning-rate schedulers, ``GradScaler`` and
    parameter groups that are added later work. Under ``GradScaler`` the norm that counts is that of the unscaled
    gradients. After a step ``parameter.grad`` holds the clipped gradient. The host waits for no device.

    A gradient that was changed after the backward pass is measured again (see :mod:`vgkern.gradients.hot_norms` for
    how that is noticed). Whoever writes through ``.data`` or from outside of PyTorch into a part of a gradient only,
    beyond its first 1024 elements, calls :meth:`forget` afterwards.

    With DistributedDataParallel everything works as well, but the norms take one read of the gradients at the step,
    since a gradient is reduced after it was produced; :meth:`register_comm_hook` has them taken of each bucket when it
    has been reduced. With FSDP2 the norm is that of the whole, sharded, gradients.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        max_norm: what the norm may be. Can be changed between steps.

    Attributes:
        total_norm: the norm at the last step, before clipping; float64 () on the gradients' device. None before the
            first.
        steps: how many times a norm was taken; with a closure, once for each time that it was evaluated.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    Example:
        >>> import torch, vgkern
        >>> net = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
        >>> clipper = vgkern.gradients.GradientClipper(optimizer, max_norm=1.0)
        >>> net(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> round(clipper.total_norm.item(), 2), clipper.clipped
        (17.89, 1)

    Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.steps = 0
        self.total_norm: Tensor | None = None
        self._clipped: Tensor | None = None
        self._clipped_before = 0  # of a state that was loaded
        self._lent: tuple[Any, ...] | None = None
        self._hot = HotNorms()
        self._hot.watch(self._parameters())
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def max_norm(self) -> float:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        number = float(value)
        if not number >= 0:
            raise ValueError(f"max_norm: expected a number of at least 0, got {value}")
        self._max_norm = number

    @property
    def clipped(self) -> int:
        """How often gradients were scaled, steps that ``GradScaler`` skipped left out. Waits for the device."""
        return self._clipped_before + (0 if self._clipped is None else int(self._clipped))

    def register_comm_hook(
        self,
        model: torch.nn.parallel.DistributedDataParallel,
        state: Any = None,
        hook: Callable[[Any, Any], torch.futures.Future] | None = None,
    ) -> None:
        """Have the norms taken of each of DistributedDataParallel's buckets when it has been reduced, on the CPU.

        Args:
            model: the wrapped model, before its first backward pass. It takes one communication hook in its life.
            state, hook: a communication hook of your own, as for ``model.register_comm_hook``, to run first; by
                default gradients are averaged as without a hook.
        """
        if hook is None:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            state, hook = model.process_group, allreduce_hook
        model.register_comm_hook(state, self._hot.measuring(hook))

    def forget(self) -> None:
        """Have all gradients measured anew at the next step."""
        self._hot.forget()

    def close(self) -> None:
        """Take all hooks away: the optimiser steps as if there had been no clipper. The counts stay."""
        for handle in self._handles:
            handle.remove()
        self._hot.close()
        self._give_back()

    def __enter__(self) -> GradientClipper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, float]:
        """``max_norm`` and the counts, as numbers. Waits for the device."""
        return {"max_norm": self.max_norm, "steps": self.steps, "clipped": self.clipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.max_norm = state["max_norm"]
        self.steps, self._clipped_before, self._clipped = int(state["steps"]), int(state["clipped"]), None

    # -- the step ------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if given is None:
            self._clip()
            return None

        def closure() -> Any:
            self._give_back()
            loss = given()
            self._clip()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        self._give_back()
        self._hot.forget()

    @torch.no_grad()
    def _clip(self) -> None:
        self._give_back()
        every = self._parameters()
        self._hot.watch(every)
        self.steps += 1
        plain = lists.plain_cpu_gradients(every)
        parameters, gradients = plain[:2] if plain else lists.without_gradientless(every)
        if not gradients:
            self.total_norm = torch.zeros((), dtype=torch.float64)
            return
        _, total, factor = self._hot.measure(parameters, gradients, self.max_norm, plain and plain.arrays)
        scale = getattr(self.optimizer, "grad_scale", None)  # GradScaler's: the gradients are that many times too large
        if scale is not None:
            total = total / scale.to(total)
            factor = ops.clip_factor(total, self.max_norm)
        self.total_norm = total.clone()
        self._count(factor)
        if factor.is_cpu and factor.item() == 1:
            return
        if self._steps_fused() and (plain or all(map(lists.is_plain, gradients))):
            self._lend(gradients, factor, scale)
        else:
            lists.scale_(gradients, factor)

    def _count(self, factor: Tensor) -> None:
        changed = ~(factor >= 1)  # NaN changes the gradients, too
        skipped = getattr(self.optimizer, "found_inf", None)
        if skipped is not None:
            changed = changed & (skipped.to(changed.device) == 0)
        if self._clipped is None:
            self._clipped = torch.zeros((), dtype=torch.int64, device=factor.device)
        self._clipped += changed.to(self._clipped.device)

    def _steps_fused(self) -> bool:
        return type(self.optimizer) in _FUSED and all(group.get("fused") for group in self.optimizer.param_groups)

    def _lend(self, gradients: list[Tensor], factor: Tensor, scale: Tensor | None) -> None:
        """Give the optimiser what to divide by, until the step is over."""
        # What float32 cannot hold the inverse of scales the gradients themselves.
        too_small = (factor > 0) & (factor < _SMALLEST_FACTOR * (1 if scale is None else scale.to(factor)))
        if not too_small.is_cpu or too_small:
            lists.scale_(gradients, torch.where(too_small, factor, 1.0))
            factor = torch.where(too_small, 1.0, factor)
        inverse = (1.0 if scale is None else scale.to(factor)) / factor
        ours = inverse.to(torch.float32)
        self._lent = (ours, "grad_scale" in self.optimizer.__dict__, scale)
        self.optimizer.grad_scale = ours  # type: ignore[attr-defined]

    def _give_back(self) -> None:
        if self._lent is None:
            return
        ours, was_there, before = self._lent
        self._lent = None
        if getattr(self.optimizer, "grad_scale", None) is not ours:
            return  # a step that raised, and after it somebody else's
        if was_there:
            self.optimizer.grad_scale = before  # type: ignore[attr-defined]
        else:
            del self.optimizer.grad_scale  # type: ignore[attr-defined]
