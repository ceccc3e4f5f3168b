// Vectors whose width is the same in every instruction set: 16 floats or 8 doubles, in one AVX-512 register, two AVX2
// registers or four of 16 bytes. A kernel is written once, and a tail is the body's code with the missing lanes filled
// in, so that the two agree to the bit.
//
//     Vec<R>      16 floats or 8 doubles               Mask<R>   a truth value for each lane of a Vec<R>
//     IntVec<R>   as many int32 or int64               Wide<R>   the lanes of a Vec<R> as doubles, for sums
//
// load and store convert between the type in memory, T, and the type of arithmetic, R = Opmath<T>.
#pragma once

#include <limits>
#include <type_traits>
#include <utility>

#include "registers.h"

namespace vgkern {
namespace {

constexpr int kParts = 64 / kRegisterBytes;  // registers of a vector

template <class R>
constexpr int kLanes = 64 / static_cast<int>(sizeof(R));

template <class F, int... I>
VGKERN_INLINE void unroll([[maybe_unused]] F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), …, f(N−1) with compile-time constants: a loop would be left to the optimiser to unroll, or not.
template <int N, class F>
VGKERN_INLINE void unroll(F f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// The vector whose register i is f(i).
template <class V, class F>
VGKERN_INLINE V each(F f) {
  V v;
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { v.reg[i] = f(i); });
  return v;
}

// clang-format off
#define VGKERN_LANEWISE(V, op)                                                     \
  friend VGKERN_INLINE V operator op(V a, V b) {                                   \
    return each<V>([&](auto i) VGKERN_LAMBDA { return a.reg[i] op b.reg[i]; });    \
  }                                                                                \
  friend VGKERN_INLINE V& operator op##=(V& a, V b) { return a = a op b; }
// clang-format on

// ---- Integers ------------------------------------------------------------------------------------------------------

// As many integers as Vec<R> has lanes, of R's size. Arithmetic wraps around; >> shifts in zeros.
template <class R>
struct IntVec {
  using Element = typename RegisterOf<R>::integer;
  using Register = typename RegisterOf<Element>::type;
  using Unsigned = typename RegisterOf<Element>::unsigned_type;

  Register reg[kParts];

  IntVec() = default;
  VGKERN_INLINE IntVec(Element a) {
    unroll<kParts>([&](auto i) VGKERN_LAMBDA { reg[i] = a - Register{}; });
  }

  // Unsigned where signed arithmetic could overflow, which is undefined.
  friend VGKERN_INLINE IntVec operator+(IntVec a, IntVec b) {
    return each<IntVec>([&](auto i) VGKERN_LAMBDA { return (Register)((Unsigned)a.reg[i] + (Unsigned)b.reg[i]); });
  }
  friend VGKERN_INLINE IntVec operator-(IntVec a, IntVec b) {
    return each<IntVec>([&](auto i) VGKERN_LAMBDA { return (Register)((Unsigned)a.reg[i] - (Unsigned)b.reg[i]); });
  }
  VGKERN_LANEWISE(IntVec, &)
  VGKERN_LANEWISE(IntVec, |)
  VGKERN_LANEWISE(IntVec, ^)
  friend VGKERN_INLINE IntVec operator<<(IntVec a, int n) {
    return each<IntVec>([&](auto i) VGKERN_LAMBDA { return (Register)((Unsigned)a.reg[i] << n); });
  }
  friend VGKERN_INLINE IntVec operator>>(IntVec a, int n) {
    return each<IntVec>([&](auto i) VGKERN_LAMBDA { return (Register)((Unsigned)a.reg[i] >> n); });
  }
};

// ---- Masks ---------------------------------------------------------------------------------------------------------

#if VGKERN_AVX512

// Mask registers: one bit a lane.
template <class R>
struct Mask {
  using Register = std::conditional_t<kLanes<R> == 16, __mmask16, __mmask8>;
  Register k;

  friend VGKERN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<Register>(a.k & b.k)}; }
  friend VGKERN_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<Register>(a.k | b.k)}; }
  friend VGKERN_INLINE Mask operator^(Mask a, Mask b) { return {static_cast<Register>(a.k ^ b.k)}; }
  friend VGKERN_INLINE Mask operator~(Mask a) { return {static_cast<Register>(~a.k)}; }
};

