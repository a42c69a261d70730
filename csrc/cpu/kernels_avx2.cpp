#include "simd_avx2.h"
// clang-format off: the lane types come first
#include "tile_kernels.h"

namespace dbmtl {

const KernelTable* avx2_kernels() {
  static const KernelTable table = make_table("avx2");
  return &table;
}

}  // namespace dbmtl
