// simd_math.h laid open to tests: each function by name, over an array.
//
//     apply_math<float>("tanh", in, out, n)     false if there is no such function
//
// An instruction set's translation unit instantiates it for float and double.
#pragma once

#include <cstring>

#include "simd_math.h"

// name, expression in x
#define VGKERN_MATH_FUNCTIONS(X)                 \
  X(exp, exp(x))                                 \
  X(expm1, expm1(x))                             \
  X(tanh, tanh(x))                               \
  X(sigmoid, sigmoid(x))                         \
  X(logistic_derivative, logistic(x).derivative) \
  X(log1p_exp, log1p_exp(x))                     \
  X(normal_cdf, normal(x).cdf)                   \
  X(normal_pdf, normal(x).pdf)

namespace vgkern {
namespace {

template <class R>
bool apply_math(const char* name, const R* in, R* out, int64_t n) {
#define VGKERN_APPLY(function, expression)                                       \
  if (std::strcmp(name, #function) == 0) {                                       \
    for (int64_t i = 0; i < n; i += kLanes<R>) {                                 \
      const int lanes = n - i < kLanes<R> ? static_cast<int>(n - i) : kLanes<R>; \
      const Vec<R> x = load(in + i, lanes, R(0));                                \
      store(out + i, expression, lanes);                                         \
    }                                                                            \
    return true;                                                                 \
  }
  VGKERN_MATH_FUNCTIONS(VGKERN_APPLY)
#undef VGKERN_APPLY
  return false;
}

}  // namespace
}  // namespace vgkern
