// The activation functions φ: one functor and one row of VGKERN_ACTIVATIONS each, under the names of
// vgkern/activations.py, whose order of arguments is that of `args`.
//
// R is the type of arithmetic, M the Math of simd_math.h to use. What a functor offers depends on what its
// backward pass reads:
//
//     Reads::nothing   forward(z)                        backward(dy, z) = dy
//     Reads::mask      forward(z)  on(z)  slopes()       backward(dy, on)     φ' is slopes().on or slopes().off
//     Reads::z         forward(z)  derivative(z)         backward(dy, z) if has_backward, else dy·derivative(z)
//     has_weight       forward(z, w)  derivative(z, w)   weight_gradient(dy, z): of Reads::z
//
// Values and gradients at ±inf, NaN, ±0 and the kinks are those of PyTorch's scalar code. In particular a gate that is
// shut passes 0 and not 0·dy, and NaN falls on the side of each comparison on which PyTorch has it.
#pragma once

#include "simd_math.h"

#define VGKERN_ACTIVATIONS(X) \
  X(identity, Identity)       \
  X(relu, Relu)               \
  X(relu6, Relu6)             \
  X(leaky_relu, LeakyRelu)    \
  X(prelu, PRelu)             \
  X(elu, Elu)                 \
  X(celu, Celu)               \
  X(selu, Selu)               \
  X(gelu, Gelu)               \
  X(silu, Silu)               \
  X(mish, Mish)               \
  X(hardswish, HardSwish)     \
  X(hardsigmoid, HardSigmoid) \
  X(sigmoid, Sigmoid)         \
  X(tanh, Tanh)               \
  X(softplus, Softplus)

namespace vgkern {
namespace {

enum class Reads { nothing, mask, z };

template <class R>
struct Slopes {
  R on, off;
};

template <Reads what>
struct Traits {
  static constexpr Reads reads = what;
  static constexpr bool has_backward = what != Reads::z;
  static constexpr bool has_weight = false;
  static constexpr bool costly = what == Reads::z;           // an exponential or more
  static constexpr bool passes_dy = what == Reads::nothing;  // or 0: dz is a number of dy's type
};

// ---- Piecewise linear ----------------------------------------------------------------------------------------------

template <class R, class M>
struct Identity : Traits<Reads::nothing> {
  explicit Identity(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return z; }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Vec<R>) const { return dy; }
};

template <class R, class M>
struct Relu : Traits<Reads::mask> {
  static constexpr bool passes_dy = true;

  explicit Relu(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return max(Vec<R>(0), z); }
  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return ~(z <= Vec<R>(0)); }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Mask<R> on) const { return select(on, dy, Vec<R>(0)); }
  constexpr Slopes<R> slopes() const { return {1, 0}; }
};

template <class R, class M>
struct Relu6 : Traits<Reads::mask> {
  static constexpr bool passes_dy = true;

  explicit Relu6(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return min(Vec<R>(6), max(Vec<R>(0), z)); }
  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return ~((z <= Vec<R>(0)) | (z >= Vec<R>(6))); }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Mask<R> on) const { return select(on, dy, Vec<R>(0)); }
  constexpr Slopes<R> slopes() const { return {1, 0}; }
};

template <class R, class M>
struct LeakyRelu : Traits<Reads::mask> {
  R slope;

  explicit LeakyRelu(const double* args) : slope(static_cast<R>(args[0])) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return select(on(z), z, z * slope); }
  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return z > Vec<R>(0); }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Mask<R> on) const { return select(on, dy, dy * slope); }
  constexpr Slopes<R> slopes() const { return {1, slope}; }
};

// One slope a channel, or one for all.
template <class R, class M>
struct PRelu : Traits<Reads::z> {
  static constexpr bool has_weight = true;
  static constexpr bool costly = false;

  explicit PRelu(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z, Vec<R> weight) const { return select(z > Vec<R>(0), z, weight * z); }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z, Vec<R> weight) const { return select(z > Vec<R>(0), Vec<R>(1), weight); }
  VGKERN_INLINE Vec<R> weight_gradient(Vec<R> dy, Vec<R> z) const { return select(z > Vec<R>(0), Vec<R>(0), z * dy); }
};

