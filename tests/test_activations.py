"""The table of activations: what ``activation=`` takes, and that Python, Triton and C++ know the same names."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from common import NAMES, torch_activation
from torch import nn

import vgkern
from vgkern.activations import TABLE, of_call, resolve
from vgkern.functional import add_act
from vgkern.nn import AddAct, BatchNormAct2d

# Every activation module with arguments other than its defaults, and without.
MODULES = [
    nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5),
    nn.PReLU(), nn.PReLU(3, init=-0.3), nn.ELU(), nn.ELU(0.5), nn.CELU(), nn.CELU(2.0), nn.SELU(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(),
    nn.Softplus(), nn.Softplus(2.0, 5.0),
]  # fmt: skip


def test_the_names_of_the_contract():
    contract = (
        "identity relu relu6 leaky_relu prelu elu celu selu gelu silu mish hardswish hardsigmoid sigmoid tanh softplus"
    )
    assert set(vgkern.activations.names()) >= set(contract.split())
    assert all(row.name == name for name, row in TABLE.items())


def test_three_tables_name_the_same_set():
    import vgkern.kernels.activations as triton_table

    from vgkern import _C

    assert set(_C.activation_names()) == set(NAMES)
    assert set(triton_table.TABLE) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_torch(name):
    """Checked by value: a name alone computes what the module of torch.nn computes without arguments."""
    z = torch.linspace(-8, 25, 1000, dtype=torch.float64)
    module = torch_activation(name).double()
    weight = getattr(module, "weight", None)
    torch.testing.assert_close(add_act(z, activation=name, activation_weight=weight), module(z), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules_are_taken_over(backend, device, module):
    module = module.to(device)
    layer = BatchNormAct2d(3, activation=module).to(device)
    x = torch.randn(4, 3, 3, 5, device=device, requires_grad=True)
    residual = torch.randn(4, 3, 3, 5, device=device) * 3
    y = layer(x, residual)
    plain = nn.BatchNorm2d(3).to(device)
    expected = module(plain(x) + residual)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0], rtol=1e-4, atol=2e-6
    )
    again = torch_activation(layer.activation.name, layer.activation.keywords())
    assert type(again) is type(module)


@pytest.mark.parametrize("make", [BatchNormAct2d, lambda channels, **kwargs: AddAct(**kwargs)])
def test_a_prelu_keeps_its_parameter(make):
    module = nn.PReLU(3)
    layer = make(3, activation=module)
    assert layer.activation_weight is module.weight
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    layer(torch.randn(4, 3, 2, 2)).sum().backward()
    before = module.weight.detach().clone()
    optimiser.step()
    assert not torch.equal(layer.activation_weight, before)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_functions_take_modules(module):
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(add_act(x, activation=module), module(x.clone()), rtol=1e-6, atol=1e-6)


def test_arguments_by_name():
    assert resolve("leaky_relu", {"negative_slope": 0.2}) == resolve(nn.LeakyReLU(0.2))
    assert resolve("gelu", {"approximate": "tanh"}) == resolve(nn.GELU(approximate="tanh"))
    assert resolve("softplus", {"threshold": 5}) == resolve(nn.Softplus(threshold=5.0))
    assert resolve(None) == resolve("identity") == resolve(nn.Identity())
    layer = BatchNormAct2d(3, activation="prelu", activation_args={"num_parameters": 3, "init": 0.1})
    assert layer.activation_weight.tolist() == pytest.approx([0.1] * 3)
    for keyword in ("num_parameters", "init"):  # these shape a layer's weight; a function is given the weight itself
        with pytest.raises(ValueError, match=keyword):
            add_act(torch.ones(3), activation="prelu", activation_args={keyword: 1}, activation_weight=torch.ones(1))


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity])
def test_subclasses_are_refused(kind):
    """A subclass may compute something else."""
    subclass = type(f"My{kind.__name__}", (kind,), {"forward": lambda self, x: x * 2})
    with pytest.raises(ValueError, match=f"no fused form of My{kind.__name__}.*LeakyReLU"):
        BatchNormAct2d(3, activation=subclass())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("leakyrelu", "leaky_relu"),
        ("ReLU", "relu"),
        ("swish", "silu"),
        ("hard_swish", "hardswish"),
        ("GELU", "gelu"),
        ("soft", "softplus"),
    ],
)
def test_an_unknown_name_lists_the_names_and_the_closest(given, meant):
    with pytest.raises(ValueError, match=f"'{given}'.*{', '.join(NAMES)}") as caught:
        resolve(given)
    if given != "swish":  # spelt unlike anything; any suggestion will do
        assert f"did you mean {meant!r}" in str(caught.value)


def test_str_shows_what_is_not_the_default():
    assert str(resolve("relu")) == "relu"
    assert str(resolve("elu", {"alpha": 0.5})) == "elu(alpha=0.5)"
    assert str(resolve("gelu", {"approximate": "tanh"})) == "gelu(approximate='tanh')"


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_consistent(name):
    """What a row says of its derivative is what autograd says of its reference."""
    row = TABLE[name]
    args = resolve(name).args
    z = torch.linspace(-8, 25, 2001, dtype=torch.float64).requires_grad_()
    weight = (torch.full((1,), 0.25, dtype=torch.float64),) if row.learnable else ()
    derivative = torch.autograd.grad(row.reference(z, *args, *weight).sum(), z)[0]
    if row.on is not None:
        slope_on, slope_off = row.slopes(*args)
        expected = torch.where(row.on(z, *args), slope_on, slope_off).double()
        torch.testing.assert_close(derivative, expected, rtol=1e-7, atol=0)
    assert row.backward_reads == {"identity": "nothing"}.get(name, "mask" if row.on else "z")
    assert len(args) == len(row.arguments)
    kinks = row.kinks(*args)
    assert all(isinstance(kink, float) for kink in kinks)
    # A jump of φ' between neighbours that is not at a kink would be one that the row does not list.
    step = (derivative[1:] - derivative[:-1]).abs()
    middle = (z[1:] + z[:-1]).detach() / 2
    for at in middle[step > 0.1].tolist():
        assert any(abs(at - kink) < 0.1 for kink in kinks), at


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ((F.relu, (True,), {}), ("relu", {})),
        (("tanh_", (), {}), ("tanh", {})),
        ((F.leaky_relu, (0.2, True), {}), ("leaky_relu", {"negative_slope": 0.2})),
        ((F.softplus, (2.0,), {"threshold": 5.0}), ("softplus", {"beta": 2.0, "threshold": 5.0})),
        ((F.gelu, (), {"approximate": "tanh"}), ("gelu", {"approximate": "tanh"})),
        ((torch.prelu, ("a weight",), {}), ("prelu", {"weight": "a weight"})),
        ((torch.relu, (1, 2), {}), None),
        ((torch.clamp_min, (0,), {}), None),
        (("identity", (), {}), None),
    ],
)
def test_calls_that_apply_an_activation(call, found):
    assert of_call(*call) == found


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("identity", "prelu")])
def test_every_activation_is_found_by_its_function(name):
    assert of_call(getattr(F, name), (), {}) == (name, {})


def test_the_names_in_the_documentation_are_the_names():
    text = vgkern.nn.BatchNormAct2d.__doc__
    for name in re.findall(r'activation="(\w+)"', text):
        assert name in NAMES