#else

// Integers that are all ones or all zeros.
template <class R>
struct Mask : IntVec<R> {
  using Register = typename IntVec<R>::Register;

  friend VGKERN_INLINE Mask operator~(Mask a) {
    return each<Mask>([&](auto i) VGKERN_LAMBDA { return ~a.reg[i]; });
  }
  VGKERN_LANEWISE(Mask, &)
  VGKERN_LANEWISE(Mask, |)
  VGKERN_LANEWISE(Mask, ^)
};

#endif

// ---- Floating point ------------------------------------------------------------------------------------------------

template <class R>
struct Vec {
  using Register = typename RegisterOf<R>::type;

  Register reg[kParts];

  Vec() = default;
  VGKERN_INLINE Vec(R a) {
    unroll<kParts>([&](auto i) VGKERN_LAMBDA { reg[i] = a - Register{}; });  // a − 0 is a, for a = −0 too
  }

  VGKERN_LANEWISE(Vec, +)
  VGKERN_LANEWISE(Vec, -)
  VGKERN_LANEWISE(Vec, *)
  VGKERN_LANEWISE(Vec, /)
  friend VGKERN_INLINE Vec operator-(Vec a) {
    return each<Vec>([&](auto i) VGKERN_LAMBDA { return -a.reg[i]; });
  }

  // As IEEE 754 has it: NaN is unequal to all, and every other comparison with it is false.
#if VGKERN_AVX512
#define VGKERN_COMPARISON(op, predicate)                                            \
  friend VGKERN_INLINE Mask<R> operator op(Vec a, Vec b) {                          \
    if constexpr (kLanes<R> == 16) {                                                \
      return {_mm512_cmp_ps_mask((__m512)a.reg[0], (__m512)b.reg[0], predicate)};   \
    } else {                                                                        \
      return {_mm512_cmp_pd_mask((__m512d)a.reg[0], (__m512d)b.reg[0], predicate)}; \
    }                                                                               \
  }
#else
#define VGKERN_COMPARISON(op, predicate)                                                                            \
  friend VGKERN_INLINE Mask<R> operator op(Vec a, Vec b) {                                                          \
    return each<Mask<R>>([&](auto i) VGKERN_LAMBDA { return (typename Mask<R>::Register)(a.reg[i] op b.reg[i]); }); \
  }
#endif
  VGKERN_COMPARISON(<, _CMP_LT_OQ)
  VGKERN_COMPARISON(<=, _CMP_LE_OQ)
  VGKERN_COMPARISON(>, _CMP_GT_OQ)
  VGKERN_COMPARISON(>=, _CMP_GE_OQ)
  VGKERN_COMPARISON(==, _CMP_EQ_OQ)
  VGKERN_COMPARISON(!=, _CMP_NEQ_UQ)
#undef VGKERN_COMPARISON
};

#undef VGKERN_LANEWISE

// a·b + c: one rounding where kHasFma, else two.
template <class R>
VGKERN_INLINE Vec<R> fma(Vec<R> a, Vec<R> b, Vec<R> c) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return fma(a.reg[i], b.reg[i], c.reg[i]); });
}

template <class R>
VGKERN_INLINE Vec<R> sqrt(Vec<R> a) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return sqrt(a.reg[i]); });
}

#if VGKERN_AVX512
// a·2^⌊n⌋, rounded once.
template <class R>
VGKERN_INLINE Vec<R> scale(Vec<R> a, Vec<R> n) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return scale(a.reg[i], n.reg[i]); });
}
#endif

#if VGKERN_AVX512
// a − ⌊a⌋; 0 for ±inf.
VGKERN_INLINE Vec<float> fraction(Vec<float> a) {
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA { return fraction(a.reg[i]); });
}

// a less the integer next to it; 0 for ±inf.
VGKERN_INLINE Vec<float> nearest_fraction(Vec<float> a) {
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA { return nearest_fraction(a.reg[i]); });
}

// 1 / a but for a relative error of 2⁻¹⁴.
VGKERN_INLINE Vec<float> reciprocal_14_bits(Vec<float> a) {
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA { return reciprocal_14_bits(a.reg[i]); });
}
#endif

