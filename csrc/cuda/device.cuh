// What the CUDA kernels share: 128-bit accesses, sums of a block, and barriers.
// fp32 arithmetic whatever the storage (fp64 for fp64), sums in fp64, no float atomics; compiled without contraction,
// so that state has the bits of the CPU kernels.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/arguments.h"
#include "common/ema.h"
#include "common/squares.h"
#include "common/types.h"
#include "common/weights.h"
#include "runtime.h"

namespace dbmtl {

constexpr int kWarp = 32;
constexpr int kMaxTasks = 256;  // sums and weights of a block lie in shared memory
constexpr int kRowsAtOnce = 4;  // loaded before the first of them is used

// Whether squares are summed in pairs of floats (common/squares.h): where fp64 has one sixty-fourth of the rate of fp32.
#ifdef DBMTL_EMULATED
inline bool float_pairs() { return emulation::float_pairs; }
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1030 || \
    __CUDA_ARCH__ >= 1200
__device__ constexpr bool float_pairs() { return true; }
#else
__device__ constexpr bool float_pairs() { return false; }
#endif

template <class S>
using Wide = std::conditional_t<std::is_same<S, double>::value, double, float>;

// Elements that a thread loads with one access: 16 bytes of the wider of two dtypes.
template <class S, class G>
constexpr int kUnitOf = 16 / int(sizeof(S) > sizeof(G) ? sizeof(S) : sizeof(G));

template <int kBytes>
using Raw = std::conditional_t<
    kBytes == 16, int4, std::conditional_t<kBytes == 8, int2, std::conditional_t<kBytes == 4, int, short>>>;

// Elements that a thread takes at a time: 32 bytes of a row of such numbers, in four units at most; eight units of one.
__host__ __device__ constexpr int elements_of(int size, int unit) {
  return unit == 1 ? 32 / (size > 4 ? size : 4) : 32 / size < 4 * unit ? 32 / size : 4 * unit;
}
template <class S, int kUnit>
constexpr int kElements = elements_of(sizeof(S), kUnit);

template <class T, int kUnit>
struct alignas(sizeof(T) * kUnit) Unit {
  T v[kUnit];
};

// What a thread loaded of a tile, kCount numbers in units: words, as they came. Were it 16-bit numbers, the compiler would
// take each load apart before it starts the next.
template <class T, int kUnit, int kCount>
struct Pack {
  static constexpr int kUnits = kCount / kUnit;
  Raw<sizeof(T) * kUnit> raw[kUnits];
  __device__ Wide<T> operator[](int e) const {
    Unit<T, kUnit> unit;
    memcpy(&unit, &raw[e / kUnit], sizeof(unit));
    return widen_lane(unit.v[e % kUnit]);
  }
};

// Where they lie: a thread's units are as far apart as the block is wide, so that a warp's access is one stretch of
// memory. Each lies inside or outside: `end` less the tile's begin is a multiple of kUnit. Units of 1 take any address.
// kFull: the tile ends where the block does, and all lie inside.
template <int kUnit, int kThreads, bool kFull = false>
struct Slice {
  int64_t first, end;
  __device__ Slice(int64_t tile_begin, int64_t end) : first(tile_begin + int64_t(threadIdx.x) * kUnit), end(end) {}
  __device__ int64_t at(int unit) const { return first + unit * (kThreads * kUnit); }
  __device__ bool holds(int unit) const { return kFull || at(unit) < end; }
};

// Read once, or read for the last time: need not stay in a cache. A plain pointer must not be marked so.
enum class Hint { kKeep, kStream };

// x = *p if wanted. One predicated instruction into the registers of x: from a branch, and a choice after it, the compiler
// makes copies that wait for one load before it starts the next.
#ifdef DBMTL_EMULATED
template <Hint, class R>
inline void load_if(R& x, const R* p, bool wanted) {
  if (wanted) x = *p;
}
#else
#define DBMTL_LOAD_IF(R, kind, to, address, condition, ...)                                                      \
  template <Hint kHint>                                                                                          \
  __device__ inline void load_if(R& x, const R* p, bool wanted) {                                                \
    if (kHint == Hint::kStream)                                                                                  \
      asm volatile("{.reg .pred p; setp.ne.s32 p, " condition ", 0; @p ld.global.cs" kind " " to ", [" address "];}" \
                   : __VA_ARGS__ : "l"(__cvta_generic_to_global(p)), "r"(int(wanted)) : "memory");                \
    else                                                                                                         \
      asm volatile("{.reg .pred p; setp.ne.s32 p, " condition ", 0; @p ld.global" kind " " to ", [" address "];}" \
                   : __VA_ARGS__ : "l"(__cvta_generic_to_global(p)), "r"(int(wanted)) : "memory");                \
  }
DBMTL_LOAD_IF(int4, ".v4.s32", "{%0, %1, %2, %3}", "%4", "%5", "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w))
DBMTL_LOAD_IF(int2, ".v2.s32", "{%0, %1}", "%2", "%3", "+r"(x.x), "+r"(x.y))
DBMTL_LOAD_IF(int, ".s32", "%0", "%1", "%2", "+r"(x))
DBMTL_LOAD_IF(short, ".s16", "%0", "%1", "%2", "+h"(x))
#undef DBMTL_LOAD_IF
#endif

template <Hint kHint, class T, int kUnit, int kCount>
__device__ inline void load_unit(Pack<T, kUnit, kCount>& x, int j, const T* from, bool wanted) {
  using R = Raw<sizeof(T) * kUnit>;
  if (wanted) DBMTL_ACCESS(from, sizeof(R), false);
  x.raw[j] = {};
  load_if<kHint>(x.raw[j], reinterpret_cast<const R*>(from), wanted);
}

// Zeros where outside, or not wanted.
template <Hint kHint, class T, int kUnit, int kCount, int kThreads, bool kFull>
__device__ inline void load(Pack<T, kUnit, kCount>& x, const T* base, const Slice<kUnit, kThreads, kFull>& slice,
                            bool wanted = true) {
#pragma unroll
  for (int j = 0; j < x.kUnits; ++j) load_unit<kHint>(x, j, base + slice.at(j), wanted && slice.holds(j));
}

// Unit j of what a thread is to store.
template <int kUnit, class T, int kCount>
__device__ inline Raw<sizeof(T) * kUnit> packed(const T (&x)[kCount], int j) {
  Raw<sizeof(T) * kUnit> raw;
  memcpy(&raw, x + j * kUnit, sizeof(raw));
  return raw;
}

template <Hint kHint, class T, int kUnit, int kCount, int kThreads, bool kFull>
__device__ inline void store(T* base, const T (&x)[kCount], const Slice<kUnit, kThreads, kFull>& slice) {
  using R = Raw<sizeof(T) * kUnit>;
#pragma unroll
  for (int j = 0; j < kCount / kUnit; ++j) {
    if (!slice.holds(j)) continue;
    R* p = reinterpret_cast<R*>(base + slice.at(j));
    DBMTL_ACCESS(p, sizeof(R), true);
    if (kHint == Hint::kStream)
      __stcs(p, packed<kUnit>(x, j));
    else
      __stwb(p, packed<kUnit>(x, j));  // a plain assignment would be taken apart into stores of 32 bits
  }
}

// total += sum_t weights[t] * row t; a row whose weight is 0 does not count. `load_row(row, t, there)` loads one: several,
// and what is left of them as well, before the first is used, with no branch in between.
template <class S, int kUnit, class V, int kCount, class LoadRow>
__device__ inline void add_rows(V (&total)[kCount], int num_tasks, const V* weights, LoadRow load_row) {
#pragma unroll 1
  for (int t0 = 0; t0 < num_tasks; t0 += kRowsAtOnce) {
    Pack<S, kUnit, kCount> row[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) load_row(row[u], t0 + u, t0 + u < num_tasks);
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const V weight = t0 + u < num_tasks ? weights[t0 + u] : V(0);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const V more = total[e] + weight * V(row[u][e]);
        total[e] = weight != V(0) ? more : total[e];
      }
    }
  }
}

