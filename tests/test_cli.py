"""The command line: what it prints where, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys

import pytest
import torch

import vgkern
from vgkern import backends, cli
from vgkern.verify import Case, CaseResult, VerifyReport


def vgkern_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vgkern", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_help_and_version_need_no_command():
    done = vgkern_command("--version")
    assert (done.returncode, done.stdout) == (0, f"vgkern {vgkern.__version__}\n")


@pytest.mark.parametrize("command", [[], ["info"], ["demo"], ["verify"], ["doctor"], ["tune"]])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: vgkern" in out
    assert "--help" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["info", "--colour"], ["demo", "--depth", "many"], ["verify", "--backend", "tpu"]],
)
def test_wrong_usage_exits_2_on_stderr(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err


# info


def test_info_says_what_is_here(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for text in (
        vgkern.__version__,
        torch.__version__,
        "cpu",
        "triton",
        "reference",
        "instruction set",
        "threads",
        "GPU",
    ):
        assert text in out
    for state in backends.available().values():
        assert state in out


def test_info_as_json(capsys, tmp_path):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backends"] == backends.available()
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["threads"] == torch.get_num_threads()
    if info["backends"]["cpu"] == "usable":
        assert info["cpu"]["isa"] in info["cpu"]["available_isas"]
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text()) == info
    assert capsys.readouterr().out == ""


def test_info_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(backends, "available", lambda: {"cpu": "not built", "triton": "no GPU", "reference": "usable"})
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "not built" in out
    assert "the cpu backend is not usable" in out


def test_a_file_that_cannot_be_written_exits_2(capsys, tmp_path):
    assert cli.main(["info", "--json", str(tmp_path / "missing" / "info.json")]) == 2
    assert "No such file" in capsys.readouterr().err


# verify


def test_verify_passes_and_prints_a_table(capsys):
    assert cli.main(["verify", "--backend", "reference", "--activation", "relu", "--activation", "tanh"]) == 0
    out = capsys.readouterr().out
    assert "relu" in out
    assert "tanh" in out
    assert "all passed" in out


def test_verify_as_json(capsys):
    assert cli.main(["verify", "--backend", "reference", "--activation", "relu", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is True
    assert "all passed" in captured.err


def test_a_failed_check_exits_1_with_the_line_that_reproduces_it(monkeypatch, capsys):
    failure = CaseResult("reference", Case("relu"), exception="ArithmeticError: made up")
    monkeypatch.setattr(sys.modules["vgkern.verify"], "verify", lambda *_, **__: VerifyReport((failure,)))
    assert cli.main(["verify"]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 FAILED" in captured.out
    assert "made up" in captured.err
    assert failure.reproduce in captured.err


@pytest.mark.parametrize("arguments", [["--activation", "rellu"], ["--backend", "triton"]])
def test_what_verify_cannot_run_exits_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr("vgkern.backends.triton.unavailable", lambda: "made up")
    assert cli.main(["verify", *arguments]) == 2
    assert ("did you mean 'relu'" if "rellu" in arguments else "made up") in capsys.readouterr().err


def test_the_bar_is_drawn_and_wiped(capsys):
    cli._bar(1, 2)
    cli._bar(2, 2)
    drawn = capsys.readouterr().err
    assert "1/2 cases" in drawn
    assert drawn.endswith("\r")


# demo


def test_the_demo_without_its_extra_names_the_command(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "scikit-learn" in err
    assert "pip install 'vgkern[demo]'" in err
    assert "matplotlib" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "51"], "50 or 56"),
        (["--epochs", "0"], "at least 1"),
        (["--device", "abacus"], "--device: 'abacus'"),
        (["--out", "figure.gif"], "a folder or a .png file"),
        (["--out", "blocked/figure.png"], "cannot create the folder"),
        (["--json", "folder"], "cannot write to folder"),
    ],
)
def test_the_demo_refuses_before_it_trains(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("vgkern.demo.command.run", lambda *_: pytest.fail("it trained"))
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("vgkern.demo.training._WARMUP_STEPS", 1)
    monkeypatch.setattr("vgkern.demo.training._TIMED_STEPS", 1)


@pytest.mark.usefixtures("quick")
def test_the_demo_writes_table_figure_numbers_and_conclusion(capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    arguments = ["demo", "--depth", "8", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert cli.main([*arguments, "--json", str(numbers)]) == 0
    captured = capsys.readouterr()
    assert "batch norm + residual" in captured.out
    assert "torch.nn" in captured.out
    assert "on its way back from layer 8 to layer 1" in captured.out
    assert captured.out.rstrip().endswith(".")
    assert "epoch 1/1" in captured.err  # no terminal: plain lines, and not among the results
    assert "\x1b" not in captured.err + captured.out
    figure = (tmp_path / "new" / "vgkern-demo.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 50_000
    raw = json.loads(numbers.read_text())
    assert len(raw["nets"]) == 4
    assert raw["conclusion"].startswith("Over the first epoch")


@pytest.mark.usefixtures("quick")
def test_the_demo_with_json_on_stdout_prints_nothing_else_there(capsys, tmp_path):
    arguments = ["demo", "--depth", "8", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "a.png"), "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["nets"]) == 4
    assert "on its way back" in captured.err
    assert (tmp_path / "a.png").stat().st_size > 50_000


def test_ctrl_c_reports_and_saves_what_was_trained(tmp_path):
    command = [sys.executable, "-m", "vgkern", "demo", "--depth", "8", "--epochs", "500", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), "--json", str(tmp_path / "n.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Ignored by what a shell starts with "&", and so by all that this starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if "epoch 1/" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "plain sigmoid" in out
    assert "The run was interrupted" in out
    assert (tmp_path / "vgkern-demo.png").stat().st_size > 50_000
    raw = json.loads((tmp_path / "n.json").read_text())
    assert raw["interrupted"] is True
    assert len(raw["nets"]) == 1


def test_ctrl_c_elsewhere_exits_130_without_a_traceback(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("vgkern.info.collect", stop)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "vgkern: interrupted\n"


def test_a_reader_that_stops_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "vgkern", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 141
