// 16 lanes of float or double in the compiler's vectors (GCC and Clang), as wide as the instruction set that this file
// is compiled for. Intrinsics only for conversions and stores past the cache.
#pragma once
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "common/types.h"

namespace dbmtl {
namespace {  // internal linkage: each instruction set keeps its own copy

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kGramBlock = 2;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kGramBlock = 1;
#else
constexpr int kVectorBytes = 16, kGramBlock = 1;
#endif

template <class T, int kWidth>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kWidth)));
};
template <class T, int kWidth>
using Vector = typename VectorOf<T, kWidth>::type;

template <class T>
struct Lanes {
  static constexpr int kWidth = kVectorBytes / sizeof(T), kParts = kLanes / kWidth;
  Vector<T, kWidth> part[kParts];
};
using F32 = Lanes<float>;
using F64 = Lanes<double>;

template <class T>
inline Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < r.kParts; ++i) r.part[i] = a.part[i] + b.part[i];
  return r;
}
template <class T>
inline Lanes<T> operator*(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> r;
  for (int i = 0; i < r.kParts; ++i) r.part[i] = a.part[i] * b.part[i];
  return r;
}
template <class T>
inline void broadcast(Lanes<T>& r, double x) {
  using Part = Vector<T, Lanes<T>::kWidth>;
  for (Part& part : r.part) part = T(x) - Part{};  // not x + 0: -0 + 0 is +0
}

