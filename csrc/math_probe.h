// simd_math.h laid open to tests: each function by name, over an array.
//
//     apply_math<bfloat16>("tanh", in, out, n)     false if there is no such function
#pragma once

#include <cstring>

#include "simd_math.h"

// name, expression in x
#define VGKERN_MATH_FUNCTIONS(X)                    \
  X(exp, exp<M>(x))                                 \
  X(expm1, expm1<M>(x))                             \
  X(tanh, tanh<M>(x))                               \
  X(sigmoid, sigmoid<M>(x))                         \
  X(logistic_derivative, logistic<M>(x).derivative) \
  X(log1p_exp, log1p_exp<M>(x))                     \
  X(normal_cdf, normal<M>(x).cdf)                   \
  X(normal_pdf, normal<M>(x).pdf)

namespace vgkern {
namespace {

template <class T>
bool apply_math(const char* name, const void* in, void* out, int64_t n) {
  using M = Math<T>;
  using R = Opmath<T>;
  const R* from = static_cast<const R*>(in);
  R* to = static_cast<R*>(out);
#define VGKERN_APPLY(function, expression)                                       \
  if (std::strcmp(name, #function) == 0) {                                       \
    for (int64_t i = 0; i < n; i += kLanes<R>) {                                 \
      const int lanes = n - i < kLanes<R> ? static_cast<int>(n - i) : kLanes<R>; \
      const Vec<R> x = load(from + i, lanes, R(0));                              \
      store(to + i, expression, lanes);                                          \
    }                                                                            \
    return true;                                                                 \
  }
  VGKERN_MATH_FUNCTIONS(VGKERN_APPLY)
#undef VGKERN_APPLY
  return false;
}

}  // namespace
}  // namespace vgkern
