// What a call checks of its arguments, and how it says what was wrong.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "common/weights.h"
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

// No memory is larger: a process has 47 bits of addresses. Sums and products of sizes that were checked stay below 2^63.
constexpr int64_t kMostBytes = int64_t(1) << 47;
constexpr int64_t kMostCount = INT32_MAX;  // of tasks, and of segments

// Elements of a valid dtype that memory has room for.
inline int64_t most_elements(int64_t dtype) { return kMostBytes / kElementSize[dtype]; }

// Zeros, and no exception: false where there is no memory.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::calloc(n > 0 ? size_t(n) : 1, sizeof(T)))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  explicit operator bool() const { return data_ != nullptr; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Sets of dtypes, one bit for each.
constexpr unsigned kAnyDtype = 0xF, kStateDtype = 0x7, kWideDtype = 0x3;

// An array of so many elements; of none it may be null.
inline int32_t check_array(const char* name, const dbmtl_array& a, int64_t count, unsigned dtypes = kAnyDtype) {
  if (a.dtype < 0 || a.dtype > 3 || !(dtypes >> a.dtype & 1)) return fail(DBMTL_UNSUPPORTED_DTYPE, name, ": dtype");
  if (count > most_elements(a.dtype)) return fail(DBMTL_INVALID_ARGUMENT, name, ": no memory is so large");
  return count == 0 || a.data != nullptr ? DBMTL_OK : fail(DBMTL_INVALID_ARGUMENT, name, " is null");
}

inline int32_t check_rows(const char* name, const dbmtl_rows& r, unsigned dtypes = kStateDtype) {
  if (r.num_tasks < 0 || r.num_params < 0 || (r.num_tasks > 1 && r.stride < r.num_params))
    return fail(DBMTL_INVALID_ARGUMENT, name, ": size or stride");
  if (r.num_tasks > kMostCount) return fail(DBMTL_INVALID_ARGUMENT, name, ": num_tasks is too large");
  DBMTL_TRY(check_array(name, {r.data, r.dtype}, r.num_tasks == 0 ? 0 : r.num_params, dtypes));
  if (r.num_tasks > 1 && r.stride > (most_elements(r.dtype) - r.num_params) / (r.num_tasks - 1))
    return fail(DBMTL_INVALID_ARGUMENT, name, ": no memory is so large");
  return DBMTL_OK;
}

inline int32_t check_weighting(const dbmtl_weighting& w) {
  if (!(w.eps > 0.0 && is_finite(w.eps))) return fail(DBMTL_INVALID_ARGUMENT, "eps: not positive and finite");
  if (!is_finite(std::fabs(w.constant))) return fail(DBMTL_INVALID_ARGUMENT, "constant: not finite");
  if (w.scale < DBMTL_SCALE_MAX || w.scale > DBMTL_SCALE_CONSTANT) return fail(DBMTL_INVALID_ARGUMENT, "scale");
  return DBMTL_OK;
}

inline int32_t check(const dbmtl_balance_args& a) {
  DBMTL_TRY(check_rows("grads", a.grads, kAnyDtype));
  DBMTL_TRY(check_rows("ema", a.ema));
  if (a.grads.num_tasks != a.ema.num_tasks || a.grads.num_params != a.ema.num_params)
    return fail(DBMTL_INVALID_ARGUMENT, "grads: not the size of ema");
  DBMTL_TRY(check_array("out", a.out, a.ema.num_params));
  if (!(a.beta >= 0.0 && a.beta < 1.0)) return fail(DBMTL_INVALID_ARGUMENT, "beta: not in [0, 1)");
  DBMTL_TRY(check_weighting(a.weighting));
  return check_array("norms", {a.norms, DBMTL_F32}, a.ema.num_tasks);
}

// That no element of a row is in two segments: two threads would write it.
inline int32_t check_apart(const int64_t* segments, int64_t count) {
  struct Span {
    int64_t begin, end;
  };
  const auto span = [segments](int64_t i) { return Span{segments[2 * i], segments[2 * i] + segments[2 * i + 1]}; };
  // Without memory where one lies after the other, up or down, as it is with parameters of one dtype.
  bool up = true, down = true;
  for (int64_t i = 1; i < count && (up || down); ++i) {
    up = up && span(i - 1).end <= span(i).begin;
    down = down && span(i).end <= span(i - 1).begin;
  }
  if (up || down) return DBMTL_OK;
  const Scratch<Span> spans(count);
  if (!spans) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  int64_t used = 0;
  for (int64_t i = 0; i < count; ++i)
    if (span(i).begin < span(i).end) spans[used++] = span(i);
  std::sort(&spans[0], &spans[0] + used, [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (int64_t i = 1; i < used; ++i)
    if (spans[i].begin < spans[i - 1].end) return fail(DBMTL_INVALID_ARGUMENT, "segments: two overlap");
  return DBMTL_OK;
}

inline int32_t check(const dbmtl_accumulate_args& a) {
  if (a.num_segments < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_segments is negative");
  if (a.num_segments > kMostCount) return fail(DBMTL_INVALID_ARGUMENT, "num_segments is too large");
  if (a.num_segments > 0 && (!a.segments || !a.grads || !a.grad_dtypes))
    return fail(DBMTL_INVALID_ARGUMENT, "segments, grads or grad_dtypes is null");
  DBMTL_TRY(check_array("row", a.row, 0, kStateDtype));
  int64_t total = 0;
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const int64_t offset = a.segments[2 * i], numel = a.segments[2 * i + 1], most = most_elements(a.row.dtype);
    if (offset < 0 || numel < 0) return fail(DBMTL_INVALID_ARGUMENT, "segments: negative");
    if (numel > most - total || (a.row.data != nullptr && numel > most - offset))
      return fail(DBMTL_INVALID_ARGUMENT, "segments: no memory is so large");
    total += numel;
    DBMTL_TRY(check_array("grads", {nullptr, a.grad_dtypes[i]}, 0));
    if (numel > most_elements(a.grad_dtypes[i]))
      return fail(DBMTL_INVALID_ARGUMENT, "grads: no memory is so large");
  }
  if (!a.sumsq || !a.coefficients) return fail(DBMTL_INVALID_ARGUMENT, "sumsq or coefficients is null");
  DBMTL_TRY(check_array("loss_scale", a.loss_scale, 0));
  return a.row.data == nullptr ? DBMTL_OK : check_apart(a.segments, a.num_segments);
}

inline int32_t check(const dbmtl_combine_args& a) {
  DBMTL_TRY(check_rows("rows", a.rows));
  DBMTL_TRY(check_array("weights", a.weights, a.rows.num_tasks));
  return check_array("out", a.out, a.rows.num_params);
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
    DBMTL_TRY(check_array("outs", {out.data, out.dtype}, out.numel));
  }
  if (!(a.propagate_above == a.propagate_above)) return fail(DBMTL_INVALID_ARGUMENT, "propagate_above: NaN");
  DBMTL_TRY(check_weighting(a.weighting));
  return check_array("loss_scale", a.loss_scale, 0);
}

inline int32_t check(const dbmtl_gramian_args& a) {
  DBMTL_TRY(check_rows("rows", a.rows));
  return check_array("gramian", a.gramian, a.rows.num_tasks * a.rows.num_tasks, kWideDtype);
}

template <class A>
int32_t check(const A* args) {
  return args == nullptr ? fail(DBMTL_INVALID_ARGUMENT, "args is null") : check(*args);
}

}  // namespace dbmtl
