// Arrays of channels: what is computed for each of them between the passes, a vector of channels at a time. The driver
// (batch_norm.cpp) says what it means; a channel's numbers do not depend on the vector that it falls in.
#pragma once

#include "kernel_table.h"
#include "vec.h"

namespace vgkern {
namespace {

// body(first, lanes) for the channels [begin, end), as many at a time as a vector of R has lanes.
template <class R, class Body>
VGKERN_INLINE void each_channels(int64_t begin, int64_t end, Body body) {
  for (int64_t c = begin; c < end; c += kLanes<R>) body(c, end - c < kLanes<R> ? static_cast<int>(end - c) : kLanes<R>);
}

// Of some channels, numbers; 0 in lanes that have none.
template <class T, class R = Opmath<T>>
VGKERN_INLINE Vec<R> load_some(const T* p, int lanes) {
  return lanes == kLanes<R> ? load(p) : load(p, lanes, R(0));
}
template <class T, class R>
VGKERN_INLINE void store_some(T* p, Vec<R> v, int lanes) {
  lanes == kLanes<R> ? store(p, v) : store(p, v, lanes);
}

// Of kLanes<R> channels at most, numbers in float64.
template <class R>
VGKERN_INLINE Wide<R> load_some_wide(const double* p, int lanes) {
  if (lanes == kLanes<R>) return load_wide<R>(p);
  Wide<R> a;
  unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA {
    const int rest = lanes - i * kLanes<double>;
    a.vec[i] =
        rest > 0 ? load_some(p + i * kLanes<double>, rest < kLanes<double> ? rest : kLanes<double>) : Vec<double>(0.0);
  });
  return a;
}
template <class R>
VGKERN_INLINE void store_some(double* p, Wide<R> a, int lanes) {
  if (lanes == kLanes<R>) return store(p, a);
  unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA {
    const int rest = lanes - i * kLanes<double>;
    if (rest > 0) store_some(p + i * kLanes<double>, a.vec[i], rest < kLanes<double> ? rest : kLanes<double>);
  });
}

// f of each of the vectors.
template <class R, class F, class... Wides>
VGKERN_INLINE Wide<R> map(F f, const Wides&... a) {
  Wide<R> result;
  unroll<Wide<R>::kVecs>([&](auto i) VGKERN_LAMBDA { result.vec[i] = f(a.vec[i]...); });
  return result;
}

// Of NaNs the one without a payload: to_bfloat16 relies on it.
template <class R>
VGKERN_INLINE Vec<R> plain_nan(Vec<R> v) {
  return select(is_nan(v), Vec<R>(std::numeric_limits<R>::quiet_NaN()), v);
}

// ---- Types ---------------------------------------------------------------------------------------------------------

template <class T>
void to_double(const void* source, double* target, int64_t count) {
  using R = Opmath<T>;
  each_channels<R>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    store_some(target + c, Wide<R>(load_some(static_cast<const T*>(source) + c, lanes)), lanes);
  });
}

template <class T>
void from_double(const double* source, void* target, int64_t count) {
  using R = Opmath<T>;
  each_channels<R>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    store_some(static_cast<T*>(target) + c, plain_nan(narrow(load_some_wide<R>(source + c, lanes))), lanes);
  });
}

// A number near to each channel's mean: that of its elements at `offsets`, channels being `pitch` apart; 0 in the place
// of what is not finite. In float64, and as numbers of type R.
//
// Of float32 several: the square of what the number is off by is taken from the mean square, which is rounded, and with
// few elements no sum evens that out. Of the others one: float64 measures twice, and halves show nothing of it.
template <class T>
void find_origins(const void* source, const int64_t* offsets, int64_t pitch, int64_t count, double* target,
                  void* same) {
  using R = Opmath<T>;
  constexpr int kTaken = std::is_same_v<T, float> ? kOriginSamples : 1;
  const auto* from = static_cast<const T*>(source);
  each_channels<R>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    Wide<R> total(0.0);
    for (int sample = 0; sample < kTaken; ++sample) {
      const T* elements = from + offsets[sample] + c * pitch;
      T gathered[kLanes<R>];
      if (pitch != 1) {
        for (int lane = 0; lane < lanes; ++lane) gathered[lane] = elements[lane * pitch];
        elements = gathered;
      }
      total += Wide<R>(load_some(elements, lanes));
    }
    Vec<R> origin = narrow(total * Wide<R>(1.0 / kTaken));
    origin = select(is_finite(origin), origin, Vec<R>(R(0)));
    store_some(target + c, Wide<R>(origin), lanes);
    store_some(static_cast<R*>(same) + c, origin, lanes);
  });
}

