"""What a run of the demo measured. Everything that is printed or drawn comes from a :class:`DemoResult` alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..models.resnet import check_depth
from ..text import jsonable
from .nets import NETS

__all__ = ["EARLY_EPOCHS", "Config", "DemoResult", "EpochResult", "NetResult", "StepSeconds"]

#: Over how many epochs, from the start, the gradient is judged. Later a net that learns has little gradient left in any
#: layer, and a net whose units have died has none.
EARLY_EPOCHS = 5


@dataclass(frozen=True)
class Config:
    """A run's settings, the same for every net.

    Optimiser, batch size, learning rate and weight decay are those of He et al. 2016 (arXiv 1512.03385) for CIFAR:
    stochastic gradient descent with momentum. The learning rate rises linearly over the first epoch and falls to zero
    as a half cosine (Loshchilov & Hutter 2017, arXiv 1608.03983).

    Raises:
        ValueError: a depth that is not 6n + 2, or less than one epoch.
    """

    depth: int = 50
    epochs: int = 40
    seed: int = 0
    device: str = "cpu"
    width: int = 16
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")


@dataclass(frozen=True)
class StepSeconds:
    """Median seconds of a training step, fused and of ``torch.nn`` layers, in steps that took turns."""

    fused: float
    torch: float

    @property
    def speedup(self) -> float:
        return self.torch / self.fused


@dataclass(frozen=True)
class EpochResult:
    """One epoch of one net.

    Attributes:
        steps: training steps in it; fewer than the others' where the epoch was interrupted.
        train_loss: mean over the steps. test_loss, test_accuracy: after the last step.
        grad_norm: for each weight layer, input first, the L2 norm of its weight's gradient, median over the steps.
        grad_norm_low, grad_norm_high: 10th and 90th percentile over the steps.
        gain: for each activation layer what its ``grad_stats()`` says: ‖dx‖ / ‖dy‖; NaN where both are 0.
        dead: for each activation layer the share of elements with φ'(z) = 0.
    """

    steps: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    grad_norm: list[float]
    grad_norm_low: list[float]
    grad_norm_high: list[float]
    gain: list[float]
    dead: list[float]

    @property
    def ratio(self) -> float:
        """First over last layer of ``grad_norm``; 0 where the first underflowed, NaN where there is no gradient."""
        return _ratio(self.grad_norm[0], self.grad_norm[-1])


@dataclass
class NetResult:
    """One net: its row of ``NETS``, and what became of it."""

    key: str
    label: str
    residual: bool
    parameters: int
    step_seconds: StepSeconds | None = None
    epochs: list[EpochResult] = field(default_factory=list)

    def early(self, name: str) -> list[float]:
        """Median over the early epochs of a list of :class:`EpochResult`, layer by layer."""
        epochs = [getattr(epoch, name) for epoch in self.epochs[:EARLY_EPOCHS]]
        return [_median(layer) for layer in zip(*epochs, strict=True)]

    @property
    def first_norm(self) -> float:
        """Gradient norm of the first weight layer, median over the early epochs."""
        return self.early("grad_norm")[0]

    @property
    def last_norm(self) -> float:
        """Gradient norm of the last weight layer, median over the early epochs."""
        return self.early("grad_norm")[-1]

    @property
    def ratio(self) -> float:
        """``first_norm / last_norm``; 0 where the first underflowed, NaN where there was no gradient at all."""
        return _ratio(self.first_norm, self.last_norm)

    @property
    def imbalance(self) -> float:
        """By how many powers of ten first and last layer differ: |log10 ratio|; inf for an underflow."""
        if math.isnan(self.ratio):
            return math.nan
        return abs(math.log10(self.ratio)) if self.ratio else math.inf

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.epochs[-1].test_accuracy

    @property
    def loss(self) -> float:
        """Test loss after the last epoch."""
        return self.epochs[-1].test_loss

    @property
    def dead_fraction(self) -> float:
        """Share of elements with φ'(z) = 0 in the last epoch, mean over the layers."""
        dead = self.epochs[-1].dead
        return sum(dead) / len(dead)

    @property
    def diverged(self) -> bool:
        """The loss became infinite or NaN; training of this net ended there."""
        return not math.isfinite(self.epochs[-1].train_loss)

    def summary(self) -> dict[str, Any]:
        """The numbers of the table."""
        return {
            "test_accuracy": self.accuracy,
            "test_loss": self.loss,
            "first_layer_grad_norm": self.first_norm,
            "last_layer_grad_norm": self.last_norm,
            "first_to_last_ratio": self.ratio,
            "dead_fraction": self.dead_fraction,
            "step_seconds_fused": self.step_seconds.fused if self.step_seconds else None,
            "step_seconds_torch": self.step_seconds.torch if self.step_seconds else None,
            "diverged": self.diverged,
        }


@dataclass
class DemoResult:
    """A run: its settings, where it ran, and one :class:`NetResult` for each net that finished at least one step.

    Attributes:
        environment: versions, device, backend and threads.
        seconds: wall time.
        interrupted: Ctrl-C ended it.
    """

    config: Config
    environment: dict[str, Any]
    train_images: int
    test_images: int
    nets: list[NetResult] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def early_epochs(self) -> int:
        """How many epochs the gradient is judged over."""
        return min(EARLY_EPOCHS, max((len(net.epochs) for net in self.nets), default=0))

    @property
    def complete(self) -> bool:
        return not self.interrupted and len(self.nets) == len(NETS)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it: infinity and NaN become null; each net gets its ``summary``."""
        raw = asdict(self)
        for net, plain in zip(self.nets, raw["nets"], strict=True):
            plain["summary"] = net.summary()
        return jsonable(raw)


def _ratio(first: float, last: float) -> float:
    return first / last if last else math.nan


def _median(values: Sequence[float]) -> float:
    """Of the values that are no NaN; NaN where there is none."""
    return statistics.median([v for v in values if not math.isnan(v)] or [math.nan])
