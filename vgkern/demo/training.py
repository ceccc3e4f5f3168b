"""Training of the four nets, one after the other, with everything the table and the figure need written down."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _version, backends, ops
from . import data
from .nets import NETS, DeepNet, NetSpec
from .results import Config, DemoResult, EpochResult, NetResult, StepSeconds

__all__ = ["Observer", "run"]

_WARMUP_STEPS = 3
_TIMED_STEPS = 15


class Observer:
    """What a run tells while it works; override what you want to hear. ``net`` is the result so far."""

    def net_started(self, spec: NetSpec) -> None:
        """First its steps are timed; training starts after that."""

    def training_started(self, spec: NetSpec) -> None: ...

    def step_done(self, spec: NetSpec, share: float) -> None:
        """``share``: which part of an epoch it was."""

    def epoch_done(self, spec: NetSpec, net: NetResult) -> None: ...

    def net_done(self, spec: NetSpec, net: NetResult) -> None: ...


def run(config: Config | None = None, observer: Observer | None = None) -> DemoResult:
    """Train the nets of the table and measure them.

    Ctrl-C ends the run early and loses nothing: the result then holds what was trained so far and says ``interrupted``.
    The global random state is left as it was.

    Example:
        >>> from vgkern.demo import Config, run
        >>> result = run(Config(depth=8, epochs=1, width=4))
        >>> [net.label for net in result.nets]
        ['plain sigmoid', 'plain ReLU', 'batch norm', 'batch norm + residual']
    """
    config, observer = config or Config(), observer or Observer()
    started = time.perf_counter()
    device = torch.device(config.device)
    digits = data.load(device)
    result = DemoResult(config, _environment(device), len(digits.train_images), len(digits.test_images))
    cuda_devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda_devices):
            for spec in NETS:
                _train(spec, config, digits, result, observer)
    except KeyboardInterrupt:
        result.interrupted = True
    result.seconds = time.perf_counter() - started
    return result


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "vgkern": _version.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": backends.name_of(device),
        "threads": torch.get_num_threads(),
    }


def _train(spec: NetSpec, config: Config, digits: data.Digits, result: DemoResult, observer: Observer) -> None:
    """Train one net and enter it in ``result`` as soon as its first step is done."""
    observer.net_started(spec)
    torch.manual_seed(config.seed)
    net = DeepNet(spec, config.depth, config.width).to(digits.train_images.device)
    report = NetResult(spec.key, spec.label, spec.residual, parameters=sum(p.numel() for p in net.parameters()))
    report.step_seconds = _time_steps(spec, config, net, digits)

    layers = net.weight_layers()
    optimizer = _optimizer(net, config)
    steps = len(digits.train_images) // config.batch_size  # whole batches: a short one has other statistics
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_cosine(steps, steps * config.epochs))
    batches = _batches(digits, config, steps)
    observer.training_started(spec)
    for epoch in range(config.epochs):
        net.train()
        for layer in net.recording_layers():
            layer.reset_grad_stats()
        losses: list[Tensor] = []  # stay on the device: one transfer an epoch
        norms: list[Tensor] = []
        try:
            for _ in range(steps):
                losses.append(_step(net, optimizer, *next(batches)))
                norms.append(_grad_norms(layers))
                schedule.step()
                observer.step_done(spec, 1 / steps)
        finally:  # an interrupted epoch counts as far as it came
            if norms:
                report.epochs.append(_close_epoch(net, digits, losses[: len(norms)], norms))
                if epoch == 0:
                    result.nets.append(report)
        observer.epoch_done(spec, report)
        if report.diverged:
            break
    observer.net_done(spec, report)


def _optimizer(net: DeepNet, config: Config) -> torch.optim.SGD:
    return torch.optim.SGD(
        net.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def _warmup_then_cosine(warmup: int, total: int):
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def _batches(digits: data.Digits, config: Config, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end, in the same order for every net."""
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = digits.train_images, digits.train_labels
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for chosen in order.split(config.batch_size)[:steps]:
            yield images[chosen], labels[chosen]


def _step(net: DeepNet, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _grad_norms(layers: list[Any]) -> Tensor:
    """(depth,) norms in float64: in float32 the squares of a gradient of 1e-25 underflow."""
    dtype = ops.statistics_dtype(layers[0].weight.device)
    return torch.stack([torch.linalg.vector_norm(layer.weight.grad, dtype=dtype) for layer in layers])


@torch.no_grad()
def _close_epoch(net: DeepNet, digits: data.Digits, losses: list[Tensor], norms: list[Tensor]) -> EpochResult:
    stats = [layer.grad_stats() for layer in net.recording_layers()]
    net.eval()
    scores = net(digits.test_images)
    probabilities = torch.tensor([0.1, 0.5, 0.9], dtype=norms[0].dtype, device=norms[0].device)
    low, median, high = torch.stack(norms).quantile(probabilities, dim=0).tolist()
    return EpochResult(
        steps=len(norms),
        train_loss=torch.stack(losses).mean().item(),
        test_loss=F.cross_entropy(scores, digits.test_labels).item(),
        test_accuracy=(scores.argmax(1) == digits.test_labels).sum().item() / len(scores),
        grad_norm=median,
        grad_norm_low=low,
        grad_norm_high=high,
        gain=[s.gain for s in stats],
        dead=[s.dead_fraction for s in stats],
    )


def _time_steps(spec: NetSpec, config: Config, net: DeepNet, digits: data.Digits) -> StepSeconds:
    """Time the net's training step against that of its twin of ``torch.nn`` layers, on copies and on one batch.

    The two take turns, and which goes first alternates, so that whatever else the machine does meets both alike.
    """
    device = digits.train_images.device
    batch = digits.train_images[: config.batch_size], digits.train_labels[: config.batch_size]
    contenders: dict[str, list[float]] = {"fused": [], "torch": []}
    steps = {}
    for name in contenders:
        twin = DeepNet(spec, config.depth, config.width, plain_torch=name == "torch").to(device)
        twin.load_state_dict(net.state_dict())
        steps[name] = (twin, _optimizer(twin, config), *batch)
    for repeat in range(_WARMUP_STEPS + _TIMED_STEPS):
        for name in sorted(contenders, reverse=repeat % 2 == 1):
            _synchronize(device)
            begin = time.perf_counter()
            _step(*steps[name])
            _synchronize(device)
            if repeat >= _WARMUP_STEPS:
                contenders[name].append(time.perf_counter() - begin)
    return StepSeconds(**{name: statistics.median(seconds) for name, seconds in contenders.items()})


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
