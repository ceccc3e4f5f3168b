"""``examples/train.py``: a run killed at a random step ends with the bits of one that was not; options, data, ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import world
from common import EXAMPLES, bits
from common import example as load_example

import vgkern

SCRIPT = EXAMPLES / "train.py"
#: Seconds at most for a few epochs of a tiny net, on a machine that does much else.
PATIENCE = 120
TINY = ("--depth", "8", "--width", "4", "--batch-size", "256")
EPOCHS = 12
STEPS = EPOCHS * (1347 // 256)


@pytest.fixture(scope="module")
def example():
    return load_example("train")


@pytest.fixture
def run(example, tmp_path, capsys):
    """Runs the script in this process: (exit status, standard output); its folder is OUT."""

    def run(*arguments: str) -> tuple[int, str]:
        status = example.main([*TINY, "--epochs", "2", "--out", str(tmp_path / "out"), *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


def _child(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(load_example("train").main(arguments))


def _start(out: Path, *arguments: str, environment: dict[str, str] | None = None) -> multiprocessing.Process:
    given = [*TINY, "--epochs", str(EPOCHS), "--out", str(out), "--seed", "5", *arguments]
    process = world.FORKS.Process(target=_child, args=(given, str(out) + ".log", environment or {}))
    process.start()
    return process


def _finish(process: multiprocessing.Process, out: Path) -> None:
    process.join(PATIENCE)
    assert process.exitcode == 0, Path(str(out) + ".log").read_text()


def _state(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def _step(out: Path) -> int:
    return _state(out)["step"] if (out / "checkpoint.pt").exists() else 0


def _random(state: dict, rank: int = 0) -> list[bytes | None]:
    return bits(*state["processes"][rank]["random"])


def _kill_somewhere(process: multiprocessing.Process, out: Path, after: int, moment: random.Random) -> None:
    """SIGKILL at a random moment, after the checkpoint of step ``after``."""
    end = time.monotonic() + PATIENCE
    while process.is_alive() and _step(out) < after and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(moment.uniform(0, 0.05))
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode == -9, "it ended before it was killed"


#: Everything that draws random numbers in training: dropped blocks. And everything that is kept besides the weights.
_KILLED = ("--stochastic-depth", "0.5", "--clip", "1", "--monitor")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    _finish(_start(out, *_KILLED), out)
    return out


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_killed_and_resumed_is_the_same_to_the_bit(killed, uninterrupted, tmp_path):
    """Three runs; each is killed twice, once while its steps are between the checkpoints of epochs."""
    moment = random.Random(killed)
    out = tmp_path / "out"
    arguments = (*_KILLED, "--save-every", "3", "--resume")
    seen = []
    for after in sorted(moment.sample(range(3, STEPS // 2), 2)):
        process = _start(out, *arguments)
        _kill_somewhere(process, out, after, moment)
        seen.append(_step(out))
    assert after <= seen[-1] < STEPS
    _finish(_start(out, *arguments), out)
    assert f"resumed at step {seen[-1]} of {STEPS}" in Path(str(out) + ".log").read_text()

    expected, state = _state(uninterrupted), _state(out)
    assert state["step"] == expected["step"] == STEPS
    assert list(state["model"]) == list(expected["model"])
    assert bits(*state["model"].values()) == bits(*expected["model"].values())
    assert state["history"] == expected["history"]  # the loss curve, and the gradients' record
    assert len(state["history"]) == EPOCHS
    momentum, right = (
        [entry["momentum_buffer"] for entry in s["optimizer"]["state"].values()] for s in (state, expected)
    )
    assert bits(*momentum) == bits(*right)
    assert _random(state) == _random(expected)


def test_a_half_written_checkpoint_is_never_the_checkpoint(example, run, tmp_path, monkeypatch):
    run()
    path = tmp_path / "out" / "checkpoint.pt"
    before = path.read_bytes()

    def stop(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(SystemExit):
        run("--epochs", "3", "--resume", "--out", tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoint.pt").exists()
    assert path.read_bytes() == before


def test_it_learns_and_writes_what_it_says(run, tmp_path):
    status, printed = run("--epochs", "8", "--json", tmp_path / "run.json", "--monitor")
    assert status == 0
    lines = printed.splitlines()
    assert len(lines) == 9
    assert "epoch 8" in lines[7]
    assert "dead_most" in lines[7]
    assert "test accuracy" in lines[8]
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["options"]["depth"] == 8
    assert [row["epoch"] for row in summary["history"]] == list(range(1, 9))
    assert summary["history"][-1]["train_loss"] < 0.7 * summary["history"][0]["train_loss"]
    assert summary["test_accuracy"] > 0.5
    assert 0 < summary["history"][0]["dead_most"] < 1
    net = vgkern.models.cifar_resnet(8, in_channels=1, width=4)
    assert summary["parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_plain_trains_the_same_net(run, tmp_path):
    """Twenty steps in: rounding has grown, and a wrong twin would be far away."""
    rows = {}
    for kind in ("fused", "plain"):
        run(f"--{kind}", "--monitor", "--lr", "0.02", "--json", tmp_path / f"{kind}.json", "--out", tmp_path / kind)
        rows[kind] = json.loads((tmp_path / f"{kind}.json").read_text())["history"]
    for fused, plain in zip(rows["fused"], rows["plain"], strict=True):
        assert fused == pytest.approx(plain, rel=2e-2)  # the monitor's numbers are of one step
        assert fused["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


@pytest.mark.parametrize("arguments", [("--amp",), ("--amp", "--plain", "--clip", "0.5")])
def test_mixed_precision_on_the_cpu(example, run, tmp_path, arguments, monkeypatch):
    seen = []
    forward = vgkern.models.ResNet.forward
    monkeypatch.setattr(vgkern.models.ResNet, "forward", lambda self, x: seen.append(y := forward(self, x)) or y)
    status, _ = run(*arguments)
    assert status == 0
    assert {y.dtype for y in seen if isinstance(y, torch.Tensor)} == {torch.bfloat16}
    assert all(value.dtype is not torch.bfloat16 for value in _state(tmp_path / "out")["model"].values())


def test_tensorboard_gets_each_epochs_row(example, run, tmp_path, monkeypatch):
    written = []

    class Writer:
        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    started = []
    monkeypatch.setattr(example, "_writer", lambda out, step: started.append((out, step)) or Writer())
    run("--json", tmp_path / "run.json")
    history = json.loads((tmp_path / "run.json").read_text())["history"]
    rows = [(name, value, 5 * row["epoch"]) for row in history for name, value in row.items()]
    assert written == [*rows, "closed"]
    assert started == [(tmp_path / "out", 0)]


def test_the_files_of_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    run()
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_an_interrupted_run_says_how_to_go_on(example, run, tmp_path, monkeypatch):
    step, taken = example.Training.train_step, []

    def interrupted(self):
        if len(taken) == 7:
            raise KeyboardInterrupt
        taken.append(step(self))

    monkeypatch.setattr(example.Training, "train_step", interrupted)
    assert run()[0] == 130
    assert _step(tmp_path / "out") == 5
    monkeypatch.undo()
    status, printed = run("--resume")
    assert status == 0
    assert "resumed at step 5 of 10" in printed


def test_clipping_holds_the_norm(example, run, monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def spy(self, *arguments):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run("--clip", "0.1", "--epochs", "1")
    assert len(norms) == 5
    assert max(norms) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in vgkern.models.__all__ if name != "ResNet"])
def test_every_model_is_offered(example, name):
    args = example.parser().parse_args(["--model", name, "--zero-init-residual", "--grad-norm-bounds", "0", "1"])
    with torch.device("meta"):
        net = example.make_model(args, 3)
    assert net(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert net.bn1.grad_norm_bounds == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depth", "21"), "nearest to 21: 20 or 26"),
        (("--batch-size", "5000"), "--batch-size: expected"),
        (("--epochs", "0"), "--epochs: expected at least 1"),
        (("--data", "nowhere"), "No such file or directory: 'nowhere/data_batch_1'"),
        (("--activation", "rleu"), "invalid choice: 'rleu'"),
        (("--no-shortcut", "--stochastic-depth", "0.5"), "drop_path"),
        (("--plain", "--grad-norm-bounds", "0", "1"), "grad_norm_bounds: only fused layers"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_not_mixed_with_another(run, tmp_path, capsys):
    run()
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    for arguments, message in {
        (): "is there already: --resume goes on with it",
        ("--resume", "--lr", "0.5"): "other options: lr (0.1, now 0.5)",
        ("--resume", "--plain"): "fused (True, now False)",
    }.items():
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    assert run("--resume")[0] == 0  # nothing is left to do, and it says how it ended


def test_a_loss_that_is_no_number_stops_the_run(run):
    assert run("--lr", "1e30")[0] == 1


def test_help_names_every_option(example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--plain", "--fused", "--resume", "--amp", "--clip", "torchrun"):
        assert option in shown


# CIFAR-10 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path):
    """A folder as CIFAR-10's python version unpacks, with few images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = rng.integers(0, 10, 40)
        data = (rng.integers(0, 128, (40, 3072)) + labels[:, None] * 12).astype(np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": data, b"labels": labels.tolist(), b"batch_label": b"made up"}, file, protocol=2)
    return folder


def test_cifar(run, example, cifar, tmp_path):
    data = example.load_data(str(cifar))
    assert data.train_images.shape == (200, 3, 32, 32)
    assert data.test_labels.shape == (40,)
    std, mean = torch.std_mean(data.train_images, (0, 2, 3))
    torch.testing.assert_close((mean, std), (torch.zeros(3), torch.ones(3)), atol=1e-4, rtol=1e-4)
    with (cifar / "data_batch_2").open("rb") as file:
        raw = pickle.load(file, encoding="bytes")
    pixels = torch.from_numpy(raw[b"data"]).reshape(40, 3, 32, 32)  # channels, rows, columns, as its authors say
    assert torch.corrcoef(torch.stack([pixels.flatten().float(), data.train_images[40:80].flatten()]))[0, 1] > 0.9999
    assert run("--data", cifar, "--batch-size", "50", "--epochs", "1")[0] == 0


def test_augmentation_crops_and_mirrors(example):
    images = torch.arange(1.0, 3 * 32 * 32 + 1).reshape(1, 3, 32, 32).expand(400, -1, -1, -1)
    crops = example.augment(images)
    margin = torch.nn.functional.pad(images[0], (4,) * 4)
    seen = set()
    for crop in crops:
        places = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(crop.flip(2) if mirrored else crop, margin[:, top : top + 32, left : left + 32])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for *_, mirrored in seen} == {False, True}


