"""csrc/simd_math.h against float64 and mpmath, in every instruction set that this machine runs.

float32 is swept in a stride of 4099 bit patterns (a prime, so that all exponents and mantissas have their turn); with
``--exhaustive`` it is swept whole. The bounds are those that the header states for a machine without fma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch

from vgkern import _C


class Function(NamedTuple):
    """float64 reference for float, mpmath reference for double, and the largest error in units in the last place."""

    reference: Callable[[np.ndarray], np.ndarray]
    exact: Callable[[mpmath.mpf], mpmath.mpf]
    ulp_float: float
    ulp_double: float
    odd: bool = False


def _logistic(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _logistic_derivative(x):
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def _erfc(x):
    return torch.special.erfc(torch.from_numpy(x)).numpy()


FUNCTIONS = {
    "exp": Function(np.exp, mpmath.exp, 1.04, 1.06),
    "expm1": Function(np.expm1, mpmath.expm1, 1.67, 2.24, odd=True),
    "tanh": Function(np.tanh, mpmath.tanh, 1.37, 1.34, odd=True),
    "sigmoid": Function(_logistic, lambda x: 1 / (1 + mpmath.exp(-x)), 1.87, 1.85),
    "logistic_derivative": Function(
        _logistic_derivative, lambda x: mpmath.exp(-abs(x)) / (1 + mpmath.exp(-abs(x))) ** 2, 2.42, 2.31
    ),
    "log1p_exp": Function(
        lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), lambda x: mpmath.log1p(mpmath.exp(x)), 2.28, 2.44
    ),
    "normal_cdf": Function(
        lambda x: 0.5 * _erfc(-x * np.sqrt(0.5)), lambda x: mpmath.erfc(-x / mpmath.sqrt(2)) / 2, 6.0, 11.0
    ),
    "normal_pdf": Function(
        lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
        lambda x: mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi),
        2.19,
        2.24,
    ),
}
# Where the functions or their algorithms change course; their neighbours and negatives are tried as well.
EDGES = [0.0, 2.0**-149, 2.0**-126, 2.0**-25, 0.55, 1.0, 10.0, 15.0, 20.0, 40.0, 88.72284, 89.0, 103.98, 104.0, 1e38]


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


DTYPES = _C.dtype_names()


def apply(name: str, x: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """The function as tensors of a type, if not of x's own, are computed with."""
    y = np.full_like(x, np.nan)
    _C.apply_math(name, x.ctypes.data, y.ctypes.data, x.size, DTYPES.index(dtype or x.dtype.name))
    return y


