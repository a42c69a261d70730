#include "simd_baseline.h"
// clang-format off: the lane types come first
#include "tile_kernels.h"

namespace dbmtl {

const KernelTable* baseline_kernels() {
  static const KernelTable table = make_table("baseline");
  return &table;
}

}  // namespace dbmtl
