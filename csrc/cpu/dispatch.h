// Which instruction set runs, and what the entry points share.
#pragma once
#include "common/arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace dbmtl {

const KernelTable& kernels();

// Whether to write `n` numbers past the cache: a result this large is not read from it.
inline bool streams(const void* out, int64_t dtype, int64_t n) {
  return n * kElementSize[dtype] >= kStreamFromBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// A float64 result, stored in one of two dtypes.
inline void put(void* to, int64_t index, bool as_double, double x) {
  if (as_double)
    static_cast<double*>(to)[index] = x;
  else
    static_cast<float*>(to)[index] = float(x);
}

}  // namespace dbmtl