def float_blocks(exhaustive: bool):
    """All bit patterns of float32, or a stride of them, and the edges."""
    edges = np.array(EDGES, dtype=np.float32)
    around = np.concatenate([edges, np.nextafter(edges, np.float32(-1)), np.nextafter(edges, np.float32(np.inf))])
    yield np.concatenate([around, -around, np.array([np.inf, -np.inf, np.nan], dtype=np.float32)])
    step, block = (1, 2**22) if exhaustive else (4099, 2**32)
    for start in range(0, 2**32, block):
        yield np.arange(start, start + block, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


def errors_in_ulp(y: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|y − reference| in units of float32's last place at the reference; beyond its range both count as 2^128."""
    limit = 2.0**128
    y, reference = (np.clip(value, -limit, limit) for value in (y.astype(np.float64), reference))
    _, exponent = np.frexp(np.minimum(np.abs(reference), limit / 2))
    return np.abs(y - reference) / np.ldexp(1.0, np.maximum(exponent - 24, -149))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_over_float32(isa, name, request):
    function = FUNCTIONS[name]
    worst = 0.0
    for x in float_blocks(request.config.getoption("--exhaustive", default=False)):
        with np.errstate(all="ignore"):
            reference = function.reference(x.astype(np.float64))
        y = apply(name, x)
        assert np.array_equal(np.isnan(y), np.isnan(x)), "NaN comes from NaN and nothing else"
        number = ~np.isnan(x)
        error = errors_in_ulp(y[number], reference[number])
        worst = max(worst, error.max(initial=0.0))
        assert worst <= function.ulp_float, f"{worst} ULP at {x[number][error.argmax()]!r}"
        if function.odd:
            assert np.array_equal(np.signbit(y[number]), np.signbit(x[number]))


# What half-precision tensors are computed with: a thirtieth of float16's last place, a sixteenth of bfloat16's.
COARSE = {"float16": 1.6e-5, "bfloat16": 2.5e-4}


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_coarse_error(isa, name, dtype, request):
    """Relative, over the float32 numbers that may arise between x and y: a stride of them, or all.

    Results below the type's normal numbers are held to the same share of the smallest of these. For expm1 away from 0
    it is a share of eˣ: so is a shift of its argument by as much.
    """
    limit, smallest = 2.0**128, torch.finfo(getattr(torch, dtype)).tiny
    for x in float_blocks(request.config.getoption("--exhaustive", default=False)):
        with np.errstate(all="ignore"):
            reference = FUNCTIONS[name].reference(x.astype(np.float64))
        y = apply(name, x, dtype).astype(np.float64)
        assert np.array_equal(np.isnan(y), np.isnan(x))
        number = ~np.isnan(x)
        x, y, reference = x[number], np.clip(y[number], -limit, limit), np.clip(reference[number], -limit, limit)
        scale = np.abs(reference) + (1.0 if name == "expm1" else 0.0) * (np.abs(x) > 0.01)
        error = np.abs(y - reference) / np.maximum(scale, smallest)
        assert error.max() <= COARSE[dtype], f"{error.max()} at {x[error.argmax()]!r}"
        if FUNCTIONS[name].odd:
            normal = np.abs(x) >= 2.0**-126
            assert np.array_equal(np.signbit(y[normal]), np.signbit(x[normal]))


@pytest.fixture(scope="module")
def exact_doubles():
    """Points, and the values of each function there in 60 digits."""
    rng = np.random.default_rng(0)
    edges = np.array([*EDGES[:-1], 5e-324, 2.0**-1022, 2.0**-54, 39.0, 709.78, 709.79, 745.1, 745.2, 746.0, 1000.0])
    spread = [rng.uniform(-scale, scale, 120) for scale in (1, 10, 40, 750)]
    tiny = rng.choice([-1.0, 1.0], 60) * 2.0 ** rng.uniform(-1070, 0, 60)
    x = np.concatenate([edges, -edges, *spread, tiny])
    with mpmath.workdps(60):
        values = {name: [row.exact(mpmath.mpf(at)) for at in x.tolist()] for name, row in FUNCTIONS.items()}
    return x, values


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_double(isa, name, exact_doubles):
    x, values = exact_doubles
    for at, y, exact in zip(x.tolist(), apply(name, x).tolist(), values[name], strict=True):
        if np.isinf(y):
            assert exact >= mpmath.mpf(2) ** 1024, f"inf at {at!r}"
            continue
        _, exponent = mpmath.frexp(exact)
        ulp = mpmath.ldexp(1, max(exponent - 53, -1074) if exact else -1074)
        assert abs(y - exact) <= FUNCTIONS[name].ulp_double * ulp, f"{float(abs(y - exact) / ulp)} ULP at {at!r}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_limits(isa, name, dtype):
    """To the bit at ±inf, NaN and the largest numbers."""
    largest = np.finfo(dtype).max
    x = np.array([-np.inf, np.inf, np.nan, -largest, largest], dtype=dtype)
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name].reference(x.astype(np.float64))
    np.testing.assert_array_equal(apply(name, x), expected.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tail_has_the_bits_of_the_body(isa, name, dtype):
    x = np.linspace(-9, 9, 64).astype(dtype)
    whole = apply(name, x)
    for count in range(1, 33):
        for start in (0, 7):
            y = np.full(count + 16, 123, dtype=dtype)
            part = np.ascontiguousarray(x[start : start + count])
            _C.apply_math(name, part.ctypes.data, y.ctypes.data, count, DTYPES.index(np.dtype(dtype).name))
            assert np.array_equal(y[:count], whole[start : start + count])
            assert (y[count:] == 123).all(), "written behind the end"


def test_an_unknown_function_is_refused():
    x = np.zeros(1, dtype=np.float32)
    with pytest.raises(ValueError, match="no mathematical function 'sine'"):
        apply("sine", x)