// ---- Columns -------------------------------------------------------------------------------------------------------

template <class T>
void to_columns(const void* channels, int64_t count, int64_t width, void* columns) {
  using R = Opmath<T>;
  const auto* from = static_cast<const R*>(channels);
  auto* to = static_cast<R*>(columns);
  for (int64_t channel = 0; channel < count; ++channel, to += width) {
    const Vec<R> number(from[channel]);
    for (int64_t i = 0; i < width; i += kLanes<R>) store(to + i, number);
  }
}

void add_columns(const double* columns, int64_t count, int64_t width, double* sums) {
  constexpr int64_t kStep = kLanes<double>;
  for (int64_t channel = 0; channel < count; ++channel, columns += width) {
    Vec<double> total[2] = {Vec<double>(0.0), Vec<double>(0.0)};
    int64_t i = 0;
    for (; i + 2 * kStep <= width; i += 2 * kStep) {
      total[0] += load(columns + i);
      total[1] += load(columns + i + kStep);
    }
    if (i + kStep <= width) {
      total[0] += load(columns + i);
      i += kStep;
    }
    if (i < width) total[1] += load(columns + i, static_cast<int>(width - i), 0.0);
    sums[channel] += sum(total[0] + total[1]);
  }
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// Of arrays `stride` apart, one after the other.
void add_slices(const double* parts, int64_t slices, int64_t stride, int64_t count, double* totals) {
  each_channels<float>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    Wide<float> total(0.0);
    for (int64_t slice = 0; slice < slices; ++slice) total += load_some_wide<float>(parts + slice * stride + c, lanes);
    store_some(totals + c, total, lanes);
  });
}

// Σ f(x)
template <class F>
VGKERN_INLINE double total_of(const double* x, int64_t count, F f) {
  Wide<float> total(0.0);
  each_channels<float>(0, count,
                       [&](int64_t c, int lanes) VGKERN_LAMBDA { total += f(load_some_wide<float>(x + c, lanes)); });
  return sum(total);
}

double add_up(const double* x, int64_t count) {
  return total_of(x, count, [](Wide<float> v) VGKERN_LAMBDA { return v; });
}
double add_up_squares(const double* x, int64_t count) {
  return total_of(x, count, [](Wide<float> v) VGKERN_LAMBDA { return v * v; });
}

bool all_finite(const double* x, int64_t count) {
  return total_of(x, count, [](Wide<float> v) VGKERN_LAMBDA { return v - v; }) == 0.0;  // or NaN
}

// ---- Statistics ----------------------------------------------------------------------------------------------------

void reciprocal_roots(const double* var, double eps, int64_t count, double* rstd) {
  each_channels<double>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    store_some(rstd + c, Vec<double>(1.0) / sqrt(load_some(var + c, lanes) + Vec<double>(eps)), lanes);
  });
}

void make_statistics(const Moments& of, int64_t begin, int64_t end) {
  const Vec<double> count = of.count, eps = of.eps, correction = of.count / (of.count - 1.0);
  each_channels<double>(begin, end, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Vec<double> offset = load_some(of.deviation + c, lanes) / count;
    // max() returns its second argument where it is NaN.
    const Vec<double> var = max(Vec<double>(0.0), load_some(of.deviation_squares + c, lanes) / count - offset * offset);
    store_some(of.mean + c, load_some(of.measured_from + c, lanes) + offset, lanes);
    store_some(of.rstd + c, Vec<double>(1.0) / sqrt(var + eps), lanes);
    store_some(of.var + c, var * correction, lanes);
  });
}

