#include "simd_avx512.h"
// clang-format off: the lane types come first
#include "tile_kernels.h"

namespace dbmtl {

const KernelTable* avx512_kernels() {
  static const KernelTable table = make_table("avx512");
  return &table;
}

}  // namespace dbmtl
