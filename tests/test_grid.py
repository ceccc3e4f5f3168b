"""The numerical grid, which is what ``vgkern verify --full`` runs, on every backend; and the engine itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vgkern
from vgkern import testing
from vgkern.verify import Case, cases


@pytest.mark.parametrize("activation", vgkern.activations.names())
def test_grid(backend, activation):
    # The interpreter takes a second for what a kernel does in a microsecond: the full grid there is marked slow.
    full = backend != "triton" or torch.cuda.is_available()
    failures = [case for case in cases([activation], full=full) if not all(row.ok for row in case.check(backend))]
    assert not failures, f"{len(failures)} cases fail; the first: {_explain(failures[0], backend)}"


@pytest.mark.slow
@pytest.mark.parametrize("activation", vgkern.activations.names())
def test_full_grid_in_the_interpreter(activation):
    for case in cases([activation], full=True):
        case.assert_passes("triton")


@pytest.mark.parametrize("shape", [(129, 70), (40, 2, 33, 31)], ids=str)
@pytest.mark.parametrize("layer", ["batch_norm_act", "double_batch_norm_act"])
def test_nothing_is_lost_where_terms_of_z_are_opposite(backend, layer, shape):
    """x̂·γ is large and cancels with bias and residual: what was rounded off either before would show in φ'(z).

    Of the many elements of the second shape, some show what x less a mean that is no neighbour of it has lost.
    """
    Case("tanh", training=False, shape=shape, layer=layer).assert_passes(backend)


def _explain(case: Case, backend: str) -> str:
    return f"{case}\n{testing.format_rows(case.check(backend))}"


def test_the_judge_agrees_with_autograd_of_torch_in_float64():
    """The oracle is written from the definition; PyTorch's own float64 ops must find no fault with it."""
    for case in cases(vgkern.activations.names(), full=False):
        if case.dtype != "float64" or case.activation == "hardsigmoid":  # whose 1/6 is float32 in PyTorch's backward
            continue
        for row in case.check("reference"):
            assert row.torch_error <= 1e-11, (case, row)


def _halve_gradient(name: str):
    """A backend whose backward returns half of one gradient."""
    index = ("dx", "dresidual", "dweight", "dbias", "dactivation_weight").index(name)
    plain = vgkern.backends.reference.batch_norm_act_backward

    def broken(*args):
        results = list(plain(*args))
        results[index] = results[index] / 2
        return tuple(results)

    return broken


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        ("dx", "grad_input"),
        ("dresidual", "grad_residual"),
        ("dweight", "grad_weight"),
        ("dbias", "grad_bias"),
        ("dactivation_weight", "grad_activation_weight"),
    ],
)
def test_the_engine_finds_a_wrong_gradient(monkeypatch, fault, row):
    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_backward", _halve_gradient(fault))
    rows = {r.name: r for r in Case("prelu").check("reference")}
    assert [name for name, r in rows.items() if not r.ok] == [row]


def test_the_engine_finds_a_wrong_record_and_a_wrong_statistic(monkeypatch):
    forward, backward = (
        vgkern.backends.reference.batch_norm_act_forward,
        vgkern.backends.reference.batch_norm_act_backward,
    )

    def biased_variance(*args):
        y, statistics, mask = forward(*args)
        statistics[2] *= 1 - 1e-5
        return y, statistics, mask

    def wrong_record(*args):
        *gradients, record = backward(*args)
        record[: vgkern.ops.RECORD_FIELDS.index("dead")] *= 1.0001
        record[vgkern.ops.RECORD_FIELDS.index("dead")] += 1
        return *gradients, record

    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_forward", biased_variance)
    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_backward", wrong_record)
    failed = {r.name for r in Case("relu").check("reference") if not r.ok}
    norms = {f"record.grad_{name}_norm" for name in ("output", "preact", "input", "weight", "bias")}
    assert failed == {"running_var", "record.dead_fraction"} | norms


def test_a_failing_case_says_how_to_reproduce_it(monkeypatch):
    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_backward", _halve_gradient("dx"))
    report = vgkern.verify("reference", activations=["gelu"])
    assert not report.ok
    assert "gelu" in str(report)
    assert "FAILED" in str(report)
    failure = report.failures[0]
    assert failure.case.activation == "gelu"
    with pytest.raises(AssertionError, match="grad_input"):
        exec(failure.reproduce, {})
    monkeypatch.undo()
    exec(failure.reproduce, {})


def test_an_exception_is_one_cases_failure(monkeypatch):
    def raises(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(vgkern.backends.reference, "batch_norm_act_forward", raises)
    report = vgkern.verify("reference", activations=["relu"])
    assert not report.ok
    assert "broken on purpose" in report.failures[0].exception


def test_verify_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="nonsense"):
        vgkern.verify("nonsense")
    with pytest.raises(ValueError, match="reluu"):
        vgkern.verify("reference", activations=["reluu"])


def test_progress_and_report():
    seen = []
    report = vgkern.verify(
        "reference", activations=["identity"], progress=lambda done, total: seen.append((done, total))
    )
    assert report.ok
    assert seen[-1] == (len(report.rows), len(report.rows))
    assert report.to_dict()["rows"][0]["case"]["activation"] == "identity"
    assert not dataclasses.replace(report, rows=()).ok  # nothing run is not a pass


def test_assert_matches_autograd_takes_a_users_layer_and_leaves_it_alone(backend):
    layer = vgkern.nn.BatchNormAct2d(6, activation=torch.nn.LeakyReLU(0.3))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, 6, 5, 5)[:, :, :, ::2]  # strides as users have them
    testing.assert_matches_autograd(layer, x, torch.randn(4, 6, 5, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.grad_stats() is None
    with pytest.raises(ValueError, match="grad_norm_bounds"):
        testing.assert_matches_autograd(vgkern.nn.BatchNormAct2d(6, grad_norm_bounds=(None, 1.0)), x)
