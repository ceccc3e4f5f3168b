"""The examination: train for a few steps under a :class:`~vgkern.gradients.GradientMonitor` and report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import Finding, GradientMonitor, GradReport
from ..gradients.history import History

__all__ = ["Examination", "Patient", "examine"]

# Steps of at most this length: the state at the start is what is judged. Not 0: a branch that begins at zero must open.
_STEP_LENGTH = 1e-3


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        model: taken as it is if it is in training mode, else set to it.
        data: an input, an (input, target) pair, or an iterable of either, a batch a step; a single batch is used in
            each step.
        loss: of (output, target), or of (output,) where there is no target. By default cross-entropy for an output
            (N, C) with C ≥ 2 and a target of classes, else the mean square of the difference; without a target they
            are random, drawn once.
    """

    model: nn.Module
    data: Any
    loss: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Examination:
    """The result: what to print, and what to draw."""

    report: GradReport
    history: History


def examine(
    patient: Patient, *, steps: int = 5, device: str = "cpu", progress: Callable[[int, int], None] | None = None
) -> Examination:
    """Train for ``steps`` steps of plain SGD, each of a length of at most 0.001, and report what the gradients did.

    Args:
        patient: the model and its data.
        steps: at least 1.
        device: where model and data are moved.
        progress: called as ``progress(done, steps)`` after each step.

    Raises:
        ValueError: no step, or the data ends before the first.

    Example:
        >>> import torch
        >>> from vgkern.doctor import Patient, examine
        >>> layers = [m for _ in range(12) for m in (torch.nn.Linear(16, 16), torch.nn.Sigmoid())]
        >>> result = examine(Patient(torch.nn.Sequential(*layers), torch.randn(8, 16)))
        >>> [finding.kind for finding in result.report.findings]
        ['vanishing']
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    model = patient.model.to(device)
    if not model.training:
        model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient")
    optimizer = torch.optim.SGD(parameters, lr=_STEP_LENGTH)
    targets: dict[tuple[int, ...], Tensor] = {}
    done = 0
    with GradientMonitor(model, capacity=steps) as monitor, _first_nonfinite_output(model) as culprit:
        for inputs, target in itertools.islice(_batches(patient.data), steps):
            optimizer.zero_grad()
            output = model(*_moved(inputs, device))
            loss = _loss(patient, output, None if target is None else _moved([target], device)[0], targets)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise ValueError(f"loss: expected one number that depends on the parameters, got {_described(loss)}")
            loss.backward()
            monitor.step()
            if bool(nn.utils.clip_grad_norm_(parameters, 1.0).isfinite()):  # else the parameters would be NaN
                optimizer.step()
            done += 1
            if progress:
                progress(done, steps)
        if not done:
            raise ValueError("data: there is no batch in it")
        report = monitor.report()
        if culprit:
            report = _with_culprit(report, *culprit[0])
        return Examination(report, monitor.history())


def _batches(data: Any) -> Iterator[tuple[list[Any], Any]]:
    """([inputs of the model], target or None) for step after step."""
    if isinstance(data, Tensor) or (isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)):
        data = itertools.repeat(data)
    if not isinstance(data, Iterable):
        raise ValueError(f"data: expected a tensor, an (input, target) pair or an iterable of them, got {type(data)}")
    for batch in data:
        if isinstance(batch, (tuple, list)):
            if len(batch) != 2:
                raise ValueError(f"data: expected an input or an (input, target) pair, got {len(batch)} parts")
            yield [batch[0]], batch[1]
        else:
            yield [batch], None


def _moved(values: list[Any], device: str) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def _loss(patient: Patient, output: Any, target: Any, targets: dict[tuple[int, ...], Tensor]) -> Any:
    if patient.loss is not None:
        return patient.loss(output) if target is None else patient.loss(output, target)
    if isinstance(output, (tuple, list)):
        output = output[0]
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        raise ValueError(f"model: its output is {_described(output)}; give a loss for it, see --help")
    if target is None:
        shape = tuple(output.shape)
        if shape not in targets:
            targets[shape] = _random_target(output)
        target = targets[shape]
    if target.is_floating_point():
        return F.mse_loss(output.float(), target.float())
    return F.cross_entropy(output.float(), target)


def _random_target(output: Tensor) -> Tensor:
    if output.dim() == 2 and output.shape[1] >= 2:
        return torch.randint(output.shape[1], (len(output),), device=output.device)
    return torch.randn(output.shape, device=output.device)


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextlib.contextmanager
def _first_nonfinite_output(model: nn.Module) -> Iterator[list[tuple[str, int]]]:
    """Yields a list that gets (name, step) of the first module whose output is not finite though its inputs are."""
    found: list[tuple[str, int]] = []
    steps = itertools.count()
    step = [0]

    def count(module: nn.Module, args: Any) -> None:
        step[0] = next(steps) + 1

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _is_finite(output) and _is_finite(args):
                found.append((name, step[0]))

        return hook

    handles = [model.register_forward_pre_hook(count)]
    # Children before parents: what is inside finishes first, so the innermost module is the one that is named.
    handles += [
        module.register_forward_hook(look(name or type(module).__name__)) for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(values.detach().isfinite().all())
    return all(map(_is_finite, values)) if isinstance(values, (tuple, list)) else True


def _with_culprit(report: GradReport, layer: str, step: int) -> GradReport:
    """The report whose finding of inf and NaN names the layer that made it in the forward pass."""
    found = Finding(
        "nonfinite", layer,
        f"{layer} is the first in the forward pass to put out inf or NaN though its input is finite, in step {step}.",
        {"first_step": step, "pass": "forward"},
        (f"Look into {layer}: a parameter that is not finite, a logarithm, a root, a division, an overflow.",),
    )  # fmt: skip
    others = tuple(finding for finding in report.findings if finding.kind != "nonfinite")
    return dataclasses.replace(report, findings=(found, *others))
