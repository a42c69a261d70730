#include "tile_kernels.h"

const dbmtl::KernelTable* dbmtl::avx2_kernels() { return table_of("avx2"); }
