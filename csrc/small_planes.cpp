#include "small_planes.h"

#include <algorithm>
#include <cstring>

namespace vgkern {
namespace {

// A row of columns and a vector behind it.
int64_t padded(int64_t columns) { return (columns / kChannelPadding + 2) * kChannelPadding; }

// The first of `bytes` bytes, eight at most.
uint64_t load_word(const uint8_t* from, int64_t bytes) {
  uint64_t word = 0;
  if (bytes >= 8) {
    std::memcpy(&word, from, 8);
  } else {
    for (int64_t i = 0; i < bytes; ++i) word |= uint64_t{from[i]} << 8 * i;
  }
  return word;
}

// Bits of `count` planes, which start a byte each, side by side in a row that 8 bytes may follow.
void pack(const uint8_t* planes, int64_t count, int64_t spatial, uint8_t* row) {
  constexpr int64_t kBits = 56;  // at a time: they fit a word that begins anywhere in a byte
  const int64_t bytes = (spatial + 7) / 8;
  const uint8_t* const end = planes + count * bytes;
  uint64_t pending = 0;
  int64_t filled = 0;
  for (; planes < end; planes += bytes) {
    for (int64_t bit = 0; bit < spatial; bit += kBits) {
      const int64_t bits = std::min(kBits, spatial - bit);
      const uint8_t* from = planes + bit / 8;
      pending |= (load_word(from, end - from) & ((uint64_t{1} << bits) - 1)) << filled;
      std::memcpy(row, &pending, 8);
      filled += bits;
      row += filled / 8;
      pending >>= filled / 8 * 8;
      filled %= 8;
    }
  }
}

}  // namespace

Columns::Columns(const KernelTable& table, DataType dtype, int64_t spatial, int64_t channels, int64_t rows)
    : table_(table),
      dtype_(dtype),
      spatial_(spatial),
      padded_(padded(channels * spatial)),
      memory_(new char[64 + kSums * padded_ * static_cast<int64_t>(sizeof(double)) +
                       2 * kParameters * padded_ * opmath_size(dtype) + rows * ((channels * spatial + 7) / 8) + 8]) {
  char* begin = memory_.get() + -reinterpret_cast<uintptr_t>(memory_.get()) % 64;
  sums_ = reinterpret_cast<double*>(begin);
  parameters_ = begin + kSums * padded_ * static_cast<int64_t>(sizeof(double));
  mask_ = reinterpret_cast<uint8_t*>(parameters_ + 2 * kParameters * padded_ * opmath_size(dtype));
}

void Columns::run(TileFunction function, Tile tile, int parameters, int sums) {
  const Tile planes = tile;
  tile.across = true;
  tile.channels = 1;
  tile.width = planes.channels * spatial_;
  tile.channel_stride = 0;

  tile.padded_channels = padded_;
  tile.parameters = parameters_;
  const int64_t size = opmath_size(dtype_);
  for (int set = 0; set <= tile.normalises_residual; ++set) {
    for (int row = set * kParameters; row < set * kParameters + parameters; ++row) {
      const auto* from = static_cast<const char*>(planes.parameters) + row * planes.padded_channels * size;
      table_.to_columns[dtype_](from, planes.channels, spatial_, parameters_ + row * padded_ * size);
    }
  }
  tile.sums = sums_;
  std::fill_n(sums_, sums * padded_, 0.0);

  // Where the bits of a plane end with a byte, those of the next follow.
  tile.mask_channel_stride = 0;
  if (tile.mask && spatial_ % 8 != 0) {
    tile.mask = mask_;
    tile.mask_offset = 0;
    tile.mask_stride = (tile.width + 7) / 8;
    for (int64_t run = 0; run < tile.runs; ++run) {
      pack(planes.mask + planes.mask_offset + run * planes.mask_stride, planes.channels, spatial_,
           mask_ + run * tile.mask_stride);
    }
  }

  // Past the caches only whole vectors at multiples of their size; a stage is for planes.
  const int64_t lanes = dtype_ == kFloat64 ? 8 : 16;
  const bool aligned = tile.offset % lanes == 0 && tile.stride % lanes == 0;
  if (tile.outputs != Outputs::cached) tile.outputs = aligned ? Outputs::streamed : Outputs::cached;

  function(tile);

  for (int row = 0; row < sums; ++row) {
    table_.add_columns(sums_ + row * padded_, planes.channels, spatial_, planes.sums + row * planes.padded_channels);
  }
}

}  // namespace vgkern