// The same for terms that may be there or not; without either, zero.
template <class V>
__device__ inline V updated(V m, V g, V decay, V gain, bool has_grad) {
  // All are formed and one is chosen, so that no branch lies in between.
  const V gained = updated<false, true>(m, g, decay, gain), decayed = updated<true, false>(m, g, decay, gain);
  if (decay == V(0)) return has_grad ? gained : V(0);
  return has_grad ? updated<true, true>(m, g, decay, gain) : decayed;
}

__device__ inline int64_t size_of(int64_t dtype) { return dtype == DBMTL_F32 ? 4 : dtype == DBMTL_F64 ? 8 : 2; }

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What the lane so much further on has, or the one that differs in these bits.
template <class T>
__device__ inline T from_further(const T& x, int offset) { return __shfl_down_sync(kAllLanes, x, offset); }
__device__ inline FloatPair from_further(const FloatPair& x, int offset) {
  return {from_further(x.high, offset), from_further(x.low, offset)};
}
template <class T>
__device__ inline T from_across(const T& x, int bits) { return __shfl_xor_sync(kAllLanes, x, bits); }
__device__ inline FloatPair from_across(const FloatPair& x, int bits) {
  return {from_across(x.high, bits), from_across(x.low, bits)};
}

// The sum over the lanes from this one on, of kLanes: in the first of them.
template <int kLanes = kWarp, class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = x + from_further(x, offset);
  return x;
}

