// The serial tile kernels, one table of them per instruction set.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace dbmtl {

constexpr int kNumDtypes = 4;  // in the order of dbmtl_dtype

// state <- decay * state + gain * grad over n elements; returns the sum of squares of what was stored.
// A null grad counts as zeros. With a null state nothing is stored: the sum of squares of gain * grad.
using EmaSumsqFn = double (*)(void* state, const void* grad, int64_t n, double decay, double gain);

// out <- (accumulate ? out : 0) + sum_t weights[t] * rows[t] over n elements. stream: bypass the cache.
using CombineFn = void (*)(const void* const* rows, const double* weights, int64_t num_rows, void* out, int64_t n,
                           bool accumulate, bool stream);

// gramian[i * num_rows + j] += <rows[i], rows[j]> for j <= i, over n elements.
using GramianFn = void (*)(const void* const* rows, int64_t num_rows, int64_t n, double* gramian);

struct KernelTable {
  const char* isa;
  EmaSumsqFn ema_sumsq[kNumDtypes][kNumDtypes];  // [state][grad]; null where the state dtype is not supported
  CombineFn combine[kNumDtypes][kNumDtypes];     // [state][out]
  GramianFn gramian[kNumDtypes];                 // [state]
};

const KernelTable* baseline_kernels();
#ifdef DBMTL_X86
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
#endif

}  // namespace dbmtl
