// 16 lanes of float or double in the compiler's vectors (GCC and Clang), as wide as the instruction set that this file is
// compiled for. Intrinsics only where the compilers have no vector of it: half precision and stores past the cache.
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
  for (auto& part : r.part) part = T(x) - decltype(r.part[0] + r.part[0]){};  // x - 0 is x, x + 0 is not: -0 + 0 is +0
}

template <class V, class T>
inline V load_vector(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class T, class V>
inline void store_vector(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

inline F64 widen(const F32& a) {
  using Half = Vector<float, F64::kWidth>;
  Half half[F64::kParts];
  std::memcpy(half, a.part, sizeof(a.part));
  F64 r;
  for (int i = 0; i < F64::kParts; ++i) r.part[i] = __builtin_convertvector(half[i], Vector<double, F64::kWidth>);
  return r;
}
inline F64 widen(const F64& a) { return a; }
inline F32 narrow(const F64& a) {
  using Half = Vector<float, F64::kWidth>;
  Half half[F64::kParts];
  for (int i = 0; i < F64::kParts; ++i) half[i] = __builtin_convertvector(a.part[i], Half);
  F32 r;
  std::memcpy(r.part, half, sizeof(half));
  return r;
}

using U32 = Vector<uint32_t, F32::kWidth>;
using U16 = Vector<uint16_t, F32::kWidth>;

inline Vector<float, F32::kWidth> load_part(const float* p) { return load_vector<Vector<float, F32::kWidth>>(p); }
inline Vector<float, F32::kWidth> load_part(const bf16* p) {
  return Vector<float, F32::kWidth>(__builtin_convertvector(load_vector<U16>(p), U32) << 16);
}
inline void store_part(float* p, const Vector<float, F32::kWidth>& x) { store_vector(p, x); }
inline void store_part(bf16* p, const Vector<float, F32::kWidth>& x) {  // to nearest, ties to even; NaN made quiet
  const U32 u = U32(x), top = u >> 16;
  const U32 rounded = (u + 0x7fff + (top & 1)) >> 16;
  store_vector(p, __builtin_convertvector(x != x ? top | 0x40 : rounded, U16));
}
#if defined(__AVX512F__)
inline __m512 load_part(const f16* p) { return _mm512_cvtph_ps(load_vector<__m256i>(p)); }
inline void store_part(f16* p, __m512 x) { store_vector(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
inline __m256 load_part(const f16* p) { return _mm256_cvtph_ps(load_vector<__m128i>(p)); }
inline void store_part(f16* p, __m256 x) { store_vector(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Vector<float, F32::kWidth> load_part(const f16* p) {
  Vector<float, F32::kWidth> x;
  for (int i = 0; i < F32::kWidth; ++i) x[i] = to_float(p[i]);
  return x;
}
inline void store_part(f16* p, const Vector<float, F32::kWidth>& x) {
  for (int i = 0; i < F32::kWidth; ++i) p[i] = to_f16(x[i]);
}
#endif

// Any storage type to and from either of the two.
template <class T>
inline void load(F32& r, const T* p) {
  for (int i = 0; i < F32::kParts; ++i) r.part[i] = load_part(p + i * F32::kWidth);
}
inline void load(F64& r, const double* p) { r = load_vector<F64>(p); }
inline void load(F32& r, const double* p) { r = narrow(load_vector<F64>(p)); }
template <class T>
inline void load(F64& r, const T* p) {
  F32 x;
  load(x, p);
  r = widen(x);
}
template <class T>
inline void store(T* p, const F32& x) {
  for (int i = 0; i < F32::kParts; ++i) store_part(p + i * F32::kWidth, x.part[i]);
}
inline void store(double* p, const F64& x) { store_vector(p, x); }
inline void store(double* p, const F32& x) { store_vector(p, widen(x)); }
template <class T>
inline void store(T* p, const F64& x) {
  store(p, narrow(x));
}

// Past the cache, on 64 bytes.
template <class T, class V>
inline void stream(T* p, const V& x) {
  store(p, x);
}
#if defined(__AVX512F__)
inline void stream_part(float* p, __m512 x) { _mm512_stream_ps(p, x); }
inline void stream_part(double* p, __m512d x) { _mm512_stream_pd(p, x); }
#elif defined(__AVX2__)
inline void stream_part(float* p, __m256 x) { _mm256_stream_ps(p, x); }
inline void stream_part(double* p, __m256d x) { _mm256_stream_pd(p, x); }
#endif
#ifdef __AVX2__
template <class T>
inline void stream(T* p, const Lanes<T>& x) {
  for (int i = 0; i < x.kParts; ++i) stream_part(p + i * x.kWidth, x.part[i]);
}
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream_fence() {}
#endif

}  // namespace
}  // namespace dbmtl