// Of two numbers a lane, at the price of one: the sum of the first in lane 0, of the second in lane 16.
template <class T>
__device__ inline T warp_sums(const T (&x)[2]) {
  const bool upper = threadIdx.x % kWarp >= kWarp / 2;
  return warp_sum<kWarp / 2>((upper ? x[1] : x[0]) + from_across(upper ? x[0] : x[1], kWarp / 2));
}

// The sum of squares of one thread's numbers, of those that lie inside.
template <class S, int kUnit, int kCount, int kThreads, bool kFull>
__device__ inline double thread_squares(const S (&x)[kCount], const Slice<kUnit, kThreads, kFull>& slice) {
  if (float_pairs() && !std::is_same<S, double>::value) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (slice.holds(e / kUnit)) largest = fmaxf(largest, fabsf(float(widen_lane(x[e]))));
    const float scale = scale_of(largest);
    FloatPair sum = {};
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (slice.holds(e / kUnit)) sum = sum + squared(float(widen_lane(x[e])), scale);
    return widened(sum, scale);
  }
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < kCount / kUnit; ++j) {
    double more = sum;
#pragma unroll
    for (int e = j * kUnit; e < (j + 1) * kUnit; ++e)
      more = fma(double(widen_lane(x[e])), double(widen_lane(x[e])), more);
    sum = slice.holds(j) ? more : sum;
  }
  return sum;
}

// The sums of squares of what a warp's threads hold of two rows: in lane 0 and in lane 16.
template <class S, int kCount>
__device__ inline double warp_squares(const S (&x)[2][kCount]) {
  if (float_pairs() && !std::is_same<S, double>::value) {
    FloatPair sum[2];
    float scale[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float largest = 0.0f;
#pragma unroll
      for (int e = 0; e < kCount; ++e) largest = fmaxf(largest, fabsf(float(widen_lane(x[u][e]))));
      scale[u] = scale_of(bit_cast<float>(__reduce_max_sync(kAllLanes, bit_cast<uint32_t>(largest))));
      sum[u] = squared(float(widen_lane(x[u][0])), scale[u]);
#pragma unroll
      for (int e = 1; e < kCount; ++e) sum[u] = sum[u] + squared(float(widen_lane(x[u][e])), scale[u]);
    }
    return widened(warp_sums(sum), threadIdx.x % kWarp >= kWarp / 2 ? scale[1] : scale[0]);
  }
  double sum[2] = {};
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum[u] = fma(double(widen_lane(x[u][e])), double(widen_lane(x[u][e])), sum[u]);
  return warp_sums(sum);
}

// The sum over the block, in thread 0. `scratch` holds one number a warp.
__device__ inline double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < int(blockDim.x) / kWarp; ++w) x += scratch[w];
  return x;
}

// Counters that set themselves back to zero, and one that only says how often the grid's barrier has opened.
struct Counters {
  unsigned arrived, opened, finished, drawn[2];
};

// Whether this block is the last of the grid to arrive here; it then sees what the others wrote before.
__device__ inline bool is_last(unsigned* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// A barrier of the (cooperative) grid: the last block to arrive does something for all of them before it opens the way.
// `opened` is what the counter said when the kernel began. Without `wait` the others go on.
template <class Last>
__device__ inline void grid_barrier(Counters* counters, unsigned opened, bool wait, Last last) {
  if (is_last(&counters->arrived)) {
    last();
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&counters->opened, 1u);
    }
  } else if (wait && threadIdx.x == 0) {
    while (*reinterpret_cast<volatile unsigned*>(&counters->opened) == opened) DBMTL_SPIN();
    __threadfence();
  }
  __syncthreads();
}

}  // namespace dbmtl
