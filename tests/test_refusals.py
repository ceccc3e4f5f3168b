"""Refused calls: the exception types of PyTorch, messages that say what is wrong, and nothing changed, to the bit."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from common import FUSED, PLAIN, SHAPES, unchanged
from torch import nn

import vgkern
from vgkern.functional import add_act, batch_norm_act

C = 3


def _call(**changes):
    """Arguments of ``F.batch_norm`` that it takes, with changes."""
    call = {
        "input": torch.randn(4, C, 5),
        "running_mean": torch.randn(C),
        "running_var": torch.rand(C) + 0.5,
        "weight": torch.randn(C),
        "bias": torch.randn(C),
        "training": True,
    }
    return call | changes


def _cast(dtype, *names, **changes):
    call = _call(**changes)
    return call | {name: call[name].to(dtype) for name in names}


_STATISTICS = ("running_mean", "running_var")
_PARAMETERS = ("weight", "bias")

# What PyTorch refuses: the call, and what our message must say: the argument, what was given, what is wanted.
REFUSED_BY_TORCH = {
    "rank 1, training": (lambda: _call(input=torch.randn(C)), ["input", "1D", "at least 2"]),
    "rank 1, training, no statistics": (
        lambda: _call(input=torch.randn(C), running_mean=None, running_var=None), ["input", "1D", "at least 2"]),
    "rank 1, eval": (lambda: _call(input=torch.randn(C), training=False), ["input", "1D", "at least 2"]),
    "one value a channel": (lambda: _call(input=torch.randn(1, C, 1)),
                            ["Expected more than 1 value per channel when training", "[1, 3, 1]"]),
    "running_mean too long": (lambda: _call(running_mean=torch.zeros(4)), ["running_mean", "3 elements", "(4,)"]),
    "running_var too long": (lambda: _call(running_var=torch.ones(4)), ["running_var", "3 elements", "(4,)"]),
    "weight too long": (lambda: _call(weight=torch.ones(4)), ["weight", "3 elements", "(4,)"]),
    "bias too short": (lambda: _call(bias=torch.ones(2)), ["bias", "3 elements", "(2,)"]),
    "running_mean (1, C)": (lambda: _call(running_mean=torch.zeros(1, C)), ["running_mean", "3 elements", "(1, 3)"]),
    "running_mean alone, training": (lambda: _call(running_var=None), ["running_mean and running_var", "both be None"]),
    "running_var alone, training": (lambda: _call(running_mean=None), ["running_mean and running_var", "both be None"]),
    "running_mean alone, eval": (lambda: _call(running_var=None, training=False), ["running_var", "None", "defined"]),
    "running_var alone, eval": (lambda: _call(running_mean=None, training=False), ["running_mean", "None", "defined"]),
    "eval without statistics": (
        lambda: _call(running_mean=None, running_var=None, training=False), ["running_mean", "None", "defined"]),
    "eps 0, training": (lambda: _call(eps=0.0), ["eps", "positive", "0.0"]),
    "eps -1, training": (lambda: _call(eps=-1.0), ["eps", "positive", "-1.0"]),
    "eps -1, eval": (lambda: _call(eps=-1.0, training=False), ["eps", "non-negative", "-1.0"]),
    "eps None": (lambda: _call(eps=None), ["NoneType"]),
    "momentum a string": (lambda: _call(momentum="0.1"), ["momentum", "number", "'0.1'"]),
    "momentum None": (lambda: _call(momentum=None), ["momentum", "number", "None"]),
    "int input": (lambda: _cast(torch.int32, "input"), ["input", "int32", "float32", "bfloat16"]),
    "bool input": (lambda: _cast(torch.bool, "input"), ["input", "bool", "float32"]),
    "complex input": (lambda: _cast(torch.complex64, "input"), ["input", "complex64", "float32"]),
    "float8 input": (lambda: _cast(torch.float8_e4m3fn, "input"), ["input", "float8_e4m3fn", "float32"]),
    "sparse input": (lambda: _call(input=torch.ones(4, C, 5).to_sparse()), ["input", "sparse_coo", "dense"]),
    "sparse CSR input": (lambda: _call(input=torch.ones(4, C).to_sparse_csr()), ["input", "sparse_csr", "dense"]),
    "nested input": (
        lambda: _call(input=torch.nested.nested_tensor([torch.ones(C, 5)] * 2)), ["input", "nested", "dense"]),
    "jagged input": (
        lambda: _call(input=torch.nested.nested_tensor([torch.ones(C, 5)] * 2, layout=torch.jagged)),
        ["input", "nested", "dense"]),
    "quantized input": (
        lambda: _call(input=torch.quantize_per_tensor(torch.ones(4, C, 5), 0.1, 0, torch.quint8)),
        ["input", "quantized", "dense"]),
    "float64 input, float32 parameters": (
        lambda: _cast(torch.float64, "input"), ["float64", "float32", "running_mean"]),
    "float64 parameters": (lambda: _cast(torch.float64, *_PARAMETERS, running_mean=None, running_var=None),
                           ["weight", "float32", "float64"]),
    "float16 parameters, bfloat16 input": (
        lambda: _cast(torch.float16, *_STATISTICS, *_PARAMETERS, input=torch.ones(4, C, 5, dtype=torch.bfloat16)),
        ["running_mean", "torch.bfloat16 or torch.float32", "float16"]),
    "half-precision statistics beside float32 parameters": (
        lambda: _cast(torch.float16, "input", *_STATISTICS),
        ["running_mean of torch.float16", "weight of torch.float32"]),
    "integer weight": (lambda: _cast(torch.int32, "weight"), ["weight", "float32", "int32"]),
    "running_mean requires grad": (
        lambda: _call(running_mean=torch.zeros(C, requires_grad=True)), ["running_mean", "not differentiable"]),
    "running_var requires grad, eval": (
        lambda: _call(running_var=torch.ones(C, requires_grad=True), training=False),
        ["running_var", "not differentiable"]),
    "weight on another device": (lambda: _call(weight=torch.ones(C, device="meta")), ["weight", "cpu", "meta"]),
    "weight a list": (lambda: _call(weight=[1.0] * C), ["weight", "Tensor", "list"]),
    "running_mean a list": (lambda: _call(running_mean=[0.0] * C), ["running_mean", "Tensor", "list"]),
    "input a list, eval": (lambda: _call(input=[1.0], training=False), ["input", "Tensor", "list"]),
}  # fmt: skip


def _refusal(function, call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is what the tests compare
        function(**call)
    return caught.value


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|quantize_per_tensor)")
@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_what_torch_refuses(name):
    make, fragments = REFUSED_BY_TORCH[name]
    theirs = _refusal(F.batch_norm, make())
    call = make()
    with unchanged(*call.values()):
        ours = _refusal(batch_norm_act, call)
    # A handler written for PyTorch's exception catches ours. (NotImplementedError is a RuntimeError.)
    assert isinstance(ours, type(theirs)), (ours, theirs)
    for fragment in fragments:
        assert fragment in str(ours), str(ours)


# What PyTorch takes, or what it does not know: the call, the exception and the message.
REFUSED_BY_US = {
    "eps NaN": (lambda: _call(eps=math.nan), ValueError, ["eps", "positive", "nan"]),
    "eps NaN, eval": (lambda: _call(eps=math.nan, training=False), ValueError, ["eps", "non-negative", "nan"]),
    "weight (1, C)": (lambda: _call(weight=torch.ones(1, C)), RuntimeError, ["weight", "3 elements", "(1, 3)"]),
    "bias (1, C)": (lambda: _call(bias=torch.ones(1, C)), RuntimeError, ["bias", "3 elements", "(1, 3)"]),
    "empty batch of wrong channels": (
        lambda: _call(input=torch.empty(0, C + 1, 5)), RuntimeError, ["running_mean", "4 elements", "(3,)"]),
    "no channels": (lambda: _call(input=torch.empty(4, 0, 5)), RuntimeError, ["running_mean", "0 elements", "(3,)"]),
    "residual of another shape": (
        lambda: _call(residual=torch.ones(4, C, 1)), RuntimeError, ["residual", "(4, 3, 5)", "(4, 3, 1)"]),
    "residual of another rank": (
        lambda: _call(residual=torch.ones(C, 5)), RuntimeError, ["residual", "(4, 3, 5)", "(3, 5)"]),
    "residual on another device": (
        lambda: _call(residual=torch.ones(4, C, 5, device="meta")), RuntimeError, ["residual", "cpu", "meta"]),
    "sparse residual": (
        lambda: _call(residual=torch.ones(4, C, 5).to_sparse()), NotImplementedError,
        ["residual", "sparse_coo", "dense"]),
    "complex residual": (
        lambda: _call(residual=torch.ones(4, C, 5, dtype=torch.cfloat)), NotImplementedError,
        ["residual", "complex64"]),
    "float8 residual": (
        lambda: _call(residual=torch.ones(4, C, 5).to(torch.float8_e5m2)), NotImplementedError, ["residual", "float8"]),
    "residual a number": (lambda: _call(residual=1.0), TypeError, ["residual", "Tensor", "float"]),
    "unknown activation": (
        lambda: _call(activation="leakyrelu"), ValueError, ["activation", "'leakyrelu'", "'leaky_relu'", "softplus"]),
    "activation of another type": (lambda: _call(activation=3), TypeError, ["activation", "name", "int"]),
    "activation a function": (lambda: _call(activation=F.relu), TypeError, ["activation", "name", "function"]),
    "module without a fused form": (
        lambda: _call(activation=nn.Softmax()), ValueError, ["activation", "Softmax", "LeakyReLU"]),
    "unknown argument of the activation": (
        lambda: _call(activation="elu", activation_args={"negative_slope": 0.1}), ValueError,
        ["activation_args", "'elu'", "'negative_slope'", "alpha"]),
    "argument of an activation that takes none": (
        lambda: _call(activation="relu", activation_args={"alpha": 1.0}), ValueError,
        ["activation_args", "'relu'", "'alpha'", "no arguments"]),
    "argument of another type": (
        lambda: _call(activation="elu", activation_args={"alpha": "1"}), TypeError, ["alpha", "elu", "number", "'1'"]),
    "infinite argument": (
        lambda: _call(activation="elu", activation_args={"alpha": math.inf}), ValueError,
        ["alpha", "elu", "finite", "inf"]),
    "argument that divides": (
        lambda: _call(activation="celu", activation_args={"alpha": 0.0}), ValueError, ["alpha", "celu", "0"]),
    "unknown choice": (
        lambda: _call(activation="gelu", activation_args={"approximate": "erf"}), ValueError,
        ["approximate", "gelu", "'none', 'tanh'", "'erf'"]),
    "arguments beside a module": (
        lambda: _call(activation=nn.ELU(), activation_args={"alpha": 1.0}), ValueError, ["activation_args", "ELU"]),
    "prelu without a weight": (
        lambda: _call(activation="prelu"), ValueError, ["activation_weight", "'prelu'", "needs", "None"]),
    "relu with a weight": (
        lambda: _call(activation="relu", activation_weight=torch.ones(1)), ValueError,
        ["activation_weight", "'relu'", "takes no"]),
    "prelu weight of wrong length": (
        lambda: _call(activation="prelu", activation_weight=torch.ones(2)), RuntimeError,
        ["activation_weight", "1 or 3 elements", "(2,)"]),
    "prelu weight of two dimensions": (
        lambda: _call(activation="prelu", activation_weight=torch.ones(1, C)), RuntimeError,
        ["activation_weight", "1 or 3 elements", "(1, 3)"]),
    "prelu weight of another dtype": (
        lambda: _call(activation="prelu", activation_weight=torch.ones(C, dtype=torch.double)), RuntimeError,
        ["activation_weight", "float32", "float64"]),
    "prelu weight on another device": (
        lambda: _call(activation="prelu", activation_weight=torch.ones(C, device="meta")), RuntimeError,
        ["activation_weight", "cpu", "meta"]),
    "bounds reversed": (
        lambda: _call(grad_norm_bounds=(2.0, 1.0)), ValueError, ["grad_norm_bounds", "low <= high", "2.0"]),
    "negative bound": (
        lambda: _call(grad_norm_bounds=(-1.0, None)), ValueError, ["grad_norm_bounds", "0 <= low", "-1.0"]),
    "NaN bound": (
        lambda: _call(grad_norm_bounds=(None, math.nan)), ValueError, ["grad_norm_bounds", "low <= high", "nan"]),
    "bounds one number": (lambda: _call(grad_norm_bounds=1.0), ValueError, ["grad_norm_bounds", "(low, high)", "1.0"]),
    "bounds of three": (lambda: _call(grad_norm_bounds=(0, 1, 2)), ValueError, ["grad_norm_bounds", "(0, 1, 2)"]),
    "bounds not numbers": (lambda: _call(grad_norm_bounds=("a", None)), ValueError, ["grad_norm_bounds", "'a'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BY_US)
def test_what_torch_does_not_refuse(name):
    make, kind, fragments = REFUSED_BY_US[name]
    call = make()
    with unchanged(*call.values()):
        ours = _refusal(batch_norm_act, call)
    assert type(ours) is kind
    for fragment in fragments:
        assert fragment in str(ours), str(ours)


@pytest.mark.parametrize(
    "name", [name for name in REFUSED_BY_US if re.search("residual|activation|prelu|module|argu", name)]
)
def test_add_act_refuses_the_same(name):
    make, kind, fragments = REFUSED_BY_US[name]
    call = {k: v for k, v in make().items() if k in ("input", "residual") or k.startswith("activation")}
    with unchanged(*call.values()):
        ours = _refusal(add_act, call)
    assert type(ours) is kind
    for fragment in fragments:
        assert fragment in str(ours), str(ours)


def _layer_refusals():
    """(dim, training, input) that ``nn.BatchNorm*d`` refuses."""
    for dim, shape in SHAPES.items():
        for wrong in (shape[:1], shape[: dim + 1] if dim > 1 else (), (*shape, 2), (*shape, 2, 2)):
            yield pytest.param(dim, True, torch.randn(wrong), id=f"{dim}d-rank{len(wrong)}")
        one = (1, 7, *[1] * dim)
        yield pytest.param(dim, True, torch.randn(one), id=f"{dim}d-one-value")
        yield pytest.param(dim, False, torch.randn(4, 6, *shape[2:]), id=f"{dim}d-channels-eval")
        yield pytest.param(dim, True, torch.randn(4, 8, *shape[2:]), id=f"{dim}d-channels")
        yield pytest.param(dim, True, torch.randint(9, shape), id=f"{dim}d-int")
        yield pytest.param(dim, True, torch.randn(shape).double(), id=f"{dim}d-float64")


@pytest.mark.parametrize(("dim", "training", "x"), list(_layer_refusals()))
def test_layers_refuse_with_the_types_of_torch_and_change_nothing(dim, training, x):
    plain, layer = PLAIN[dim](7).train(training), FUSED[dim](7, activation="prelu").train(training)
    theirs = _refusal(plain, {"input": x})
    with unchanged(layer, x):
        ours = _refusal(layer, {"input": x})
    assert isinstance(ours, type(theirs)), (ours, theirs)
    if type(theirs) is ValueError:
        assert str(ours) == str(theirs)  # the wording that users search for


def test_one_value_a_channel_is_refused_in_eval_without_running_statistics():
    x = torch.randn(1, 3, 1, 1)
    layer = vgkern.nn.BatchNormAct2d(3, track_running_stats=False).eval()
    for refuses in (nn.BatchNorm2d(3, track_running_stats=False).eval(), layer):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            refuses(x)


@pytest.mark.parametrize(
    "refused",
    [
        lambda layer, x: layer(x, residual=x[:1]),
        lambda layer, x: layer(x[:, :2]),
        lambda layer, x: layer(x.double()),
        lambda layer, x: layer(x[:1, :, :1, :1]),
        lambda layer, x: layer(x[0]),
        lambda layer, x: layer(torch.empty(0, 5, 4, 4)),
        lambda layer, x: layer(x.requires_grad_(), residual=x.to_sparse()),
        lambda layer, x: torch.func.vmap(layer)(torch.stack([x, x])),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    ],
)
def test_a_refused_call_counts_no_batch(refused):
    layer = vgkern.nn.BatchNormAct2d(3, momentum=None)
    x = torch.randn(4, 3, 4, 4)
    layer(x)
    with unchanged(layer), pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        refused(layer, x)


def test_a_momentum_that_is_no_number_counts_no_batch():
    layer = vgkern.nn.BatchNormAct2d(3, momentum="0.1")
    with unchanged(layer), pytest.raises(TypeError, match=r"momentum.*number.*'0\.1'"):
        layer(torch.randn(4, 3, 4, 4))


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"),
    [
        ({"eps": -1.0}, ValueError, "eps.*-1.0"),
        ({"eps": math.nan}, ValueError, "eps.*nan"),
        ({"activation": "rleu"}, ValueError, "'rleu'.*'relu'"),
        ({"activation": "relu", "activation_args": {"slope": 1}}, ValueError, "slope"),
        ({"grad_norm_bounds": (3, 1)}, ValueError, "grad_norm_bounds"),
        ({"num_features": -1}, RuntimeError, "negative dimension"),
        ({"num_features": "3"}, TypeError, "str"),
    ],
)  # fmt: skip
def test_construction_refuses(kwargs, kind, match):
    with pytest.raises(kind, match=match):
        vgkern.nn.BatchNormAct2d(**{"num_features": 3} | kwargs)


def test_bounds_are_checked_when_they_are_set_later():
    layer = vgkern.nn.BatchNormAct2d(3, grad_norm_bounds=(0.5, 2.0))
    with pytest.raises(ValueError, match="grad_norm_bounds"):
        layer.grad_norm_bounds = (2.0, 1.0)
    assert layer.grad_norm_bounds == (0.5, 2.0)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"cpu, triton, reference.*'cuda'"), vgkern.backends.use("cuda"):
        pass


@pytest.mark.parametrize(
    ("activation", "arguments", "match"),
    [("gelu", [], r"expected 1 \(approximate\) for 'gelu', got \[\]"), ("relu", [1.0], "expected none"),
     ("rleu", [], "'rleu'")],
)  # fmt: skip
def test_an_operator_called_by_itself_with_other_arguments_than_the_activation_has(activation, arguments, match):
    x, mask = torch.randn(4, 3, 4, 4), torch.empty(0, dtype=torch.uint8)
    operators = torch.ops.vgkern
    _, statistics, _ = operators.batch_norm_act_forward(
        x, None, None, None, None, None, None, True, 1e-5, "relu", [], False
    )
    with pytest.raises(ValueError, match=match):
        operators.batch_norm_act_forward(
            x, None, None, None, None, None, None, True, 1e-5, activation, arguments, False
        )
    with pytest.raises(ValueError, match=match):
        operators.batch_norm_act_backward(
            x, x, None, None, statistics, None, None, None, True, 1e-5, activation, arguments, 0.0, math.inf, [True] * 6
        )
    with pytest.raises(ValueError, match=match):
        operators.batch_norm_act_input_gradient(
            x,
            x,
            None,
            mask,
            statistics,
            None,
            None,
            None,
            activation,
            arguments,
            torch.zeros(2, 3).double(),
            torch.ones(()).double(),
        )