// a < b ? a : b, so b where either is NaN.
template <class R>
VGKERN_INLINE Vec<R> min(Vec<R> a, Vec<R> b) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return min(a.reg[i], b.reg[i]); });
}

// a > b ? a : b, so b where either is NaN.
template <class R>
VGKERN_INLINE Vec<R> max(Vec<R> a, Vec<R> b) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return max(a.reg[i], b.reg[i]); });
}

// m ? a : b
template <class R>
VGKERN_INLINE Vec<R> select(Mask<R> m, Vec<R> a, Vec<R> b) {
#if VGKERN_AVX512
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return blend(m.k, a.reg[i], b.reg[i]); });
#else
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return blend(m.reg[i], a.reg[i], b.reg[i]); });
#endif
}

// The same bits read as the other type.
template <class R>
VGKERN_INLINE IntVec<R> as_int(Vec<R> a) {
  return each<IntVec<R>>([&](auto i) VGKERN_LAMBDA { return (typename IntVec<R>::Register)a.reg[i]; });
}
template <class R>
VGKERN_INLINE Vec<R> as_real(IntVec<R> a) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return (typename Vec<R>::Register)a.reg[i]; });
}

// The value as the other type; int64 only within ±2⁵¹, since few machines convert it.
VGKERN_INLINE Vec<float> to_real(IntVec<float> a) {
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA { return __builtin_convertvector(a.reg[i], F32); });
}
VGKERN_INLINE Vec<double> to_real(IntVec<double> a) {
  const Vec<double> shifter = 0x1.8p52;  // its unit in the last place is 1
  return as_real(a + as_int(shifter)) - shifter;
}

template <class R>
VGKERN_INLINE IntVec<R> sign_bit() {
  return std::numeric_limits<typename IntVec<R>::Element>::min();
}

template <class R>
VGKERN_INLINE Vec<R> abs(Vec<R> a) {
  return as_real<R>(as_int(a) & IntVec<R>(std::numeric_limits<typename IntVec<R>::Element>::max()));
}

// The magnitude of a, which must not be negative, with the sign of b.
template <class R>
VGKERN_INLINE Vec<R> with_sign(Vec<R> a, Vec<R> b) {
  return as_real<R>(as_int(a) | (as_int(b) & sign_bit<R>()));
}

template <class R>
VGKERN_INLINE Mask<R> is_nan(Vec<R> a) {
  return a != a;
}

template <class R>
VGKERN_INLINE Mask<R> is_finite(Vec<R> a) {
  return abs(a) <= Vec<R>(std::numeric_limits<R>::max());
}

// The sum over the lanes, halves folded onto each other: the same order on every machine.
template <class R>
VGKERN_INLINE R sum(Vec<R> a) {
  R lane[kLanes<R>];
  std::memcpy(lane, a.reg, sizeof lane);
  unroll<kLanes<R> / 2>([&](auto i) VGKERN_LAMBDA { lane[i] += lane[i + kLanes<R> / 2]; });
  unroll<kLanes<R> / 4>([&](auto i) VGKERN_LAMBDA { lane[i] += lane[i + kLanes<R> / 4]; });
  unroll<kLanes<R> / 8>([&](auto i) VGKERN_LAMBDA { lane[i] += lane[i + kLanes<R> / 8]; });
  if constexpr (kLanes<R> == 16) lane[0] += lane[1];
  return lane[0];
}

// ---- Masks and bits ------------------------------------------------------------------------------------------------

// Lane i as bit i.
template <class R>
VGKERN_INLINE unsigned bits(Mask<R> m) {
#if VGKERN_AVX512
  return m.k;
#else
  unsigned all = 0;
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { all |= movemask(m.reg[i]) << (i * (kLanes<R> / kParts)); });
  return all;
#endif
}

// Lane i is value(i).
template <class V, class F>
VGKERN_INLINE V lanes_of(F value) {
  constexpr int kRegisterLanes = sizeof(V::reg[0]) / sizeof(V::reg[0][0]);
  return each<V>([&](auto part) VGKERN_LAMBDA {
    typename V::Register reg{};
    unroll<kRegisterLanes>([&](auto i) VGKERN_LAMBDA { reg[int{i}] = value(part * kRegisterLanes + i); });
    return reg;
  });
}

