// The elementwise arithmetic of the EMA, of combining and of the sums, written once: for one number, as the CUDA
// kernels work, and for 16 lanes of them, whose `add` and `mul` are those of csrc/cpu/simd_*.h. Compiled without
// contraction. Functions are static, for the reason given in types.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace dbmtl {

DBMTL_HD static inline float add(float a, float b) { return a + b; }
DBMTL_HD static inline float mul(float a, float b) { return a * b; }
DBMTL_HD static inline double add(double a, double b) { return a + b; }
DBMTL_HD static inline double mul(double a, double b) { return a * b; }

// decay * m + gain * g; a missing term is left out, not added as zero: 0 * inf is NaN, and -0 + 0 is +0.
template <bool kHasState, bool kHasGrad, class V>
DBMTL_HD static inline V updated(const V& m, const V& g, const V& decay, const V& gain) {
  if constexpr (kHasState && kHasGrad)
    return add(mul(decay, m), mul(gain, g));
  else if constexpr (kHasState)
    return mul(decay, m);
  else
    return mul(gain, g);
}

// acc + a * b: a row times its weight, a product or a square to be summed.
template <class V>
DBMTL_HD static inline V multiply_add(const V& acc, const V& a, const V& b) {
  return add(acc, mul(a, b));
}

// What a row is updated with.
struct Coefficients {
  double decay, gain;
  uint64_t seed;
};

// From memory, as dbmtl_accumulate takes them.
DBMTL_HD static inline Coefficients coefficients_at(const void* p) {
  const double* numbers = static_cast<const double*>(p);
  Coefficients c = {numbers[0], numbers[1], 0};
  std::memcpy(&c.seed, numbers + 2, sizeof(c.seed));
  return c;
}

// The gain of gradients beside a decay of beta.
DBMTL_HD static inline double gain_of(double beta) { return 1.0 - beta; }

// The gain of gradients that carry a loss scale; where that is 0 they count as zeros.
DBMTL_HD static inline double unscaled(double gain, double loss_scale) {
  return loss_scale == 0.0 ? 0.0 : gain / loss_scale;
}

}  // namespace dbmtl
