// Small planes across the batch.
//
// The planes of a few vectors of some channels lie side by side in each sample. Walked one by one, they leave lanes
// empty at the end of each, and what a sum takes once a plane is most of the work. So a pass that sums takes them as a
// row of columns, an element of a plane each, and walks down the samples as it does down rows of channels: each column
// has the numbers of its channel, and its sums are added up to that channel's.
#pragma once

#include <memory>

#include "kernel_table.h"

namespace vgkern {

// The numbers of one thread's columns.
class Columns {
 public:
  // For tiles of up to `rows` samples of so many channels' planes, of `spatial` elements each.
  Columns(const KernelTable& table, DataType dtype, int64_t spatial, int64_t channels, int64_t rows);

  // Runs `function`, which makes the first `sums` of these and reads the first `parameters` of these, on a tile of
  // whole planes. It keeps no dz.
  void run(TileFunction function, Tile tile, int parameters, int sums);

 private:
  const KernelTable& table_;
  const DataType dtype_;
  const int64_t spatial_, padded_;
  const std::unique_ptr<char[]> memory_;
  double* sums_;
  char* parameters_;
  uint8_t* mask_;
};

}  // namespace vgkern
