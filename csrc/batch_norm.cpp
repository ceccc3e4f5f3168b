#include "batch_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "memory_pool.h"
#include "parallel.h"
#include "small_planes.h"

namespace vgkern {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t item_size(DataType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// ---- Where the tiles lie -------------------------------------------------------------------------------------------

// A tensor is cut into this many slices, the units of work of a thread and of summation, so that they feed 16
// threads...
constexpr int64_t kSlices = 32;
// ... but into none so small that its sums cost much beside it, nor larger than is of use.
constexpr int64_t kMinSliceBytes = 128 * 1024, kMaxSliceBytes = 512 * 1024;
// A channel has at most this many slices, so that the sums of a huge tensor stay small.
constexpr int64_t kMaxSlices = 256;
// Planes: what is read in one go, if planes are small: those of several channels, as they lie side by side. More where
// nothing is read twice, for memory answers faster the longer it is asked in its own order: (32,256,56,56) float32 in
// eval mode takes 1.15 times as long by stretches of 16 KiB (2 threads, AMD EPYC).
constexpr int64_t kStretchBytes = 16384, kOnePassStretchBytes = 262144;
// Planes of so many elements are taken across the batch; in a small batch of so many for each sample and one more, for
// what is made for their columns is then spread over little.
constexpr int64_t kMaxSmallPlane = 64, kSmallPlaneOfSample = 8;
// So are planes of a few more bytes, if their last vector is not full.
constexpr int64_t kMediumPlaneBytes = 512, kMediumPlanesBatch = 32;
// Of each sample so many bytes at a time, as they lie side by side: of fewer, each page would be come to for little;
// with more, the numbers of the columns leave the L1 cache. Up to the second where it takes those to make whole cache
// lines: to write half of one past the caches, and the rest later, takes twice as long.
constexpr int64_t kMinSmallPlanesBytes = 256, kSmallPlanesBytes = 4096, kMaxSmallPlanesBytes = 8192, kLineBytes = 64;
// Planes: groups of channels that are left, for as many threads, when channels are taken together; one where no thread
// is waked for the tensor.
constexpr int64_t kGroups = 16;
// Across channels: of a row a group has so many bytes, so that the next row's are not far, but not fewer: threads that
// take parts of the same rows take each other's lines, too (by parts of 1 KiB and less two of them took up to twice as
// long as one, Zen 4). A multiple of so many channels.
constexpr int64_t kGroupRowBytes = 4096, kGroupMultiple = 64;
// A tensor of so many bytes is probably written past the caches. (The cuts are not to depend on whether it is.)
constexpr int64_t kLargeBytes = 4 * 1024 * 1024;
// Across channels: rows that do not end with a cache line are taken together, as one that does, in which each channel
// has several columns: half a line written past the caches, and the rest when the walk comes there, takes two to three
// times as long as both at once. There are more sums, too, so that with many channels smaller tensors would lose by it.
constexpr int64_t kMaxColumnsTogether = 2048, kFewChannels = 96;
// Of a channel in a slice of rows, at least: its sums take 48 bytes, which are written, looked at and added up. Or half
// of all rows, but so many.
constexpr int64_t kSliceColumnBytes = 512, kFewestRows = 32;
// What a group's tensors may take for those that are read twice to lie in the L2 cache when the second pass begins.
constexpr int64_t kGroupBytes = 1024 * 1024;
// What dz of a group may take, kept by the thread between its two passes.
constexpr int64_t kMaxKeptBytes = 2 * 1024 * 1024;

// Cuts x into groups of channels and each group into slices; depends on the shape, the type, and how many tensors like
// x share the L2 cache, only; none where there is one pass.
//
// Planes: a group is one channel, or a few; a slice is some planes of each, or a part of one plane. Rows: a group is
// some columns, a slice some rows.
class Grid {
 public:
  Grid(const Shape& shape, DataType dtype, int64_t tensors) : shape_(shape), size_(item_size(dtype)) {
    const int64_t bytes = shape.batch * shape.channels * shape.spatial * size_;
    const int64_t slice_bytes = std::clamp(bytes / kSlices, kMinSliceBytes, kMaxSliceBytes);
    shape.rows ? cut_rows(slice_bytes, bytes >= kLargeBytes, tensors)
               : cut_planes(slice_bytes, bytes >= kLargeBytes, tensors);
    groups_ = ceil_div(shape.channels, group_);
  }

  int64_t groups() const { return groups_; }
  int64_t slices() const { return slices_; }
  int64_t slice_elements() const { return ceil_div(shape_.batch * shape_.spatial * group_, slices_); }
  int64_t first_channel(int64_t group) const { return group * group_; }
  int64_t end_channel(int64_t group) const { return std::min(shape_.channels, (group + 1) * group_); }
  // How many columns a channel has: beside those of the first row in a tile's lie those of the next.
  int64_t columns_of_channel() const { return together_; }
  // The end of the sums that a tile of the group adds to: across, it adds whole vectors.
  int64_t padded_end(int64_t group) const {
    return shape_.rows ? round_up(together_ * end_channel(group), kChannelPadding) : end_channel(group);
  }

  // Whether each thread should take whole groups, one after the other: a group's second pass then finds it in cache.
  bool by_groups(int threads) const {
    const int64_t rounds = ceil_div(groups_, threads);
    const bool balanced = rounds * threads - groups_ <= groups_ / 8;
    return slices_ == 1 || (fits_cache_ && balanced);
  }

  // Elements of a slice, its stretches padded to whole vectors: what a tile's dz of it takes.
  int64_t padded_slice() const {
    return shape_.rows ? extent_ * round_up(group_, kChannelPadding)
                       : extent_ * group_ * round_up(std::min(part_, shape_.spatial), kChannelPadding);
  }

  // Whether every whole vector of every tile starts at a multiple of its size, if the tensor does.
  bool aligned() const {
    if (!shape_.rows && !across_) return shape_.spatial % lanes() == 0;
    const int64_t elements =
        shape_.rows ? together_ * shape_.channels : std::gcd(group_, shape_.channels) * shape_.spatial;
    return elements * size_ % kLineBytes == 0;
  }

  // Whether a run of planes fits a stage.
  bool stages() const {
    return !shape_.rows && !across_ && group_ * std::min(part_, shape_.spatial) * size_ <= kStageBytes;
  }

  // What a thread needs to take planes across the batch, or null where they are taken one by one.
  std::unique_ptr<Columns> columns(const KernelTable& table, DataType dtype) const {
    if (!across_) return nullptr;
    return std::make_unique<Columns>(table, dtype, shape_.spatial, group_);
  }

  // The first element of a slice.
  int64_t offset(int64_t group, int64_t slice) const {
    const int64_t channel = first_channel(group);
    if (shape_.rows) return slice * extent_ * shape_.channels + channel;
    return (slice / parts_ * extent_ * shape_.channels + channel) * shape_.spatial + slice % parts_ * part_;
  }

  // The tile that a slice is; `tile` has all but its geometry.
  Tile place(Tile tile, int64_t group, int64_t slice) const {
    const int64_t channel = first_channel(group), channels = end_channel(group) - channel;
    tile.across = shape_.rows;
    tile.planes = false;
    tile.bits_stretch = together_ > 1 ? shape_.channels : 0;
    tile.offset = offset(group, slice);
    if (!shape_.rows) {
      const int64_t part = slice % parts_, plane = slice / parts_ * extent_;
      const int64_t mask_bytes = ceil_div(shape_.spatial, 8);
      tile.runs = std::min(extent_, height_ - plane);
      tile.channels = channels;
      tile.width = std::min(part_, shape_.spatial - part * part_);
      tile.stride = shape_.channels * shape_.spatial;
      tile.channel_stride = shape_.spatial;
      tile.mask_stride = shape_.channels * mask_bytes;
      tile.mask_channel_stride = mask_bytes;
      tile.mask_offset = (plane * shape_.channels + channel) * mask_bytes + part * part_ / 8;
      return tile;
    }
    const int64_t begin = slice * extent_, end = std::min(height_, begin + extent_);
    const int64_t mask_bytes = ceil_div(shape_.channels, 8);
    tile.runs = (end - begin) / together_;
    tile.channels = 1;
    tile.width = together_ * channels;
    tile.stride = together_ * shape_.channels;
    tile.channel_stride = 0;
    tile.mask_stride = together_ * mask_bytes;
    tile.mask_channel_stride = 0;
    tile.mask_offset = begin * mask_bytes + channel / 8;
    return tile;
  }

 private:
  void cut_rows(int64_t slice_bytes, bool is_large, int64_t tensors) {
    height_ = shape_.batch * shape_.spatial;
    if (shape_.channels <= kFewChannels || is_large) together_ = rows_of_whole_lines();
    const int64_t groups = ceil_div(shape_.channels * size_, kGroupRowBytes);
    group_ = together_ > 1 ? shape_.channels  // what is taken together is all of a row
                           : std::min(shape_.channels, round_up(ceil_div(shape_.channels, groups), kGroupMultiple));
    const int64_t worth_sums = std::min(kSliceColumnBytes / size_, std::max(kFewestRows, ceil_div(height_, 2)));
    cut_evenly(
        std::max({ceil_div(slice_bytes / size_, group_), tensors > 0 ? worth_sums : 1, ceil_div(height_, kMaxSlices)}),
        together_);
    // Where nothing is read twice nothing is gained by it, and threads that share rows take each other's lines.
    fits_cache_ = tensors > 0 && height_ * group_ * size_ * tensors <= kGroupBytes;
  }

  // Into slices of about so many planes or rows: of the same size, and as many as threads share evenly.
  void cut_evenly(int64_t extent, int64_t multiple) {
    extent_ = round_up(ceil_div(height_, even(ceil_div(height_, extent))), multiple);
    slices_ = ceil_div(height_, extent_);
  }

  static int64_t even(int64_t parts) { return parts <= 2 ? parts : round_up(parts, 4); }

  // How many together are, or 1. Where a row's bits do not fill bytes, eight bytes of them are read at a time.
  int64_t rows_of_whole_lines() const {
    if (shape_.channels == 1) return 1;  // a word holds the bits of eight such
    int64_t rows = whole_lines(shape_.channels * size_);
    while (shape_.channels % 8 != 0 && rows * ceil_div(shape_.channels, 8) < 8) rows *= 2;
    return height_ % rows == 0 && rows * shape_.channels <= kMaxColumnsTogether ? rows : 1;
  }

  void cut_planes(int64_t slice_bytes, bool is_large, int64_t tensors) {
    height_ = shape_.batch;
    const int64_t plane_bytes = shape_.spatial * size_, whole = whole_lines(plane_bytes);
    const bool staged = shape_.spatial % lanes() != 0;  // what is written so goes in short stretches
    across_ = has_small_planes() && whole * plane_bytes <= kMaxSmallPlanesBytes;

    const int64_t stretch_bytes = across_                 ? kSmallPlanesBytes
                                  : tensors > 0 || staged ? kStretchBytes
                                                          : kOnePassStretchBytes;
    const int64_t together =
        tensors > 0 ? std::min(stretch_bytes / plane_bytes, kGroupBytes / (shape_.batch * plane_bytes * tensors))
                    : stretch_bytes / plane_bytes;
    const int64_t groups = shape_.batch * shape_.channels * shape_.spatial < kParallelCost ? 1 : kGroups;
    group_ = std::max<int64_t>(std::min(together, shape_.channels / groups), 1);
    if (across_) {
      group_ = std::max({group_, whole, ceil_div(kMinSmallPlanesBytes, plane_bytes)});
      group_ = std::min(group_ - group_ % whole, shape_.channels);
    } else {
      group_ = std::min<int64_t>(group_, kTileChannels);
    }

    const int64_t elements =
        std::max(slice_bytes / size_ / group_, ceil_div(shape_.batch * shape_.spatial, kMaxSlices));  // of a channel
    const int64_t stage = std::max(kStageBytes / size_, ceil_div(shape_.spatial, kMaxSlices));
    const int64_t longest = staged && is_large ? std::min(elements, stage) : elements;
    part_ = round_up(ceil_div(shape_.spatial, even(ceil_div(shape_.spatial, longest))),
                     std::max(kChannelPadding, kLineBytes / size_));
    parts_ = ceil_div(shape_.spatial, part_);
    cut_evenly(std::max<int64_t>(1, elements / std::min(part_, shape_.spatial)), 1);
    slices_ *= parts_;
    fits_cache_ = true;  // or else nothing is lost by taking one channel after the other
  }

  bool has_small_planes() const {
    const int64_t size = shape_.spatial;
    if (size <= kMaxSmallPlane) return size <= kSmallPlaneOfSample * (shape_.batch + 1);
    return size * size_ <= kMediumPlaneBytes && size % kChannelPadding != 0 && shape_.batch >= kMediumPlanesBatch;
  }

  // How many stretches of so many bytes make whole cache lines.
  static int64_t whole_lines(int64_t bytes) { return kLineBytes / std::gcd(bytes, kLineBytes); }

  int64_t lanes() const { return size_ == 8 ? 8 : 16; }

  Shape shape_;
  int64_t size_;    // of an element, in bytes
  int64_t height_;  // planes of a channel, or rows
  int64_t group_, groups_, slices_;
  int64_t extent_;        // planes or rows of a slice
  int64_t together_ = 1;  // rows that are taken as one: their masks lie side by side as they do
  int64_t part_ = 0, parts_ = 1;
  bool fits_cache_;
  bool across_ = false;  // planes of several channels, across the batch
};

// A block of the pool, or none where there is none or no bytes are asked for.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : block_(bytes ? acquire_memory(bytes) : MemoryBlock{}) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.data) release_memory(block_);
  }

