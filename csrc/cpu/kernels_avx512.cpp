#include "tile_kernels.h"

const dbmtl::KernelTable* dbmtl::avx512_kernels() { return table_of("avx512"); }
