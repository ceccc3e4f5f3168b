// What the drivers (batch_norm.cpp) and the instruction sets (isa/*.cpp) agree on: a tile of memory, the numbers of its
// channels, the sums made over it, and the table of functions that an instruction set provides.
//
// Nothing of the standard library's beyond <cstdint>: an inline function that the AVX-512 file emits is compiled for
// AVX-512, and the linker keeps one copy for all.
#pragma once

#include <cstdint>

namespace vgkern {

enum DataType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kDataTypes };

// Bytes of the type of arithmetic R.
constexpr int64_t opmath_size(DataType dtype) { return dtype == kFloat64 ? 8 : 4; }

// Arrays of channels are padded to a multiple of this many, so that every vector of them is whole.
constexpr int64_t kChannelPadding = 16;

// What a channel is multiplied and shifted by, in the type of arithmetic R (float; double for float64 tensors):
//
//     d = x − pivot      z = (d·scale + shift) + residual + (d·scale_low + shift_low)
//     dx = (dz·input_scale + (d·input_slope + input_shift))·dx_factor
//
// The pivot is a number of type R at which x is not large against its deviation: the subtraction then loses nothing,
// and what the exact mean differs by is in the shifts. With their low parts scale and shift are good to float64 where R
// is float: an error of half a unit in the last place would be that of every element, and add up in dweight and dbias.
//
// A residual with a batch norm of its own has the same numbers again, kParameters rows further: with e = residual − its
// pivot, z = (d·scale + shift) + (e·scale' + shift') + low parts, and dresidual is to e what dx is to d.
enum Parameter : int {
  kPivot,  // also the value from which the statistics measure
  kScale,
  kScaleLow,
  kShift,
  kShiftLow,
  kActivationWeight,
  kInputScale,
  kInputSlope,
  kInputShift,
  kParameters
};

// What is summed over a channel, in float64. The statistics use the first two rows.
enum Sum : int {
  kDeviation = 0,         // x − pivot
  kDeviationSquares = 1,  // its square
  kDz = 0,
  kDzDeviation,  // dz·(x − pivot)
  kDzSquares,
  kDySquares,            // of all channels of a tile, in the first one's place
  kDead,                 // elements with φ'(z) = 0; there too
  kActivationDweight,    // z·dy where not z > 0
  kDzResidualDeviation,  // dz·(residual − its pivot), where the residual is normalised
  kDxSquares,            // made by the pass that writes dx, where it is asked for
  kDresidualSquares,     // the same of a residual that is normalised
  kSums
};

constexpr Parameter of_residual(Parameter which) { return static_cast<Parameter>(kParameters + which); }

// How y, dx and dresidual are written: into the caches; past them, which needs every vector aligned; or past them by
// way of a stage in the L1 cache, a run of planes at a time.
enum class Outputs { cached, streamed, staged };

// A part of x that one call works on: a stretch of `width` elements for each run and channel, or, where channels lie
// across (rows), for each run alone.
//
// Not across: element `offset + run·stride + channel·channel_stride` begins the stretch of a channel. Across: element i
// of every run is of channel i, or has numbers and sums of its own as a channel has (small_planes.h), and `channels` is
// 1. `parameters` and `sums` point at the tile's first channel; their rows are `padded_channels` apart. Sums are added
// to. Null pointers stand for what is absent or not wanted.
struct Tile {
  int64_t runs, channels, width;
  int64_t offset, stride, channel_stride;
  int64_t following;  // the `offset` of the tile that comes next, to be asked for at the end of this one
  int64_t mask_offset, mask_stride, mask_channel_stride;  // bytes; a stretch's bits start a byte of their own
  int64_t
      bits_stretch;  // across: of so many elements at a time the bits start a byte of their own; 0 if those of runs do
  bool across;
  bool planes;  // across: whether a run is planes side by side, which do not go on where the next run begins

  const void* x;
  const void* residual;
  const void* dy;
  const uint8_t* mask;
  void* y;
  void* dx;
  void* dresidual;
  uint8_t* saved_mask;

  const void* parameters;  // R[kParameters][padded_channels], twice that where the residual is normalised
  double* sums;            // [kSums][padded_channels]
  int64_t padded_channels;
  void* dz;  // R: what reduce leaves there for apply, as it walks; stretches are padded to whole vectors
  const double* activation_args;
  double dx_factor;  // what brings the norm of dx into its bounds; else 1
  bool normalises;   // or else z is x + residual to the bit, and the low parts play no part
  bool normalises_residual;
  bool record;  // whether dy² and dead elements are counted
  Outputs outputs;
};

// Channels of a tile that is not across, at most.
constexpr int kTileChannels = 16;
// Elements of a channel that tell from where it is measured.
constexpr int kOriginSamples = 8;
// A run of planes is written by way of a stage only if it takes no more: a part of the L1 cache.
constexpr int64_t kStageBytes = 16384;
using TileFunction = void (*)(const Tile&);

// One activation's inner kernels, indexed by DataType. Units: one read or write of a tensor of x's size.
//
//     forward    y (and saved_mask) from x and residual                               2 … 3 + 1/32 units
//     reduce     sums from dy and z, z from x and residual, or from mask; writes dresidual = dz, and dx =
//     input_scale·dz
//                where asked for (frozen statistics)                                  2 … 5
//     apply      dx from dy and z; kDxSquares where `sums` is given                   3 … 4
//
// Of a residual that is normalised, reduce reads it in any case and sums kDzResidualDeviation; it writes dresidual with
// dx alone, and apply too where asked for, with kDresidualSquares.                    3 … 5 and 5
//
// Sums over a few vectors are made in R and added up in float64. Where R is float, squares may underflow or overflow in
// that: the driver sees it in the sums and has them made again by reduce_wide, in float64 throughout.
struct ActivationKernels {
  const char* name;
  bool costly;  // whether z and dz take longer to make than dz takes to wait in the last cache
  TileFunction forward[kDataTypes];
  TileFunction reduce[kDataTypes];
  TileFunction reduce_wide[kDataTypes];
  TileFunction apply[kDataTypes];
};

