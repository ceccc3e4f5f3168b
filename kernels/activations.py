# ruff: noqa: RET505 -- a branch on a compile-time constant chooses between programs: both arms stay visible
"""The activation functions as Triton device functions, and one table of them by name.

Each row of :data:`TABLE` holds up to four ``triton.jit`` functions, which a kernel receives as ``tl.constexpr``
arguments: adding an activation changes no kernel. All of them work element by element on blocks of float32 or float64
and stay in that type; half precision is widened before and rounded after.

==================================  =============================================================================
``forward(z, weight, ARGS)``        φ(z)
``backward(dy, state, weight,       dz = φ'(z)·dy. ``state`` is z itself or, for a row that has ``on``, its one bit
ARGS)``                             ``on(z)``, computed again from z or read from a mask.
``on(z, ARGS)``                     Which of two straight pieces z lies on, for activations made of two (else None).
``weight_backward(dy, z)``          The element's share of the gradient of a learnable ``weight`` (else None).
==================================  =============================================================================

``ARGS`` is the tuple of the activation's arguments, a compile-time constant: a layer has one value for its whole life,
and only a constant reaches a float64 computation unrounded (a run-time Python float arrives in a kernel as float32).
``weight`` broadcasts against z and is 0 for activations that have none.

Values and derivatives at ±inf, NaN, ±0 and the kinks are those of PyTorch's scalar code: a ``tl.where`` stands where
PyTorch selects (so that 0 wins over inf·0) and a product where PyTorch multiplies (so that silu(-inf) is NaN).
Comparisons are turned so that NaN falls on PyTorch's side.

``exp``, ``expm1``, ``log1p`` and ``tanh`` are built below from IEEE arithmetic alone, with contraction written out as
``tl.fma`` (and otherwise off): they give the same bits on CUDA, on ROCm and in the interpreter, so an error measured in
one holds in all. Triton has the last three nowhere, and its float32 ``exp`` is two units in the last place off, more
where the argument is large (ex2.approx on CUDA, numpy in the interpreter). Only ``erf`` is the target's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import KernelInterface

__all__ = ["TABLE", "Activation"]

_INV_FACTORIAL = tl.constexpr(tuple(1.0 / math.factorial(i) for i in range(14)))
_SQRT_HALF = tl.constexpr(0.7071067811865476)  # 1/√2
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)  # √(2/π)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)  # 1/√(2π)
_GELU_CUBIC = tl.constexpr(0.044715)  # Hendrycks & Gimpel, arXiv 1606.08415
_SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)  # Klambauer et al., arXiv 1706.02515
_SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
_SELU_PRODUCT_HIGH = tl.constexpr(1.7580993175506592)  # α·λ rounded to float32, and the rest
_SELU_PRODUCT_LOW = tl.constexpr(2.3296717444054593e-08)


# -- functions that Triton lacks ---------------------------------------------------------------------------------------


@triton.jit
def divide(numerator, denominator):
    """The quotient rounded as IEEE 754 asks, which ``/`` is in float64; in float32 on CUDA it may be two units off."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def _reduced_expm1(v):
    """(e, s) with e^v = s·(1 + e), s a power of two and |log(1 + e)| ≤ log(2)/2, by Cody & Waite and Taylor.

    The first omitted term of the series is below 2⁻²⁵ (float32, 7 terms) and 2⁻⁵⁶ (float64, 13 terms) of e. s is 0
    below −87 (float64: −708), and v is clamped above 88 (709).
    """
    DOUBLE: tl.constexpr = v.dtype == tl.float64
    TERMS: tl.constexpr = 13 if DOUBLE else 7
    LOW: tl.constexpr = -708.0 if DOUBLE else -87.0
    HIGH: tl.constexpr = 709.0 if DOUBLE else 88.0
    LOG2_HIGH: tl.constexpr = 0.6931471803691238 if DOUBLE else 0.693145751953125
    LOG2_LOW: tl.constexpr = 1.9082149292705877e-10 if DOUBLE else 1.428606820309417e-06
    clamped = tl.where(v < LOW, LOW, tl.where(v > HIGH, HIGH, v))
    k = tl.floor(tl.fma(clamped, 1.4426950408889634, 0.5))
    r = tl.fma(k, -LOG2_LOW, tl.fma(k, -LOG2_HIGH, clamped))
    series = r * 0.0 + _INV_FACTORIAL[TERMS]
    for i in tl.static_range(TERMS - 1, 0, -1):
        series = tl.fma(series, r, _INV_FACTORIAL[i])
    if DOUBLE:
        s = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        s = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return r * series, tl.where(v < LOW, 0.0, s)


