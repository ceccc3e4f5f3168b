"""Clipping: every row of what PyTorch's does, and where it is to be better; on each backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from common import bits
from torch import nn

import vgkern
from vgkern import ops
from vgkern.backends import cpu
from vgkern.gradients import adaptive_clip_grad_, clip_grad_norm_, clip_grad_value_, get_grad_norms
from vgkern.gradients import lists as gradient_lists

INF = math.inf
POWERS = (0.5, 1.0, 1.5, 2.0, 4.0, INF)


def _parameter(gradient: torch.Tensor | None, value: torch.Tensor | None = None) -> nn.Parameter:
    if value is None:
        value = torch.zeros(3) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype)
    p = nn.Parameter(value.to(gradient.device) if gradient is not None else value)
    p.grad = gradient
    return p


def _exact_norm(gradients, p: float = 2.0) -> float:
    x = torch.cat([g.detach().double().abs().flatten() for g in gradients])
    most = x.max().item()
    if p == INF or most == 0:
        return most
    return most * math.fsum((v / most) ** p for v in x.tolist()) ** (1 / p)


def _random(device: str = "cpu", dtypes=(torch.float32,)) -> list[torch.Tensor]:
    shapes = ((7, 5), (13,), (), (2, 3, 4, 5), (4099,))
    return [torch.randn(shape, device=device).to(dtype) for dtype, shape in itertools.product(dtypes, shapes)]


def _clone(gradients) -> list[nn.Parameter]:
    return [_parameter(g.clone()) for g in gradients]


# -- as PyTorch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [*POWERS, "inf"])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_as_pytorch(backend, device, norm_type, max_norm, foreach):
    gradients = _random(device)
    ours, theirs = _clone(gradients), _clone(gradients)
    norm = clip_grad_norm_(ours, max_norm, norm_type, foreach=foreach)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    torch.testing.assert_close(norm.float(), expected, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -INF])
def test_powers_that_are_no_norm_are_left_to_pytorch(norm_type):
    gradients = _random()
    ours, theirs = _clone(gradients), _clone(gradients)
    norm = clip_grad_norm_(ours, 0.1, norm_type)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.1, norm_type))
    assert bits(*(p.grad for p in ours)) == bits(*(p.grad for p in theirs))


def test_parameters_without_a_gradient_are_passed_over(backend, device):
    gradient = torch.randn(9, device=device)
    both = [_parameter(None), _parameter(gradient.clone()), _parameter(None)]
    assert clip_grad_norm_(both, 0.5).item() == pytest.approx(_exact_norm([gradient]), rel=1e-7)
    assert both[0].grad is None
    assert _exact_norm([both[1].grad]) == pytest.approx(0.5, rel=1e-5)
    assert clip_grad_norm_([_parameter(None)], 0.5).item() == 0
    assert clip_grad_norm_([], 0.5).item() == 0
    clip_grad_value_([_parameter(None)], 0.5)
    adaptive_clip_grad_([_parameter(None)])


def test_a_single_tensor_may_stand_for_a_list(backend, device):
    p = _parameter(torch.full((4,), 3.0, device=device))
    assert clip_grad_norm_(p, 1.0).item() == 6
    assert p.grad.tolist() == pytest.approx([0.5] * 4)
    clip_grad_value_(p, 0.25)
    assert p.grad.tolist() == [0.25] * 4
    adaptive_clip_grad_(p)
    assert _exact_norm([p.grad]) == pytest.approx(1e-5)
    assert get_grad_norms(p).shape == (1,)


def test_generators_are_taken_and_an_exhausted_one_warns():
    parameters = _clone(_random())
    assert clip_grad_norm_(iter(parameters), 1.0) > 1
    assert clip_grad_norm_((p for p in parameters), 1.0) <= 1 + 1e-6
    spent = (p for p in parameters)
    list(spent)
    for function in (lambda x: clip_grad_norm_(x, 1.0), lambda x: clip_grad_value_(x, 1.0), adaptive_clip_grad_):
        with pytest.warns(UserWarning, match="empty generator") as caught:
            function(spent)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_error_if_nonfinite_leaves_the_gradients_untouched(backend, device, bad):
    gradients = [torch.randn(5, device=device), torch.randn(7, device=device)]
    gradients[1][3] = bad
    parameters = _clone(gradients)
    before = bits(*(p.grad for p in parameters))
    versions = [p.grad._version for p in parameters]
    with pytest.raises(RuntimeError, match="no gradient has changed"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert bits(*(p.grad for p in parameters)) == before
    assert [p.grad._version for p in parameters] == versions
    # Without it: as PyTorch. An infinite norm makes 0 of what is finite, NaN makes NaN of all.
    theirs = _clone(gradients)
    clip_grad_norm_(parameters, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_foreach_is_refused_where_pytorch_refuses_it():
    p = nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="foreach=True"):
        torch.nn.utils.clip_grad_norm_([p], 1.0, foreach=True)
    with pytest.raises(RuntimeError, match="foreach=True"):
        clip_grad_norm_([p], 1.0, foreach=True)


def test_autograd_sees_the_change():
    """A gradient that carries a graph (create_graph) was saved for a second backward: scaling it must show."""
    x = torch.randn(6, requires_grad=True)
    (x**3).sum().backward(create_graph=True)
    penalty = (x.grad**2).sum()  # saves x.grad
    version = x.grad._version
    clip_grad_norm_([x], 1e-3)
    assert x.grad._version > version
    assert x.grad.grad_fn is not None or x.grad.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_under_a_compiler_pytorch_computes():
    gradients = _random()
    ours, theirs = _clone(gradients), _clone(gradients)
    norm = torch.compile(clip_grad_norm_, backend="eager")(ours, 0.5)
    torch.testing.assert_close(norm.float(), torch.nn.utils.clip_grad_norm_(theirs, 0.5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# -- better than PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES, ids=str)
def test_the_norm_is_good_to_1e_7(backend, device, dtype):
    for scale in (1.0, 1e-3):
        gradients = [((torch.rand(size, device=device) + 1.0) * scale).to(dtype) for size in (3, 70001)]
        parameters = _clone(gradients)
        expected = _exact_norm(gradients)
        assert abs(clip_grad_norm_(parameters, 1.0).item() / expected - 1) <= 1e-7
        assert abs(get_grad_norms(_clone(gradients)).double().norm().item() / expected - 1) <= 1e-7


@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES, ids=str)
def test_the_norm_after_clipping_keeps_the_bound(backend, device, dtype):
    """Rounding to the nearest exceeds it where all elements round up: half precision by 2⁻⁹ and 2⁻¹²."""
    kinds = [torch.full((1000,), 1.01), torch.rand(5000) + 0.5, torch.randn(5000) * 0.1, torch.full((7,), -1.9)]
    for gradient, max_norm in itertools.product(kinds, (1.0, 0.3, 0.01)):
        p = _parameter(gradient.to(device, dtype))
        assert clip_grad_norm_([p], max_norm) > max_norm
        assert max_norm * (1 - 2**-7) <= _exact_norm([p.grad]) <= max_norm * (1 + 1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 4.0, INF])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_neither_overflow_nor_vanish(backend, device, size, norm_type):
    gradient = (torch.randn(1000, dtype=torch.float64) * size).to(device, torch.float32)
    p = _parameter(gradient.clone())
    norm = clip_grad_norm_([p], 1.0, norm_type)
    assert norm.item() == pytest.approx(_exact_norm([gradient], norm_type), rel=1e-7)
    if size > 1:
        assert _exact_norm([p.grad], norm_type) == pytest.approx(1.0, rel=1e-5)
    else:
        assert bits(p.grad) == bits(gradient)


def test_listed_twice_counts_once(backend, device):
    p = _parameter(torch.tensor([3.0, 4.0], device=device))
    assert clip_grad_norm_([p, p], 1.0).item() == 5
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])
    q = _parameter(torch.tensor([8.0], device=device), torch.ones(1))
    adaptive_clip_grad_([q, q], 0.5)
    assert q.grad.item() == 0.5
    assert get_grad_norms([q, q]).tolist() == [0.5, 0.5]  # one for each that is listed


@pytest.mark.parametrize("bad", [-1.0, -INF, math.nan])
def test_negative_and_nan_limits_are_refused(bad):
    parameters = _clone(_random())
    before = bits(*(p.grad for p in parameters))
    for call in (
        lambda: clip_grad_norm_(parameters, bad),
        lambda: clip_grad_value_(parameters, bad),
        lambda: adaptive_clip_grad_(parameters, bad),
        lambda: adaptive_clip_grad_(parameters, 0.01, bad),
        lambda: adaptive_clip_grad_(parameters, norm_type=bad),
        lambda: get_grad_norms(parameters, bad),
    ):
        with pytest.raises(ValueError, match=r"expected a number .* got (-|nan)"):
            call()
    assert bits(*(p.grad for p in parameters)) == before


def test_nothing_is_skipped_but_gradients_without_elements(backend, device):
    empty = torch.empty(0, 3, device=device)
    parameters = [_parameter(empty), _parameter(torch.tensor([3.0, 4.0], device=device)), _parameter(empty.clone())]
    assert get_grad_norms(parameters, INF).tolist() == [0, 4, 0]
    assert clip_grad_norm_(parameters, 1.0, INF).item() == 4
    clip_grad_value_(parameters, 0.5)
    adaptive_clip_grad_(parameters, 1.0, 0.25)
    assert _exact_norm([parameters[1].grad]) == pytest.approx(0.25)
    assert clip_grad_norm_(parameters[:1], 1.0).item() == 0


@pytest.mark.parametrize(
    "clip",
    [
        lambda parameters: clip_grad_norm_(parameters, 1e6),
        lambda parameters: clip_grad_value_(parameters, 1e6),
        lambda parameters: adaptive_clip_grad_(parameters, 1e6, 1e6),
    ],
    ids=["norm", "value", "adaptive"],
)
def test_an_unclipped_gradient_is_not_rewritten(backend, device, clip):
    """Neither its bytes nor, on the CPU, its version."""
    gradients = [*_random(device, ops.FLOATING_DTYPES), torch.tensor([-0.0, 0.0, 1e-45], device=device)]
    parameters = _clone(gradients)
    versions = [p.grad._version for p in parameters]
    clip(parameters)
    assert bits(*(p.grad for p in parameters)) == bits(*gradients)
    if device == "cpu" and backend != "triton":
        assert [p.grad._version for p in parameters] == versions


def test_only_what_exceeds_is_rewritten():
    """By value and adaptively, gradients are looked at one by one."""
    small, large = torch.tensor([0.1, -0.2]), torch.tensor([0.1, -7.0])
    for clip in (lambda x: clip_grad_value_(x, 1.0), lambda x: adaptive_clip_grad_(x, 1.0, 1.0)):
        parameters = _clone([small, large])
        versions = [p.grad._version for p in parameters]
        clip(parameters)
        assert parameters[0].grad._version == versions[0]
        assert parameters[1].grad._version > versions[1]
        assert bits(parameters[0].grad) == bits(small)


# -- gradients of every kind -------------------------------------------------------------------------------------------


def _kinds() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8)
    return {
        "mixed": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(6, 3).to(torch.bfloat16),
        "transposed": base.clone().t(),
        "step 2": base.clone()[:, ::2],
        "channels_last": torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(6, 1).expand(6, 8),
        "complex": torch.randn(4, 3, dtype=torch.complex64),
        "conjugate": torch.randn(4, 3, dtype=torch.complex64).conj(),
        "sparse": torch.sparse_coo_tensor([[0, 2, 2]], torch.randn(3, 4), (5, 4)),
    }


def _values(g: torch.Tensor) -> torch.Tensor:
    g = g.resolve_conj() if g.layout is torch.strided else g.to_dense()
    return g.abs() if g.is_complex() else g


@pytest.mark.parametrize("name", [*_kinds(), "all"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
def test_gradients_of_every_kind(name, norm_type):
    kinds = _kinds()
    gradients = list(kinds.values()) if name == "all" else [kinds[name], torch.randn(3)]
    parameters = []
    for g in gradients:
        p = nn.Parameter(torch.zeros(g.shape, dtype=g.dtype))
        p.grad = g
        parameters.append(p)
    before = [_values(g).clone() for g in gradients]
    expected = _exact_norm(before, norm_type)
    each = get_grad_norms(parameters, norm_type)
    assert each.tolist() == pytest.approx([_exact_norm([g], norm_type) for g in before], rel=1e-6)
    assert clip_grad_norm_(parameters, 0.5, norm_type).item() == pytest.approx(expected, rel=1e-6)
    factor = 0.5 / (expected + 1e-6)
    for p, was in zip(parameters, before, strict=True):
        tolerance = 2 * torch.finfo(was.dtype).eps
        torch.testing.assert_close(
            _values(p.grad).double(), was.double() * factor, rtol=tolerance if was.dtype != torch.float64 else 1e-6,
            atol=0 if was.dtype != torch.float64 else 1e-9,
        )  # fmt: skip


def test_the_fast_reading_of_tensors_takes_only_what_is_plain():
    plain = _parameter(torch.randn(3))
    assert cpu.plain_gradients([plain, plain, _parameter(None)])[1] == [plain.grad]

    class Subclass(torch.Tensor):
        pass

    others = {
        "a subclass": torch.randn(3).as_subclass(Subclass),
        "complex": torch.randn(3, dtype=torch.complex64),
        "float8": torch.zeros(3, dtype=torch.float8_e5m2),
        "sparse": torch.eye(3)[0].to_sparse(),
        "meta": torch.empty(3, device="meta"),
    }
    for name, gradient in others.items():
        p = nn.Parameter(torch.zeros(3, dtype=gradient.dtype, device=gradient.device))
        p.grad = gradient
        assert cpu.plain_gradients([plain, p]) is None, name
    with pytest.raises(AttributeError):
        cpu.plain_gradients([None])


def test_each_gradient_is_read_once_and_in_order():
    """Among so many that the set of those that were seen has collisions."""
    gradients = [torch.full((i % 3 + 1,), float(i)) for i in range(700)]
    parameters = [_parameter(g) for g in gradients]
    found = cpu.plain_gradients([p for p in parameters for _ in range(3)] + parameters)
    assert [id(p) for p in found.parameters] == [id(p) for p in parameters]
    assert [id(g) for g in found.gradients] == [id(g) for g in gradients]
    norms, _ = cpu.dense_norms(found.arrays, len(gradients))
    assert norms == pytest.approx([g.norm().item() for g in gradients])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
def test_one_call_clips_as_two_do(norm_type):
    """To the bit, in gradients of several dtypes that end within a chunk, at its end and behind it."""
    sizes = (1, 70, 16384, 40000)
    gradients = [torch.randn(size).to(dtype) for size in sizes for dtype in ops.FLOATING_DTYPES]
    expected = [g.clone() for g in gradients]
    _, total, factor = cpu.gradient_norms(expected, norm_type, 0.5)
    cpu.scale_gradients_(expected, factor)
    parameters = _clone(gradients)
    assert bits(clip_grad_norm_(parameters, 0.5, norm_type)) == bits(total)
    assert bits(*(p.grad for p in parameters)) == bits(*expected)


def test_without_the_table_of_functions(monkeypatch):
    """torch 2.9 has none: tensors are described from Python, to the same bits."""
    gradients = [g for g in _kinds().values() if g.layout is torch.strided and not g.is_complex()]
    expected = [cpu.gradient_norms(gradients, p)[0] for p in POWERS]

    class Slow:
        def __getattr__(self, name):
            return getattr(extension, name)

        plain_gradients = read_tensors = staticmethod(lambda tensors: None)

    extension = cpu._C
    monkeypatch.setattr(cpu, "_C", Slow())
    assert bits(*expected) == bits(*(cpu.gradient_norms(gradients, p)[0] for p in POWERS))
    parameters = _clone(gradients)
    assert clip_grad_norm_(parameters, 1e-2) > 1e-2
    assert _exact_norm([p.grad for p in parameters]) == pytest.approx(1e-2, rel=1e-3)


def test_norms_are_one_for_each_parameter(backend, device):
    gradients = _random(device)
    parameters = [_parameter(gradients[0]), _parameter(None), *map(_parameter, gradients[1:])]
    for p in POWERS:
        norms = get_grad_norms(parameters, p)
        assert norms.shape == (6,)
        expected = [_exact_norm([q.grad], p) if q.grad is not None else 0.0 for q in parameters]
        assert norms.tolist() == pytest.approx(expected, rel=1e-7)
    assert get_grad_norms([]).shape == (0,)


def test_groups_of_several_kinds_keep_the_order():
    """As on several devices: each group is measured by itself, and the norms come back in the order of the list."""
    gradients = [torch.tensor([float(i + 1)], dtype=torch.complex64 if i % 3 == 0 else torch.float32) for i in range(7)]
    norms, total, factor = gradient_lists.measure(gradients, 2.0, 1.0)
    assert norms.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert total.item() == pytest.approx(math.sqrt(140))
    assert factor.item() == pytest.approx(1 / math.sqrt(140))


# -- by value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True, False])
def test_value_as_pytorch(backend, device, foreach):
    gradients = [*_random(device), torch.tensor([math.nan, INF, -INF, 2.0, 0.1], device=device)]
    ours, theirs = _clone(gradients), _clone(gradients)
    clip_grad_value_(ours, 0.5, foreach=foreach)
    torch.nn.utils.clip_grad_value_(theirs, 0.5, foreach=foreach)
    assert bits(*(p.grad for p in ours)) == bits(*(p.grad for p in theirs))


# -- adaptively --------------------------------------------------------------------------------------------------------


def _by_units(p: torch.Tensor, g: torch.Tensor, clip_factor: float, eps: float, norm_type: float) -> torch.Tensor:
    """In float64, unit by unit."""
    if g.dim() < 2:
        return _by_units(p.reshape(1, -1), g.reshape(1, -1), clip_factor, eps, norm_type).view(g.shape)
    result = g.double().clone()
    for i in range(len(g)):
        limit = clip_factor * max(_exact_norm([p[i]], norm_type), eps)
        found = _exact_norm([g[i]], norm_type)
        if found > limit:
            result[i] *= limit / found
    return result


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 2.7, INF])
@pytest.mark.parametrize("dtype", ops.FLOATING_DTYPES, ids=str)
def test_adaptive_clipping_unit_by_unit(backend, device, dtype, norm_type):
    shapes = ((7, 5), (13,), (), (6, 3, 2, 2), (3, 20000), (400, 1), (1, 9))
    for shape, memory_format in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        if memory_format is torch.channels_last and len(shape) != 4:
            continue
        weight, gradient = (torch.randn(shape).to(device, dtype).contiguous(memory_format=memory_format) for _ in "wg")
        if weight.dim() > 1:
            weight[0] = 0  # eps is what lets it begin
            gradient[-1] *= 1e-3  # stays as it is
        p = _parameter(gradient.clone(), weight)
        adaptive_clip_grad_([p], 0.2, 1e-2, norm_type)
        expected = _by_units(weight, gradient, 0.2, 1e-2, norm_type)
        torch.testing.assert_close(p.grad.double(), expected, rtol=2 * torch.finfo(dtype).eps + 1e-12, atol=1e-7)
        kept = expected == gradient.double()
        assert bits(p.grad[kept]) == bits(gradient[kept])
        assert p.grad.stride() == gradient.stride()


def test_adaptive_clipping_brings_any_height_down_to_the_bound(backend, device):
    """Where timm divides by at least 1e-6, and where its float32 norms are inf or 0."""
    for size, clip_factor, eps in ((1e30, 0.01, 1e-3), (5e-7, 0.01, 1e-5), (1e-30, 1e-32, 1.0), (3e38, 0.01, 1e-3)):
        gradient = torch.full((3, 50), size, device=device)
        p = _parameter(gradient.clone())
        adaptive_clip_grad_([p], clip_factor, eps)
        for row in p.grad:
            assert _exact_norm([row]) == pytest.approx(clip_factor * eps, rel=1e-5)


def test_adaptive_clipping_and_what_is_not_finite(backend, device):
    gradient = torch.ones(4, 3, device=device)
    gradient[1, 1], gradient[2, 0] = math.nan, INF
    p = _parameter(gradient, torch.ones(4, 3))
    adaptive_clip_grad_([p], 0.1)
    assert p.grad[1].isnan().all()  # as what the unit's norm is
    assert p.grad[2].tolist() == pytest.approx([math.nan, 0, 0], nan_ok=True)
    assert torch.isfinite(p.grad[[0, 3]]).all()  # the others are clipped by themselves
    assert _exact_norm([p.grad[0]]) == pytest.approx(0.1 * math.sqrt(3), rel=1e-6)


def test_adaptive_clipping_of_any_memory():
    """Units that do not lie one behind the other, dtypes that differ, sparse and complex gradients."""
    weight = torch.randn(6, 8)
    made = {
        "transposed": torch.randn(8, 6).t(),
        "step 2": torch.randn(6, 16)[:, ::2],
        "float64": torch.randn(6, 8, dtype=torch.float64),
        "half": torch.randn(6, 8).to(torch.float16),
        "sparse": torch.sparse_coo_tensor([[0, 2, 2]], torch.randn(3, 8), (6, 8)),
    }
    for name, gradient in made.items():
        p = nn.Parameter(weight.clone())
        dense = gradient.to_dense().clone()
        p.grad = gradient if gradient.dtype == p.dtype else None
        if p.grad is None:
            p = nn.Parameter(weight.to(gradient.dtype))
            p.grad = gradient
        adaptive_clip_grad_([p], 0.1)
        expected = _by_units(p.detach(), dense, 0.1, 1e-3, 2.0)
        rtol = max(2 * torch.finfo(dense.dtype).eps, 1e-9)
        torch.testing.assert_close(p.grad.to_dense().double(), expected, rtol=rtol, atol=1e-9, msg=name)
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    p.grad = torch.randn(3, 4, dtype=torch.complex64)
    adaptive_clip_grad_([p], 0.1)
    norms = torch.linalg.vector_norm(p.grad, dim=1) / torch.linalg.vector_norm(p.detach(), dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 0.1))


def test_the_same_bits_on_any_number_of_threads():
    gradients = [torch.randn(size) for size in ((300, 70), (9, 40000), (17,), (64, 3, 7, 7))]
    weights = [torch.randn_like(g) for g in gradients]
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            parameters = [_parameter(g.clone(), w.clone()) for g, w in zip(gradients, weights, strict=True)]
            adaptive_clip_grad_(parameters, 0.5)
            norm = clip_grad_norm_(parameters, 1.0)
            seen.append(bits(norm, *(p.grad for p in parameters)))
    finally:
        torch.set_num_threads(before)
    assert all(results == seen[0] for results in seen)


def test_a_forced_backend_computes():
    called = []
    with vgkern.backends.use("reference"):
        module = vgkern.backends.of(torch.ones(1))
        original = module.gradient_norms
        try:
            module.gradient_norms = lambda *args: called.append(args) or original(*args)
            clip_grad_norm_(_clone(_random()), 1.0)
        finally:
            module.gradient_norms = original
    assert called
