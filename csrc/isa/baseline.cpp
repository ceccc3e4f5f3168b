#include "../tiles.h"

namespace vgkern {

const KernelTable& baseline_kernels() {
  static constexpr KernelTable table = make_table("baseline");
  return table;
}

}  // namespace vgkern