  char* data() const { return static_cast<char*>(block_.data); }

 private:
  MemoryBlock block_;
};

// What a step does at a time.
struct Slice {
  int64_t group, index;
  int64_t following;  // the first element of the slice whose turn is next
  char* kept;         // memory that holds the slice's dz from one step to the next, or null
  Columns* columns;   // the thread's, of small planes, or null
};

// One step of a computation: first over the channels [begin, end), then over the slices of every group; either may be
// empty. A step that follows another in reverse starts in what that one left in cache; within a slice every walk is
// forward, as the hardware prefetches. Where a step is finished for all groups before the next begins, one whose slices
// are not `wanted`, as its channels have found, leaves them out.
struct Step {
  std::function<void(int64_t begin, int64_t end)> channels;
  std::function<void(const Slice& slice)> slices;
  bool reverse = false;
  std::function<bool()> wanted = [] { return true; };
};

bool any(const std::vector<char>& of_channel, int64_t begin, int64_t end) {
  return std::memchr(of_channel.data() + begin, 1, end - begin) != nullptr;
}

// The share of the last level of cache that a pass's tensors take where its outputs begin to be written past the
// caches, for a store to a line that is not there holds up others. Measured with a pass over the outputs behind it (2
// threads on 2 cores, 32 MiB, 16 to 32 MB of tensors). With a backward between them, y is not there: forward, backward
// and those passes together took 0.84 to 1.0 of the time in channels_last, 0.74 to 1.05 over planes, but up to 1.1
// where the forward went by way of stages. In eval mode y lies where the last one did, and they took up to 2 times as
// long.
struct Shares {
  double streamed, staged;
};
constexpr Shares kTrainingForwardShares{0.5, 1.0}, kEvalForwardShares{1.0, 1.0}, kBackwardShares{0.5, 0.5};

