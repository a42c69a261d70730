// Which instruction set runs, and how a failing call says what was wrong.
#pragma once
#include "dbmtl.h"
#include "kernels.h"

namespace dbmtl {

const KernelTable& kernels();

// Remembers `message` for dbmtl_last_error() and returns `status`.
int32_t fail(int32_t status, const char* message);

constexpr const char* kStochasticNeedsBf16 = "stochastic: only a bf16 state can be rounded stochastically";

constexpr int64_t kElementSize[kNumDtypes] = {4, 8, 2, 2};

inline bool is_dtype(int32_t dtype) { return dtype >= 0 && dtype < kNumDtypes; }
inline bool is_state_dtype(int32_t dtype) { return is_dtype(dtype) && kernels().gramian[dtype] != nullptr; }

inline char* at(void* base, int64_t element, int32_t dtype) {
  return static_cast<char*>(base) + element * kElementSize[dtype];
}
inline const char* at(const void* base, int64_t element, int32_t dtype) {
  return static_cast<const char*>(base) + element * kElementSize[dtype];
}

}  // namespace dbmtl
