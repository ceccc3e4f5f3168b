#include "../tiles.h"

namespace vgkern {

const KernelTable& avx512_kernels() {
  static constexpr KernelTable table = make_table("avx512");
  return table;
}

}  // namespace vgkern