// The last level of cache, as Linux gives it (glibc's sysconf answered 320 MiB for 32 on a virtual machine), or a
// guess. Only speed depends on it.
int64_t read_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  int64_t kibibytes = 0;
  return file >> kibibytes && kibibytes > 0 ? kibibytes * 1024 : int64_t{32} << 20;
}

std::atomic<int64_t>& cache_bytes() {
  static std::atomic<int64_t> bytes{read_cache_bytes()};
  return bytes;
}

// Ends what was streamed before another thread may read it.
void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Of a channel, for z.
constexpr uint32_t kReadForZ = set_of(kPivot, kScale, kScaleLow, kShift, kShiftLow, kActivationWeight);

// ---- What both directions share ------------------------------------------------------------------------------------

class Operation {
 protected:
  // `tensors`: how many like x share the L2 cache between a group's two passes: what is read twice, and what is written
  // meanwhile; 0 if there is one pass.
  Operation(const KernelTable& table, const Common& call, int64_t tensors)
      : table_(table),
        kernels_(table.activations[call.activation]),
        common_(call),
        grid_(call.shape, call.dtype, tensors),
        channels_(call.shape.channels),
        count_(static_cast<double>(call.shape.batch * call.shape.spatial)),
        channel_stride_(round_up(grid_.columns_of_channel() * channels_, kChannelPadding)),
        parameters_(allocate(call.normalises_residual ? 2 * kParameters : kParameters)),
        x_norm_{0, call.norm.eps, read(call.norm.weight, channels_, 1.0), read(call.norm.bias, channels_, 0.0)} {
    if (call.normalises_residual) {
      const BatchNorm& norm = call.residual_norm;
      residual_norm_ = {kParameters, norm.eps, read(norm.weight, channels_, 1.0), read(norm.bias, channels_, 0.0)};
    }
    base_.x = call.x;
    base_.residual = call.residual;
    base_.normalises_residual = call.normalises_residual;
    base_.activation_args = call.activation_args.data();
    base_.padded_channels = channel_stride_;
    if (!call.activation_weight.data) {
      fill(x_norm_, kActivationWeight, 0.0);
      return;
    }
    const Rows slope = read(call.activation_weight, call.activation_weight_size, 0.0);
    for (int64_t c = 0; c < channels_; ++c) {
      set(x_norm_, kActivationWeight, c, slope[call.activation_weight_size == 1 ? 0 : c]);
    }
  }

  // Rows of channels, padded; not initialised.
  using Rows = std::unique_ptr<double[]>;
  Rows allocate(int64_t rows) const { return Rows(new double[rows * channel_stride_]); }

  // The batch norm of x, or of the residual.
  struct Norm {
    int first_parameter;  // row of its parameters in the tiles'
    double eps;
    Rows weight, bias;
  };

  // A tensor of channels as doubles, or `missing` in its place.
  Rows read(ChannelArray source, int64_t count, double missing) const {
    Rows values = allocate(1);
    if (source.data) {
      table_.to_double[source.dtype](source.data, values.get(), count);
    } else {
      std::fill_n(values.get(), count, missing);
    }
    return values;
  }

  void set(const Norm& norm, Parameter which, int64_t channel, double value) {
    const int64_t first = (norm.first_parameter + which) * channel_stride_ + channel;
    for (int64_t column = 0; column < grid_.columns_of_channel(); ++column) {
      const int64_t i = first + column * channels_;
      if (common_.dtype == kFloat64) {
        parameters_[i] = value;
      } else {
        // Of NaNs the one without a payload: to_bfloat16 relies on it.
        constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
        reinterpret_cast<float*>(parameters_.get())[i] = std::isnan(value) ? kNan : static_cast<float>(value);
      }
    }
  }

  // Of all channels.
  void fill(const Norm& norm, Parameter which, double value) {
    const int64_t first = (norm.first_parameter + which) * channel_stride_;
    if (common_.dtype == kFloat64) {
      std::fill_n(parameters_.get() + first, channel_stride_, value);
    } else {
      std::fill_n(reinterpret_cast<float*>(parameters_.get()) + first, channel_stride_, static_cast<float>(value));
    }
  }

  // What rows [first, last] have for some channels, in the other columns of these.
  void repeat(const Norm& norm, Parameter first, Parameter last, int64_t begin, int64_t end) {
    const int64_t size = opmath_size(common_.dtype);
    for (int64_t column = 1; column < grid_.columns_of_channel(); ++column) {
      for (int row = first; row <= last; ++row) {
        char* from = parameters_of((norm.first_parameter + row) * channel_stride_ + begin);
        std::memcpy(from + column * channels_ * size, from, (end - begin) * size);
      }
    }
  }

  // z = (x − mean)·weight·rstd + bias, from (x − pivot). Where |mean| is at most four deviations the pivot is 0, as
  // x − 0 is exact; else it is the mean in R, and x − pivot is exact where x is close to it. A constant channel is its
  // own pivot: z is then the bias to the bit. `var` is NaN where rstd alone is known.
  //
  // The scale is rounded towards zero, so that it and its remainder agree in sign, and that is not 0 unless the scale
  // is: an infinite x gives an infinite z. What stands in for a remainder of 0 is too small to change any z. Of the
  // shift none that remains is −0, which changes no sum.
  //
  // A backward also wants mean − pivot and the scale.
  void set_normalisation(const Norm& norm, const double* statistics, int64_t begin, int64_t end, double* rest = nullptr,
                         double* scale = nullptr) {
    table_.normalise[common_.dtype](
        {statistics, statistics + channels_, statistics + 2 * channels_, norm.weight.get(), norm.bias.get(),
         parameters_of(norm.first_parameter * channel_stride_), channel_stride_, rest, scale},
        begin, end);
    repeat(norm, kPivot, kShiftLow, begin, end);
    if (scale) repeat(norm, kInputScale, kInputScale, begin, end);
  }

  // z = x to the bit: the shift keeps the sign of a zero.
  void set_no_normalisation() {
    fill(x_norm_, kPivot, 0.0);
    fill(x_norm_, kScale, 1.0);
    fill(x_norm_, kScaleLow, 0x1p-60);
    fill(x_norm_, kShift, -0.0);
    fill(x_norm_, kShiftLow, -0.0);
  }

  // To the type of arithmetic.
  double round(double value) const { return common_.dtype == kFloat64 ? value : static_cast<float>(value); }

  char* parameters_of(int64_t index) const {
    return reinterpret_cast<char*>(parameters_.get()) + index * opmath_size(common_.dtype);
  }

