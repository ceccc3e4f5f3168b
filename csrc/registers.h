// One native vector register, and the operations on it that GCC's vector extensions do not spell.
//
// The including translation unit's compiler flags choose the instruction set: AVX-512 (F, BW, DQ, VL), AVX2 with FMA
// and F16C, SSE2, NEON, or plain vector extensions on any other machine. Each set fills in the same short list:
//
//     fma  sqrt  min  max  blend  movemask  widen_low  widen_high  narrow  load_u16  store_u16  stream  stream_u16
//
// Everything lives in an anonymous namespace: the same names mean other instructions in each translation unit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VGKERN_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VGKERN_AVX2 1
#elif defined(__SSE2__)
#define VGKERN_SSE2 1
#elif defined(__aarch64__)
#define VGKERN_NEON 1
#endif

#if VGKERN_AVX512 || VGKERN_AVX2
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 of its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#elif VGKERN_SSE2
#include <emmintrin.h>
#elif VGKERN_NEON
#include <arm_neon.h>
#endif

// Inlining is not left to the compiler's judgement: a call would pass every register through memory.
#define VGKERN_INLINE inline __attribute__((always_inline))
#define VGKERN_NOINLINE __attribute__((noinline))
#define VGKERN_LAMBDA __attribute__((always_inline))

