// 16 lanes as AVX-512 registers (F, BW, VL, DQ). The bf16 rounding is done in integers: the hardware's own
// instruction flushes subnormals, and the other instruction sets do not.
#pragma once
#include <immintrin.h>

#include "common/types.h"

namespace dbmtl {
namespace {  // internal linkage: each instruction set keeps its own copy

struct F32 {
  __m512 v;
};
struct F64 {
  __m512d lo, hi;
};

inline void load(F32& r, const float* p) { r.v = _mm512_loadu_ps(p); }
inline void load(F32& r, const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  r.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline void load(F32& r, const f16* p) {
  r.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F64 widen(const F32& a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
inline F64 widen(const F64& a) { return a; }
inline F32 narrow(const F64& a) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo)), _mm512_cvtpd_ps(a.hi), 1)};
}
inline void load(F64& r, const double* p) { r = {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline void load(F32& r, const double* p) {
  F64 x;
  load(x, p);
  r = narrow(x);
}
template <class T>
inline void load(F64& r, const T* p) {
  F32 x;
  load(x, p);
  r = widen(x);
}

inline void store(float* p, const F32& x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, const F32& x) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i top = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}
inline void store_top(bf16* p, const F32& x) {  // the high half of each lane
  const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(x.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
inline void store(f16* p, const F32& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(double* p, const F64& x) {
  _mm512_storeu_pd(p, x.lo);
  _mm512_storeu_pd(p + 8, x.hi);
}
inline void store(double* p, const F32& x) { store(p, widen(x)); }
template <class T>
inline void store(T* p, const F64& x) {
  store(p, narrow(x));
}
inline void stream(float* p, const F32& x) { _mm512_stream_ps(p, x.v); }
inline void stream(double* p, const F64& x) {
  _mm512_stream_pd(p, x.lo);
  _mm512_stream_pd(p + 8, x.hi);
}
template <class T, class V>
inline void stream(T* p, const V& x) {
  store(p, x);
}
inline void stream_fence() { _mm_sfence(); }

inline void broadcast(F32& r, double x) { r.v = _mm512_set1_ps(float(x)); }
inline void broadcast(F64& r, double x) { r = {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline F32 mul(const F32& a, const F32& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 add(const F32& a, const F32& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F64 mul(const F64& a, const F64& b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
inline F64 add(const F64& a, const F64& b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
inline void spill(double* p, const F64& x) { store(p, x); }
constexpr int kGramBlock = 2;

}  // namespace
}  // namespace dbmtl