  // Outputs are better written past the caches where all tensors take more than a share of these.
  Outputs way_of(std::initializer_list<const void*> inputs, std::initializer_list<const void*> outputs,
                 Shares shares) const {
    const int64_t bytes =
        common_.shape.batch * common_.shape.channels * common_.shape.spatial * item_size(common_.dtype);
    int64_t tensors = 0;
    for (const auto& pointers : {inputs, outputs})
      tensors += std::count_if(pointers.begin(), pointers.end(), [](const void* p) { return p; });
    const bool lines = std::all_of(outputs.begin(), outputs.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
    if (!lines) return Outputs::cached;
    const auto exceed = [&](double share) {
      return static_cast<double>(bytes * tensors) > share * static_cast<double>(cache_bytes());
    };
    if (grid_.aligned()) return exceed(shares.streamed) ? Outputs::streamed : Outputs::cached;
    return grid_.stages() && exceed(shares.staged) ? Outputs::staged : Outputs::cached;
  }

  // A function over a slice; with the residual's batch norm in the place of x's where the pass is over it alone.
  void run_tile(TileFunction function, Tile tile, const Slice& slice, const Norm& norm,
                const Columns::Needs& needs) const {
    tile = placed(tile, slice, norm);
    if (!slice.columns) return function(tile);
    if (Columns::takes(tile)) return slice.columns->run(function, tile, needs);
    tile.outputs = Outputs::cached;  // a few planes that are left, one by one: they need not be aligned
    function(tile);
  }
  void run_tile(TileFunction function, Tile tile, const Slice& slice, const Columns::Needs& needs) const {
    run_tile(function, tile, slice, x_norm_, needs);
  }

  // Of rows [first, last) of a tile's sums, those of each channel's columns.
  void add_up_columns(double* sums, int64_t first, int64_t last) const {
    for (int64_t column = 1; column < grid_.columns_of_channel(); ++column) {
      for (int64_t row = first; row < last; ++row) {
        double* total = sums + row * channel_stride_;
        for (int64_t c = 0; c < channels_; ++c) total[c] += total[column * channels_ + c];
      }
    }
  }

  Tile placed(Tile tile, const Slice& slice, const Norm& norm) const {
    tile.parameters = parameters_of(norm.first_parameter * channel_stride_ + grid_.first_channel(slice.group));
    tile.following = slice.following;
    return grid_.place(tile, slice.group, slice.index);
  }

  // Runs steps in order. Either a thread takes a group through all of them, or all threads share each step. Slices have
  // `kept_bytes` each to keep something in, where the memory for it is to be had.
  void run(const std::vector<Step>& steps, int64_t kept_bytes = 0) const {
    const int64_t groups = grid_.groups(), slices = grid_.slices(), cost = grid_.slice_elements();
    if (grid_.by_groups(common_.threads)) {
      parallel_ranges(common_.threads, groups, cost * slices, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<char[]> kept(kept_bytes ? new char[kept_bytes * slices] : nullptr);
        const std::unique_ptr<Columns> columns = grid_.columns(table_, common_.dtype);
        for (int64_t group = begin; group < end; ++group) {
          for (const Step& step : steps) {
            if (step.channels) step.channels(grid_.first_channel(group), grid_.end_channel(group));
            if (!step.slices) continue;
            for (int64_t i = 0; i < slices; ++i) {
              const auto index = [&](int64_t turn) { return step.reverse ? slices - 1 - turn : turn; };
              const int64_t next_group = i + 1 < slices ? group : std::min(group + 1, groups - 1);
              const int64_t following = grid_.offset(next_group, i + 1 < slices ? index(i + 1) : 0);
              char* dz = kept ? kept.get() + kept_bytes * index(i) : nullptr;
              step.slices({group, index(i), following, dz, columns.get()});
            }
          }
        }
        if (base_.outputs != Outputs::cached) fence();
      });
      return;
    }
    const Scratch kept(kept_bytes * groups * slices);
    for (const Step& step : steps) {
      if (step.channels) parallel_ranges(common_.threads, channels_, slices * kSums, step.channels);
      if (!step.slices || !step.wanted()) continue;
      parallel_ranges(common_.threads, groups * slices, cost, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Columns> columns = grid_.columns(table_, common_.dtype);
        const auto unit = [&](int64_t turn) { return step.reverse ? begin + end - 1 - turn : turn; };
        for (int64_t i = begin; i < end; ++i) {
          const int64_t next = unit(std::min(i + 1, end - 1));
          const int64_t following = grid_.offset(next % groups, next / groups);
          char* dz = kept.data() ? kept.data() + kept_bytes * unit(i) : nullptr;
          step.slices({unit(i) % groups, unit(i) / groups, following, dz, columns.get()});
        }
        if (base_.outputs != Outputs::cached) fence();
      });
    }
  }

  const KernelTable& table_;
  const ActivationKernels& kernels_;
  const Common& common_;
  const Grid grid_;
  const int64_t channels_;
  const double count_;  // elements of a channel
  const int64_t channel_stride_;
  const Rows parameters_;  // R[kParameters][channel_stride_], or twice that
  const Norm x_norm_;
  Norm residual_norm_{};
  Tile base_{};
};

// Sums over each slice, and their totals.
class Sums {
 public:
  Sums(const KernelTable& table, const Grid& grid, int64_t channel_stride, int rows)
      : table_(table),
        grid_(grid),
        stride_(channel_stride),
        rows_(rows),
        parts_(new double[grid.slices() * rows * channel_stride]),
        totals_(grid.slices() == 1 ? nullptr : new double[rows * channel_stride]) {}

  // Zeroes rows [first, last) of a slice and returns where the group's row 0 is.
  double* start(const Slice& slice, int first, int last) {
    double* base = parts_.get() + slice.index * rows_ * stride_;
    const int64_t begin = grid_.first_channel(slice.group), end = grid_.padded_end(slice.group);
    for (int row = first; row < last; ++row) std::fill(base + row * stride_ + begin, base + row * stride_ + end, 0.0);
    return base + begin;
  }

  // Adds up the slices, in order, for rows [first, last) of channels [begin, end).
  void merge(int64_t begin, int64_t end, int first, int last) {
    if (!totals_) return;
    for (int row = first; row < last; ++row) {
      table_.add_slices(parts(0, row) + begin, grid_.slices(), rows_ * stride_, end - begin,
                        totals_.get() + row * stride_ + begin);
    }
  }

  // Has rows [0, last) of a slice made again by make_again() if they are not good(channel) in some of its channels. In
  // the others they stay: what one channel holds is not to show in another's last bits. The row `shared`, which is of
  // all channels, stays if it is good, else it alone is a reason.
  template <class Good, class MakeAgain>
  void mend(const Slice& slice, int last, Good good, MakeAgain make_again, int shared = -1, bool shared_good = true) {
    const int64_t begin = grid_.first_channel(slice.group), end = grid_.end_channel(slice.group);
    std::vector<double> kept;
    for (int64_t c = begin; c < end; ++c) {
      if (good(c) && shared_good) continue;
      for (int row = 0; row < last; ++row) {
        for (int64_t i = begin; i < end; ++i) kept.push_back(part(slice.index, row, i));
      }
      std::vector<char> stays;
      for (int64_t i = begin; i < end; ++i) stays.push_back(good(i));
      make_again();
      for (int row = 0; row < last; ++row) {
        for (int64_t i = begin; i < end; ++i) {
          if (row == shared ? shared_good : stays[i - begin] != 0)
            parts_[(slice.index * rows_ + row) * stride_ + i] = kept[row * (end - begin) + i - begin];
        }
      }
      return;
    }
  }

