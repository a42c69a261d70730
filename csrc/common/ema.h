// The arithmetic of the EMA, written once: for one number, as the CUDA kernels work, and for 16 lanes of them
// (csrc/cpu/simd.h). Compiled without contraction. Functions are static, for the reason given in types.h.
#pragma once
#include "common/host_device.h"

namespace dbmtl {

// decay * m + gain * g; a missing term is left out, not added as zero: 0 * inf is NaN, and -0 + 0 is +0.
template <bool kHasState, bool kHasGrad, class V>
DBMTL_HD static inline V updated(const V& m, const V& g, const V& decay, const V& gain) {
  if constexpr (kHasState && kHasGrad)
    return decay * m + gain * g;
  else if constexpr (kHasState)
    return decay * m;
  else
    return gain * g;
}

// The gain of gradients that carry a loss scale; where that is 0 they count as zeros.
DBMTL_HD static inline double unscaled(double gain, double loss_scale) {
  return loss_scale == 0.0 ? 0.0 : gain / loss_scale;
}

}  // namespace dbmtl
