"""What the callbacks for trainers share: a monitor that lives as long as the training."""

from __future__ import annotations

from typing import Any

from torch import nn

from .monitor import GradientMonitor
from .tensorboard import scalars

__all__ = ["MonitorCallback"]


class MonitorCallback:
    """Makes the monitor when training starts and takes its hooks off when it ends.

    Args:
        every, capacity: as :class:`~vgkern.gradients.GradientMonitor`.
    """

    def __init__(self, *, every: int = 1, capacity: int = 1000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.every, self.capacity = every, capacity
        self.monitor: GradientMonitor | None = None

    def _start(self, model: nn.Module) -> None:
        self._stop()
        self.monitor = GradientMonitor(model, every=self.every, capacity=self.capacity)

    def _stop(self) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def _summary(self) -> dict[str, float]:
        """The few numbers of the whole model; empty before the first row."""
        if self.monitor is None or not len(self.monitor):
            return {}
        whole = scalars(self.monitor.history(latest=True))
        return {tag: whole[tag] for tag in ("gradients/total_norm", "gradients/nonfinite") if tag in whole}