template <class R>
VGKERN_INLINE Mask<R> mask_from_bits(unsigned bits) {
#if VGKERN_AVX512
  return {static_cast<typename Mask<R>::Register>(bits)};
#else
  // Compared as int32, for SSE2 cannot compare int64: the lane of a double holds its bit twice.
  using Element = typename IntVec<R>::Element;
  constexpr Element kTwice = kLanes<R> == 16 ? Element{1} : static_cast<Element>(0x100000001);
  const IntVec<R> wanted = lanes_of<IntVec<R>>([](int i) VGKERN_LAMBDA { return kTwice << i; });
  const IntVec<R> given = wanted & IntVec<R>(kTwice * static_cast<Element>(bits & 0xffff));
  return each<Mask<R>>(
      [&](auto i) VGKERN_LAMBDA { return (typename Mask<R>::Register)((I32)given.reg[i] == (I32)wanted.reg[i]); });
#endif
}

// Lanes 0 … n−1.
template <class R>
VGKERN_INLINE Mask<R> first_lanes(int n) {
#if VGKERN_AVX512
  return {static_cast<typename Mask<R>::Register>((1u << n) - 1)};
#else
  return lanes_of<Vec<R>>([](int i) VGKERN_LAMBDA { return static_cast<R>(i); }) < Vec<R>(static_cast<R>(n));
#endif
}

// A bit a lane from and to memory; ⌈lanes / 8⌉ bytes are touched.
VGKERN_INLINE unsigned load_bits(const uint8_t* p, int lanes) {
  if (lanes <= 8) return p[0];
  uint16_t both;
  std::memcpy(&both, p, 2);
  return both;
}
VGKERN_INLINE void store_bits(uint8_t* p, unsigned bits, int lanes) {
  if (lanes > 8) {
    const uint16_t both = static_cast<uint16_t>(bits);
    std::memcpy(p, &both, 2);
  } else {
    p[0] = static_cast<uint8_t>(bits);
  }
}

// The bits of `word` that `select` has, side by side; and such bits where it has them. (Every machine with AVX-512 has
// instructions for it that take a cycle; with some that have AVX2 alone they take hundreds.)
#if VGKERN_AVX512
VGKERN_INLINE uint64_t compress_bits(uint64_t word, uint64_t select) { return _pext_u64(word, select); }
VGKERN_INLINE uint64_t expand_bits(uint64_t bits, uint64_t select) { return _pdep_u64(bits, select); }
#else
// take(where they begin in `select`, where side by side, a bit for each) for each stretch of bits of `select`.
template <class Take>
VGKERN_INLINE void each_stretch(uint64_t select, Take take) {
  for (int filled = 0; select != 0;) {
    const int begin = __builtin_ctzll(select), count = __builtin_ctzll(~(select >> begin));
    const uint64_t ones = (uint64_t{1} << count) - 1;
    take(begin, filled, ones);
    filled += count;
    select &= ~(ones << begin);
  }
}
VGKERN_INLINE uint64_t compress_bits(uint64_t word, uint64_t select) {
  uint64_t bits = 0;
  each_stretch(select, [&](int begin, int filled, uint64_t ones) { bits |= (word >> begin & ones) << filled; });
  return bits;
}
VGKERN_INLINE uint64_t expand_bits(uint64_t bits, uint64_t select) {
  uint64_t word = 0;
  each_stretch(select, [&](int begin, int filled, uint64_t ones) { word |= (bits >> filled & ones) << begin; });
  return word;
}
#endif

// ---- Memory --------------------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
using Opmath = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A register at any address.
template <class R>
struct __attribute__((packed, may_alias)) Unaligned {
  typename RegisterOf<R>::type reg;
};

template <class R>
VGKERN_INLINE Vec<R> load(const R* p) {
  return each<Vec<R>>([&](auto i) VGKERN_LAMBDA { return reinterpret_cast<const Unaligned<R>*>(p)[i].reg; });
}
template <class R>
VGKERN_INLINE void store(R* p, Vec<R> v) {
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { reinterpret_cast<Unaligned<R>*>(p)[i].reg = v.reg[i]; });
}
// Past the caches, to an address that is a multiple of the vector's size in memory. A fence has to follow before
// another thread reads.
template <class R>
VGKERN_INLINE void stream(R* p, Vec<R> v) {
  constexpr int kRegisterLanes = kLanes<R> / kParts;
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { stream(p + i * kRegisterLanes, v.reg[i]); });
}