bool far_from_mean(const double* deviation, const double* squares, double limit, int64_t begin, int64_t end,
                   char* far) {
  unsigned any = 0;
  each_channels<double>(begin, end, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Vec<double> sum = load_some(deviation + c, lanes), of_squares = load_some(squares + c, lanes);
    const unsigned is_far = bits((sum * sum > Vec<double>(limit) * of_squares) & (of_squares > Vec<double>(0.0)));
    for (int lane = 0; lane < lanes; ++lane) far[c + lane] = static_cast<char>(is_far >> lane & 1);
    any |= is_far;
  });
  return any != 0;
}

template <class T>
void update_running(void* running, const double* batch, double momentum, int64_t count) {
  using R = Opmath<T>;
  auto* values = static_cast<T*>(running);
  each_channels<R>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Wide<R> old(load_some(values + c, lanes)), now = load_some_wide<R>(batch + c, lanes), difference = now - old;
    const Wide<R> next =
        momentum < 0.5 ? old + Wide<R>(momentum) * difference : now - Wide<R>(1.0 - momentum) * difference;
    store_some(values + c, plain_nan(narrow(next)), lanes);
  });
}

// ---- What channels are multiplied and shifted by -------------------------------------------------------------------

// Of the numbers of type R beside each of these, the one that is nearer to 0.
VGKERN_INLINE Vec<float> toward_zero(Wide<float> value) {
  const Vec<float> nearest = narrow(value), beyond = narrow(value - Wide<float>(nearest));
  // Of a float's bits, one less is the next towards 0.
  return select(beyond * with_sign(Vec<float>(1.0f), nearest) < Vec<float>(0.0f),
                as_real<float>(as_int(nearest) - IntVec<float>(1)), nearest);
}
VGKERN_INLINE Vec<double> toward_zero(Wide<double> value) { return value.vec[0]; }

// Rows of parameters of type R.
template <class R>
struct ParameterRows {
  R* rows;
  int64_t padded_channels;

  VGKERN_INLINE void put(Parameter which, int64_t channel, Vec<R> v, int lanes) const {
    store_some(rows + which * padded_channels + channel, plain_nan(v), lanes);
  }
};

template <class T>
void normalise(const Normalisation& of, int64_t begin, int64_t end) {
  using R = Opmath<T>;
  const ParameterRows<R> parameters{static_cast<R*>(of.parameters), of.padded_channels};
  const Vec<R> zero = R(0);
  each_channels<R>(begin, end, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Wide<R> mean = load_some_wide<R>(of.mean + c, lanes), rstd = load_some_wide<R>(of.rstd + c, lanes),
                  var = load_some_wide<R>(of.var + c, lanes), weight = load_some_wide<R>(of.weight + c, lanes),
                  bias = load_some_wide<R>(of.bias + c, lanes);
    const Vec<R> pivot = narrow(map<R>(
        [](Vec<double> mean, Vec<double> rstd, Vec<double> var) VGKERN_LAMBDA {
          const Vec<double> spread = select(is_nan(var), Vec<double>(1.0) / (rstd * rstd), var);
          return select(mean * mean <= Vec<double>(16.0) * spread, Vec<double>(0.0), mean);
        },
        mean, rstd, var));
    const Wide<R> rest = map<R>([](Vec<double> mean, Vec<double> pivot)
                                    VGKERN_LAMBDA { return select(is_finite(pivot), mean - pivot, Vec<double>(0.0)); },
                                mean, Wide<R>(pivot));
    const Wide<R> scale = weight * rstd, shift = bias - rest * scale;
    parameters.put(kPivot, c, pivot, lanes);

    const Vec<R> scale_high = toward_zero(scale), scale_low = narrow(scale - Wide<R>(scale_high));
    parameters.put(kScale, c, scale_high, lanes);
    parameters.put(kScaleLow, c, select(scale_low == zero, narrow(scale * Wide<R>(0x1p-60)), scale_low), lanes);

    const Vec<R> shift_high = narrow(shift), shift_low = narrow(shift - Wide<R>(shift_high));
    parameters.put(kShift, c, shift_high, lanes);
    parameters.put(kShiftLow, c, select(is_finite(shift_low) & (shift_low != zero), shift_low, -zero), lanes);

    if (!of.scale) return;
    store_some(of.rest + c, rest, lanes);
    store_some(of.scale + c, scale, lanes);
    parameters.put(kInputScale, c, narrow(scale), lanes);
  });
}

