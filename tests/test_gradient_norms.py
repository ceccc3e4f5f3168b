"""Norms of lists of tensors and their scaling, by every backend: against float64, at the edges of every dtype."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from common import bits
from vgkern.kernels import gradient_norm

import vgkern
from vgkern import ops
from vgkern.backends import cpu, reference
from vgkern.backends import triton as triton_backend

INF = math.inf
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 2.7, INF)
MODULES = {"cpu": cpu, "reference": reference, "triton": triton_backend}


@pytest.fixture(params=["reference", "triton", *(f"cpu-{name}" for name in cpu.available_isas())])
def module(request):
    """Each backend, the C++ kernels in each instruction set."""
    name, _, isa = request.param.partition("-")
    assert vgkern.backends.available()[name] == "usable"
    before = cpu.isa()
    if isa:
        cpu._C.use_isa(isa)
    yield MODULES[name]
    cpu._C.use_isa(before)


@pytest.fixture
def where(module) -> str:
    return "cuda" if module is triton_backend and torch.cuda.is_available() else "cpu"


def _exact(x: torch.Tensor, p: float) -> float:
    """By Python's integers-and-fsum arithmetic, scaled so that no power leaves float64."""
    values = [abs(v) for v in x.double().flatten().tolist()]
    if any(math.isnan(v) for v in values):
        return math.nan
    most = max(values, default=0.0)
    if most in (0.0, INF) or p == INF:
        return most
    return most * math.fsum((v / most) ** p for v in values) ** (1 / p)


def _assert_norms(module, tensors, p, rel=1e-7):
    norms, total, factor = module.gradient_norms(tensors, p)
    assert norms.dtype == total.dtype == factor.dtype == torch.float64
    assert norms.shape == (len(tensors),)
    assert total.shape == factor.shape == ()
    for got, x in zip(norms.tolist(), tensors, strict=True):
        assert got == pytest.approx(_exact(x, p), rel=rel, abs=0, nan_ok=True)
    everything = torch.cat([x.double().flatten() for x in tensors])
    assert total.item() == pytest.approx(_exact(everything, p), rel=rel, abs=0, nan_ok=True)


def _mixed(where: str) -> list[torch.Tensor]:
    """All dtypes, no elements, one, a tile and more, memory formats, and a view that is aligned to nothing."""
    sizes = ((7,), (0,), (), (3, 5, 2, 2), (4099,), (64, 3), (20000,))
    tensors = [
        torch.randn(size, dtype=torch.float64).to(where, dtype)
        for dtype, size in itertools.product(ops.FLOATING_DTYPES, sizes)
    ]
    tensors.append(torch.randn(2, 3, 4, 5, device=where).contiguous(memory_format=torch.channels_last))
    tensors.append(torch.randn(100, device=where)[3:98])
    tensors.append(torch.randn(30, 40, device=where).to(torch.bfloat16)[:, ::3])
    tensors.append(torch.randn(30, 40, device=where).t())
    return tensors


@pytest.mark.parametrize("p", POWERS)
def test_norms_of_a_mixed_list(module, where, p):
    _assert_norms(module, _mixed(where), p)


@pytest.fixture(params=[1, 3])
def few_programs(request, monkeypatch, module):
    """Long lists give a program of the GPU's kernels several tiles; here short ones do."""
    monkeypatch.setattr(gradient_norm, "_PROGRAMS", request.param)
    gradient_norm._LISTS.clear()
    yield
    gradient_norm._LISTS.clear()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES)
def test_values_that_grow_along_a_tensor(module, where, p, dtype):
    # What was summed so far is brought to a scale that holds what comes next.
    x = torch.cat([torch.full((5000,), value, device=where, dtype=dtype) for value in (1.0, 5.0, 300.0, 2.0)])
    _assert_norms(module, [x, x[:3000]], p)


@pytest.mark.usefixtures("few_programs")
def test_tiles_of_one_program_are_all_scaled(module, where):
    tensors = [torch.arange(1.0, size + 1, device=where) for size in (9000, 100, 5000)]
    module.scale_gradients_(tensors, torch.tensor(0.5, dtype=torch.float64, device=where))
    for x in tensors:
        assert torch.equal(x, torch.arange(1.0, len(x) + 1, device=where) / 2)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES, ids=str)
def test_no_finite_gradient_overflows_or_vanishes(module, where, dtype, p):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = {"largest": largest, "tiny": tiny, "subnormal": tiny * torch.finfo(dtype).eps}
    if dtype != torch.float16:
        values |= {"1e30": 1e30, "1e-30": 1e-30}
    if dtype == torch.bfloat16 and module is triton_backend and where == "cpu":
        values |= {"tiny": tiny * 2**40, "subnormal": tiny * 2**30}  # the interpreter makes 0 of subnormal ones
    for value in values.values():
        x = torch.randn(1000, dtype=torch.float64).clamp(-1, 1).mul(value).to(where, dtype)
        assert x.count_nonzero() > 0
        _assert_norms(module, [x], p)
        # Beside others, and behind elements that are far smaller: sums are scaled anew on the way.
        _assert_norms(module, [torch.ones(5, device=where), torch.cat([x * 2**-10, x])], p)


def test_the_norm_is_good_to_1e_7_where_float32_sums_are_not(module, where):
    for dtype, size in itertools.product((torch.float32, torch.bfloat16), (3, 70001)):
        for x in (torch.full((size,), 1.1), torch.rand(size) + 1.0, torch.randn(size) * 1e-3):
            x = x.to(where, dtype)
            _assert_norms(module, [x], 2.0, rel=1e-9)
            _assert_norms(module, [x], 1.0, rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES, ids=str)
