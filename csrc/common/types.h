// Storage types, and their conversions. Functions are static: one compiled for AVX-512 must never be linked in place of
// the baseline's.
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

template <class To, class From>
DBMTL_HD static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The conversions by bits, of one number (U is uint32_t, F float) or of the compiler's vectors of them.

// fp32 to bf16: to nearest, ties to even; NaN stays NaN and is made quiet.
template <class U, class F>
DBMTL_HD static inline U bf16_bits(const F& f) {
  const U u = bit_cast<U>(f), top = u >> 16;
  return f != f ? top | 0x40u : (u + 0x7fffu + (top & 1u)) >> 16;
}

// fp16 to fp32. Subnormal numbers are multiples of the distance of numbers from 0.5 on, 2^-24.
template <class U, class F>
DBMTL_HD static inline U bits_of_f16(const U& h) {
  const U sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu, shifted = magnitude << 13;
  const U tiny = bit_cast<U>(F(bit_cast<F>(U(magnitude + 0x3f000000u)) - 0.5f));
  const U special = magnitude > 0x7c00u ? shifted | 0x7fc00000u : shifted | 0x7f800000u;  // NaN made quiet, or inf
  return sign | (magnitude >= 0x7c00u ? special : magnitude < 0x400u ? tiny : shifted + 0x38000000u);
}

// fp32 to fp16: to nearest, ties to even; NaN stays NaN and is made quiet.
template <class U, class F>
DBMTL_HD static inline U f16_bits(const F& f) {
  const U u = bit_cast<U>(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const U tiny = bit_cast<U>(F(bit_cast<F>(magnitude) + 0.5f)) - 0x3f000000u;  // the adder rounds to multiples of 2^-24
  const U rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < 0x38800000u ? tiny : rounded;
  const U special = f != f ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : (magnitude & 0u) | 0x7c00u;
  return sign | (magnitude >= 0x477ff000u ? special : finite);  // from there on it rounds to inf
}

DBMTL_HD static inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
#ifdef __CUDA_ARCH__  // the hardware's: the same bits of numbers, another NaN
__device__ static inline float to_float(f16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
__device__ static inline bf16 to_bf16(float f) {
  bf16 x;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
  return x;
}
__device__ static inline f16 to_f16(float f) {
  f16 x;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(f));
  return x;
}
#else
DBMTL_HD static inline float to_float(f16 x) { return bit_cast<float>(bits_of_f16<uint32_t, float>(x.bits)); }
DBMTL_HD static inline bf16 to_bf16(float f) { return {uint16_t(bf16_bits<uint32_t>(f))}; }
DBMTL_HD static inline f16 to_f16(float f) { return {uint16_t(f16_bits<uint32_t>(f))}; }
#endif

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