# Several processes ----------------------------------------------------------------------------------------------------


def test_processes_share_out_each_batch(example):
    data = example.load_data("digits")

    def batch(rank, size):
        args = SimpleNamespace(seed=3, batch_size=64)
        where = example.World(rank, size, torch.device("cpu"))
        return example.Training.batch(SimpleNamespace(step=25, steps_per_epoch=21, args=args, data=data, where=where))

    images, labels = batch(0, 1)
    assert images.shape == (64, 1, 8, 8)
    shares = [batch(rank, 4) for rank in range(4)]
    assert torch.equal(torch.stack([share for share, _ in shares], 1).flatten(0, 1), images)
    assert torch.equal(torch.stack([share for _, share in shares], 1).flatten(), labels)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """What the next test does with torchrun's variables, by torchrun itself, whose processes take 10 s to start."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), *TINY,
        "--epochs", "1", "--stochastic-depth", "0.5", "--clip", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch") == 1  # the first process alone prints
    state = _state(tmp_path / "out")
    assert state["options"]["processes"] == 2
    assert _random(state, 0) != _random(state, 1)  # each drops blocks of its own


def _ranks(out: Path, *arguments: str) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [_start(out, *arguments, environment=environment | {"RANK": str(rank)}) for rank in range(2)]


def test_two_processes_killed_and_resumed_are_the_same_to_the_bit(tmp_path):
    arguments = ("--epochs", "4", "--stochastic-depth", "0.5", "--save-every", "3", "--resume")
    whole, out = tmp_path / "whole", tmp_path / "out"
    for process in _ranks(whole, *arguments):
        _finish(process, whole)
    first, second = _ranks(out, *arguments)
    _kill_somewhere(first, out, 7, random.Random(4))
    second.kill()
    second.join(PATIENCE)
    stopped_at = _step(out)
    assert 7 <= stopped_at < 4 * STEPS // EPOCHS
    for process in _ranks(out, *arguments):
        _finish(process, out)
    assert f"resumed at step {stopped_at}" in Path(str(out) + ".log").read_text()
    expected, state = _state(whole), _state(out)
    assert bits(*state["model"].values()) == bits(*expected["model"].values())
    assert state["history"] == expected["history"]