def test_inf_and_nan_propagate_to_their_tensor_and_the_total(module, where, dtype, p):
    clean = torch.randn(50, device=where).to(dtype)
    for bad, place in itertools.product((INF, -INF, math.nan), (0, 17, 8200)):
        x = torch.randn(9000, device=where).to(dtype)
        x[place] = bad
        _assert_norms(module, [clean, x, torch.full((3,), 1e300, dtype=torch.float64, device=where)], p)
    x[0], x[8999] = math.nan, INF
    assert module.gradient_norms([x], p)[0].isnan().item()


def test_zeros_and_nothing(module, where):
    empty, zeros = torch.empty(0, 3, device=where), torch.zeros(5000, device=where)
    for p in POWERS:
        for tensors in ([empty], [zeros], [empty, zeros, empty]):
            norms, total, factor = module.gradient_norms(tensors, p, 1.0)
            assert not norms.any()
            assert total.item() == 0
            assert factor.item() == 1


def test_the_factor_is_that_of_clipping(module, where):
    x = torch.randn(500, device=where)
    _, total, factor = module.gradient_norms([x], 2.0, 0.5)
    assert factor.item() == pytest.approx(0.5 / (total.item() + 1e-6), rel=1e-15)
    assert module.gradient_norms([x], 2.0, 1e3)[2].item() == 1
    assert module.gradient_norms([x * math.nan], 2.0, 1.0)[2].isnan().item()
    x[3] = INF
    assert module.gradient_norms([x], 2.0, 1.0)[2].item() == 0


@pytest.mark.parametrize("factor", [0.3, 0.0, 1.5, 1e-40, math.nan])
def test_scaling_rounds_once(module, where, factor):
    tensors = [*_mixed(where), torch.randn(70, device=where) * 1e38]
    expected = [(t.double() * factor).to(t.dtype) for t in tensors]
    module.scale_gradients_(tensors, torch.tensor(factor, dtype=torch.float64, device=where))
    for got, wanted in zip(tensors, expected, strict=True):
        # The interpreter's and a GPU's float32 product may differ from the float64 one's in the last place.
        info = torch.finfo(got.dtype)
        unit = max(1e-44, info.smallest_normal * info.eps)
        torch.testing.assert_close(got, wanted, rtol=2 * info.eps, atol=unit if factor == 1e-40 else 0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.7, 1e-3, 2.0**-20])
def test_scaling_rounds_half_precision_towards_0(module, where, dtype, factor):
    """To the nearest, a norm that is scaled down to a bound would exceed it by up to 2⁻⁹ or 2⁻¹² of it."""
    x = torch.cat([torch.randn(5000), torch.zeros(9), torch.randn(5000) * 2.0**-14]).to(where, dtype)
    exact = x.double() * factor
    module.scale_gradients_([x], torch.tensor(factor, dtype=torch.float64, device=where))
    info = torch.finfo(dtype)
    assert (x.double().abs() <= exact.abs() * (1 + 1e-6)).all()
    one_less = x.double().abs() * (1 + 1e-6) + (exact.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    assert (one_less >= exact.abs()).all()
    assert (x.double() * exact >= 0).all()


def test_a_factor_of_1_writes_nothing(module, where):
    """A NaN's payload would not survive a multiplication, nor would a signalling one."""
    tensors = [t for t in _mixed(where) if ops.is_dense(t)]
    payload = torch.tensor([0x7F800001, 0x7FC12345], dtype=torch.int32).view(torch.float32).to(where)
    tensors.append(payload)
    before = bits(*tensors)
    module.scale_gradients_(tensors, torch.ones((), dtype=torch.float64, device=where))
    assert bits(*tensors) == before


def test_scaling_leaves_the_neighbours_alone(module, where):
    for dtype, lead, size in itertools.product(ops.FLOATING_DTYPES, (0, 1, 3, 5), (1, 7, 16, 33, 9001)):
        whole = torch.ones(lead + size + 9, dtype=dtype, device=where)
        module.scale_gradients_([whole[lead : lead + size]], torch.full((), 0.5, dtype=torch.float64, device=where))
        expected = torch.ones_like(whole)
        expected[lead : lead + size] = 0.5
        assert torch.equal(whole, expected)


def test_the_same_bits_on_any_number_of_threads():
    tensors = [torch.randn(size) for size in (100_000, 3, 70_001, 16384, 16385)] + [torch.randn(9) for _ in range(500)]
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3, 8, 16):
            torch.set_num_threads(threads)
            copies = [t.clone() for t in tensors]
            results = [cpu.gradient_norms(tensors, p)[:2] for p in POWERS]
            cpu.scale_gradients_(copies, torch.tensor(0.3, dtype=torch.float64))
            seen.append(bits(*itertools.chain(*results), *copies))
    finally:
        torch.set_num_threads(before)
    assert all(results == seen[0] for results in seen)


def test_what_is_dense():
    x = torch.empty(2, 3, 4, 5)
    dense = [x, x.transpose(0, 3), x.contiguous(memory_format=torch.channels_last), x[:1], x[:, :, :1][:1, :1], x[0, 0]]
    assert all(ops.is_dense(t) for t in dense)
    assert not any(ops.is_dense(t) for t in (x[:, :2], x[..., ::2], x[:1].expand(2, 3, 4, 5)))