template <class V>
struct Anywhere {  // GCC copies what memcpy is asked for in pieces of 16 bytes
  typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
inline V load_vector(const void* p) {
  return *static_cast<const typename Anywhere<V>::type*>(p);
}
template <class V>
inline void store_vector(void* p, const V& v) {
  *static_cast<typename Anywhere<V>::type*>(p) = v;
}

// What the instruction sets do not share: GCC makes poor code of __builtin_convertvector, hence the intrinsics.
using Float = Vector<float, F32::kWidth>;
using Double = Vector<double, F64::kWidth>;
using U32 = Vector<uint32_t, F32::kWidth>;
using U16 = Vector<uint16_t, F32::kWidth>;

#if defined(__AVX512F__)
inline Double low(Float x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Double high(Float x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline Float join(Double a, Double b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}
inline U32 unpack(const void* p) { return U32(_mm512_cvtepu16_epi32(load_vector<__m256i>(p))); }
inline void pack(void* p, const U32 (&x)[1]) { store_vector(p, _mm512_cvtepi32_epi16(__m512i(x[0]))); }
inline Float load_part(const f16* p) { return _mm512_cvtph_ps(load_vector<__m256i>(p)); }
inline void store_part(f16* p, Float x) { store_vector(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void stream_part(float* p, Float x) { _mm512_stream_ps(p, x); }
inline void stream_part(double* p, Double x) { _mm512_stream_pd(p, x); }
inline void stream_fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline Double low(Float x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Double high(Float x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline Float join(Double a, Double b) { return _mm256_set_m128(_mm256_cvtpd_ps(b), _mm256_cvtpd_ps(a)); }
inline U32 unpack(const void* p) { return U32(_mm256_cvtepu16_epi32(load_vector<__m128i>(p))); }
inline void pack(void* p, const U32 (&x)[2]) {
  store_vector(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(x[0]), __m256i(x[1])), 0xd8));
}
inline Float load_part(const f16* p) { return _mm256_cvtph_ps(load_vector<__m128i>(p)); }
inline void store_part(f16* p, Float x) { store_vector(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void stream_part(float* p, Float x) { _mm256_stream_ps(p, x); }
inline void stream_part(double* p, Double x) { _mm256_stream_pd(p, x); }
inline void stream_fence() { _mm_sfence(); }
#else
#ifdef __SSE2__
inline Double low(Float x) { return _mm_cvtps_pd(x); }
inline Double high(Float x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }
inline Float join(Double a, Double b) { return _mm_movelh_ps(_mm_cvtpd_ps(a), _mm_cvtpd_ps(b)); }
inline U32 unpack(const void* p) {
  return U32(_mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)), _mm_setzero_si128()));
}
inline void pack(void* p, const U32 (&x)[4]) {  // the only packing that there is takes signed numbers
  const auto sign = [](U32 u) { return _mm_srai_epi32(_mm_slli_epi32(__m128i(u), 16), 16); };
  for (int i = 0; i < 2; ++i)
    store_vector(static_cast<__m128i*>(p) + i, _mm_packs_epi32(sign(x[2 * i]), sign(x[2 * i + 1])));
}
#else
inline Double low(Float x) { return Double{x[0], x[1]}; }
inline Double high(Float x) { return Double{x[2], x[3]}; }
inline Float join(Double a, Double b) { return Float{float(a[0]), float(a[1]), float(b[0]), float(b[1])}; }
inline U32 unpack(const void* p) { return __builtin_convertvector(load_vector<U16>(p), U32); }
inline void pack(void* p, const U32 (&x)[4]) {
  for (int i = 0; i < 4; ++i) store_vector(static_cast<U16*>(p) + i, __builtin_convertvector(x[i], U16));
}
#endif
inline Float load_part(const f16* p) { return Float(bits_of_f16<U32, Float>(unpack(p))); }
inline void store_part(f16* p, Float x) { store_vector(p, __builtin_convertvector(f16_bits<U32>(x), U16)); }
template <class T, class V>
inline void stream_part(T* p, const V& x) {
  store_vector(p, x);
}
inline void stream_fence() {}
#endif

inline Float load_part(const float* p) { return load_vector<Float>(p); }
inline Double load_part(const double* p) { return load_vector<Double>(p); }
inline Float load_part(const bf16* p) { return Float(unpack(p) << 16); }
// As many numbers as a part of F32 has.
inline void load_wide(Double (&r)[2], const double* p) {
  for (int i = 0; i < 2; ++i) r[i] = load_vector<Double>(p + i * F64::kWidth);
}
template <class T>
inline void load_wide(Double (&r)[2], const T* p) {
  const Float x = load_part(p);
  r[0] = low(x);
  r[1] = high(x);
}

#if defined(__SSE2__) && !defined(__AVX2__)
inline void load_wide(Double (&r)[2], const float* p) {  // straight from memory: a sixth of the time of a Gramian
  for (int i = 0; i < 2; ++i) r[i] = _mm_cvtps_pd(__m128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 2 * i))));
}
#endif

inline F64 widen(const F32& a) {
  F64 r;
  for (int i = 0; i < F32::kParts; ++i) {
    r.part[2 * i] = low(a.part[i]);
    r.part[2 * i + 1] = high(a.part[i]);
  }
  return r;
}
inline F64 widen(const F64& a) { return a; }
inline F32 narrow(const F64& a) {
  F32 r;
  for (int i = 0; i < F32::kParts; ++i) r.part[i] = join(a.part[2 * i], a.part[2 * i + 1]);
  return r;
}

template <class T>
inline void store_part(T* p, const Vector<T, Lanes<T>::kWidth>& x) {
  store_vector(p, x);
}

// Any storage type to and from either of the two.
template <class T>
inline void load(F32& r, const T* p) {
  for (int i = 0; i < r.kParts; ++i) r.part[i] = load_part(p + i * r.kWidth);
}
inline void load(F64& r, const double* p) {
  for (int i = 0; i < r.kParts; ++i) r.part[i] = load_part(p + i * r.kWidth);
}
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
template <class T>
inline void store(T* p, const F32& x) {
  for (int i = 0; i < x.kParts; ++i) store_part(p + i * x.kWidth, x.part[i]);
}
inline void store(bf16* p, const F32& x) {
  U32 bits[F32::kParts];
  for (int i = 0; i < x.kParts; ++i) bits[i] = bf16_bits<U32>(x.part[i]);
  pack(p, bits);
}
inline void store(double* p, const F64& x) {
  for (int i = 0; i < x.kParts; ++i) store_part(p + i * x.kWidth, x.part[i]);
}
inline void store(double* p, const F32& x) { store(p, widen(x)); }
template <class T>
inline void store(T* p, const F64& x) {
  store(p, narrow(x));
}

// Past the cache, on 64 bytes.
template <class T, class V>
inline void stream(T* p, const V& x) {
  store(p, x);
}
template <class T>
inline void stream(T* p, const Lanes<T>& x) {
  for (int i = 0; i < x.kParts; ++i) stream_part(p + i * x.kWidth, x.part[i]);
}

}  // namespace
}  // namespace dbmtl
