#include "../tiles.h"

namespace vgkern {

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table = make_table("avx2");
  return table;
}

}  // namespace vgkern
