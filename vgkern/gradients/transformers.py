"""A callback for the Trainer of Hugging Face's transformers: ``pip install 'vgkern[transformers]'``."""

from __future__ import annotations

from typing import Any

from .callbacks import MonitorCallback

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ModuleNotFoundError(
        "vgkern.gradients.transformers needs transformers: pip install 'vgkern[transformers]'"
    ) from error

__all__ = ["GradientMonitorCallback"]


class GradientMonitorCallback(MonitorCallback, TrainerCallback):
    """Watches the gradients of a model while ``transformers.Trainer`` trains it.

    A row is recorded before each optimiser step: after accumulation, after DDP's reduction, and after the Trainer's own
    clipping (``max_grad_norm``, 1.0 by default), so the parameters' norms are those that the optimiser sees. The
    Trainer's log history and what it prints get ``gradients/total_norm`` and ``gradients/nonfinite`` as well.

    Args:
        every, capacity: as :class:`~vgkern.gradients.GradientMonitor`.
        summary_writer: a TensorBoard ``SummaryWriter``, for all numbers of each layer.

    Attributes:
        monitor: the :class:`~vgkern.gradients.GradientMonitor`, None before training; it stays readable afterwards.

    Example::

        callback = vgkern.gradients.transformers.GradientMonitorCallback()
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        print(callback.monitor.report())
    """

    def __init__(self, *, every: int = 1, capacity: int = 1000, summary_writer: Any = None) -> None:
        super().__init__(every=every, capacity=capacity)
        self.summary_writer = summary_writer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._start(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.monitor is not None
        self.monitor.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.monitor is None or logs is None or not len(self.monitor) or "train_runtime" in logs:
            return
        summary = self._summary()
        logs.update(summary)  # what is printed
        state.log_history[-1].update(summary)  # a copy of logs, made before
        if self.summary_writer is not None and state.is_world_process_zero:
            self.monitor.write(self.summary_writer, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
