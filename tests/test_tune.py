"""``vgkern tune`` with a timer that is not one: what it tries, chooses and prints."""

from __future__ import annotations

import pytest
import torch
from vgkern.kernels import batch_norm, tuning

import vgkern.cli
from vgkern import tune

pytestmark = pytest.mark.skipif(not batch_norm.INTERPRETED, reason="runs the kernels in the interpreter")

TINY = {"large": [(2, 3, 4, 4)], "small": [(2, 3, 2, 2)]}


def test_it_chooses_the_fastest_and_leaves_what_is_not_worth_it():
    """Forward and backward of every candidate; a table row takes the fastest if that is 2 % faster."""
    shown, calls = [], []
    table = dict(tuning.TABLE)
    wanted = {row: list(tuning.candidates(row)) for row in table if row[1] != "interpreted"}
    best = {row: candidates[3] for row, candidates in wanted.items() if row[0] == "planes"}

    def timed(call) -> float:
        if len(calls) < 8:  # a few are enough to see that they run
            call()
        (row,) = (row for row in wanted if tuning.TABLE[row] is not table[row]) if table != tuning.TABLE else (None,)
        calls.append(row)
        if row is None:
            return 1.0
        return 0.5 if tuning.TABLE[row] == best.get(row) else 0.99

    chosen = tune.tune("cpu", time=timed, shapes=TINY, progress=shown.append)
    assert table == tuning.TABLE
    assert list(chosen) == list(wanted)
    for row, limits in chosen.items():
        if row in best:
            assert limits.reason == "1.0000 ms in place of 2.0000 on cpu"
            assert tuning.replace(limits, reason="") == best[row]
        else:
            assert limits == table[row]  # 1 % faster is noise
    assert len(calls) == 2 * sum(map(len, wanted.values()))
    assert len(shown) == sum(map(len, wanted.values()))


def test_what_does_not_fit_the_gpu_is_left_out():
    from triton.runtime.errors import OutOfResources

    def timed(call) -> float:
        if table != tuning.TABLE:
            raise OutOfResources(300000, 200000, "shared memory")
        return 1.0

    table = dict(tuning.TABLE)
    shown = []
    chosen = tune.tune("cpu", time=timed, shapes=TINY, progress=shown.append)
    assert all(limits == table[row] for row, limits in chosen.items())
    assert sum("does not fit" in line for line in shown) == 15 * len(chosen)


def test_what_it_prints_is_the_table():
    rows = {row: limits for row, limits in tuning.TABLE.items() if row[1] != "interpreted"}
    names = {"TABLE": {}, "Limits": tuning.Limits}
    exec(tune.render(rows), names)
    assert names["TABLE"] == rows


def test_candidates_are_valid_cuts(monkeypatch):
    for row in [row for row in tuning.TABLE if row[1] != "interpreted"]:
        candidates = list(tuning.candidates(row))
        assert candidates[0] == tuning.TABLE[row]
        assert len(set(candidates)) == len(candidates) == 16
        for limits in candidates:
            monkeypatch.setitem(tuning.TABLE, row, limits)
            shape = {
                ("planes", "large"): (4096, 64, 3136), ("planes", "small"): (64, 8, 3136),
                ("rows", "large"): (2**17, 64, 64), ("rows", "small"): (4096, 64, 64),
            }[row[0], row[2]]  # fmt: skip
            blocks = tuning.choose(row[0] == "rows", row[1], *shape, 0)
            assert blocks.num_warps in (4, 8, 16)
            assert blocks.runs * blocks.inner == limits.elements


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert vgkern.cli.main(["tune"]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "message"), [("cuda", "TRITON_INTERPRET=1"), ("cpu", "got 'cpu'")])
def test_devices_that_are_refused(monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if device == "cpu":
        monkeypatch.setattr(batch_norm, "INTERPRETED", False)
    assert vgkern.cli.main(["tune", "--device", device]) == 2
    assert message in capsys.readouterr().err


def test_it_writes_to_a_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "check_device", lambda device: None)
    monkeypatch.setattr(tune, "tune", lambda device, progress: {("rows", "half", "small"): tuning.Limits(*range(1, 9))})
    assert vgkern.cli.main(["tune", "--out", str(tmp_path / "rows.py")]) == 0
    assert "Limits(1, 2, 3," in (tmp_path / "rows.py").read_text()
    assert vgkern.cli.main(["tune"]) == 0
    assert 'TABLE |= {\n    ("rows", "half", "small"): Limits(1,' in capsys.readouterr().out
