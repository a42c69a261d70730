// What a call checks of its arguments, and how it says what was wrong.
#pragma once
#include <cstdint>
#include <cstdio>

#include "dbmtl.h"

// Return the status of a failing check.
#define DBMTL_TRY(check) \
  if (const int32_t status = (check)) return status

namespace dbmtl {

constexpr int64_t kElementSize[4] = {4, 8, 2, 2};  // in the order of dbmtl_dtype

inline thread_local char last_error[256] = "";

inline int32_t fail(int32_t status, const char* what, const char* why = "") {
  std::snprintf(last_error, sizeof(last_error), "%s%s", what, why);
  return status;
}

inline char* at(void* base, int64_t element, int64_t dtype) {
  return static_cast<char*>(base) + element * kElementSize[dtype];
}

// Sets of dtypes, one bit for each.
constexpr unsigned kAnyDtype = 0xF, kStateDtype = 0x7, kWideDtype = 0x3;

inline int32_t check_array(const char* name, const dbmtl_array& a, bool empty, unsigned dtypes = kAnyDtype) {
  if (a.dtype < 0 || a.dtype > 3 || !(dtypes >> a.dtype & 1)) return fail(DBMTL_UNSUPPORTED_DTYPE, name, ": dtype");
  return empty || a.data != nullptr ? DBMTL_OK : fail(DBMTL_INVALID_ARGUMENT, name, " is null");
}

inline int32_t check_rows(const char* name, const dbmtl_rows& r, unsigned dtypes = kStateDtype) {
  if (r.num_tasks < 0 || r.num_params < 0 || (r.num_tasks > 1 && r.stride < r.num_params))
    return fail(DBMTL_INVALID_ARGUMENT, name, ": size or stride");
  return check_array(name, {r.data, r.dtype}, r.num_tasks == 0 || r.num_params == 0, dtypes);
}

inline int32_t check(const dbmtl_balance_args& a) {
  DBMTL_TRY(check_rows("grads", a.grads, kAnyDtype));
  DBMTL_TRY(check_rows("ema", a.ema));
  if (a.grads.num_tasks != a.ema.num_tasks || a.grads.num_params != a.ema.num_params)
    return fail(DBMTL_INVALID_ARGUMENT, "grads: not the size of ema");
  DBMTL_TRY(check_array("out", a.out, a.ema.num_params == 0));
  return check_array("norms", {a.norms, DBMTL_F32}, a.ema.num_tasks == 0);
}

inline int32_t check(const dbmtl_accumulate_args& a) {
  if (a.num_segments < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_segments is negative");
  if (a.num_segments > 0 && (!a.segments || !a.grads || !a.grad_dtypes))
    return fail(DBMTL_INVALID_ARGUMENT, "segments, grads or grad_dtypes is null");
  for (int64_t i = 0; i < a.num_segments; ++i) {
    if (a.segments[2 * i] < 0 || a.segments[2 * i + 1] < 0) return fail(DBMTL_INVALID_ARGUMENT, "segments: negative");
    DBMTL_TRY(check_array("grads", {nullptr, a.grad_dtypes[i]}, true));
  }
  DBMTL_TRY(check_array("row", a.row, true, kStateDtype));
  if (!a.sumsq || !a.coefficients) return fail(DBMTL_INVALID_ARGUMENT, "sumsq or coefficients is null");
  return check_array("loss_scale", a.loss_scale, true);
}

inline int32_t check(const dbmtl_combine_args& a) {
  DBMTL_TRY(check_rows("rows", a.rows));
  DBMTL_TRY(check_array("weights", a.weights, a.rows.num_tasks == 0));
  return check_array("out", a.out, a.rows.num_params == 0);
}

inline int32_t check(const dbmtl_balance_rows_args& a) {
  DBMTL_TRY(check_rows("rows", a.rows));
  if (!a.sumsq || !a.norms || !a.weights || !a.nonfinite || !a.nonfinite_steps)
    return fail(DBMTL_INVALID_ARGUMENT, "sumsq, norms, weights, nonfinite or nonfinite_steps is null");
  if (a.num_outs < 0 || a.num_outs > DBMTL_MAX_OUTS) return fail(DBMTL_INVALID_ARGUMENT, "num_outs");
  for (int64_t i = 0; i < a.num_outs; ++i) {
    const dbmtl_out& out = a.outs[i];
    if (out.start < 0 || out.numel < 0 || out.numel > a.rows.num_params - out.start)
      return fail(DBMTL_INVALID_ARGUMENT, "outs: outside the rows");
    DBMTL_TRY(check_array("outs", {out.data, out.dtype}, out.numel == 0));
  }
  return check_array("loss_scale", a.loss_scale, true);
}

inline int32_t check(const dbmtl_gramian_args& a) {
  DBMTL_TRY(check_rows("rows", a.rows));
  return check_array("gramian", a.gramian, a.rows.num_tasks == 0, kWideDtype);
}

}  // namespace dbmtl