// Halves in memory: sixteen in one register of half the width with AVX-512; else as the IntVec<float> of their bits.
#if VGKERN_AVX512

template <class T>
VGKERN_INLINE Vec<float> from_halves(__m256i halves) {
  return each<Vec<float>>([&](auto) VGKERN_LAMBDA {
    if constexpr (std::is_same_v<T, bfloat16>) return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    if constexpr (std::is_same_v<T, float16>) return (F32)_mm512_cvtph_ps(halves);
  });
}

// The floats whose upper halves are the first (0) or last (1) sixteen of thirty-two: one instruction each, where the
// way by 32 bits and a shift takes two, of which the shift is one of many on its pipes.
template <int WHICH>
VGKERN_INLINE Vec<float> spread(__m512i halves) {
  typedef int16_t I16 __attribute__((vector_size(64)));
  I16 places{};
  unroll<16>([&](auto i) VGKERN_LAMBDA { places[2 * i + 1] = 16 * WHICH + i; });
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  return each<Vec<float>>(
      [&](auto) VGKERN_LAMBDA { return (F32)_mm512_maskz_permutexvar_epi16(kUpper, (__m512i)places, halves); });
}

// The lower (0) or upper (1) halves of thirty-two floats.
template <int WHICH>
VGKERN_INLINE __m512i halves_of(Vec<float> a, Vec<float> b) {
  typedef int16_t I16 __attribute__((vector_size(64)));
  I16 places{};
  unroll<32>([&](auto i) VGKERN_LAMBDA { places[int{i}] = 2 * i + WHICH; });
  return _mm512_permutex2var_epi16((__m512i)a.reg[0], (__m512i)places, (__m512i)b.reg[0]);
}

// Two vectors side by side, to the nearest, ties to even: up where what is cut off is more than a half, or the half of
// an odd number. All upper halves in one register and all lower ones in another, the two take six instructions; each by
// itself took four, and one to bring them together.
//
// A NaN of ones above and more than a one below would be carried out of. There is none: those that arithmetic makes, of
// bfloat16 and of its own, have no ones below, and Operation::set and from_double let no other in.
VGKERN_INLINE __m512i to_bfloat16(Vec<float> a, Vec<float> b) {
  constexpr int kAOrBAndC = 0xf8;
  const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(INT16_MIN);
  const __m512i upper = halves_of<1>(a, b);
  const __m512i rest = _mm512_ternarylogic_epi32(halves_of<0>(a, b), upper, one, kAOrBAndC);
  return _mm512_mask_add_epi16(upper, _mm512_cmpgt_epu16_mask(rest, half), upper, one);
}

// The same; `EXACT` says that they hold numbers of bfloat16, so that there is nothing to round.
template <bool EXACT>
VGKERN_INLINE __m512i narrow_to_bfloat16(Vec<float> a, Vec<float> b) {
  if constexpr (EXACT) return halves_of<1>(a, b);
  return to_bfloat16(a, b);
}

template <class T>
VGKERN_INLINE __m256i to_halves(Vec<float> v) {
  if constexpr (std::is_same_v<T, bfloat16>) return _mm512_castsi512_si256(to_bfloat16(v, v));
  if constexpr (std::is_same_v<T, float16>) return _mm512_cvtps_ph((__m512)v.reg[0], _MM_FROUND_TO_NEAREST_INT);
}

#define VGKERN_HALVES(T)                                                            \
  VGKERN_INLINE Vec<float> load(const T* p) {                                       \
    return from_halves<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); \
  }                                                                                 \
  VGKERN_INLINE void store(T* p, Vec<float> v) {                                    \
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_halves<T>(v));            \
  }                                                                                 \
  VGKERN_INLINE void stream(T* p, Vec<float> v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_halves<T>(v)); }
VGKERN_HALVES(bfloat16)
VGKERN_HALVES(float16)
#undef VGKERN_HALVES

#else

