// What the arguments of every call must be: the same in each implementation of dbmtl.h.
#pragma once
#include <cstdint>

#include "dbmtl.h"

namespace dbmtl {

struct Fault {
  int32_t status;
  const char* message;
};
constexpr Fault kNoFault = {DBMTL_OK, ""};

constexpr int64_t kElementSize[4] = {4, 8, 2, 2};  // in the order of dbmtl_dtype
constexpr int kMaxOuts = 4;

inline bool is_dtype(int32_t dtype) { return dtype >= 0 && dtype < 4; }
inline bool is_state_dtype(int32_t dtype) { return is_dtype(dtype) && dtype != DBMTL_F16; }
inline Fault invalid(const char* message) { return {DBMTL_INVALID_ARGUMENT, message}; }
inline Fault unsupported(const char* message) { return {DBMTL_UNSUPPORTED_DTYPE, message}; }

inline char* at(void* base, int64_t element, int32_t dtype) {
  return static_cast<char*>(base) + element * kElementSize[dtype];
}
inline const char* at(const void* base, int64_t element, int32_t dtype) {
  return static_cast<const char*>(base) + element * kElementSize[dtype];
}

inline Fault check_weighting(double eps, int32_t scale) {
  if (!(eps > 0.0)) return invalid("eps must be positive");
  if (scale < DBMTL_SCALE_MAX || scale > DBMTL_SCALE_CONSTANT) return invalid("scale is unknown");
  return kNoFault;
}

inline Fault check_rows(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                        int64_t num_params) {
  if (num_tasks < 0) return invalid("num_tasks is negative");
  if (num_params < 0) return invalid("num_params is negative");
  if (!is_state_dtype(state_dtype)) return unsupported("state_dtype");
  if (num_tasks > 0 && num_params > 0 && rows == nullptr) return invalid("rows is null");
  if (num_tasks > 1 && row_stride < num_params) return invalid("row_stride is smaller than num_params");
  return kNoFault;
}

inline Fault check_balance(const void* grads, int32_t grad_dtype, int64_t grad_row_stride, const void* ema,
                           int32_t state_dtype, int64_t state_row_stride, const void* out, int32_t out_dtype,
                           const void* norms, int64_t num_tasks, int64_t num_params, double beta, double eps,
                           int32_t scale, int32_t stochastic) {
  if (num_tasks < 1) return invalid("num_tasks must be at least 1");
  if (num_params < 0) return invalid("num_params is negative");
  if (!is_dtype(grad_dtype)) return unsupported("grad_dtype");
  if (!is_dtype(out_dtype)) return unsupported("out_dtype");
  if (!is_state_dtype(state_dtype)) return unsupported("state_dtype");
  if (norms == nullptr) return invalid("norms is null");
  if (num_params > 0 && grads == nullptr) return invalid("grads is null");
  if (num_params > 0 && ema == nullptr) return invalid("ema is null");
  if (num_params > 0 && out == nullptr) return invalid("out is null");
  if (num_tasks > 1 && (grad_row_stride < num_params || state_row_stride < num_params))
    return invalid("row stride smaller than num_params");
  if (!(beta >= 0.0 && beta < 1.0)) return invalid("beta is outside [0, 1)");
  if (stochastic && state_dtype != DBMTL_BF16)
    return invalid("stochastic: only a bf16 state can be rounded stochastically");
  return check_weighting(eps, scale);
}

inline Fault check_accumulate(const void* row, int32_t state_dtype, int64_t num_segments, const int64_t* segments,
                              const void* const* grads, const uint8_t* grad_dtypes, const void* loss_scale,
                              int32_t loss_scale_dtype, const double* sumsq, int32_t stochastic) {
  if (num_segments < 0) return invalid("num_segments is negative");
  if (!is_state_dtype(state_dtype)) return unsupported("state_dtype");
  if (loss_scale != nullptr && !is_dtype(loss_scale_dtype)) return unsupported("loss_scale_dtype");
  if (sumsq == nullptr) return invalid("sumsq is null");
  if (num_segments > 0 && (segments == nullptr || grads == nullptr || grad_dtypes == nullptr))
    return invalid("segments, grads or grad_dtypes is null");
  if (stochastic && state_dtype != DBMTL_BF16)
    return invalid("stochastic: only a bf16 state can be rounded stochastically");
  bool any = false;
  for (int64_t i = 0; i < num_segments; ++i) {
    if (segments[2 * i] < 0 || segments[2 * i + 1] < 0) return invalid("segments has a negative offset or size");
    if (!is_dtype(grad_dtypes[i])) return unsupported("grad_dtypes");
    any |= segments[2 * i + 1] > 0;
  }
  if (any && row == nullptr) return invalid("row is null");
  return kNoFault;
}

inline Fault check_combine(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                           int64_t num_params, const void* weights, int32_t weights_dtype, const void* out,
                           int32_t out_dtype) {
  const Fault fault = check_rows(rows, state_dtype, row_stride, num_tasks, num_params);
  if (fault.status) return fault;
  if (!is_dtype(weights_dtype)) return unsupported("weights_dtype");
  if (!is_dtype(out_dtype)) return unsupported("out_dtype");
  if (num_params > 0 && out == nullptr) return invalid("out is null");
  if (num_tasks > 0 && weights == nullptr) return invalid("weights is null");
  return kNoFault;
}

inline Fault check_balance_rows(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                const void* sumsq, const void* broken, const void* nonfinite_steps, const void* norms,
                                const void* weights, int32_t num_outs, void* const* outs, const int32_t* out_dtypes,
                                const int64_t* starts, const int64_t* numels, const void* loss_scale,
                                int32_t loss_scale_dtype, double eps, int32_t scale) {
  if (num_tasks < 1) return invalid("num_tasks must be at least 1");
  if (!is_state_dtype(state_dtype)) return unsupported("state_dtype");
  if (!sumsq || !broken || !nonfinite_steps || !norms || !weights)
    return invalid("sumsq, broken, nonfinite_steps, norms or weights is null");
  if (num_outs < 1 || num_outs > kMaxOuts) return invalid("num_outs must be 1 to 4");
  if (!outs || !out_dtypes || !starts || !numels) return invalid("outs, out_dtypes, starts or numels is null");
  if (loss_scale != nullptr && !is_dtype(loss_scale_dtype)) return unsupported("loss_scale_dtype");
  for (int32_t i = 0; i < num_outs; ++i) {
    if (!is_dtype(out_dtypes[i])) return unsupported("out_dtypes");
    if (starts[i] < 0 || numels[i] < 0) return invalid("starts or numels is negative");
    if (numels[i] > 0 && outs[i] == nullptr) return invalid("outs has a null pointer");
    if (numels[i] > 0 && rows == nullptr) return invalid("rows is null");
    if (num_tasks > 1 && row_stride < starts[i] + numels[i]) return invalid("row_stride is smaller than a row");
  }
  return check_weighting(eps, scale);
}

inline Fault check_gramian(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                           int64_t num_params, const void* gramian, int32_t out_dtype) {
  const Fault fault = check_rows(rows, state_dtype, row_stride, num_tasks, num_params);
  if (fault.status) return fault;
  if (out_dtype != DBMTL_F32 && out_dtype != DBMTL_F64) return unsupported("out_dtype must be f32 or f64");
  if (num_tasks > 0 && gramian == nullptr) return invalid("gramian is null");
  return kNoFault;
}

}  // namespace dbmtl