@triton.jit
def exp(v):
    """e^v within one unit in the last place."""
    e, s = _reduced_expm1(v)
    return tl.where(v > (709.0 if v.dtype == tl.float64 else 88.0), float("inf"), tl.fma(e, s, s))


@triton.jit
def expm1(v):
    """e^v − 1 within one unit in the last place, without cancellation at 0. Keeps −0."""
    e, s = _reduced_expm1(v)
    difference = tl.where(s == 1.0, e, tl.fma(e, s, s - 1.0))
    return tl.where(v > (709.0 if v.dtype == tl.float64 else 88.0), float("inf"), difference)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], as 2·artanh(s) with s = u/(2 + u) ≤ 1/3: no cancellation at 0 and no ``log``.

    The first omitted term is below 2⁻²⁸ (float32, 8 terms) and 2⁻⁵⁸ (float64, 17 terms) of the result.
    """
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    s = divide(u, u + 2.0)
    s2 = s * s
    series = s * 0.0 + 1.0 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 1, 0, -1):
        series = tl.fma(series, s2, 1.0 / (2 * k - 1))
    return 2.0 * s * series


@triton.jit
def tanh_and_slope(v):
    """tanh(v) and 1 − tanh²(v) within two units in the last place of 1, from E = e^−2|v|. Keeps −0 and NaN.

    |tanh v| is (1 − E)/(1 + E) below 1/2, where expm1 saves 1 − E from cancelling, and 1 − q with q = 2E/(1 + E) above,
    where rounding of q counts half. The slope is 1 − t² below and q·(2 − q) above: no cancellation in the tails.
    """
    e, s = _reduced_expm1(-2.0 * tl.abs(v))
    small = tl.abs(v) < 0.55
    big_e = tl.fma(e, s, s)
    q = divide(tl.where(small, -tl.where(s == 1.0, e, tl.fma(e, s, s - 1.0)), 2.0 * big_e), tl.fma(e, s, s + 1.0))
    t = tl.where(small, q, 1.0 - q)
    slope = tl.where(small, tl.fma(-q, q, 1.0), q * (2.0 - q))
    return tl.where(v > 0, t, tl.where(v < 0, -t, v)), slope


@triton.jit
def sigmoid(v):
    """1/(1 + e^−v), by e^−|v| so that nothing overflows and the left tail keeps its relative accuracy."""
    e = exp(-tl.abs(v))
    return divide(tl.where(v < 0, e, 1.0), e + 1.0)


# -- activations -------------------------------------------------------------------------------------------------------


@triton.jit
def _identity(z, weight, ARGS: tl.constexpr):
    return z


@triton.jit
def _identity_backward(dy, state, weight, ARGS: tl.constexpr):
    return dy


@triton.jit
def _relu(z, weight, ARGS: tl.constexpr):
    return tl.where(z < 0, 0.0, z)  # not tl.maximum, which drops NaN


@triton.jit
def _relu_on(z, ARGS: tl.constexpr):
    return (z > 0) | (z != z)


@triton.jit
def _relu6(z, weight, ARGS: tl.constexpr):
    return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))


@triton.jit
def _relu6_on(z, ARGS: tl.constexpr):
    return ((z > 0) & (z < 6)) | (z != z)


@triton.jit
def _pass_or_zero(dy, on, weight, ARGS: tl.constexpr):
    return tl.where(on, dy, 0.0)


@triton.jit
def _leaky_relu(z, weight, ARGS: tl.constexpr):
    return tl.where(z > 0, z, z * ARGS[0])


@triton.jit
def _leaky_relu_on(z, ARGS: tl.constexpr):
    return z > 0


@triton.jit
def _leaky_relu_backward(dy, on, weight, ARGS: tl.constexpr):
    return tl.where(on, dy, dy * ARGS[0])


@triton.jit
def _prelu(z, weight, ARGS: tl.constexpr):
    return tl.where(z > 0, z, z * weight)


@triton.jit
def _prelu_backward(dy, z, weight, ARGS: tl.constexpr):
    return tl.where(z > 0, dy, dy * weight)


@triton.jit
def _prelu_weight_backward(dy, z):
    return tl.where(z > 0, 0.0, z * dy)


@triton.jit
def _elu(z, weight, ARGS: tl.constexpr):
    return tl.where(z <= 0, expm1(tl.where(z <= 0, z, 0.0)) * ARGS[0], z)


@triton.jit
def _elu_backward(dy, z, weight, ARGS: tl.constexpr):
    return tl.where(z <= 0, dy * ARGS[0] * exp(tl.where(z <= 0, z, 0.0)), dy)


@triton.jit
def _celu(z, weight, ARGS: tl.constexpr):
    return tl.where(z <= 0, expm1(tl.where(z <= 0, z, 0.0) * (1.0 / ARGS[0])) * ARGS[0], z)


@triton.jit
def _celu_backward(dy, z, weight, ARGS: tl.constexpr):
    return tl.where(z <= 0, dy * exp(tl.where(z <= 0, z, 0.0) * (1.0 / ARGS[0])), dy)


@triton.jit
def _selu(z, weight, ARGS: tl.constexpr):
    return tl.where(z <= 0, expm1(tl.where(z <= 0, z, 0.0)) * (_SELU_ALPHA * _SELU_SCALE), z * _SELU_SCALE)


@triton.jit
def _selu_backward(dy, z, weight, ARGS: tl.constexpr):
    e = exp(tl.where(z <= 0, z, 0.0))
    return tl.where(z <= 0, dy * tl.fma(e, _SELU_PRODUCT_HIGH, e * _SELU_PRODUCT_LOW), dy * _SELU_SCALE)


@triton.jit
def _gelu(z, weight, ARGS: tl.constexpr):
    if ARGS[0] == 1:  # approximate="tanh"
        t, _ = tanh_and_slope((z + z * z * z * _GELU_CUBIC) * _SQRT_2_OVER_PI)
        return 0.5 * z * (1.0 + t)
    else:
        return 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))


@triton.jit
def _gelu_backward(dy, z, weight, ARGS: tl.constexpr):
    if ARGS[0] == 1:
        t, slope = tanh_and_slope((z + z * z * z * _GELU_CUBIC) * _SQRT_2_OVER_PI)
        inner_slope = (1.0 + z * z * (3.0 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        return dy * (0.5 * (1.0 + t) + 0.5 * z * (slope * inner_slope))
    else:
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        pdf = exp(-0.5 * z * z) * _INV_SQRT_2PI
        return dy * (cdf + z * pdf)


@triton.jit
def _silu(z, weight, ARGS: tl.constexpr):
    return z * sigmoid(z)


@triton.jit
def _silu_backward(dy, z, weight, ARGS: tl.constexpr):
    s = sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def _tanh_softplus(z):
    """t = tanh(softplus(z)) and 1 − t², both free of cancellation, from e = e^−|z|.

    With n = e^z·(e^z + 2), tanh(log(1 + e^z)) = n/(n + 2); for z > 0 numerator and denominator are scaled by e^−2z.
    """
    e = exp(-tl.abs(z))
    n = tl.where(z < 0, e * (e + 2.0), 1.0 + 2.0 * e)
    two = tl.where(z < 0, 2.0, 2.0 * e * e)
    return divide(n, n + two), divide(two * (2.0 * n + two), (n + two) * (n + two))


@triton.jit
def _mish(z, weight, ARGS: tl.constexpr):
    t, _ = _tanh_softplus(z)
    return z * t


@triton.jit
def _mish_backward(dy, z, weight, ARGS: tl.constexpr):
    t, complement = _tanh_softplus(z)
    return dy * (t + z * (sigmoid(z) * complement))


@triton.jit
def _hardswish(z, weight, ARGS: tl.constexpr):
    return z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3.0)) * (1.0 / 6.0)


@triton.jit
def _hardswish_backward(dy, z, weight, ARGS: tl.constexpr):
    return tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z * (1.0 / 3.0) + 0.5), dy))


@triton.jit
def _hardsigmoid(z, weight, ARGS: tl.constexpr):
    return tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, (z + 3.0) * (1.0 / 6.0)))


@triton.jit
def _hardsigmoid_on(z, ARGS: tl.constexpr):
    return (z > -3) & (z < 3)


@triton.jit
def _hardsigmoid_backward(dy, on, weight, ARGS: tl.constexpr):
    return tl.where(on, dy * (1.0 / 6.0), 0.0)


@triton.jit
def _sigmoid(z, weight, ARGS: tl.constexpr):
    return sigmoid(z)


@triton.jit
def _sigmoid_backward(dy, z, weight, ARGS: tl.constexpr):
    s = sigmoid(z)
    return dy * ((1.0 - s) * s)


@triton.jit
def _tanh(z, weight, ARGS: tl.constexpr):
    t, _ = tanh_and_slope(z)
    return t


@triton.jit
def _tanh_backward(dy, z, weight, ARGS: tl.constexpr):
    _, slope = tanh_and_slope(z)
    return dy * slope


@triton.jit
def _softplus(z, weight, ARGS: tl.constexpr):
    v = z * ARGS[0]
    soft = tl.where(v > 0, v, 0.0) + log1p_unit(exp(-tl.abs(v)))
    return tl.where(v > ARGS[1], z, soft * (1.0 / ARGS[0]))


@triton.jit
def _softplus_backward(dy, z, weight, ARGS: tl.constexpr):
    v = z * ARGS[0]
    return tl.where(v > ARGS[1], dy, dy * sigmoid(v))


class Activation(NamedTuple):
    """The device functions of one activation; see the module's docstring."""

    forward: KernelInterface
    backward: KernelInterface
    on: KernelInterface | None = None
    weight_backward: KernelInterface | None = None


TABLE: dict[str, Activation] = {
    "identity": Activation(_identity, _identity_backward),
    "relu": Activation(_relu, _pass_or_zero, on=_relu_on),
    "relu6": Activation(_relu6, _pass_or_zero, on=_relu6_on),
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_backward, on=_leaky_relu_on),
    "prelu": Activation(_prelu, _prelu_backward, weight_backward=_prelu_weight_backward),
    "elu": Activation(_elu, _elu_backward),
    "celu": Activation(_celu, _celu_backward),
    "selu": Activation(_selu, _selu_backward),
    "gelu": Activation(_gelu, _gelu_backward),
    "silu": Activation(_silu, _silu_backward),
    "mish": Activation(_mish, _mish_backward),
    "hardswish": Activation(_hardswish, _hardswish_backward),
    "hardsigmoid": Activation(_hardsigmoid, _hardsigmoid_backward, on=_hardsigmoid_on),
    "sigmoid": Activation(_sigmoid, _sigmoid_backward),
    "tanh": Activation(_tanh, _tanh_backward),
    "softplus": Activation(_softplus, _softplus_backward),
}
