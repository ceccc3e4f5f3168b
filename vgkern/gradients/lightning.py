"""A callback for Lightning: ``pip install 'vgkern[lightning]'``."""

from __future__ import annotations

from typing import Any

from .callbacks import MonitorCallback

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ModuleNotFoundError(
            "vgkern.gradients.lightning needs Lightning: pip install 'vgkern[lightning]'"
        ) from error

__all__ = ["GradientMonitorCallback"]


class GradientMonitorCallback(MonitorCallback, Callback):
    """Watches the gradients of a ``LightningModule`` while it is trained.

    A row is recorded before each optimiser step, after accumulation over batches and after DDP's reduction. Every
    ``trainer.log_every_n_steps`` the latest goes to the logger: all numbers that the monitor writes to a
    ``TensorBoardLogger``, and the norm of all gradients to any other.

    Args:
        every, capacity: as :class:`~vgkern.gradients.GradientMonitor`.

    Attributes:
        monitor: the :class:`~vgkern.gradients.GradientMonitor`, None before training; it stays readable afterwards.

    Example::

        callback = vgkern.gradients.lightning.GradientMonitorCallback()
        pytorch_lightning.Trainer(callbacks=[callback]).fit(module, loader)
        print(callback.monitor.report())
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert self.monitor is not None
        self.monitor.step()
        if not trainer.is_global_zero or (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        for logger in trainer.loggers:
            experiment = logger.experiment
            if hasattr(experiment, "add_scalar") and hasattr(experiment, "add_histogram"):
                self.monitor.write(experiment, trainer.global_step)
            else:
                logger.log_metrics(self._summary(), trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()