namespace vgkern {
namespace {

#if VGKERN_AVX512
constexpr int kRegisterBytes = 64;
#elif VGKERN_AVX2
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#if VGKERN_AVX512 || VGKERN_AVX2 || VGKERN_NEON
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

typedef float F32 __attribute__((vector_size(kRegisterBytes)));
typedef double F64 __attribute__((vector_size(kRegisterBytes)));
typedef int32_t I32 __attribute__((vector_size(kRegisterBytes)));
typedef int64_t I64 __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t U32 __attribute__((vector_size(kRegisterBytes)));
typedef uint64_t U64 __attribute__((vector_size(kRegisterBytes)));

// clang-format off
template <class E> struct RegisterOf;
template <> struct RegisterOf<float>   { using type = F32; using integer = int32_t; };
template <> struct RegisterOf<double>  { using type = F64; using integer = int64_t; };
template <> struct RegisterOf<int32_t> { using type = I32; using unsigned_type = U32; };
template <> struct RegisterOf<int64_t> { using type = I64; using unsigned_type = U64; };
// clang-format on

// fma(a, b, c) = a·b + c, in one rounding where the machine has it.
// min(a, b) = a < b ? a : b and max(a, b) = a > b ? a : b: b where either is NaN.
// blend(m, a, b): a in the lanes where m is set. movemask(m): lane i to bit i.
// widen_low, widen_high: the halves of a float register as doubles; narrow: the way back, rounded to nearest even.
// scale(a, n) = a·2ⁿ for integral n, rounded once; AVX-512 only.
// load_u16: as many uint16 as a float register has lanes, zero-extended; store_u16: the way back, truncated; not
// AVX-512, whose halves fill a register (vec.h). stream, stream_u16: a store past the caches, to an address that is a
// multiple of what is stored. An ordinary one where there is none of that width.

#if VGKERN_AVX512

VGKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
VGKERN_INLINE F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
VGKERN_INLINE F32 sqrt(F32 a) { return _mm512_sqrt_ps(a); }
VGKERN_INLINE F64 sqrt(F64 a) { return _mm512_sqrt_pd(a); }
VGKERN_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
VGKERN_INLINE F64 min(F64 a, F64 b) { return _mm512_min_pd(a, b); }
VGKERN_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
VGKERN_INLINE F64 max(F64 a, F64 b) { return _mm512_max_pd(a, b); }
VGKERN_INLINE F32 blend(__mmask16 m, F32 a, F32 b) { return _mm512_mask_blend_ps(m, b, a); }
VGKERN_INLINE F64 blend(__mmask8 m, F64 a, F64 b) { return _mm512_mask_blend_pd(m, b, a); }
VGKERN_INLINE F32 scale(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
VGKERN_INLINE F64 scale(F64 a, F64 n) { return _mm512_scalef_pd(a, n); }
VGKERN_INLINE F32 fraction(F32 a) { return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
VGKERN_INLINE F32 nearest_fraction(F32 a) { return _mm512_reduce_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VGKERN_INLINE F32 reciprocal_14_bits(F32 a) { return _mm512_rcp14_ps(a); }
VGKERN_INLINE F64 widen_low(F32 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
VGKERN_INLINE F64 widen_high(F32 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
VGKERN_INLINE F32 narrow(F64 low, F64 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
VGKERN_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a); }
VGKERN_INLINE void stream(double* p, F64 a) { _mm512_stream_pd(p, a); }

#elif VGKERN_AVX2

VGKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
VGKERN_INLINE F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
VGKERN_INLINE F32 sqrt(F32 a) { return _mm256_sqrt_ps(a); }
VGKERN_INLINE F64 sqrt(F64 a) { return _mm256_sqrt_pd(a); }
VGKERN_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
VGKERN_INLINE F64 min(F64 a, F64 b) { return _mm256_min_pd(a, b); }
VGKERN_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
VGKERN_INLINE F64 max(F64 a, F64 b) { return _mm256_max_pd(a, b); }
VGKERN_INLINE F32 blend(I32 m, F32 a, F32 b) { return _mm256_blendv_ps(b, a, (__m256)m); }
VGKERN_INLINE F64 blend(I64 m, F64 a, F64 b) { return _mm256_blendv_pd(b, a, (__m256d)m); }
VGKERN_INLINE unsigned movemask(I32 m) { return static_cast<unsigned>(_mm256_movemask_ps((__m256)m)); }
VGKERN_INLINE unsigned movemask(I64 m) { return static_cast<unsigned>(_mm256_movemask_pd((__m256d)m)); }
VGKERN_INLINE F64 widen_low(F32 a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
VGKERN_INLINE F64 widen_high(F32 a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
VGKERN_INLINE F32 narrow(F64 low, F64 high) { return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)); }
VGKERN_INLINE I32 load_u16(const uint16_t* p) {
  return (I32)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
VGKERN_INLINE __m128i pack_u16(I32 a) {
  const __m256i low_bits = (__m256i)(a & 0xffff);
  return _mm_packus_epi32(_mm256_castsi256_si128(low_bits), _mm256_extracti128_si256(low_bits, 1));
}
VGKERN_INLINE void store_u16(uint16_t* p, I32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack_u16(a)); }
VGKERN_INLINE void stream_u16(uint16_t* p, I32 a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), pack_u16(a)); }
VGKERN_INLINE void stream(float* p, F32 a) { _mm256_stream_ps(p, a); }
VGKERN_INLINE void stream(double* p, F64 a) { _mm256_stream_pd(p, a); }

#else

// Bitwise: with vector extensions `m ? a : b` would first compare m with zero wherever m is not seen being made.
VGKERN_INLINE F32 blend(I32 m, F32 a, F32 b) { return (F32)((m & (I32)a) | (~m & (I32)b)); }
VGKERN_INLINE F64 blend(I64 m, F64 a, F64 b) { return (F64)((m & (I64)a) | (~m & (I64)b)); }

#if VGKERN_SSE2

VGKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
VGKERN_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
VGKERN_INLINE F32 sqrt(F32 a) { return _mm_sqrt_ps(a); }
VGKERN_INLINE F64 sqrt(F64 a) { return _mm_sqrt_pd(a); }
VGKERN_INLINE F32 min(F32 a, F32 b) { return _mm_min_ps(a, b); }
VGKERN_INLINE F64 min(F64 a, F64 b) { return _mm_min_pd(a, b); }
VGKERN_INLINE F32 max(F32 a, F32 b) { return _mm_max_ps(a, b); }
VGKERN_INLINE F64 max(F64 a, F64 b) { return _mm_max_pd(a, b); }
VGKERN_INLINE unsigned movemask(I32 m) { return static_cast<unsigned>(_mm_movemask_ps((__m128)m)); }
VGKERN_INLINE unsigned movemask(I64 m) { return static_cast<unsigned>(_mm_movemask_pd((__m128d)m)); }
VGKERN_INLINE F64 widen_low(F32 a) { return _mm_cvtps_pd(a); }
VGKERN_INLINE F64 widen_high(F32 a) { return _mm_cvtps_pd(_mm_movehl_ps(a, a)); }
VGKERN_INLINE F32 narrow(F64 low, F64 high) { return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)); }
VGKERN_INLINE I32 load_u16(const uint16_t* p) {
  return (I32)_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
}
VGKERN_INLINE void store_u16(uint16_t* p, I32 a) {
  // SSE2 packs with signed saturation only: sign-extend bit 15 first, and nothing saturates.
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)a, 16), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(extended, extended));
}
VGKERN_INLINE void stream_u16(uint16_t* p, I32 a) { store_u16(p, a); }
VGKERN_INLINE void stream(float* p, F32 a) { _mm_stream_ps(p, a); }
VGKERN_INLINE void stream(double* p, F64 a) { _mm_stream_pd(p, a); }