  double part(int64_t slice, int row, int64_t channel) const { return parts(slice, row)[channel]; }
  const double* parts(int64_t slice, int row) const { return parts_.get() + (slice * rows_ + row) * stride_; }

  double total(int row, int64_t channel) const { return totals(row)[channel]; }
  const double* totals(int row) const { return totals_ ? totals_.get() + row * stride_ : parts(0, row); }

 private:
  const KernelTable& table_;
  const Grid& grid_;
  const int64_t stride_;
  const int rows_;
  std::unique_ptr<double[]> parts_, totals_;  // a single slice is its own total
};

// The share of the mean square that the squared mean of x − pivot may take before x is measured from another pivot: at
// 15/16, four bits of var are lost.
constexpr double kFarOutlier = 15.0 / 16.0;

// ---- Forward -------------------------------------------------------------------------------------------------------

class ForwardPass : Operation {
 public:
  ForwardPass(const KernelTable& table, const Forward& call)
      : Operation(table, call,
                  !call.training             ? 0
                  : call.normalises_residual ? 2
                                             : 1),
        call_(call) {
    base_.y = call.y;
    base_.saved_mask = call.saved_mask;
    base_.outputs =
        way_of({call.x, call.residual}, {call.y}, call.training ? kTrainingForwardShares : kEvalForwardShares);
    base_.normalises = call.statistics;
  }

  void operator()() {
    const auto write = [this](const Slice& slice) {
      run_tile(kernels_.forward[call_.dtype], base_, slice, {kReadForZ, call_.normalises_residual ? kReadForZ : 0, 0});
    };
    if (!call_.training) {
      if (!call_.statistics) set_no_normalisation();
      if (call_.statistics) use_running_statistics(x_norm_, call_.norm, call_.statistics);
      if (call_.normalises_residual) {
        use_running_statistics(residual_norm_, call_.residual_norm, call_.statistics + 3 * channels_);
      }
      run({{nullptr, write}});
      return;
    }
    std::vector<Measured> measured;
    measured.emplace_back(*this, call_.x, x_norm_, call_.statistics);
    if (call_.normalises_residual) {
      measured.emplace_back(*this, call_.residual, residual_norm_, call_.statistics + 3 * channels_);
    }
    const auto each_channel = [&](void (Measured::*step)(int64_t begin, int64_t end)) {
      return [&measured, step](int64_t begin, int64_t end) {
        for (Measured& input : measured) (input.*step)(begin, end);
      };
    };
    const auto each_slice = [&](void (Measured::*step)(const Slice& slice)) {
      return [&measured, step](const Slice& slice) {
        for (Measured& input : measured) (input.*step)(slice);
      };
    };
    Step last{each_channel(&Measured::settle), nullptr, true};
    if (call_.y) last.slices = write;
    const auto any_again = [&] {
      return std::any_of(measured.begin(), measured.end(), [](const Measured& input) { return input.any_again(); });
    };
    run({{each_channel(&Measured::start), each_slice(&Measured::measure)},
         {each_channel(&Measured::restart), each_slice(&Measured::measure_again), false, any_again},
         last});
  }

 private:
  // The statistics of x, or of the residual, in the making.
  class Measured {
   public:
    Measured(ForwardPass& pass, const void* x, const Norm& norm, double* statistics)
        : pass_(pass),
          x_(x),
          norm_(norm),
          statistics_(statistics),
          sums_(pass.table_, pass.grid_, pass.channel_stride_, 2),
          shift_(pass.allocate(1)),
          again_(pass.channels_, 0) {}

    // x is measured from a number near to its mean, so that neither a large mean nor a constant channel costs accuracy.
    void start(int64_t begin, int64_t end) {
      const Shape& shape = pass_.call_.shape;
      const DataType dtype = pass_.call_.dtype;
      int64_t offsets[kOriginSamples];  // all over the channel: what lies side by side may be alike
      for (int64_t i = 0; i < kOriginSamples; ++i) {
        const int64_t element = (2 * i + 1) * (shape.batch * shape.spatial) / (2 * kOriginSamples);
        offsets[i] = shape.rows ? element * shape.channels
                                : element / shape.spatial * shape.channels * shape.spatial + element % shape.spatial;
      }
      const int64_t pitch = shape.rows ? 1 : shape.spatial;
      char* pivots = pass_.parameters_of((norm_.first_parameter + kPivot) * pass_.channel_stride_ + begin);
      pass_.table_.find_origins[dtype](static_cast<const char*>(x_) + begin * pitch * item_size(dtype), offsets, pitch,
                                       end - begin, shift_.get() + begin, pivots);
      pass_.repeat(norm_, kPivot, kPivot, begin, end);
    }

    void measure(const Slice& slice) {
      const auto run = [&](const TileFunction* functions) {
        Tile tile = pass_.base_;
        tile.x = x_;
        tile.normalises_residual = false;  // of the two, this is about one
        tile.sums = sums_.start(slice, 0, 2);
        pass_.run_tile(functions[pass_.call_.dtype], tile, slice, norm_,
                       {set_of(kPivot), 0, set_of(kDeviation, kDeviationSquares)});
        pass_.add_up_columns(tile.sums, 0, 2);
      };
      run(pass_.table_.statistics);
      const Grid& grid = pass_.grid_;
      const int64_t first = grid.first_channel(slice.group), count = grid.end_channel(slice.group) - first;
      if (pass_.table_.all_finite(sums_.parts(slice.index, kDeviationSquares) + first, count)) return;
      sums_.mend(
          slice, 2, [&](int64_t c) { return std::isfinite(sums_.part(slice.index, kDeviationSquares, c)); },
          [&] { run(pass_.table_.statistics_wide); });
    }

    // A second time, from the mean itself, where var would be a small difference of large numbers: an outlier was among
    // the elements that were asked. In float64 always, which is the accuracy that its users ask for.
    void restart(int64_t begin, int64_t end) {
      sums_.merge(begin, end, 0, 2);
      const double *deviation = sums_.totals(kDeviation), *squares = sums_.totals(kDeviationSquares);
      if (pass_.call_.dtype == kFloat64) {
        std::fill_n(again_.data() + begin, end - begin, 1);
      } else if (!pass_.table_.far_from_mean(deviation, squares, kFarOutlier * pass_.count_, begin, end,
                                             again_.data())) {
        return;
      }
      for (int64_t c = begin; c < end; ++c) {
        if (!again_[c]) continue;
        shift_[c] = pass_.round(shift_[c] + deviation[c] / pass_.count_);
        pass_.set(norm_, kPivot, c, shift_[c]);
      }
    }

    bool any_again() const { return any(again_, 0, pass_.channels_); }

    void measure_again(const Slice& slice) {
      const Grid& grid = pass_.grid_;
      if (any(again_, grid.first_channel(slice.group), grid.end_channel(slice.group))) measure(slice);
    }

