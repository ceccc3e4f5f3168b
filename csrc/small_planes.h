// Small planes across the batch.
//
// The planes of some channels lie side by side in each sample. Walked one by one, small ones leave lanes empty at the
// end of each, and what a sum takes once a plane is most of the work. So they are taken as a row of columns, an element
// of a plane each, and walked down the samples as rows of channels are: each column has the numbers of its channel, and
// its sums are added up to that channel's.
#pragma once

#include <cstdint>
#include <memory>

#include "kernel_table.h"

namespace vgkern {

// Of parameters, or of sums.
template <class... Rows>
constexpr uint32_t set_of(Rows... rows) {
  return (uint32_t{0} | ... | (uint32_t{1} << rows));
}

// The numbers of one thread's columns.
class Columns {
 public:
  // For tiles of so many channels' planes, of `spatial` elements each.
  Columns(const KernelTable& table, DataType dtype, int64_t spatial, int64_t channels);

  // What a function has of each column: the parameters that it reads, and the sums that it makes (but for kDySquares
  // and kDead, which are of all columns). Sets of rows, a bit for each.
  struct Needs {
    uint32_t parameters, residual_parameters, sums;
  };

  // Whether `run` takes a tile of whole planes.
  static bool takes(const Tile& tile);

  void run(TileFunction function, Tile tile, const Needs& needs);

 private:
  const KernelTable& table_;
  const DataType dtype_;
  const int64_t spatial_, padded_;
  const std::unique_ptr<char[]> memory_;
  double* sums_;
  char* parameters_;
};

}  // namespace vgkern
