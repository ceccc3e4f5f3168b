#include "small_planes.h"

#include <algorithm>

namespace vgkern {
namespace {

// A row of columns and a vector behind it.
int64_t padded(int64_t columns) { return (columns / kChannelPadding + 2) * kChannelPadding; }

int64_t mask_bytes(int64_t spatial) { return (spatial + 7) / 8; }

// take(row) for each of a set.
template <class Take>
void each(uint32_t rows, Take take) {
  for (int row = 0; rows >> row; ++row) {
    if (rows >> row & 1) take(row);
  }
}

}  // namespace

Columns::Columns(const KernelTable& table, DataType dtype, int64_t spatial, int64_t channels)
    : table_(table),
      dtype_(dtype),
      spatial_(spatial),
      padded_(padded(channels * spatial)),
      memory_(new char[64 + kSums * padded_ * static_cast<int64_t>(sizeof(double)) +
                       2 * kParameters * padded_ * opmath_size(dtype)]) {
  char* begin = memory_.get() + -reinterpret_cast<uintptr_t>(memory_.get()) % 64;
  sums_ = reinterpret_cast<double*>(begin);
  parameters_ = begin + kSums * padded_ * static_cast<int64_t>(sizeof(double));
}

// Bits of a mask are read and written eight bytes at a time.
bool Columns::takes(const Tile& tile) { return tile.channels * mask_bytes(tile.width) >= 8; }

void Columns::run(TileFunction function, Tile tile, const Needs& needs) {
  const Tile planes = tile;
  tile.across = true;
  tile.planes = true;
  tile.bits_stretch = spatial_;
  tile.channels = 1;
  tile.width = planes.channels * spatial_;
  tile.channel_stride = 0;
  tile.mask_channel_stride = 0;

  tile.padded_channels = padded_;
  tile.parameters = parameters_;
  const int64_t size = opmath_size(dtype_);
  const auto expand = [&](int row) {
    const char* from = static_cast<const char*>(planes.parameters) + row * planes.padded_channels * size;
    table_.to_columns[dtype_](from, planes.channels, spatial_, parameters_ + row * padded_ * size);
  };
  each(needs.parameters, expand);
  each(needs.residual_parameters, [&](int row) { expand(kParameters + row); });
  if (planes.sums) tile.sums = sums_;
  each(needs.sums, [&](int row) { std::fill_n(sums_ + row * padded_, padded_, 0.0); });
  for (Sum row : {kDySquares, kDead}) sums_[row * padded_] = 0.0;  // of all columns

  function(tile);

  each(needs.sums, [&](int row) {
    table_.add_columns(sums_ + row * padded_, planes.channels, spatial_, planes.sums + row * planes.padded_channels);
  });
  if (!planes.sums || !tile.record) return;
  for (Sum row : {kDySquares, kDead}) planes.sums[row * planes.padded_channels] += sums_[row * padded_];
}

}  // namespace vgkern
