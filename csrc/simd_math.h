// The transcendental functions that activations need, for Vec<float> and Vec<double>: branch-free, and the same
// algorithm for both types with polynomials of two lengths. Arguments are any: ±inf, NaN, ±0 and subnormals are right,
// overflow and underflow come where the exact value has them, and subnormal results are not flushed.
//
// Each function states its largest error in units in the last place (ULP) of the exact value. For float it was measured
// over all 2³² arguments, against float64 functions of the C library, in the SSE2, AVX2 and AVX-512 code; for double
// over 6·10⁶ random arguments of all magnitudes, against 80-bit long double. "No fma" is the SSE2 code, where it is
// worse. tests/test_simd_math.py holds the same bounds.
#pragma once

#include "vec.h"

namespace vgkern {
namespace {

// Polynomials, the highest power first: minimax for the relative error of the function they serve, found with a Remez
// exchange in mpmath at 50 digits. In float, kExp, kLog1p and kTail were rounded one coefficient at a time from the
// lowest power up, the rest being fitted anew each time; the others were fitted once and rounded.
//
// T is the tensors' type in memory.
template <class T>
struct Math;

template <>
struct Math<float> {
  static constexpr bool kCoarse = false, kBareReciprocal = false;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr int kExcess = 64;  // an exponent that keeps 2ⁿ a normal number where eˣ no longer is one
  static constexpr float kUndoExcess = 0x1p-64f;
  static constexpr float kShifter = 0x1.8p23f;  // adding it rounds to an integer and leaves that in the lowest bits
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2 = 0x1.62e43p-1f;
  static constexpr float kLn2High = 0x1.62e4p-1f;  // few bits, so that its products with integers are exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;

  static constexpr float kExpMin = -104;    // exp is 0 from here down,
  static constexpr float kExpMax = 89;      // and inf from here up
  static constexpr float kExpm1Min = -20;   // expm1 is −1 from here down,
  static constexpr float kTiny = 0x1p-25f;  // and expm1(x) is x where |x| is below this
  static constexpr float kTanhMax = 20;     // tanh is 1 from half of this on
  static constexpr float kNormalMax = 15;   // Φ(−x) is 0 from here on

  // (eˣ − 1 − x) / x² for |x| ≤ ln(2)/2
  static constexpr float kExp[] = {1.3835646e-03f, 8.367124e-03f, 4.1667756e-02f, 1.6666539e-01f, 4.9999997e-01f};
  // (log(1 + x) − x) / x² for 0 ≤ x ≤ 1
  static constexpr float kLog1p[] = {-3.2904686e-03f, 2.0086242e-02f,  -5.745723e-02f, 1.0661128e-01f, -1.534488e-01f,
                                     1.9692102e-01f,  -2.4958019e-01f, 3.3330464e-01f, -4.999993e-01f};
  // (tanh(√u) − √u) / √u³ for 0 ≤ u ≤ 0.55²
  static constexpr float kTanh[] = {-6.2742387e-03f, 2.107168e-02f, -5.3852312e-02f, 1.3332586e-01f, -3.3333316e-01f};
  // Φ(−a)·exp(a²/2)·(a + kTailOffset) as a polynomial of a / (a + kTailOffset)
  static constexpr float kTailOffset = 2.75f;
  static constexpr float kTail[] = {-3.8428497e-02f, 6.611786e-02f,  5.0163295e-02f, -7.5311795e-02f, -9.561146e-02f,
                                    -9.90911e-02f,   3.1798747e-01f, 5.400748e-01f,  -1.6419969e+00f, 1.375f};
};

template <>
struct Math<double> {
  static constexpr bool kCoarse = false, kBareReciprocal = false;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr int kExcess = 512;
  static constexpr double kUndoExcess = 0x1p-512;
  static constexpr double kShifter = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefa3000p-1;
  static constexpr double kLn2Low = 0x1.3de6af278ece6p-42;

  static constexpr double kExpMin = -746;
  static constexpr double kExpMax = 710;
  static constexpr double kExpm1Min = -40;
  static constexpr double kTiny = 0x1p-54;
  static constexpr double kTanhMax = 40;
  static constexpr double kNormalMax = 39;