VGKERN_INLINE IntVec<float> load_halves(const uint16_t* p) {
  return each<IntVec<float>>([&](auto i) VGKERN_LAMBDA { return load_u16(p + i * (16 / kParts)); });
}
VGKERN_INLINE void store_halves(uint16_t* p, IntVec<float> v) {
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { store_u16(p + i * (16 / kParts), v.reg[i]); });
}
VGKERN_INLINE void stream_halves(uint16_t* p, IntVec<float> v) {
  unroll<kParts>([&](auto i) VGKERN_LAMBDA { stream_u16(p + i * (16 / kParts), v.reg[i]); });
}

// The upper half of a float.
VGKERN_INLINE Vec<float> load(const bfloat16* p) { return as_real<float>(load_halves(&p->bits) << 16); }
// To the nearest, ties to even, in the upper half; NaN is made quiet, since its payload may lie in the half that is cut
// off.
VGKERN_INLINE IntVec<float> to_bfloat16(Vec<float> v) {
  const IntVec<float> exact = as_int(v);
  const IntVec<float> rounded = exact + 0x7fff + ((exact >> 16) & 1);
  return as_int(select(is_nan(v), as_real<float>(exact | 0x400000), as_real<float>(rounded))) >> 16;
}

#if VGKERN_AVX2

VGKERN_INLINE Vec<float> load(const float16* p) {
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA {
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
  });
}
VGKERN_INLINE IntVec<float> to_float16(Vec<float> v) {
  return each<IntVec<float>>([&](auto i) VGKERN_LAMBDA {
    return (I32)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(v.reg[i], _MM_FROUND_TO_NEAREST_INT));
  });
}

#else

VGKERN_INLINE Vec<float> load(const float16* p) {
  const IntVec<float> half = load_halves(&p->bits);
  const IntVec<float> magnitude = half & 0x7fff;
  const Vec<float> magnitude_real = to_real(magnitude);          // tells subnormals and inf from the rest
  const IntVec<float> normal = (magnitude << 13) + (112 << 23);  // the exponent's bias is 127 and was 15
  Vec<float> v = as_real<float>(normal);
  v = select(magnitude_real < Vec<float>(0x1p10f), magnitude_real * Vec<float>(0x1p-24f), v);
  v = select(magnitude_real >= Vec<float>(0x7c00), as_real<float>(normal + (112 << 23)), v);
  return as_real<float>(as_int(v) | ((half & 0x8000) << 16));
}
VGKERN_INLINE IntVec<float> to_float16(Vec<float> v) {
  const Vec<float> magnitude = abs(v);
  const IntVec<float> exact = as_int(magnitude);
  const Vec<float> half = 0.5f;  // its unit in the last place is that of a subnormal float16
  Vec<float> bits = as_real<float>((exact - (112 << 23) + 0xfff + ((exact >> 13) & 1)) >> 13);
  bits = select(magnitude < Vec<float>(0x1p-14f), as_real<float>(as_int(magnitude + half) - as_int(half)), bits);
  bits = select(magnitude >= Vec<float>(65520.0f), as_real<float>(IntVec<float>(0x7c00)), bits);
  bits = select(is_nan(v), as_real<float>(((exact >> 13) & 0x3ff) | 0x7e00), bits);
  return as_int(bits) | ((as_int(v) >> 16) & 0x8000);
}

#endif

VGKERN_INLINE void store(bfloat16* p, Vec<float> v) { store_halves(&p->bits, to_bfloat16(v)); }
VGKERN_INLINE void store(float16* p, Vec<float> v) { store_halves(&p->bits, to_float16(v)); }
VGKERN_INLINE void stream(bfloat16* p, Vec<float> v) { stream_halves(&p->bits, to_bfloat16(v)); }
VGKERN_INLINE void stream(float16* p, Vec<float> v) { stream_halves(&p->bits, to_float16(v)); }

#endif

// Two vectors side by side.
template <class T, class R>
VGKERN_INLINE void load_pair(const T* p, Vec<R>& a, Vec<R>& b) {
#if VGKERN_AVX512
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m512i both = _mm512_loadu_si512(p);
    a = spread<0>(both);
    b = spread<1>(both);
    return;
  }
