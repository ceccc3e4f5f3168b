"""The examples on gradients, at reduced size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bounds_keep_a_net_trainable_whatever_the_loss_is_multiplied_by(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    example = _example("grad_norm_bounds")
    results = example.main(tmp_path / "a.png", depth=14, epochs=4)
    accuracy = {key: result["accuracy"] for key, result in results.items()}
    for factor in example.FACTORS:
        assert accuracy[factor, True] > 0.7, accuracy
        assert (accuracy[factor, False] > 0.7) == (factor == 1), accuracy
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_normalised_initialisation_keeps_the_gradient_and_the_usual_one_loses_it_as_published(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    example = _example("glorot_bengio_2010")
    results = example.main(tmp_path / "a.png", width=128, seeds=3)
    a_layer = {key: (norms[0] / norms[-1]) ** (1 / (len(norms) - 1)) for key, norms in results.items()}
    assert a_layer["tanh", "usual"] == pytest.approx(3**-0.5, abs=0.08)
    assert a_layer["tanh", "normalised"] == pytest.approx(1, abs=0.2)
    assert a_layer["sigmoid", "normalised"] < 0.3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
