"""The callbacks under the real trainers, where these are installed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vgkern


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), vgkern.nn.BatchNormAct1d(8), nn.Linear(8, 3))


def _data(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=generator), torch.tensor(i % 3)) for i in range(count)]


def _assert_records(monitor, steps: int, backwards: int) -> None:
    rows = [record for record in monitor.records() if record.layer.endswith("1")]
    assert [record.step for record in rows] == list(range(1, steps + 1))
    assert {record.source for record in rows} == {"kernel"}
    assert {record.backwards for record in rows} == {backwards}
    assert all(record.grad_norm > 0 for record in rows)
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from vgkern.gradients.lightning import GradientMonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = GradientMonitorCallback()
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[callback],
        logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="csv")], log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(_data(16), batch_size=4))
    assert trainer.global_step == 4
    _assert_records(callback.monitor, steps=4, backwards=2)
    events = event_accumulator.EventAccumulator(trainer.loggers[0].log_dir)
    events.Reload()
    assert "gradients/gain/model.1" in events.Tags()["scalars"]
    assert len(events.Scalars("gradients/total_norm")) == 2
    trainer.loggers[1].save()
    assert "gradients/total_norm" in (Path(trainer.loggers[1].log_dir) / "metrics.csv").read_text()


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from vgkern.gradients.transformers import GradientMonitorCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def forward(self, x, labels):
            logits = self.model(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Writer:
        def __init__(self) -> None:
            self.tags = set()

        def add_scalar(self, tag, value, step):
            self.tags.add(tag)

        add_histogram = add_scalar

    callback = GradientMonitorCallback(summary_writer=Writer())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": x, "labels": label} for x, label in _data(32)]
    trainer = transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    _assert_records(callback.monitor, steps=3, backwards=2)
    logged = [entry["gradients/total_norm"] for entry in trainer.state.log_history if "gradients/total_norm" in entry]
    assert len(logged) == 3
    assert all(0 < value < math.inf for value in logged)
    assert "gradients/gain/model.1" in callback.summary_writer.tags


@pytest.mark.parametrize(
    ("module", "missing"),
    [("lightning", ("lightning", "pytorch_lightning")), ("transformers", ("transformers",))],
)
def test_without_the_trainer_the_extra_is_named(monkeypatch, module, missing):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] in missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"vgkern.gradients.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"vgkern\[{module}\]"):
        importlib.import_module(f"vgkern.gradients.{module}")
