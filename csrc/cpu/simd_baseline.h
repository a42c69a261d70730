// 16 lanes as plain arrays: whatever the compiler makes of them on this machine (SSE2, NEON, scalar).
#pragma once
#include "common/types.h"

namespace dbmtl {
namespace {  // internal linkage: each instruction set keeps its own copy

struct F32 {
  float v[kLanes];
};
struct F64 {
  double v[kLanes];
};

#define DBMTL_EACH_LANE for (int i = 0; i < kLanes; ++i)

template <class T>
inline void load(F32& r, const T* p) {
  DBMTL_EACH_LANE r.v[i] = float(widen_lane(p[i]));
}
template <class T>
inline void load(F64& r, const T* p) {
  DBMTL_EACH_LANE r.v[i] = double(widen_lane(p[i]));
}
template <class T>
inline void store(T* p, const F32& x) {
  DBMTL_EACH_LANE narrow_lane(p + i, x.v[i]);
}
template <class T>
inline void store(T* p, const F64& x) {
  DBMTL_EACH_LANE narrow_lane(p + i, x.v[i]);
}
inline void store_top(bf16* p, const F32& x) {  // the high half of each lane
  DBMTL_EACH_LANE p[i].bits = uint16_t(float_to_bits(x.v[i]) >> 16);
}
template <class T, class V>
inline void stream(T* p, const V& x) {
  store(p, x);
}
inline void stream_fence() {}

inline void broadcast(F32& r, double x) { DBMTL_EACH_LANE r.v[i] = float(x); }
inline void broadcast(F64& r, double x) { DBMTL_EACH_LANE r.v[i] = x; }
inline F32 mul(const F32& a, const F32& b) {
  F32 r;
  DBMTL_EACH_LANE r.v[i] = a.v[i] * b.v[i];
  return r;
}
inline F32 add(const F32& a, const F32& b) {
  F32 r;
  DBMTL_EACH_LANE r.v[i] = a.v[i] + b.v[i];
  return r;
}
inline F64 mul(const F64& a, const F64& b) {
  F64 r;
  DBMTL_EACH_LANE r.v[i] = a.v[i] * b.v[i];
  return r;
}
inline F64 add(const F64& a, const F64& b) {
  F64 r;
  DBMTL_EACH_LANE r.v[i] = a.v[i] + b.v[i];
  return r;
}
inline F64 widen(const F32& a) {
  F64 r;
  DBMTL_EACH_LANE r.v[i] = double(a.v[i]);
  return r;
}
inline F64 widen(const F64& a) { return a; }
inline void spill(double* p, const F64& x) { DBMTL_EACH_LANE p[i] = x.v[i]; }
#undef DBMTL_EACH_LANE
constexpr int kGramBlock = 1;

}  // namespace
}  // namespace dbmtl