// What a norm is made of: the largest |x|, Σ|x|, Σx², or Σ|x|ᵖ for another p > 0.
enum NormKind : int { kLargest, kMagnitudes, kSquares, kPowers };

// The norm of a part of an array: Σ|x|ᵖ = scaleᵖ·sum; of kLargest scale·sum is the magnitude. A part that is not finite
// has the largest scale, so that a merge does not multiply it by 0.
struct NormPart {
  double scale, sum;
};
constexpr double kLargestNormScale = 0x1p1000;

// Below, of arrays of channels in float64, one for each of some rows, functions take the channels [begin, end).

// What statistics are made from, and where they go.
struct Moments {
  const double *measured_from, *deviation, *deviation_squares;  // sums over `count` elements of a channel
  double count, eps;
  double *mean, *rstd, *var;  // the last: unbiased
};

// What the numbers of a batch norm are made from, and where they go.
struct Normalisation {
  const double *mean, *rstd, *var;  // the last: NaN where rstd alone is known
  const double *weight, *bias;
  void* parameters;  // R[kParameters][padded_channels], of which kPivot to kShiftLow are set
  int64_t padded_channels;
  double *rest, *scale;  // mean − pivot and weight·rstd; then kInputScale is set, too. Or null
};

// What the gradients of a batch norm are made from, and where they go.
struct InputGradient {
  const double *dz, *dz_deviation, *dz_squares;  // sums
  const double *rstd, *rest, *scale;             // rstd: null without statistics
  double count, eps, closed_form_share;          // the last: as in batch_norm.cpp
  bool batch_mode, wanted;                       // whether dx depends on the sums; whether ‖dx‖ is asked for
  double *dbias, *dweight, *squares;             // the last: ‖dx‖², where it has a closed form
  char* cancels;                                 // whether that is no use
  void* parameters;                              // as above, of which kInputSlope and kInputShift are set
  int64_t padded_channels;
};

// Of the sums over a slice: whether all are finite; Σdz², Σdx², Σdy² and the largest squared scale.
struct SquaresOfSlice {
  bool finite;
  double dz, dx, dy, largest;
};

struct KernelTable {
  const char* name;
  const ActivationKernels* activations;  // in the order of VGKERN_ACTIVATIONS, which starts with identity
  int num_activations;
  TileFunction statistics[kDataTypes];  // kDeviation, kDeviationSquares from x; 1 unit
  TileFunction statistics_wide[kDataTypes];
  void (*to_double[kDataTypes])(const void* source, double* target, int64_t count);
  void (*from_double[kDataTypes])(const double* source, void* target, int64_t count);
  // A number near to each channel's mean, in float64 and in R: from elements at kOriginSamples offsets, channels being
  // `pitch` apart.
  void (*find_origins[kDataTypes])(const void* source, const int64_t* offsets, int64_t pitch, int64_t count,
                                   double* target, void* same);
  // A channel's number for each of its `width` columns; a vector's worth behind the last may be written over. And the
  // columns of each channel added up and to its sum.
  void (*to_columns[kDataTypes])(const void* channels, int64_t count, int64_t width, void* columns);
  void (*add_columns)(const double* columns, int64_t count, int64_t width, double* sums);
  // Arrays `stride` apart, added up one after the other; and the numbers of one, or their squares.
  void (*add_slices)(const double* parts, int64_t slices, int64_t stride, int64_t count, double* totals);
  double (*add_up)(const double* x, int64_t count);
  double (*add_up_squares)(const double* x, int64_t count);
  bool (*all_finite)(const double* x, int64_t count);
  SquaresOfSlice (*look_at_slice)(const double* dz_deviation, const double* dweight, const double* dz_squares,
                                  const double* dy_squares, const double* scale, int64_t count);
  // 1/√(var + eps)
  void (*reciprocal_roots)(const double* var, double eps, int64_t count, double* rstd);
  void (*make_statistics)(const Moments& of, int64_t begin, int64_t end);
  // Where Σ² > limit·Σ of squares: of each channel, and whether anywhere.
  bool (*far_from_mean)(const double* deviation, const double* squares, double limit, int64_t begin, int64_t end,
                        char* far);
  // running ← (1 − momentum)·running + momentum·batch
  void (*update_running[kDataTypes])(void* running, const double* batch, double momentum, int64_t count);
  void (*normalise[kDataTypes])(const Normalisation& of, int64_t begin, int64_t end);
  void (*settle_gradients)(const InputGradient& of, int64_t begin, int64_t end);
  void (*input_lines[kDataTypes])(const InputGradient& of, int64_t begin, int64_t end);
  // The functions of simd_math.h as tensors of a type are computed with, over arrays of the type of arithmetic, for
  // tests: false where there is none of that name.
  bool (*apply_math[kDataTypes])(const char* name, const void* in, void* out, int64_t count);
  // `following` elements lie behind the `count` of x and are to be worked on next: they are prefetched.
  NormPart (*norm[kDataTypes])(const void* x, int64_t count, int64_t following, NormKind kind, double p);  // 1 unit
  void (*scale[kDataTypes])(void* x, int64_t count, int64_t following, double factor);                     // 2 units
};

constexpr int kIdentity = 0;

const KernelTable& baseline_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

}  // namespace vgkern