    void settle(int64_t begin, int64_t end) {
      if (any(again_, begin, end)) sums_.merge(begin, end, 0, 2);
      const int64_t channels = pass_.channels_;
      pass_.table_.make_statistics(
          {shift_.get(), sums_.totals(kDeviation), sums_.totals(kDeviationSquares), pass_.count_, norm_.eps,
           statistics_, statistics_ + channels, statistics_ + 2 * channels},
          begin, end);
      pass_.set_normalisation(norm_, statistics_, begin, end);
    }

   private:
    ForwardPass& pass_;
    const void* x_;
    const Norm& norm_;
    double* statistics_;
    Sums sums_;
    Rows shift_;
    std::vector<char> again_;
  };

  void use_running_statistics(const Norm& norm, const BatchNorm& given, double* statistics) {
    const Rows mean = read(given.running_mean, channels_, 0.0), var = read(given.running_var, channels_, 1.0);
    std::copy_n(mean.get(), channels_, statistics);
    table_.reciprocal_roots(var.get(), norm.eps, channels_, statistics + channels_);
    std::fill_n(statistics + 2 * channels_, channels_, std::numeric_limits<double>::quiet_NaN());
    set_normalisation(norm, statistics, 0, channels_);
  }

  const Forward& call_;
};

// ---- Backward ------------------------------------------------------------------------------------------------------

// The part of Σdz² above which ‖dx‖² is taken from the closed form. The formula subtracts from Σdz² what mean and x̂
// explain of it, with x̂ as rounded in float32 (6e-8 an element): at a tenth the difference is right to 1e-6. Below, the
// norm is summed by the pass that writes dx.
constexpr double kClosedFormShare = 0.1;

int64_t count_nonfinite(const void* data, DataType dtype, int64_t count, int threads) {
  constexpr int64_t kScanned = 32768;  // at a time
  // An exponent of all ones.
  const auto scan = [&](auto bits, auto exponent) {
    using Bits = decltype(bits);
    const auto* values = static_cast<const Bits*>(data);
    const int64_t blocks = ceil_div(count, kScanned);
    std::vector<int64_t> found(blocks);
    parallel_ranges(threads, blocks, kScanned, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t last = std::min(count, (block + 1) * kScanned);
        for (int64_t i = block * kScanned; i < last; ++i) found[block] += (values[i] & exponent) == exponent;
      }
    });
    int64_t total = 0;
    for (int64_t n : found) total += n;
    return total;
  };
  switch (dtype) {
    case kFloat64:
      return scan(uint64_t{}, uint64_t{0x7ff} << 52);
    case kFloat32:
      return scan(uint32_t{}, uint32_t{0xff} << 23);
    case kBFloat16:
      return scan(uint16_t{}, 0xff << 7);
    default:
      return scan(uint16_t{}, 0x1f << 10);
  }
}

class BackwardPass : Operation {
 public:
  BackwardPass(const KernelTable& table, const Backward& call)
      : Operation(table, call, call.normalises_residual ? 5 : 4),
        call_(call),
        batch_mode_(call.training && call.statistics),
        bounded_(call.min_norm > 0 || call.max_norm < std::numeric_limits<double>::infinity()),
        sums_(table, grid_, channel_stride_, kSums),
        reduced_(call.normalises_residual ? kDxSquares : kDzResidualDeviation),
        dbias_(allocate(1)) {
    inputs_.push_back({x_norm_, call.statistics, kDzDeviation, kDxSquares, call.dx, call.record, allocate(1),
                       allocate(1), allocate(1), allocate(1), std::vector<char>(channels_, 0)});
    if (call.normalises_residual) {
      inputs_.push_back({residual_norm_, call.statistics + 3 * channels_, kDzResidualDeviation, kDresidualSquares,
                         call.dresidual, call.residual_record, allocate(1), allocate(1), allocate(1), allocate(1),
                         std::vector<char>(channels_, 0)});
    }
    base_.dy = call.dy;
    base_.mask = call.mask;
    base_.record = call.record;
    base_.outputs = way_of({call.x, call.residual, call.dy}, {call.dx, call.dresidual}, kBackwardShares);
    base_.normalises = call.statistics;
    base_.dx_factor = 1.0;
    // Frozen statistics, z known from the mask, γ without a gradient: nothing reads x.
    const bool dweight_wanted = call.norm.weight.data && (call.dweight || call.record);
    if (!batch_mode_ && !evaluates_z() && !(call.statistics && dweight_wanted)) base_.x = nullptr;
  }

  void operator()() {
    const auto set_channels = [this](int64_t begin, int64_t end) {
      for (Input& input : inputs_) set_normalisation_of(input, begin, end);
    };
    if (!call_.statistics) forgo_normalisation();
    if (call_.mean_gradients) {
      set_channels(0, channels_);
      return differentiate_input();
    }
    const auto reduce_all = [this](const Slice& slice) { reduce(slice, call_.dresidual); };
    const auto apply_all = [this](const Slice& slice) { apply(slice); };
    const auto settle_norms_of = [this](int64_t begin, int64_t end) { settle_norms(begin, end); };
    const auto settle = [&](int64_t begin, int64_t end) {
      sums_.merge(begin, end, 0, reduced_);
      for (Input& input : inputs_) {
        table_.settle_gradients(gradient_of(input), begin, end);
        if (batch_mode_) set_input_lines(input, begin, end);
      }
    };
    if (batch_mode_ && call_.dx) {
      run({{set_channels, reduce_all}, {settle, apply_all, true}, {settle_norms_of, nullptr}}, kept_bytes());
    } else {
      run({{set_channels, reduce_all}, {settle, nullptr}});
    }
    write_records(bound(add_up(x().squares.get())));
    write_gradients();
  }

 private:
  // What the gradient of an input, x or a residual that is normalised, is made of.
  struct Input {
    const Norm& norm;
    const double* statistics;
    Sum dz_deviation, gradient_squares;  // its rows
    const void* gradient;
    double* record;
    Rows dweight, mean_rest, scale, squares;  // of each channel; the last: ‖dx‖²
    std::vector<char> cancels;                // whether that is summed up as dx is written
  };

  Input& x() { return inputs_[0]; }

  void set_normalisation_of(Input& input, int64_t begin, int64_t end) {
    if (!input.statistics) return;
    set_normalisation(input.norm, input.statistics, begin, end, input.mean_rest.get(), input.scale.get());
  }

  void forgo_normalisation() {
    set_no_normalisation();
    fill(x_norm_, kInputScale, 1.0);
    std::fill_n(x().mean_rest.get(), channels_, 0.0);
    std::fill_n(x().scale.get(), channels_, 1.0);
  }

  InputGradient gradient_of(Input& input) const {
    return {sums_.totals(kDz),
            sums_.totals(input.dz_deviation),
            sums_.totals(kDzSquares),
            input.statistics ? input.statistics + channels_ : nullptr,
            input.mean_rest.get(),
            input.scale.get(),
            count_,
            input.norm.eps,
            kClosedFormShare,
            batch_mode_,
            input.gradient && (input.record || bounded_),
            dbias_.get(),
            input.dweight.get(),
            input.squares.get(),
            input.cancels.data(),
            parameters_of(input.norm.first_parameter * channel_stride_),
            channel_stride_};
  }

  // dx = scale·(dz − dβ/m − x̂·dγ/m) as a line in dz and in d = x − pivot.
  void set_input_lines(Input& input, int64_t begin, int64_t end) {
    table_.input_lines[call_.dtype](gradient_of(input), begin, end);
    repeat(input.norm, kInputSlope, kInputShift, begin, end);
  }

