// 16 lanes as AVX2 registers (F16C for half precision).
#pragma once
#include <immintrin.h>

#include "common/types.h"

namespace dbmtl {
namespace {  // internal linkage: each instruction set keeps its own copy

struct F32 {
  __m256 lo, hi;
};
struct F64 {
  __m256d v[4];
};

inline __m256 bf16_to_ps(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256i bf16_round(__m256 x) {  // nearest even in the low 16 bits of each lane, NaN made quiet
  const __m256i u = _mm256_castps_si256(x);
  const __m256i top = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
}
inline __m256 half_to_ps(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void load(F32& r, const float* p) { r = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void load(F32& r, const bf16* p) { r = {bf16_to_ps(p), bf16_to_ps(p + 8)}; }
inline void load(F32& r, const f16* p) { r = {half_to_ps(p), half_to_ps(p + 8)}; }
inline void load(F32& r, const double* p) {
  const auto four = [&](int i) { return _mm256_cvtpd_ps(_mm256_loadu_pd(p + i)); };
  r = {_mm256_set_m128(four(4), four(0)), _mm256_set_m128(four(12), four(8))};
}
inline F64 widen(const F32& a) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1))}};
}
inline F64 widen(const F64& a) { return a; }
inline F32 narrow(const F64& a) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(a.v[1]), _mm256_cvtpd_ps(a.v[0])),
          _mm256_set_m128(_mm256_cvtpd_ps(a.v[3]), _mm256_cvtpd_ps(a.v[2]))};
}
inline void load(F64& r, const double* p) {
  for (int i = 0; i < 4; ++i) r.v[i] = _mm256_loadu_pd(p + 4 * i);
}
template <class T>
inline void load(F64& r, const T* p) {
  F32 x;
  load(x, p);
  r = widen(x);
}

inline void store(float* p, const F32& x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void store(bf16* p, const F32& x) {
  const __m256i packed = _mm256_packus_epi32(bf16_round(x.lo), bf16_round(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_top(bf16* p, const F32& x) {  // the high half of each lane
  const auto top = [](__m256 half) { return _mm256_srli_epi32(_mm256_castps_si256(half), 16); };
  const __m256i packed = _mm256_packus_epi32(top(x.lo), top(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(f16* p, const F32& x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(double* p, const F64& x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
inline void store(double* p, const F32& x) { store(p, widen(x)); }
template <class T>
inline void store(T* p, const F64& x) {
  store(p, narrow(x));
}
inline void stream(float* p, const F32& x) {
  _mm256_stream_ps(p, x.lo);
  _mm256_stream_ps(p + 8, x.hi);
}
inline void stream(double* p, const F64& x) {
  for (int i = 0; i < 4; ++i) _mm256_stream_pd(p + 4 * i, x.v[i]);
}
template <class T, class V>
inline void stream(T* p, const V& x) {
  store(p, x);
}
inline void stream_fence() { _mm_sfence(); }

inline void broadcast(F32& r, double x) { r = {_mm256_set1_ps(float(x)), _mm256_set1_ps(float(x))}; }
inline void broadcast(F64& r, double x) {
  for (int i = 0; i < 4; ++i) r.v[i] = _mm256_set1_pd(x);
}
inline F32 mul(const F32& a, const F32& b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 add(const F32& a, const F32& b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F64 mul(const F64& a, const F64& b) {
  F64 r;
  for (int i = 0; i < 4; ++i) r.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return r;
}
inline F64 add(const F64& a, const F64& b) {
  F64 r;
  for (int i = 0; i < 4; ++i) r.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return r;
}
inline void spill(double* p, const F64& x) { store(p, x); }
constexpr int kGramBlock = 1;

}  // namespace
}  // namespace dbmtl
