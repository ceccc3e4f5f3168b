// Norms of an array and its scaling in place: one function for each type in memory T, behind gradient_norm.cpp.
#pragma once

#include "kernel_table.h"
#include "vec.h"

namespace vgkern {
namespace {

// How far ahead of itself a walk asks for memory. The processor's own prefetching ends with each page of 4 KiB, as the
// memory of gradients has them; this one crosses into the next two, and their addresses are translated meanwhile.
template <class T>
constexpr int64_t kAhead = 8192 / static_cast<int64_t>(sizeof(T));

// Calls body(chain, x) for all vectors of x, `chain` being 0 or 1 in turn: two chains of additions run side by side.
// Missing lanes of the last vector are 0. The `following` elements behind x are those that are read next.
template <class T, class Body>
VGKERN_INLINE void each_vector(const T* x, int64_t count, int64_t following, Body body) {
  using R = Opmath<T>;
  constexpr int64_t kStep = kLanes<R>;
  constexpr std::integral_constant<int, 0> kFirst;
  constexpr std::integral_constant<int, 1> kSecond;
  const int64_t asked = count + following - kAhead<T>;
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    if (i < asked) {
      __builtin_prefetch(x + i + kAhead<T>);
      if (sizeof(T) * kStep == 64) __builtin_prefetch(x + i + kAhead<T> + kStep);  // two vectors are two cache lines
    }
    body(kFirst, load(x + i));
    body(kSecond, load(x + i + kStep));
  }
  if (i + kStep <= count) {
    body(kFirst, load(x + i));
    i += kStep;
  }
  if (i < count) body(kSecond, load(x + i, static_cast<int>(count - i), R(0)));
}

// Σ f(x), f(sum, x) being sum + the term of x, in doubles.
template <class T, class F>
VGKERN_INLINE double wide_sum(const T* x, int64_t count, int64_t following, F f) {
  using R = Opmath<T>;
  Wide<R> sums[2] = {Wide<R>(0.0), Wide<R>(0.0)};
  each_vector(x, count, following,
              [&](auto chain, Vec<R> v) VGKERN_LAMBDA { sums[chain] = f(sums[chain], Wide<R>(v)); });
  return sum(sums[0] + sums[1]);
}

// The largest magnitude; NaN if there is one.
template <class T>
VGKERN_INLINE double largest(const T* x, int64_t count, int64_t following) {
  using R = Opmath<T>;
  Vec<R> most[2] = {Vec<R>(0), Vec<R>(0)};
  Mask<R> nan[2] = {is_nan(most[0]), is_nan(most[1])};
  each_vector(x, count, following, [&](auto chain, Vec<R> v) VGKERN_LAMBDA {
    most[chain] = max(abs(v), most[chain]);  // the second where the first is NaN
    nan[chain] = nan[chain] | is_nan(v);
  });
  if (bits(nan[0] | nan[1])) return std::numeric_limits<double>::quiet_NaN();
  R lanes[kLanes<R>], result = 0;
  store(lanes, max(most[0], most[1]));
  for (R lane : lanes) result = lane > result ? lane : result;
  return static_cast<double>(result);
}

// The power of two just below x > 0, kept where its reciprocal and products with it are far from overflow.
VGKERN_INLINE double power_of_two(double x) {
  uint64_t pattern;
  std::memcpy(&pattern, &x, sizeof pattern);
  pattern &= 0x7ff0000000000000;
  std::memcpy(&x, &pattern, sizeof pattern);
  return x < 0x1p-1000 ? 0x1p-1000 : x > kLargestNormScale ? kLargestNormScale : x;
}

// x raised to p > 0, for x ≥ 0: by products and a square root where 2p is a small integer, else by the C library.
VGKERN_INLINE Vec<double> raise(Vec<double> x, double p) {
  const int twice = p <= 16 ? static_cast<int>(2 * p) : 0;
  if (twice == 2 * p) {
    Vec<double> y = twice % 2 ? sqrt(x) : Vec<double>(1.0);
    for (int i = 0; i < twice / 2; ++i) y = y * x;
    return y;
  }
  double lanes[kLanes<double>];
  store(lanes, x);
  for (double& lane : lanes) lane = __builtin_pow(lane, p);
  return load(lanes);
}

// Σ|x|ᵖ, x divided by a power of two near its largest magnitude: no power leaves float64 for any finite x.
template <class T>
NormPart scaled_norm(const T* x, int64_t count, int64_t following, NormKind kind, double p) {
  using R = Opmath<T>;
  const double most = largest(x, count, following);
  if (most == 0) return {0, 0};
  if (!(most <= std::numeric_limits<double>::max())) return {kLargestNormScale, most};
  const double scale = power_of_two(most);
  const Wide<R> reciprocal(1 / scale);
  return {scale, wide_sum(x, count, 0, [&](Wide<R> sum, Wide<R> v) VGKERN_LAMBDA {
            v = v * reciprocal;
            if (kind == kSquares) return fma(v, v, sum);
            unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA {
              const Vec<double> magnitude = abs(v.vec[i]);
              v.vec[i] = kind == kMagnitudes ? magnitude : raise(magnitude, p);
            });
            return sum + v;
          })};
}