  // dx from the means that were given, and ‖dx‖² as it is written.
  void differentiate_input() {
    for (int64_t c = 0; c < channels_; ++c) {
      dbias_[c] = call_.mean_gradients[c] * count_;
      x().dweight[c] = call_.mean_gradients[channels_ + c] * count_;
      x().cancels[c] = 1;  // the closed form holds for the sums of this tensor alone
    }
    set_input_lines(x(), 0, channels_);
    base_.dx_factor = *call_.dx_factor;
    run({{nullptr, [this](const Slice& slice) { apply(slice); }},
         {[this](int64_t begin, int64_t end) { settle_norms(begin, end); }, nullptr}});
    *call_.dx_squares = add_up(x().squares.get());
  }

  // Whether dx is made from dz as dresidual has it, rounded to the tensors' type: as PyTorch's batch norm takes it from
  // its activation, and half of the work of a smooth one. Kept or read again, it is the same.
  bool reads_dresidual() const { return call_.dresidual && !call_.mask && !call_.normalises_residual; }

  bool evaluates_z() const { return !call_.mask && call_.activation != kIdentity; }

  // Of a slice's dz, if it is to be kept for the second pass: where it costs more to make than to read again. Not where
  // it is rounded as dresidual would be. Where all threads share the passes it waits in the last cache for all slices'
  // second turn, which gains where tensors take half of its room.
  int64_t kept_bytes() const {
    const int64_t bytes = grid_.padded_slice() * opmath_size(call_.dtype);
    const bool half = item_size(call_.dtype) == 2;
    const bool rounded = half && call_.residual && !call_.normalises_residual;
    const bool again = evaluates_z() && !reads_dresidual() && !rounded;
    if (!again) return 0;
    if (grid_.by_groups(call_.threads)) return bytes * grid_.slices() <= kMaxKeptBytes ? bytes : 0;
    return half && kernels_.costly && bytes * grid_.slices() * grid_.groups() <= cache_bytes() / 2 ? bytes : 0;
  }

  // Sums; and, with frozen statistics, dx.
  void reduce(const Slice& slice, void* dresidual) {
    Tile tile = base_;
    tile.dresidual = batch_mode_ && call_.normalises_residual ? nullptr : dresidual;
    tile.dz = slice.kept;
    if (!batch_mode_) tile.dx = call_.dx;
    // Where the second pass finds it.
    if (reads_dresidual() && grid_.by_groups(call_.threads)) tile.outputs = Outputs::cached;
    const auto run = [&](const TileFunction* functions) {
      tile.sums = sums_.start(slice, 0, reduced_);
      run_tile(functions[call_.dtype], tile, slice, reduction_needs(tile));
      add_up_columns(tile.sums, 0, reduced_);
    };
    run(kernels_.reduce);
    if (call_.dtype == kFloat64) return;
    if (all_hold(slice.group, slice.index)) return;
    const bool hold = squares_hold(slice.group, slice.index);
    const bool dy_squares_hold = hold && std::isfinite(dy_squares(slice.group, slice.index));
    sums_.mend(
        slice, reduced_, [&](int64_t c) { return hold && finite(slice.index, c); }, [&] { run(kernels_.reduce_wide); },
        kDySquares, dy_squares_hold);
  }

  Columns::Needs reduction_needs(const Tile& tile) const {
    const uint32_t for_z = evaluates_z() ? kReadForZ : set_of(kPivot);
    const uint32_t scaled = set_of(kInputScale);
    Columns::Needs needs{for_z | (tile.dx ? scaled : 0), 0, set_of(kDz, kDzDeviation, kDzSquares)};
    if (call_.activation_weight.data) needs.sums |= set_of(kActivationDweight);
    if (call_.normalises_residual) {
      needs.residual_parameters = for_z | (tile.dresidual ? scaled : 0);
      needs.sums |= set_of(kDzResidualDeviation);
    }
    return needs;
  }

  double dy_squares(int64_t group, int64_t slice) const {
    return sums_.part(slice, kDySquares, grid_.first_channel(group));
  }

  bool finite(int64_t slice, int64_t c) const {
    return std::isfinite(sums_.part(slice, kDzDeviation, c) + sums_.part(slice, kDzSquares, c) +
                         sums_.part(slice, kActivationDweight, c) +
                         (call_.normalises_residual ? sums_.part(slice, kDzResidualDeviation, c) : 0.0));
  }

  // Whether the squares in a slice's sums are those of numbers whose squares float32 holds. One that underflows takes
  // less than 2⁻¹²⁵ from a sum, and is missed only beside others that are as small: in Σdz², in Σdy², or in ‖dx‖².
  bool squares_hold(int64_t group, int64_t slice) const {
    return std::all_of(inputs_.begin(), inputs_.end(),
                       [&](const Input& input) { return squares_hold(input, group, slice); });
  }

  bool squares_hold(const Input& input, int64_t group, int64_t slice) const {
    SquaresOfSlice squares{};
    for (int64_t c = grid_.first_channel(group); c < grid_.end_channel(group); ++c) {
      if (!finite(slice, c)) continue;
      const double dz = sums_.part(slice, kDzSquares, c), squared_scale = input.scale[c] * input.scale[c];
      squares.dz += dz;
      squares.dx += squared_scale * dz;
      squares.largest = std::max(squares.largest, squared_scale);
    }
    const double dy = dy_squares(group, slice);
    squares.dy = std::isfinite(dy) ? dy : std::numeric_limits<double>::infinity();  // that is asked for elsewhere
    return hold(squares);
  }

  bool hold(const SquaresOfSlice& squares) const {
    const double lost = 0x1p-125 * static_cast<double>(grid_.slice_elements());
    constexpr double kNegligible = 0x1p-26;
    return lost <= kNegligible * squares.dz && lost * squares.largest <= kNegligible * squares.dx &&
           (!call_.record || lost <= kNegligible * squares.dy);
  }

  // Whether all sums of a slice are finite and all squares hold, by one quick look. So it is but for rare gradients, of
  // whose channels more is then to be asked.
  bool all_hold(int64_t group, int64_t slice) const {
    if (call_.normalises_residual) return false;
    const int64_t first = grid_.first_channel(group);
    const SquaresOfSlice squares =
        table_.look_at_slice(sums_.parts(slice, kDzDeviation) + first, sums_.parts(slice, kActivationDweight) + first,
                             sums_.parts(slice, kDzSquares) + first, sums_.parts(slice, kDySquares) + first,
                             inputs_[0].scale.get() + first, grid_.end_channel(group) - first);
    return squares.finite && hold(squares);
  }

  // dx, from dz as it was kept or written, else from dy again.
  void apply(const Slice& slice) {
    Tile tile = base_;
    tile.dx = call_.dx;
    if (call_.normalises_residual) tile.dresidual = call_.dresidual;
    const bool any_cancels = std::any_of(inputs_.begin(), inputs_.end(), [&](const Input& input) {
      return any(input.cancels, grid_.first_channel(slice.group), grid_.end_channel(slice.group));
    });
    if (any_cancels) tile.sums = sums_.start(slice, kDxSquares, kSums);
    const ActivationKernels* kernels = &kernels_;
    if (slice.kept) {
      tile.dz = slice.kept;
    } else if (reads_dresidual()) {
      kernels = &table_.activations[kIdentity];
      tile.dy = call_.dresidual;
    }
    const uint32_t for_dx = set_of(kPivot, kInputScale, kInputSlope, kInputShift);
    const uint32_t for_z = kernels == &kernels_ && !tile.dz && evaluates_z() ? kReadForZ : 0;
    run_tile(kernels->apply[call_.dtype], tile, slice,
             {for_dx | for_z, call_.normalises_residual ? for_dx | for_z : 0,
              any_cancels ? set_of(kDxSquares, kDresidualSquares) : 0});
    if (any_cancels) add_up_columns(tile.sums, kDxSquares, kSums);
  }

