// From norms to the weights alpha / (norm + eps), as python/dbmtl_kernels/reference.py writes it. One task at a time,
// so that threads can share the work.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "dbmtl.h"

namespace dbmtl {

// No weight is larger: times the zeros of a task without gradient it still gives zero. (The largest float.)
constexpr double kLargest = 3.4028234663852886e38;

// Neither infinite nor NaN; x is not negative.
DBMTL_HD inline bool is_finite(double x) { return x <= 1.7976931348623157e308; }

// A norm as it is told in fp32: one that is finite does not look as if it were not.
DBMTL_HD inline double told(double norm) { return is_finite(norm) && norm > kLargest ? kLargest : norm; }

// Alpha from the norms of the tasks in use. Counting ranks for the median needs no scratch, and K is small.
DBMTL_HD inline double alpha_of(const double* norms, const uint8_t* use, int64_t num_tasks,
                                const dbmtl_weighting& w) {
  int64_t count = 0;
  double least = 0.0, most = 0.0, sum = 0.0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (!use[t]) continue;
    least = count == 0 || norms[t] < least ? norms[t] : least;
    most = norms[t] > most ? norms[t] : most;
    sum += norms[t];
    ++count;
  }
  if (w.scale == DBMTL_SCALE_CONSTANT || count == 0) return w.constant;
  if (w.scale == DBMTL_SCALE_MAX) return most;
  if (w.scale == DBMTL_SCALE_MIN) return least;
  if (w.scale == DBMTL_SCALE_MEAN) return sum / double(count);
  double low = 0.0, high = 0.0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (!use[t]) continue;
    int64_t rank = 0;
    for (int64_t u = 0; u < num_tasks; ++u)
      rank += use[u] && (norms[u] < norms[t] || (norms[u] == norms[t] && u < t));
    if (rank == (count - 1) / 2) low = norms[t];
    if (rank == count / 2) high = norms[t];
  }
  return 0.5 * (low + high);
}

// The weight of one task; 0 if it is not in use. With a single task and a named scale it is exactly 1.
DBMTL_HD inline double weight_of(double norm, bool use, double alpha, int64_t num_tasks,
                                 const dbmtl_weighting& w) {
  if (!use) return 0.0;
  if (num_tasks == 1 && w.scale != DBMTL_SCALE_CONSTANT) return 1.0;
  const double weight = alpha / (norm + w.eps);
  return weight < kLargest ? weight : kLargest;
}

// Whether a task has a say; `active` may be null.
DBMTL_HD inline bool is_active(const uint8_t* active, int64_t task) { return active == nullptr || active[task]; }

// What the balanced gradient carries of a weight: times the loss scale (1 where there is none), or NaN where somebody
// looks for it and an active task is not finite. A task that is not active had no part in this step.
DBMTL_HD inline double carried_of(double weight, bool nonfinite, bool active, double factor, double propagate_above) {
  return nonfinite && active && factor > propagate_above ? std::nan("") : weight * factor;
}

}  // namespace dbmtl
