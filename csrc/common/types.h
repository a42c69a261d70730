// Storage types, and the scalar conversions that the baseline instruction set and the CUDA kernels use. Functions are
// static: one compiled for AVX-512 must never be linked in place of the baseline's.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "dbmtl.h"

namespace dbmtl {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Logical vector width: every instruction set works on 16 lanes, so that all of them add in the same order.
constexpr int kLanes = 16;

DBMTL_HD static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DBMTL_HD static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

DBMTL_HD static inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
DBMTL_HD static inline bf16 to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return bf16{uint16_t(nan ? (u >> 16) | 0x40u : rounded)};
}

DBMTL_HD static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, or NaN made quiet as the hardware does
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  if (magnitude < 0x400u) {  // zero or subnormal: magnitude * 2^-24, exact
    const float f = float(magnitude) * 5.9604644775390625e-8f;
    return bits_to_float(sign | float_to_bits(f));
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

DBMTL_HD static inline f16 to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round to a multiple of 2^-24.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return f16{uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{uint16_t(sign | (rounded >> 13))};
}

// Between storage and arithmetic types, one number at a time.
DBMTL_HD static inline float widen_lane(float x) { return x; }
DBMTL_HD static inline float widen_lane(bf16 x) { return to_float(x); }
DBMTL_HD static inline float widen_lane(f16 x) { return to_float(x); }
DBMTL_HD static inline double widen_lane(double x) { return x; }
DBMTL_HD static inline void narrow_lane(float* p, float x) { *p = x; }
DBMTL_HD static inline void narrow_lane(bf16* p, float x) { *p = to_bf16(x); }
DBMTL_HD static inline void narrow_lane(f16* p, float x) { *p = to_f16(x); }
DBMTL_HD static inline void narrow_lane(double* p, float x) { *p = x; }
DBMTL_HD static inline void narrow_lane(float* p, double x) { *p = float(x); }
DBMTL_HD static inline void narrow_lane(bf16* p, double x) { *p = to_bf16(float(x)); }
DBMTL_HD static inline void narrow_lane(f16* p, double x) { *p = to_f16(float(x)); }
DBMTL_HD static inline void narrow_lane(double* p, double x) { *p = x; }

// One number of a dtype that is known at run time.
DBMTL_HD static inline double number(const void* p, int64_t dtype) {
  switch (dtype) {
    case DBMTL_F32: return widen_lane(*static_cast<const float*>(p));
    case DBMTL_F64: return widen_lane(*static_cast<const double*>(p));
    case DBMTL_BF16: return widen_lane(*static_cast<const bf16*>(p));
    default: return widen_lane(*static_cast<const f16*>(p));
  }
}

}  // namespace dbmtl