#endif
  a = load(p);
  b = load(p + kLanes<R>);
}
// `EXACT`: they hold numbers of T, which saves bfloat16 the rounding.
template <bool EXACT = false, class T, class R>
VGKERN_INLINE void store_pair(T* p, Vec<R> a, Vec<R> b) {
#if VGKERN_AVX512
  if constexpr (std::is_same_v<T, bfloat16>) return _mm512_storeu_si512(p, narrow_to_bfloat16<EXACT>(a, b));
#endif
  store(p, a);
  store(p + kLanes<R>, b);
}
template <bool EXACT = false, class T, class R>
VGKERN_INLINE void stream_pair(T* p, Vec<R> a, Vec<R> b) {
#if VGKERN_AVX512
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m512i both = narrow_to_bfloat16<EXACT>(a, b);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(both));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, _mm512_extracti64x4_epi64(both, 1));
    return;
  }
#endif
  stream(p, a);
  stream(p + kLanes<R>, b);
}

// The bits of two vectors side by side, the first one's below.
template <class R>
VGKERN_INLINE unsigned load_bit_pair(const uint8_t* p) {
  std::conditional_t<kLanes<R> == 16, uint32_t, uint16_t> bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
template <class R>
VGKERN_INLINE void store_bit_pair(uint8_t* p, Mask<R> low, Mask<R> high) {
#if VGKERN_AVX512
  if constexpr (kLanes<R> == 16) {  // without a way by the general registers
    const __mmask32 both = _mm512_kunpackw(high.k, low.k);
    std::memcpy(p, &both, sizeof both);
    return;
  }
#endif
  const auto both =
      static_cast<std::conditional_t<kLanes<R> == 16, uint32_t, uint16_t>>(bits(low) | bits(high) << kLanes<R>);
  std::memcpy(p, &both, sizeof both);
}

// The first `lanes` elements, the other lanes being `fill`. What lies behind them in memory is not touched.
template <class T, class R = Opmath<T>>
VGKERN_INLINE Vec<R> load(const T* p, int lanes, R fill) {
  const Mask<R> mask = first_lanes<R>(lanes);
#if VGKERN_AVX512
  if constexpr (sizeof(T) == 4) {
    return each<Vec<R>>([&](auto) VGKERN_LAMBDA { return (F32)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask.k, p); });
  } else if constexpr (sizeof(T) == 8) {
    return each<Vec<R>>([&](auto) VGKERN_LAMBDA { return (F64)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), mask.k, p); });
  } else {
    return select(mask, from_halves<T>(_mm256_maskz_loadu_epi16(mask.k, p)), Vec<R>(fill));
  }
#else
#if VGKERN_AVX2
  if constexpr (sizeof(T) == sizeof(R)) {
    const auto read = [&](auto i) VGKERN_LAMBDA {
      if constexpr (sizeof(T) == 4) return (F32)_mm256_maskload_ps(p + i * 8, (__m256i)mask.reg[i]);
      if constexpr (sizeof(T) == 8) return (F64)_mm256_maskload_pd(p + i * 4, (__m256i)mask.reg[i]);
    };
    return select(mask, each<Vec<R>>(read), Vec<R>(fill));
  }
#endif
  T buffer[kLanes<R>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(lanes) * sizeof(T));
  return select(mask, load(buffer), Vec<R>(fill));
#endif
}

// The first `lanes` lanes. What lies behind them in memory is not touched.
template <class T, class R>
VGKERN_INLINE void store(T* p, Vec<R> v, int lanes) {
#if VGKERN_AVX512
  const Mask<R> mask = first_lanes<R>(lanes);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask.k, v.reg[0]);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, mask.k, v.reg[0]);
  } else {
    _mm256_mask_storeu_epi16(p, mask.k, to_halves<T>(v));
  }
#else
#if VGKERN_AVX2
  if constexpr (sizeof(T) == sizeof(R)) {
    const Mask<R> mask = first_lanes<R>(lanes);
    unroll<kParts>([&](auto i) VGKERN_LAMBDA {
      if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p + i * 8, (__m256i)mask.reg[i], v.reg[i]);
      if constexpr (sizeof(T) == 8) _mm256_maskstore_pd(p + i * 4, (__m256i)mask.reg[i], v.reg[i]);
    });
    return;
  }
#endif
  T buffer[kLanes<R>];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(lanes) * sizeof(T));
#endif
}