  void settle_norms(int64_t begin, int64_t end) {
    for (Input& input : inputs_) {
      if (!any(input.cancels, begin, end)) continue;
      for (int64_t c = begin; c < end; ++c) {
        if (!input.cancels[c]) continue;
        sums_.merge(c, c + 1, input.gradient_squares, input.gradient_squares + 1);
        input.squares[c] = sums_.total(input.gradient_squares, c);
      }
    }
  }

  // Brings ‖dx‖ into its bounds, where it is not, by the pass that wrote dx once more, with a factor: a half-precision
  // dx is rounded once. Returns ‖dx‖² as it is handed on.
  double bound(double squares) {
    const double norm = std::sqrt(squares);
    if (!bounded_ || !(norm > 0.0) || !std::isfinite(norm)) return squares;
    base_.dx_factor = std::clamp(norm, call_.min_norm, call_.max_norm) / norm;
    if (base_.dx_factor == 1.0) return squares;
    if (call_.dx) {
      std::fill(x().cancels.begin(), x().cancels.end(), 0);  // the norm is known
      run({{nullptr, [this](const Slice& slice) { batch_mode_ ? apply(slice) : reduce(slice, nullptr); }}});
    }
    return squares * base_.dx_factor * base_.dx_factor;
  }

  double add_up(const double* channels) const { return table_.add_up(channels, channels_); }
  double add_up(Sum row) const { return add_up(sums_.totals(row)); }
  double add_up_squares(const double* channels) const { return table_.add_up_squares(channels, channels_); }

  // The residual's batch norm is a layer without activation, at which dz arrives.
  void write_records(double dx_squares) {
    const double dz_squares = add_up(kDzSquares);
    // Squares of finite float32 values do not overflow in float64: nothing to count unless the sum says so.
    if (call_.record) {
      const double dy_squares = add_up(kDySquares);
      const int64_t nonfinite = std::isfinite(dy_squares) ? 0 : nonfinite_in(call_.dy);
      write_record(call_.record, dy_squares, dz_squares, dx_squares, x(), call_.norm, add_up(kDead), nonfinite);
    }
    if (call_.residual_record) {
      const int64_t nonfinite = std::isfinite(dz_squares) ? 0 : nonfinite_in_dz();
      const Input& input = inputs_[1];
      write_record(call_.residual_record, dz_squares, dz_squares, add_up(input.squares.get()), input,
                   call_.residual_norm, 0.0, nonfinite);
    }
  }

  // In the order of vgkern.ops.RECORD_FIELDS.
  void write_record(double* record, double dy_squares, double dz_squares, double dx_squares, const Input& input,
                    const BatchNorm& norm, double dead, int64_t nonfinite) const {
    const double fields[kRecordFields] = {
        dy_squares,
        dz_squares,
        dx_squares,
        norm.weight.data ? add_up_squares(input.dweight.get()) : 0.0,
        norm.bias.data ? add_up_squares(dbias_.get()) : 0.0,
        dead,
        static_cast<double>(nonfinite),
        static_cast<double>(elements()),
        1.0,
    };
    std::copy_n(fields, kRecordFields, record);
  }

  int64_t elements() const { return call_.shape.batch * call_.shape.channels * call_.shape.spatial; }

  int64_t nonfinite_in(const void* tensor) const {
    return count_nonfinite(tensor, call_.dtype, elements(), call_.threads);
  }

  // dz is written nowhere. Here it is, as the gradient of a residual that is scaled by 1 under frozen statistics.
  int64_t nonfinite_in_dz() {
    const std::unique_ptr<char[]> dz(new char[elements() * item_size(call_.dtype)]);
    Sums unused(table_, grid_, channel_stride_, kSums);
    for (int64_t c = 0; c < channels_; ++c) set(residual_norm_, kInputScale, c, 1.0);
    run({{nullptr, [&](const Slice& slice) {
            Tile tile = base_;
            tile.dresidual = dz.get();
            tile.outputs = Outputs::cached;
            tile.sums = unused.start(slice, 0, reduced_);
            run_tile(kernels_.reduce[call_.dtype], tile, slice, reduction_needs(tile));
          }}});
    return nonfinite_in(dz.get());
  }

  void write_gradients() const {
    const auto write = [&](const Rows& values, void* target, DataType dtype) {
      if (target) table_.from_double[dtype](values.get(), target, channels_);
    };
    write(inputs_[0].dweight, call_.dweight, call_.gradient_dtype);
    write(dbias_, call_.dbias, call_.gradient_dtype);
    if (call_.normalises_residual) {
      write(inputs_[1].dweight, call_.dresidual_weight, call_.residual_gradient_dtype);
      write(dbias_, call_.dresidual_bias, call_.residual_gradient_dtype);
    }
    if (!call_.dactivation_weight) return;
    const bool shared = call_.activation_weight_size == 1;
    const Rows gradient = allocate(1);
    for (int64_t c = 0; c < channels_; ++c) gradient[c] = sums_.total(kActivationDweight, c);
    if (shared) gradient[0] = add_up(kActivationDweight);
    table_.from_double[call_.activation_weight.dtype](gradient.get(), call_.dactivation_weight, shared ? 1 : channels_);
  }

  const Backward& call_;
  const bool batch_mode_, bounded_;
  Sums sums_;
  const int reduced_;  // how many of their rows the reduction makes
  const Rows dbias_;
  std::vector<Input> inputs_;
};

// ---- Without channels ----------------------------------------------------------------------------------------------

// Whether there is a number for each channel.
bool has_channels(const Common& call, const double* statistics) {
  return statistics || call.activation_weight_size > 1;
}

// The same memory, and the same bits of a mask, with as few channels as may be.
Shape without_channels(const Shape& shape, const uint8_t* mask) {
  const int64_t stretch = shape.rows ? shape.channels : shape.spatial;
  const int64_t stretches = shape.batch * shape.channels * shape.spatial / stretch;
  if (!mask || stretch % 8 == 0) return {1, 1, stretches * stretch, false};
  if (shape.rows) return shape;  // of rows those that have gaps in their bits can be taken together
  const int64_t channels = std::gcd(stretches, kTileChannels);
  return {stretches / channels, channels, stretch, false};
}

}  // namespace

int64_t set_cache_bytes(int64_t bytes) { return cache_bytes().exchange(bytes); }

void batch_norm_act_forward(const KernelTable& table, const Forward& given) {
  Forward call = given;
  if (!has_channels(call, call.statistics)) call.shape = without_channels(call.shape, call.saved_mask);
  ForwardPass(table, call)();
}

void batch_norm_act_backward(const KernelTable& table, const Backward& given) {
  Backward call = given;
  if (!has_channels(call, call.statistics)) call.shape = without_channels(call.shape, call.mask);
  BackwardPass(table, call)();
}

}  // namespace vgkern