// min(max(z + 3, 0), 6) / 6
template <class R, class M>
struct HardSigmoid : Traits<Reads::mask> {
  explicit HardSigmoid(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return over<M>(min(Vec<R>(6), max(Vec<R>(0), z + R(3))), R(6)); }
  VGKERN_INLINE Mask<R> on(Vec<R> z) const { return (z > Vec<R>(-3)) & (z < Vec<R>(3)); }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Mask<R> on) const { return select(on, dy * slopes().on, Vec<R>(0)); }
  constexpr Slopes<R> slopes() const { return {R(1) / R(6), 0}; }
};

// z·min(max(z + 3, 0), 6) / 6. Divided, not multiplied by 1/6, so that the bits are PyTorch's.
template <class R, class M>
struct HardSwish : Traits<Reads::z> {
  static constexpr bool has_backward = true;
  static constexpr bool costly = false;

  explicit HardSwish(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return over<M>(z * min(Vec<R>(6), max(Vec<R>(0), z + R(3))), R(6)); }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const { return backward(Vec<R>(1), z); }
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Vec<R> z) const {
    const Vec<R> between = dy * over<M>(z + R(1.5), R(3));  // exactly 0 at −1.5, as PyTorch's z / 3 + 1 / 2 is
    return select(z <= Vec<R>(-3), Vec<R>(0), select(z < Vec<R>(3), between, dy));
  }
};

// ---- Exponential linear --------------------------------------------------------------------------------------------

// scale·z for z ≥ 0, else scale·alpha·expm1(inner·z): elu, celu and selu are settings of these. Products of constants
// are made in double, which leaves celu a slope of 1 at 0 in float, whatever alpha.
template <class R, class M>
struct ExponentialLinear : Traits<Reads::z> {
  R inner, positive, negative, slope;  // slope: φ' just left of 0

  ExponentialLinear(double inner, double scale, double alpha)
      : inner(static_cast<R>(inner)),
        positive(static_cast<R>(scale)),
        negative(static_cast<R>(scale * alpha)),
        slope(static_cast<R>(scale * alpha * inner)) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const {
    return select(z < Vec<R>(0), expm1<M>(z * inner) * negative, z * positive);
  }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const {
    return select(z <= Vec<R>(0), exp<M>(z * inner) * slope, Vec<R>(positive));
  }
};

template <class R, class M>
struct Elu : ExponentialLinear<R, M> {
  explicit Elu(const double* args) : ExponentialLinear<R, M>(1, 1, args[0]) {}
};

template <class R, class M>
struct Celu : ExponentialLinear<R, M> {
  explicit Celu(const double* args) : ExponentialLinear<R, M>(1 / args[0], 1, args[0]) {}
};

// Maps a normal distribution to one of mean 0 and variance 1: arXiv 1706.02515.
template <class R, class M>
struct Selu : ExponentialLinear<R, M> {
  static constexpr bool has_backward = true;
  static constexpr double kScale = 1.0507009873554804934, kAlpha = 1.6732632423543772848;

  explicit Selu(const double*) : ExponentialLinear<R, M>(1, kScale, kAlpha) {}
  // The constants to twice R's precision: what rounding takes from them, it takes from every term of a sum.
  VGKERN_INLINE Vec<R> backward(Vec<R> dy, Vec<R> z) const {
    constexpr R kScaleLow = static_cast<R>(kScale - static_cast<R>(kScale));
    constexpr R kSlopeLow = static_cast<R>(kScale * kAlpha - static_cast<R>(kScale * kAlpha));
    const Mask<R> negative = z <= Vec<R>(0);
    const Vec<R> grown = dy * select(negative, exp<M>(z), Vec<R>(1));
    return fma(grown, select(negative, Vec<R>(this->slope), Vec<R>(this->positive)),
               grown * select(negative, Vec<R>(kSlopeLow), Vec<R>(kScaleLow)));
  }
};

// ---- Smooth --------------------------------------------------------------------------------------------------------