// Two vectors side by side, the first `lanes` lanes of the second.
template <bool EXACT = false, class T, class R>
VGKERN_INLINE void store_pair(T* p, Vec<R> a, Vec<R> b, int lanes) {
#if VGKERN_AVX512
  if constexpr (std::is_same_v<T, bfloat16>) {
    return _mm512_mask_storeu_epi16(p, (1u << 16 << lanes) - 1, narrow_to_bfloat16<EXACT>(a, b));
  }
#endif
  store(p, a);
  store(p + kLanes<R>, b, lanes);
}

// ---- Doubles for sums ----------------------------------------------------------------------------------------------

// Lanes 0 … 7 and 8 … 15 as doubles.
VGKERN_INLINE Vec<double> widen_low(Vec<float> a) {
  return each<Vec<double>>(
      [&](auto i) VGKERN_LAMBDA { return i % 2 == 0 ? widen_low(a.reg[i / 2]) : widen_high(a.reg[i / 2]); });
}
VGKERN_INLINE Vec<double> widen_high(Vec<float> a) {
  return each<Vec<double>>([&](auto i) VGKERN_LAMBDA {
    return (i + kParts) % 2 == 0 ? widen_low(a.reg[(i + kParts) / 2]) : widen_high(a.reg[(i + kParts) / 2]);
  });
}

// The lanes of a Vec<R> as doubles, where sums are kept.
template <class R>
struct Wide {
  static constexpr int kVecs = kLanes<R> / kLanes<double>;

  Vec<double> vec[kVecs];

  Wide() = default;
  VGKERN_INLINE Wide(double a) {
    unroll<kVecs>([&](auto i) VGKERN_LAMBDA { vec[i] = Vec<double>(a); });
  }
  VGKERN_INLINE Wide(Vec<R> a) {
    if constexpr (kVecs == 2) {
      vec[0] = widen_low(a);
      vec[1] = widen_high(a);
    } else {
      vec[0] = a;
    }
  }

  // clang-format off
#define VGKERN_WIDE(op)                                                            \
  friend VGKERN_INLINE Wide operator op(Wide a, Wide b) {                          \
    Wide c;                                                                        \
    unroll<kVecs>([&](auto i) VGKERN_LAMBDA { c.vec[i] = a.vec[i] op b.vec[i]; }); \
    return c;                                                                      \
  }                                                                                \
  friend VGKERN_INLINE Wide& operator op##=(Wide& a, Wide b) { return a = a op b; }
  // clang-format on
  VGKERN_WIDE(+)
  VGKERN_WIDE(-)
  VGKERN_WIDE(*)
#undef VGKERN_WIDE

  // a·b + c
  friend VGKERN_INLINE Wide fma(Wide a, Wide b, Wide c) {
    unroll<kVecs>([&](auto i) VGKERN_LAMBDA { c.vec[i] = fma(a.vec[i], b.vec[i], c.vec[i]); });
    return c;
  }

  // The sum over the lanes, in the same order on every machine.
  friend VGKERN_INLINE double sum(Wide a) {
    if constexpr (kVecs == 2) return sum(a.vec[0] + a.vec[1]);
    return sum(a.vec[0]);
  }

  friend VGKERN_INLINE void store(double* p, Wide a) {
    unroll<kVecs>([&](auto i) VGKERN_LAMBDA { store(p + i * kLanes<double>, a.vec[i]); });
  }
};

// kLanes<R> doubles.
template <class R>
VGKERN_INLINE Wide<R> load_wide(const double* p) {
  Wide<R> a;
  unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA { a.vec[i] = load(p + i * kLanes<double>); });
  return a;
}

// Back to R, to the nearest.
VGKERN_INLINE Vec<float> narrow(Wide<float> a) {
  constexpr int kRegisters = 2 * kParts;
  F64 reg[kRegisters];
  unroll<kRegisters>([&](auto i) VGKERN_LAMBDA { reg[i] = a.vec[i / kParts].reg[i % kParts]; });
  return each<Vec<float>>([&](auto i) VGKERN_LAMBDA { return narrow(reg[2 * i], reg[2 * i + 1]); });
}
VGKERN_INLINE Vec<double> narrow(Wide<double> a) { return a.vec[0]; }

}  // namespace
}  // namespace vgkern
