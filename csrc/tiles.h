// The inner kernels: one function for each pass, type in memory T and activation F, whatever the layout (kernel_table.h).
// An instruction set's file includes this and returns make_table's result.
//
// A vector's tail runs the body's code with the missing lanes filled in: dy with 0 and x with the pivot, so that they
// add nothing to any sum.
#pragma once

#include "activations.h"
#include "kernel_table.h"
#include "math_probe.h"
#include "norm_kernels.h"
#include "vec.h"

namespace vgkern {
namespace {

// One vector of a tile.
struct Place {
  int64_t element, mask_byte;
  int lanes;

  // A bit for each lane that is not filled in.
  VGKERN_INLINE unsigned bits() const { return (1u << lanes) - 1; }
};

// Calls per_channel(v, each_place) for every vector v of channels; each_place(body) calls body(place) for all its
// vectors of elements. Across: a vector of channels is one column of vectors. Else: the one channel has the whole tile.
template <class R, class PerChannel>
VGKERN_INLINE void walk(const Tile& tile, PerChannel per_channel) {
  constexpr int64_t kStep = kLanes<R>;
  const int64_t vectors = (tile.width + kStep - 1) / kStep;
  const int64_t columns = tile.across ? vectors : 1;
  const int64_t depth = tile.across ? 1 : vectors;
  for (int64_t v = 0; v < columns; ++v) {
    per_channel(v, [&](auto body) VGKERN_LAMBDA {
      for (int64_t run = 0; run < tile.runs; ++run) {
        const int64_t element = tile.offset + run * tile.stride;
        const int64_t mask_byte = tile.mask_offset + run * tile.mask_stride;
        for (int64_t i = v; i < v + depth; ++i) {
          const int64_t left = tile.width - i * kStep;
          body(Place{element + i * kStep, mask_byte + i * (kStep / 8), static_cast<int>(left < kStep ? left : kStep)});
        }
      }
    });
  }
}

template <class T, class R = Opmath<T>>
VGKERN_INLINE Vec<R> load_at(const void* base, Place place, R fill) {
  const T* p = static_cast<const T*>(base) + place.element;
  return place.lanes == kLanes<R> ? load(p) : load(p, place.lanes, fill);
}

template <class T, class R = Opmath<T>>
VGKERN_INLINE void store_at(void* base, Place place, Vec<R> v) {
  T* p = static_cast<T*>(base) + place.element;
  if (place.lanes == kLanes<R>) {
    store(p, v);
  } else {
    store(p, v, place.lanes);
  }
}

// The parameters of channel vector v: one channel's in every lane, or those of the channels that lie across.
template <class R>
struct Parameters {
  const Tile& tile;
  int64_t v;

  VGKERN_INLINE const R* at(Parameter which) const {
    return static_cast<const R*>(tile.parameters) + which * tile.channel_stride + v * kLanes<R>;
  }
  VGKERN_INLINE Vec<R> operator[](Parameter which) const {
    return tile.across ? load(at(which)) : Vec<R>(*at(which));
  }
};

template <class R>
VGKERN_INLINE void add_to(const Tile& tile, int64_t v, int row, Wide<R> value) {
  double* p = tile.sums + row * tile.channel_stride + v * kLanes<R>;
  if (tile.across) {
    store(p, load_wide<R>(p) + value);
  } else {
    *p += sum(value);
  }
}

// z and its way there.
template <class T, class F>
struct PreActivation {
  using R = Opmath<T>;

  Vec<R> pivot, scale, scale_low, shift, shift_low, weight;
  R fill;

  VGKERN_INLINE explicit PreActivation(const Parameters<R>& parameters)
      : pivot(parameters[kPivot]),
        scale(parameters[kScale]),
        scale_low(parameters[kScaleLow]),
        shift(parameters[kShift]),
        shift_low(parameters[kShiftLow]),
        weight(parameters[kActivationWeight]),
        fill(*parameters.at(kPivot)) {}

  VGKERN_INLINE Vec<R> deviation(const Tile& tile, Place place) const {
    return load_at<T>(tile.x, place, fill) - pivot;
  }