// ---- Gradients -----------------------------------------------------------------------------------------------------

SquaresOfSlice look_at_slice(const double* dz_deviation, const double* dweight, const double* dz_squares,
                             const double* dy_squares, const double* scale, int64_t count) {
  Vec<double> zero = 0.0, dz = 0.0, dx = 0.0, dy = 0.0, largest = 0.0;  // zero, or NaN
  each_channels<double>(0, count, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Vec<double> of_dz = load_some(dz_squares + c, lanes), of_dy = load_some(dy_squares + c, lanes);
    const Vec<double> all = load_some(dz_deviation + c, lanes) + load_some(dweight + c, lanes) + of_dz + of_dy;
    const Vec<double> number = load_some(scale + c, lanes), squared = number * number;
    zero += all - all;
    dz += of_dz;
    dx += squared * of_dz;
    dy += of_dy;
    largest = max(squared, largest);
  });
  double lane[kLanes<double>], most = 0.0;
  store(lane, largest);
  for (double one : lane) most = one > most ? one : most;
  return {sum(zero) == 0.0, sum(dz), sum(dx), sum(dy), most};
}

template <class T>
void input_lines(const InputGradient& of, int64_t begin, int64_t end) {
  using R = Opmath<T>;
  const ParameterRows<R> parameters{static_cast<R*>(of.parameters), of.padded_channels};
  const Vec<double> count = of.count;
  each_channels<R>(begin, end, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Wide<R> scale = load_some_wide<R>(of.scale + c, lanes), rstd = load_some_wide<R>(of.rstd + c, lanes),
                  dweight = load_some_wide<R>(of.dweight + c, lanes), dbias = load_some_wide<R>(of.dbias + c, lanes);
    const auto mean_of = [&](Vec<double> scaled) VGKERN_LAMBDA { return -scaled / count; };
    const Wide<R> slope = map<R>(mean_of, scale * rstd * dweight);
    parameters.put(kInputSlope, c, narrow(slope), lanes);
    parameters.put(kInputShift, c,
                   narrow(map<R>(mean_of, scale * dbias) - load_some_wide<R>(of.rest + c, lanes) * slope), lanes);
  });
}

void settle_gradients(const InputGradient& of, int64_t begin, int64_t end) {
  const Vec<double> zero = 0.0, two = 2.0, count = of.count, eps = of.eps;
  each_channels<double>(begin, end, [&](int64_t c, int lanes) VGKERN_LAMBDA {
    const Vec<double> dz = load_some(of.dz + c, lanes), dz_squares = load_some(of.dz_squares + c, lanes);
    const Vec<double> scale = load_some(of.scale + c, lanes), rest = load_some(of.rest + c, lanes);
    Vec<double> rstd = zero, dweight = zero, remaining = dz_squares;
    if (of.rstd) {
      rstd = load_some(of.rstd + c, lanes);
      dweight = (load_some(of.dz_deviation + c, lanes) - rest * dz) * rstd;
    }
    unsigned cancels = 0;
    if (of.batch_mode) {
      const Vec<double> kappa = Vec<double>(1.0) - eps * rstd * rstd;  // Σx̂²/m
      remaining -= (dz * dz + (two - kappa) * dweight * dweight) / count;
      // Not comparable: NaN, which the sum over dx then shows.
      if (of.wanted) {
        cancels = bits((dz_squares != zero) & ~(remaining > Vec<double>(of.closed_form_share) * dz_squares));
      }
    }
    for (int lane = 0; lane < lanes; ++lane) of.cancels[c + lane] = static_cast<char>(cancels >> lane & 1);
    store_some(of.dbias + c, dz, lanes);
    store_some(of.dweight + c, dweight, lanes);
    store_some(of.squares + c, scale * scale * max(zero, remaining), lanes);  // NaN if that is
  });
}

}  // namespace
}  // namespace vgkern
