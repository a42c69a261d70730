// From sums of squares to the weights alpha / (norm + eps), as python/dbmtl_kernels/weighting.py writes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "dbmtl.h"

namespace dbmtl {

// No weight is larger: times the zeros of a task without gradient it still gives zero.
constexpr double kLargest = std::numeric_limits<float>::max();

// weights[t] = 0 marks a row whose norm is not finite. `scratch` holds num_tasks numbers.
inline void weights_from_sumsq(const double* sumsq, int64_t num_tasks, double eps, int32_t scale, double constant,
                               double* norms, double* weights, double* scratch) {
  int64_t finite = 0;
  double sum = 0.0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    norms[t] = std::sqrt(sumsq[t]);
    if (!std::isfinite(norms[t])) continue;
    scratch[finite++] = norms[t];
    sum += norms[t];
  }
  double alpha = constant;
  if (finite > 0 && scale != DBMTL_SCALE_CONSTANT) {
    std::sort(scratch, scratch + finite);
    if (scale == DBMTL_SCALE_MAX) alpha = scratch[finite - 1];
    if (scale == DBMTL_SCALE_MEAN) alpha = sum / double(finite);
    if (scale == DBMTL_SCALE_MEDIAN) alpha = 0.5 * (scratch[(finite - 1) / 2] + scratch[finite / 2]);
    if (scale == DBMTL_SCALE_MIN) alpha = scratch[0];
  }
  const bool single = num_tasks == 1 && scale != DBMTL_SCALE_CONSTANT;
  for (int64_t t = 0; t < num_tasks; ++t) {
    const bool ok = std::isfinite(norms[t]);
    weights[t] = !ok ? 0.0 : single ? 1.0 : std::min(alpha / (norms[t] + eps), kLargest);
  }
}

}  // namespace dbmtl