  VGKERN_INLINE Vec<R> operator()(const Tile& tile, Place place, Vec<R> deviation) const {
    Vec<R> z = fma(deviation, scale, shift);
    if (tile.residual) z = z + load_at<T>(tile.residual, place, R(0));
    // Last, for a sum of opposite terms is exact, and small, and the low parts then are not.
    if (tile.normalises) z = z + fma(deviation, scale_low, shift_low);
    return z;
  }
};

// What the chain rule takes from z.
template <class R>
struct Derivative {
  Vec<R> dz;
  unsigned dead = 0;  // the lanes with φ'(z) = 0, as bits
  Vec<R> dweight;     // the share of a learnable activation's weight
};

template <class T, class F, class R = Opmath<T>>
VGKERN_INLINE Derivative<R> differentiate(const Tile& tile, const F& activation, const PreActivation<T, F>& z_of,
                                          Place place, Vec<R> deviation, Vec<R> dy) {
  const Vec<R> one(1), zero(0);
  Derivative<R> out;
  if constexpr (F::reads == Reads::nothing) {
    out.dz = dy;
  } else if constexpr (F::reads == Reads::mask) {
    const Mask<R> on = tile.mask ? mask_from_bits<R>(load_bits(tile.mask + place.mask_byte, place.lanes))
                                 : activation.on(z_of(tile, place, deviation));
    out.dz = activation.backward(dy, on);
    out.dead = bits(activation.backward(one, on) == zero);
  } else if constexpr (F::has_weight) {
    const Vec<R> z = z_of(tile, place, deviation);
    out.dz = activation.backward(dy, z, z_of.weight);
    out.dead = bits(activation.derivative(z, z_of.weight) == zero);
    out.dweight = activation.weight_gradient(dy, z);
  } else {
    const Vec<R> z = z_of(tile, place, deviation);
    out.dz = activation.backward(dy, z);
    out.dead = bits(activation.derivative(z) == zero);
  }
  return out;
}

// ---- Passes --------------------------------------------------------------------------------------------------------

// Σ (x − pivot) and Σ (x − pivot)², the difference taken in float64.
template <class T>
void statistics_tile(const Tile& given) {
  using R = Opmath<T>;
  const Tile tile = given;  // a copy: what the kernel stores cannot be one of its fields
  walk<R>(tile, [&](int64_t v, auto each_place) VGKERN_LAMBDA {
    const Parameters<R> parameters{tile, v};
    const R fill = *parameters.at(kPivot);
    const Wide<R> pivot(parameters[kPivot]);
    Wide<R> sum(0.0), squares(0.0);
    each_place([&](Place place) VGKERN_LAMBDA {
      const Wide<R> deviation = Wide<R>(load_at<T>(tile.x, place, fill)) - pivot;
      sum += deviation;
      squares = fma(deviation, deviation, squares);
    });
    add_to(tile, v, kDeviation, sum);
    add_to(tile, v, kDeviationSquares, squares);
  });
}

template <class T, class F>
void forward_tile(const Tile& given) {
  using R = Opmath<T>;
  const Tile tile = given;
  const F activation(tile.activation_args);
  walk<R>(tile, [&](int64_t v, auto each_place) VGKERN_LAMBDA {
    const PreActivation<T, F> z_of(Parameters<R>{tile, v});
    each_place([&](Place place) VGKERN_LAMBDA {
      const Vec<R> z = z_of(tile, place, z_of.deviation(tile, place));
      if constexpr (F::reads == Reads::mask) {
        if (tile.saved_mask) {
          store_bits(tile.saved_mask + place.mask_byte, bits(activation.on(z)) & place.bits(), place.lanes);
        }
      }
      if constexpr (F::has_weight) {
        store_at<T>(tile.y, place, activation.forward(z, z_of.weight));
      } else {
        store_at<T>(tile.y, place, activation.forward(z));
      }
    });
  });
}

// The sums are of doubles: a vanishing gradient of 1e-25 has a square, and one that has exploded in float32 too.
template <class T, class F>
void reduce_tile(const Tile& given) {
  using R = Opmath<T>;
  const Tile tile = given;
  const F activation(tile.activation_args);
  walk<R>(tile, [&](int64_t v, auto each_place) VGKERN_LAMBDA {
    const Parameters<R> parameters{tile, v};
    const PreActivation<T, F> z_of(parameters);
    const Vec<R> input_scale = parameters[kInputScale], factor(static_cast<R>(tile.dx_factor));
    Wide<R> dz_sum(0.0), dz_deviation(0.0), dz_squares(0.0), dy_squares(0.0), dweight(0.0);
    int64_t dead = 0;
    each_place([&](Place place) VGKERN_LAMBDA {
      const Vec<R> dy = load_at<T>(tile.dy, place, R(0));
      const Vec<R> deviation = tile.x ? z_of.deviation(tile, place) : Vec<R>(0);
      const Derivative<R> d = differentiate(tile, activation, z_of, place, deviation, dy);
      if (tile.dresidual) store_at<T>(tile.dresidual, place, d.dz);
      if (tile.dx) store_at<T>(tile.dx, place, d.dz * input_scale * factor);
      const Wide<R> dz(d.dz);
      dz_sum += dz;
      dz_deviation = fma(dz, Wide<R>(deviation), dz_deviation);
      dz_squares = fma(dz, dz, dz_squares);
      if (tile.record) {
        const Wide<R> wide_dy(dy);
        dy_squares = fma(wide_dy, wide_dy, dy_squares);
        dead += __builtin_popcount(d.dead & place.bits());
      }
      if constexpr (F::has_weight) dweight += Wide<R>(d.dweight);
    });
    add_to(tile, v, kDz, dz_sum);
    add_to(tile, v, kDzDeviation, dz_deviation);
    add_to(tile, v, kDzSquares, dz_squares);
    add_to(tile, v, kDySquares, dy_squares);
    if constexpr (F::has_weight) add_to(tile, v, kActivationDweight, dweight);
    tile.sums[kDead * tile.channel_stride + v * kLanes<R>] += static_cast<double>(dead);
  });
}

template <class T, class F>
void apply_tile(const Tile& given) {
  using R = Opmath<T>;
  const Tile tile = given;
  const F activation(tile.activation_args);
  walk<R>(tile, [&](int64_t v, auto each_place) VGKERN_LAMBDA {
    const Parameters<R> parameters{tile, v};
    const PreActivation<T, F> z_of(parameters);
    const Vec<R> scale = parameters[kInputScale], slope = parameters[kInputSlope], shift = parameters[kInputShift];
    const Vec<R> factor(static_cast<R>(tile.dx_factor));
    Wide<R> squares(0.0);
    each_place([&](Place place) VGKERN_LAMBDA {
      const Vec<R> deviation = z_of.deviation(tile, place);
      const Vec<R> dy = load_at<T>(tile.dy, place, R(0));
      const Vec<R> dz = differentiate(tile, activation, z_of, place, deviation, dy).dz;
      const Vec<R> dx = fma(dz, scale, fma(deviation, slope, shift)) * factor;
      store_at<T>(tile.dx, place, dx);
      if (tile.sums) {
        const Wide<R> wide_dx(select(first_lanes<R>(place.lanes), dx, Vec<R>(0)));
        squares = fma(wide_dx, wide_dx, squares);
      }
    });
    if (tile.sums) add_to(tile, v, kDxSquares, squares);
  });
}

// ---- Arrays of channels --------------------------------------------------------------------------------------------

template <class T>
void to_double(const void* source, double* target, int64_t count) {
  using R = Opmath<T>;
  for (int64_t i = 0; i < count; i += kLanes<R>) {
    const int lanes = static_cast<int>(count - i < kLanes<R> ? count - i : kLanes<R>);
    double buffer[kLanes<R>];
    store(buffer, Wide<R>(load(static_cast<const T*>(source) + i, lanes, R(0))));
    for (int lane = 0; lane < lanes; ++lane) target[i + lane] = buffer[lane];
  }
}

template <class T>
void from_double(const double* source, void* target, int64_t count) {
  using R = Opmath<T>;
  for (int64_t i = 0; i < count; i += kLanes<R>) {
    const int lanes = static_cast<int>(count - i < kLanes<R> ? count - i : kLanes<R>);
    double buffer[kLanes<R>] = {};
    for (int lane = 0; lane < lanes; ++lane) buffer[lane] = source[i + lane];
    store(static_cast<T*>(target) + i, narrow(load_wide<R>(buffer)), lanes);
  }
}

// ---- The table -----------------------------------------------------------------------------------------------------

#define VGKERN_EACH_TYPE(function) \
  { function<float>, function<double>, function<bfloat16>, function<float16> }

template <template <class> class F>
struct OfActivation {
  template <class T>
  static constexpr TileFunction forward = forward_tile<T, F<Opmath<T>>>;
  template <class T>
  static constexpr TileFunction reduce = reduce_tile<T, F<Opmath<T>>>;
  template <class T>
  static constexpr TileFunction apply = apply_tile<T, F<Opmath<T>>>;
};

#define VGKERN_ROW(name, Functor)                         \
  {#name, VGKERN_EACH_TYPE(OfActivation<Functor>::forward), \
   VGKERN_EACH_TYPE(OfActivation<Functor>::reduce), VGKERN_EACH_TYPE(OfActivation<Functor>::apply)},

constexpr ActivationKernels kActivationKernels[] = {VGKERN_ACTIVATIONS(VGKERN_ROW)};

static_assert(Identity<float>::reads == Reads::nothing, "identity");

constexpr KernelTable make_table(const char* name) {
  return {name,
          kActivationKernels,
          sizeof kActivationKernels / sizeof kActivationKernels[0],
          VGKERN_EACH_TYPE(statistics_tile),
          VGKERN_EACH_TYPE(to_double),
          VGKERN_EACH_TYPE(from_double),
          apply_math<float>,
          apply_math<double>,
          VGKERN_EACH_TYPE(norm_part),
          VGKERN_EACH_TYPE(scale_array)};
}

#undef VGKERN_ROW
#undef VGKERN_EACH_TYPE

}  // namespace
}  // namespace vgkern