template <class T>
NormPart norm_part(const void* data, int64_t count, int64_t following, NormKind kind, double p) {
  using R = Opmath<T>;
  const T* x = static_cast<const T*>(data);
  if (kind == kLargest) return {1, largest(x, count, following)};
  if (kind == kPowers) return scaled_norm(x, count, following, kind, p);
  double total;
  if (kind == kSquares) {
    total = wide_sum(x, count, following, [](Wide<R> sum, Wide<R> v) VGKERN_LAMBDA { return fma(v, v, sum); });
  } else {
    total = wide_sum(x, count, following, [](Wide<R> sum, Wide<R> v) VGKERN_LAMBDA {
      unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA { v.vec[i] = abs(v.vec[i]); });
      return sum + v;
    });
  }
  // The square of any float is a normal double. That of a double may not be, and takes a second look.
  if constexpr (sizeof(T) == 8) {
    if (!(total > 0x1p-900 && total < 0x1p1000)) return scaled_norm(x, count, following, kind, p);
  }
  if (!(total <= std::numeric_limits<double>::max())) return {kLargestNormScale, total};
  return {1, total};
}

// v at a precision of T, rounded towards 0 if T is narrower than v: 8 or 11 bits rounded to the nearest may exceed by
// 2⁻⁹ or 2⁻¹² what v was scaled down to.
template <class T, class R>
VGKERN_INLINE Vec<R> toward_zero(Vec<R> v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return as_real<float>(as_int(v) & IntVec<float>(-(1 << 16)));
  } else if constexpr (std::is_same_v<T, float16>) {
    const Vec<float> normal = as_real<float>(as_int(v) & IntVec<float>(-(1 << 13)));
    // Below 2⁻¹⁴ all have the unit of the smallest, which is that of a half.
    const Vec<float> magnitude = abs(v), half = 0.5f;
    const Vec<float> nearest = (magnitude + half) - half;
    const Vec<float> below = select(nearest > magnitude, nearest - Vec<float>(0x1p-24f), nearest);
    return select(magnitude < Vec<float>(0x1p-14f), with_sign(below, v), normal);
  } else {
    return v;
  }
}

// x·factor, multiplied in float64: a factor that is no normal float keeps its digits.
template <class T>
void scale_array(void* data, int64_t count, int64_t following, double factor) {
  using R = Opmath<T>;
  T* x = static_cast<T*>(data);
  const Wide<R> wide_factor(factor);
  const int64_t asked = count + following - kAhead<T>;
  for (int64_t i = 0; i < count; i += kLanes<R>) {
    if (i < asked) __builtin_prefetch(x + i + kAhead<T>, 1);
    if (count - i >= kLanes<R>) {
      store(x + i, toward_zero<T>(narrow(Wide<R>(load(x + i)) * wide_factor)));
    } else {
      const int lanes = static_cast<int>(count - i);
      store(x + i, toward_zero<T>(narrow(Wide<R>(load(x + i, lanes, R(0))) * wide_factor)), lanes);
    }
  }
}

}  // namespace
}  // namespace vgkern
