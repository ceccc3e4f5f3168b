"""The benchmark's own code: it must not fail, or flatter, on the day it is needed."""

from __future__ import annotations

import csv

import pytest
import torch

import vgkern
from benchmarks.__main__ import main
from benchmarks.micro import Configuration
from benchmarks.timing import Timing, interleave


def test_rows_describe_themselves(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.csv"
    arguments = ["micro", "--shape", "2,3,4,5", "--rounds", "3", "--activation", "relu", "gelu", "--csv", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert main() == 0
    rows = list(csv.DictReader(path.open()))
    assert [(row["activation"], row["pass"]) for row in rows] == [
        ("relu", "forward"),
        ("relu", "backward"),
        ("gelu", "forward"),
        ("gelu", "backward"),
    ]
    for row in rows:
        assert row["shape"] == "2x3x4x5"
        assert row["torch"] == torch.__version__
        assert float(row["vgkern_q1_ms"]) <= float(row["vgkern_ms"]) <= float(row["vgkern_q3_ms"])
    assert "geometric mean" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    plain = vgkern.backends.reference.batch_norm_act_forward

    def wrong(*args):
        y, statistics, mask = plain(*args)
        return y + 1e-3, statistics, mask

    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_forward", wrong)
    monkeypatch.setattr("sys.argv", ["benchmarks", "micro", "--shape", "2,3,4,5", "--rounds", "2"])
    with vgkern.backends.use("reference"):
        assert main() == 1
    captured = capsys.readouterr()
    assert "is wrong and is not timed" in captured.err
    assert "forward" not in captured.out


def test_eager_computes_the_same_function():
    configuration = Configuration((2, 3, 4, 5), "float64", "channels_last", "leaky_relu", True, True, "cpu")
    torch.testing.assert_close(configuration.fused(), configuration.eager())


def test_variants_run_in_turn_and_warmup_is_not_counted():
    calls = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert len(timings["a"].seconds) == 3


def test_speedup_is_taken_round_by_round():
    fast, slow = Timing((1.0, 10.0, 2.0)), Timing((2.0, 20.0, 4.0))
    assert fast.speedup_over(slow) == 2.0
    assert fast.median == 2.0
    with pytest.raises(ValueError, match="zip"):
        fast.speedup_over(Timing((1.0,)))