template <class R, class M>
struct Sigmoid : Traits<Reads::z> {
  explicit Sigmoid(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return sigmoid<M>(z); }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const { return logistic<M>(z).derivative; }
};

template <class R, class M>
struct Tanh : Traits<Reads::z> {
  explicit Tanh(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return tanh<M>(z); }
  // 1 − tanh² = 4σ'(2z), which does not cancel where tanh is close to ±1
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const { return R(4) * logistic<M>(z + z).derivative; }
};

// z·σ(z)
template <class R, class M>
struct Silu : Traits<Reads::z> {
  explicit Silu(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const { return z * sigmoid<M>(z); }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const {
    const Logistic<R> s = logistic<M>(z);
    return fma(z, s.derivative, s.value);
  }
};

// z·tanh(log1p(eᶻ)) = z·n / (n + 2) with n = e²ᶻ + 2eᶻ: one exponential and one division.
template <class R, class M>
struct Mish : Traits<Reads::z> {
  // From here on n / (n + 2) is 1 in float and double, and up to twice here n² does not overflow.
  static constexpr R kSaturated = 20;

  explicit Mish(const double*) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const {
    const Vec<R> e = exp<M>(min(Vec<R>(kSaturated), z));
    const Vec<R> n = e * (e + R(2));
    return z * quotient<M>(n, n + R(2));
  }
  // n / (n + 2) + z·4eᶻ(eᶻ + 1) / (n + 2)²
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const {
    const Vec<R> bounded = min(Vec<R>(kSaturated), z);
    const Vec<R> e = exp<M>(bounded);
    const Vec<R> n = e * (e + R(2));
    const Vec<R> r = quotient<M>(Vec<R>(1), n + R(2));
    const Vec<R> factor = fma(z, Vec<R>(0), bounded);  // z where it matters, and NaN at inf, as PyTorch has it
    return r * fma(factor * (e * (e + R(1))), R(4) * r, n);
  }
};

// log1p(exp(beta·z)) / beta, and z itself where beta·z > threshold.
template <class R, class M>
struct Softplus : Traits<Reads::z> {
  R beta, reciprocal, threshold;

  explicit Softplus(const double* args)
      : beta(static_cast<R>(args[0])), reciprocal(R(1) / beta), threshold(static_cast<R>(args[1])) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const {
    const Vec<R> u = z * beta;
    return select(u > Vec<R>(threshold), z, log1p_exp<M>(u) * reciprocal);
  }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const {
    const Vec<R> u = z * beta;
    return select(u > Vec<R>(threshold), Vec<R>(1), sigmoid<M>(u));
  }
};

// z·Φ(z) with the normal distribution Φ; or its approximation z·σ(2u), u = √(2/π)·(z + 0.044715·z³), which is PyTorch's
// z·(1 + tanh u)/2 without the cancellation.
template <class R, class M>
struct Gelu : Traits<Reads::z> {
  static constexpr R kLinear = R(1.5957691216057307);   // 2·√(2/π)
  static constexpr R kCubic = R(0.071354816272600249);  // 0.044715 of it

  bool approximate;

  explicit Gelu(const double* args) : approximate(args[0] != 0) {}
  VGKERN_INLINE Vec<R> forward(Vec<R> z) const {
    return z * (approximate ? sigmoid<M>(z * fma(square(z), Vec<R>(kCubic), Vec<R>(kLinear))) : normal<M>(z).cdf);
  }
  VGKERN_INLINE Vec<R> derivative(Vec<R> z) const {
    if (approximate) {
      const Vec<R> z2 = square(z);
      const Logistic<R> s = logistic<M>(z * fma(z2, Vec<R>(kCubic), Vec<R>(kLinear)));
      return fma(z * s.derivative, fma(z2, Vec<R>(3 * kCubic), Vec<R>(kLinear)), s.value);
    }
    const Normal<R> n = normal<M>(z);
    return fma(z, n.pdf, n.cdf);
  }

 private:
  // z², bounded where σ is 0 or 1 anyhow: its overflow would make the derivative 0·inf.
  VGKERN_INLINE static Vec<R> square(Vec<R> z) { return min(Vec<R>(1000), z * z); }
};

}  // namespace
}  // namespace vgkern