  static constexpr double kExp[] = {2.505378031525574e-08,  2.7626038237375643e-07, 2.755740752541955e-06,
                                    2.4801505272847236e-05, 1.9841269719026385e-04, 1.3888888931565743e-03,
                                    8.333333333389543e-03,  4.166666666657675e-02,  1.6666666666666588e-01,
                                    5.000000000000006e-01};
  static constexpr double kLog1p[] = {
      2.5329991999276178e-05, -2.9176176803318244e-04, 1.5957438187728335e-03, -5.543117257003516e-03,
      1.3838607089780635e-02, -2.674398708924082e-02,  4.230013434568557e-02,  -5.75020190896995e-02,
      7.035541498340044e-02,  -8.081210871617839e-02,  9.013153375957485e-02,  -9.981014857505431e-02,
      1.1107505990866964e-01, -1.2499479614381437e-01, 1.428565889781182e-01,  -1.666666249859202e-01,
      1.9999999791330114e-01, -2.499999999367689e-01,  3.333333333323505e-01,  -4.999999999999946e-01};
  static constexpr double kTanh[] = {5.102148186568429e-05,   -2.1030241281137535e-04, 5.791370289655777e-04,
                                     -1.4532167627392088e-03, 3.5917196989360372e-03,  -8.86319450427096e-03,
                                     2.186948597481227e-02,   -5.3968253876079224e-02, 1.3333333333168707e-01,
                                     -3.3333333333332316e-01};
  static constexpr double kTailOffset = 3.5;
  static constexpr double kTail[] = {
      1.2558053775752868e-02,  -1.2372985076714384e-01, 5.586028088238595e-01,   -1.5381448713109451e+00,
      2.9069182167325662e+00,  -4.026501021981603e+00,  4.253777627147553e+00,   -3.507387939862784e+00,
      2.292452188340916e+00,   -1.204213742254941e+00,  5.018232853129991e-01,   -1.6548886112623626e-01,
      6.0515629680657386e-02,  1.1840492206981743e-03,  -2.040757632700616e-02,  -6.143000188952728e-02,
      -1.4212682106282438e-02, 1.6841146810479235e-01,  1.8809956494289504e-01,  -4.8120113699568495e-01,
      -7.103041223035202e-01,  2.6946641301648464e+00,  -3.1370429349175524e+00, 1.75};
};

// What half-precision tensors are computed with, which have few digits to fill: polynomials as short as these need, and
// minimax too, by Lawson's iteration in float64; the quotient of tanh by the same, its denominator's weight of the step
// before.
//
// float16: results good to 1.6e-5, a thirtieth of its unit in the last place.
template <>
struct Math<float16> : Math<float> {
  static constexpr bool kCoarse = true;
  static constexpr float kExp[] = {4.1277748e-02f, 1.6753514e-01f, 5.0005114e-01f};
  // 2ˣ for 0 ≤ x ≤ 1
  static constexpr float kExp2[] = {1.3534169e-02f, 5.201146e-02f, 2.4144275e-01f, 6.9300383e-01f, 1.0000026e+00f};
  static constexpr float kExp2Max = 128.25f;  // 2ˣ is inf from here up
  // (2ˣ − 1) / x for |x| ≤ 1/2
  static constexpr float kExp2m1[] = {9.618111e-03f, 5.5837288e-02f, 2.4023253e-01f, 6.9313687e-01f};
  static constexpr float kLog1p[] = {-2.4734516e-02f, 1.0359258e-01f, -2.1240416e-01f, 3.2622609e-01f, -4.9953946e-01f};
  // tanh(√u) / √u as a quotient, up to √u = kTanhMax, whose tanh is 1 but for 5e-6
  static constexpr float kTanhMax = 6.5f;
  static constexpr float kTanhOver[] = {4.2760021e-06f, 2.349169e-03f, 1.2382975e-01f, 9.999994e-01f};
  static constexpr float kTanhUnder[] = {1.5023557e-04f, 2.1408131e-02f, 4.5715848e-01f, 1.0f};
  // Φ(−a)·exp(a²/2)·(a + kTailOffset) as a polynomial of 1 / (a + kTailOffset)
  static constexpr float kTailOffset = 3.8f;
  static constexpr float kTail[] = {-7.9040479e+02f, 6.1796906e+02f, -6.1441578e+01f, 3.1021561e+01f,
                                    4.4087262e+00f,  1.5511246e+00f, 3.9841157e-01f};
};

// bfloat16: results good to 2.5e-4, a sixteenth of its unit in the last place at the most. For the forward.
template <>
struct Math<bfloat16> : Math<float16> {
  static constexpr bool kBareReciprocal = true;  // the processor's, of 14 bits, without a step of Newton's
  static constexpr float kExp2[] = {7.8024521e-02f, 2.2606716e-01f, 6.958335e-01f, 9.999252e-01f};
  static constexpr float kLog1p[] = {4.3106232e-02f, -1.6136299e-01f, 3.0922472e-01f, -4.9777448e-01f};
  static constexpr float kTanhMax = 5;  // but for 1e-4
  static constexpr float kTanhOver[] = {6.7056593e-04f, 1.0241771e-01f, 9.9994808e-01f};
  static constexpr float kTanhUnder[] = {1.2819894e-02f, 4.3543252e-01f, 1.0f};
  static constexpr float kTailOffset = 2.7f;
  static constexpr float kTail[] = {-1.2779186e+01f, 1.0956583e+01f, 1.5578479e+00f, 1.141633e+00f, 3.9734843e-01f};
};

// a / b, for b in 1 … 2⁶⁰ or NaN where M is coarse.
template <class M, class R>
VGKERN_INLINE Vec<R> quotient(Vec<R> a, Vec<R> b) {
#if VGKERN_AVX512
  if constexpr (M::kCoarse) {
    const Vec<R> r = reciprocal_14_bits(b);
    return a * (M::kBareReciprocal ? r : fma(r, fma(-b, r, Vec<R>(1)), r));
  }
#endif
  return a / b;
}

// a / b for a constant b.
template <class M, class R>
VGKERN_INLINE Vec<R> over(Vec<R> a, R b) {
  if constexpr (M::kCoarse) return a * (R(1) / b);
  return a / b;
}

template <class R, int N>
VGKERN_INLINE Vec<R> polynomial(Vec<R> x, const R (&coefficients)[N]) {
  Vec<R> p = coefficients[0];
  unroll<N - 1>([&](auto i) VGKERN_LAMBDA { p = fma(p, x, Vec<R>(coefficients[i + 1])); });
  return p;
}

// −|x|
template <class R>
VGKERN_INLINE Vec<R> negative_abs(Vec<R> x) {
  return as_real<R>(as_int(x) | sign_bit<R>());
}

// ---- Exponentials --------------------------------------------------------------------------------------------------

// eˣ = 2ⁿ·(1 + p): n is an integer, |p| < 0.42, and `exponent` holds n + bias in its lowest bits.
template <class R>
struct Exponential {
  IntVec<R> exponent;
  Vec<R> n, p;
};

// |x| below 1000, or NaN. `rest`, if given, is a small number to be added to x without rounding.
template <class M, class R, class... Rest>
VGKERN_INLINE Exponential<R> split_exp(Vec<R> x, R bias, Rest... rest) {
  const Vec<R> shifter = M::kShifter + bias;
  const Vec<R> shifted = fma(x, Vec<R>(M::kLog2E), shifter);
  const Vec<R> n = shifted - shifter;
  Vec<R> r;
  if constexpr (M::kCoarse) {
    r = fma(n, Vec<R>(-M::kLn2), x);
  } else {
    r = (fma(n, Vec<R>(-M::kLn2Low), fma(n, Vec<R>(-M::kLn2High), x)) + ... + rest);
  }
  return {as_int(shifted), n, fma(r * r, polynomial(r, M::kExp), r)};
}

#if VGKERN_AVX512
// 2ˣ for every x, from its fraction.
template <class M>
VGKERN_INLINE Vec<float> exp2_coarse(Vec<float> x) {
  return scale(polynomial(fraction(x), M::kExp2), x);
}

template <class M>
VGKERN_INLINE Vec<float> exp_coarse(Vec<float> x) {
  return exp2_coarse<M>(x * Vec<float>(M::kLog2E));
}
#endif

// exp(x + rest) for kNormalMin ≤ x ≤ 40 or NaN.
template <class M, class R, class... Rest>
VGKERN_INLINE Vec<R> exp_in_range(Vec<R> x, Rest... rest) {
#if VGKERN_AVX512
  if constexpr (M::kCoarse) return exp_coarse<M>(x);
  const Exponential<R> e = split_exp<M>(x, R(0), rest...);
  return scale(e.p + R(1), e.n);
#else
  // Too big by 2^kExcess at first, so that the power is a normal number; subnormal results are rounded once.
  const Exponential<R> e = split_exp<M>(x, R(M::kBias + M::kExcess), rest...);
  const Vec<R> power = as_real<R>(e.exponent << M::kMantissaBits);
  return fma(power, e.p, power) * M::kUndoExcess;
#endif
}

// eˣ. Float ≤ 1.04 ULP, double ≤ 1.05.
template <class M, class R>
VGKERN_INLINE Vec<R> exp(Vec<R> x) {
#if VGKERN_AVX512
  if constexpr (M::kCoarse) return exp_coarse<M>(x);
#endif
  x = min(Vec<R>(M::kExpMax), max(Vec<R>(M::kExpMin), x));
#if VGKERN_AVX512
  const Exponential<R> e = split_exp<M>(x, R(0));
  return scale(e.p + R(1), e.n);
#else
  // 2ⁿ in two factors, each of which is a normal number.
  const Exponential<R> e = split_exp<M>(x, R(2 * M::kBias));
  const IntVec<R> half = e.exponent >> 1;
  const Vec<R> first = as_real<R>(half << M::kMantissaBits);
  const Vec<R> second = as_real<R>((e.exponent - half) << M::kMantissaBits);
  return fma(first, e.p, first) * second;
#endif
}

// e^−|x|
template <class M, class R>
VGKERN_INLINE Vec<R> exp_negative_abs(Vec<R> x) {
#if VGKERN_AVX512
  if constexpr (M::kCoarse) return exp_coarse<M>(negative_abs(x));
#endif
  return exp_in_range<M>(max(Vec<R>(M::kExpMin), negative_abs(x)));
}

// eˣ − 1. Float ≤ 1.56 ULP (no fma 1.67), double ≤ 2.13 (2.23).
template <class M, class R>
VGKERN_INLINE Vec<R> expm1(Vec<R> x) {
#if VGKERN_AVX512
  if constexpr (M::kCoarse) {
    const Vec<R> t = min(Vec<R>(M::kExp2Max), x * R(M::kLog2E)), rest = nearest_fraction(t);
    const Vec<R> half = scale(Vec<R>(0.5), t - rest);  // of 2ⁿ, which itself may overflow
    const Vec<R> y = fma(half, rest * polynomial(rest, M::kExp2m1), half - R(0.5));
    return y + y;
  }
#endif
  const Vec<R> bounded = min(Vec<R>(M::kExpMax), max(Vec<R>(M::kExpm1Min), x));
  const Exponential<R> e = split_exp<M>(bounded, R(M::kBias - 1));
  const Vec<R> half = as_real<R>(e.exponent << M::kMantissaBits);  // of 2ⁿ, which itself may overflow
  const Vec<R> y = fma(half, e.p, half - R(0.5));
  return select(abs(x) < Vec<R>(M::kTiny), x, y + y);
}

// tanh |x| = 1 − 2 / (e^2|x| + 1), but not for small x, where it would cancel: there it is a polynomial.
// Float ≤ 1.35 ULP (no fma 1.37), double ≤ 1.33.
template <class M, class R>
VGKERN_INLINE Vec<R> tanh(Vec<R> x) {
  if constexpr (M::kCoarse) {
    const Vec<R> bounded = min(Vec<R>(M::kTanhMax), max(Vec<R>(-M::kTanhMax), x)), square = bounded * bounded;
    return quotient<M>(bounded * polynomial(square, M::kTanhOver), polynomial(square, M::kTanhUnder));
  } else {
    const Vec<R> a = abs(x);
    const Exponential<R> e = split_exp<M>(min(Vec<R>(M::kTanhMax), a + a), R(M::kBias));
    const Vec<R> power = as_real<R>(e.exponent << M::kMantissaBits);
    const Vec<R> large = R(1) - R(2) / fma(power, e.p, power + R(1));
    const Vec<R> square = x * x;
    const Vec<R> small = fma(a * square, polynomial(square, M::kTanh), a);
    return with_sign(select(a < Vec<R>(R(0.55)), small, large), x);
  }
}

// ---- The logistic function -----------------------------------------------------------------------------------------

template <class R>
struct Logistic {
  Vec<R> value, derivative;
};

// σ(x) = 1 / (1 + e⁻ˣ) and σ'(x) = σ(x)·σ(−x). With e = e^−|x| and s = σ(−|x|) = e / (1 + e), σ(x) is 1 − s or e − e·s:
// so the errors of the sum and the quotient count for less than in s itself. Value: float ≤ 1.67 ULP (no fma 1.87),
// double ≤ 1.61 (1.84). Derivative: float ≤ 2.42, double ≤ 2.30.
template <class M, class R>
VGKERN_INLINE Logistic<R> logistic(Vec<R> x) {
  const Vec<R> e = exp_negative_abs<M>(x);
  if constexpr (M::kCoarse) {
    const Vec<R> r = quotient<M>(Vec<R>(1), e + R(1)), s = e * r;
    return {select(x >= Vec<R>(0), r, s), s * r};
  }
  const Vec<R> s = quotient<M>(e, e + R(1));
  const Vec<R> m = select(x >= Vec<R>(0), Vec<R>(1), e);
  const Vec<R> smaller = fma(-e, s, e);
  return {fma(-m, s, m), fma(-smaller, smaller, smaller)};
}

template <class M, class R>
VGKERN_INLINE Vec<R> sigmoid(Vec<R> x) {
#if VGKERN_AVX512
  if constexpr (M::kBareReciprocal) {
    // 2⁻²⁴ / (2⁻²⁴ + e⁻ˣ·2⁻²⁴), of which nothing overflows where the value is not 0.
    constexpr float kShare = 0x1p-24f;
    const Vec<R> e = exp2_coarse<M>(fma(x, Vec<R>(-M::kLog2E), Vec<R>(-24)));
    return reciprocal_14_bits(e + kShare) * kShare;
  }
#endif
  return logistic<M>(x).value;
}

// log(1 + eˣ), the integral of σ. Float ≤ 1.87 ULP (no fma 2.28), double ≤ 1.91 (2.43).
template <class M, class R>
VGKERN_INLINE Vec<R> log1p_exp(Vec<R> x) {
  const Vec<R> e = exp_negative_abs<M>(x);
  return fma(e * e, polynomial(e, M::kLog1p), e) + max(Vec<R>(0), x);
}

// ---- The normal distribution ---------------------------------------------------------------------------------------

template <class R>
struct Normal {
  Vec<R> cdf, pdf;
};

// a·b − product without error, for the rounded product.
template <class M, class R>
VGKERN_INLINE Vec<R> product_error(Vec<R> a, Vec<R> b, Vec<R> product) {
  if constexpr (kHasFma) return fma(a, b, -product);
  constexpr int kCut = M::kMantissaBits / 2 + 1;  // products of what is left or cut off are not rounded
  const Vec<R> a_high = as_real<R>((as_int(a) >> kCut) << kCut), a_low = a - a_high;
  const Vec<R> b_high = as_real<R>((as_int(b) >> kCut) << kCut), b_low = b - b_high;
  return a_high * b_high - product + a_high * b_low + a_low * b_high + a_low * b_low;
}

// Φ(x) = (1 + erf(x / √2)) / 2, and its derivative exp(−x²/2) / √(2π). With a = |x|, Φ(−a) is exp(−a²/2) times a
// function that varies slowly: the tail below 0 keeps its digits, where 1 + erf cancels to nothing.
//
// Φ: float ≤ 5.37 ULP (no fma 6.00), double ≤ 7.31 (10.6), reached where Φ is below 1e-19. Derivative: float ≤ 2.19,
// double ≤ 2.24.
template <class M, class R>
VGKERN_INLINE Normal<R> normal(Vec<R> x) {
  const Vec<R> a = min(Vec<R>(M::kNormalMax), abs(x));
  const Vec<R> half = a * R(-0.5);
  const Vec<R> t = quotient<M>(Vec<R>(1), a + M::kTailOffset);
  Vec<R> e, tail;
  if constexpr (M::kCoarse) {
    e = exp_in_range<M>(half * a);
    tail = e * (t * polynomial(t, M::kTail));
  } else {
    const Vec<R> exponent = half * a;
    e = exp_in_range<M>(exponent, product_error<M>(half, a, exponent));
    tail = e * (t * polynomial(a * t, M::kTail));
  }
  return {select(x < Vec<R>(0), tail, R(1) - tail), e * R(0.39894228040143267794)};
}

}  // namespace
}  // namespace vgkern
