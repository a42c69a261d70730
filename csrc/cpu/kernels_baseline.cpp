#include "tile_kernels.h"

const dbmtl::KernelTable* dbmtl::baseline_kernels() { return table_of("baseline"); }