#else

#if VGKERN_NEON
VGKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
VGKERN_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
VGKERN_INLINE F32 sqrt(F32 a) { return (F32)vsqrtq_f32((float32x4_t)a); }
VGKERN_INLINE F64 sqrt(F64 a) { return (F64)vsqrtq_f64((float64x2_t)a); }
#else
VGKERN_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
VGKERN_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
VGKERN_INLINE F32 sqrt(F32 a) {
  return F32{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
VGKERN_INLINE F64 sqrt(F64 a) { return F64{__builtin_sqrt(a[0]), __builtin_sqrt(a[1])}; }
#endif

VGKERN_INLINE F32 min(F32 a, F32 b) { return blend((I32)(a < b), a, b); }
VGKERN_INLINE F64 min(F64 a, F64 b) { return blend((I64)(a < b), a, b); }
VGKERN_INLINE F32 max(F32 a, F32 b) { return blend((I32)(a > b), a, b); }
VGKERN_INLINE F64 max(F64 a, F64 b) { return blend((I64)(a > b), a, b); }
VGKERN_INLINE unsigned movemask(I32 m) {
  const I32 bit = m & I32{1, 2, 4, 8};
  return static_cast<unsigned>(bit[0] | bit[1] | bit[2] | bit[3]);
}
VGKERN_INLINE unsigned movemask(I64 m) {
  const I64 bit = m & I64{1, 2};
  return static_cast<unsigned>(bit[0] | bit[1]);
}
VGKERN_INLINE F64 widen_low(F32 a) { return F64{a[0], a[1]}; }
VGKERN_INLINE F64 widen_high(F32 a) { return F64{a[2], a[3]}; }
VGKERN_INLINE F32 narrow(F64 low, F64 high) {
  return F32{static_cast<float>(low[0]), static_cast<float>(low[1]), static_cast<float>(high[0]),
             static_cast<float>(high[1])};
}
VGKERN_INLINE I32 load_u16(const uint16_t* p) { return I32{p[0], p[1], p[2], p[3]}; }
VGKERN_INLINE void store_u16(uint16_t* p, I32 a) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint16_t>(a[i]);
}
VGKERN_INLINE void stream_u16(uint16_t* p, I32 a) { store_u16(p, a); }
VGKERN_INLINE void stream(float* p, F32 a) { std::memcpy(p, &a, sizeof a); }
VGKERN_INLINE void stream(double* p, F64 a) { std::memcpy(p, &a, sizeof a); }

#endif
#endif

}  // namespace
}  // namespace vgkern
