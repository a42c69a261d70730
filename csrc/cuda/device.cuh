// What the CUDA kernels share: 128-bit accesses, sums of a block, and barriers.
// fp32 arithmetic whatever the storage (fp64 for fp64), sums in fp64, no float atomics; compiled without contraction,
// so that state has the bits of the CPU kernels.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/arguments.h"
#include "common/ema.h"
#include "common/types.h"
#include "common/weights.h"
#include "runtime.h"

namespace dbmtl {

constexpr int kWarp = 32;
constexpr int kElements = 8;        // of one thread at a time: 16 bytes of bf16, twice 16 of fp32
constexpr int kMaxTasks = 256;      // sums and weights of a block lie in shared memory

template <class S>
using Wide = std::conditional_t<std::is_same<S, double>::value, double, float>;

template <class T>
struct alignas(16) Vector {
  T v[16 / sizeof(T)];
};

// Where a thread's elements of a tile lie. kAligned: side by side, every first one on 16 bytes; otherwise as far apart
// as the block is wide, loaded one by one.
template <bool kAligned>
struct Slice {
  int64_t first;
  int step;
  __device__ Slice(int64_t tile_begin, int thread, int threads)
      : first(tile_begin + (kAligned ? int64_t(thread) * kElements : thread)), step(kAligned ? 1 : threads) {}
};

// How many of a thread's elements lie below `bound`. Aligned ones are all inside or all outside: bounds are multiples.
template <bool kAligned>
__device__ inline bool inside(const Slice<kAligned>& slice, int64_t bound, int element) {
  return kAligned ? slice.first < bound : slice.first + int64_t(element) * slice.step < bound;
}

// Read once, or read for the last time: need not stay in a cache. A plain pointer must not be marked so.
enum class Hint { kKeep, kStream };

template <Hint kHint, class T>
__device__ inline Vector<T> load_vector(const T* p) {
  DBMTL_ACCESS(p, 16, false);
  const int4 raw = kHint == Hint::kStream ? __ldcs(reinterpret_cast<const int4*>(p)) : *reinterpret_cast<const int4*>(p);
  Vector<T> out;
  memcpy(&out, &raw, 16);
  return out;
}

template <Hint kHint, class T>
__device__ inline void store_vector(T* p, const Vector<T>& x) {
  DBMTL_ACCESS(p, 16, true);
  int4 raw;
  memcpy(&raw, &x, 16);
  if (kHint == Hint::kStream)
    __stcs(reinterpret_cast<int4*>(p), raw);
  else
    __stwb(reinterpret_cast<int4*>(p), raw);  // a plain assignment of 16-bit numbers would be taken apart again
}

template <class T>
__device__ inline T load_one(const T* p) {
  DBMTL_ACCESS(p, sizeof(T), false);
  return *p;
}

template <class T>
__device__ inline void store_one(T* p, T x) {
  DBMTL_ACCESS(p, sizeof(T), true);
  *p = x;
}

// kElements numbers as arithmetic type; zeros where outside.
template <Hint kHint, bool kAligned, class T, class V>
__device__ inline void load(V (&x)[kElements], const T* base, const Slice<kAligned>& slice, int64_t bound) {
  constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
  for (int e = 0; e < kElements; ++e) x[e] = V(0);
  if (kAligned) {
    if (!inside(slice, bound, 0)) return;
#pragma unroll
    for (int j = 0; j < kElements / kPerVector; ++j) {
      const Vector<T> in = load_vector<kHint>(base + slice.first + j * kPerVector);
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) x[j * kPerVector + i] = V(widen_lane(in.v[i]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (inside(slice, bound, e)) x[e] = V(widen_lane(load_one(base + slice.first + int64_t(e) * slice.step)));
  }
}

template <Hint kHint, bool kAligned, class T>
__device__ inline void store(T* base, const T (&x)[kElements], const Slice<kAligned>& slice, int64_t bound) {
  constexpr int kPerVector = 16 / sizeof(T);
  if (kAligned) {
    if (!inside(slice, bound, 0)) return;
#pragma unroll
    for (int j = 0; j < kElements / kPerVector; ++j) {
      Vector<T> out;
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) out.v[i] = x[j * kPerVector + i];
      store_vector<kHint>(base + slice.first + j * kPerVector, out);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (inside(slice, bound, e)) store_one(base + slice.first + int64_t(e) * slice.step, x[e]);
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

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
  return x;  // in lane 0
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

// Counters that set themselves back to zero, and one that only says how often the barrier has opened.
struct Counters {
  unsigned arrived, opened, ticket, unused;
};

// Wait until every block of the (cooperative) grid has arrived here.
__device__ inline void grid_barrier(Counters* counters) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned opened = *reinterpret_cast<volatile unsigned*>(&counters->opened);
    __threadfence();
    if (atomicAdd(&counters->arrived, 1u) == gridDim.x - 1) {
      counters->arrived = 0;
      __threadfence();
      atomicAdd(&counters->opened, 1u);
    } else {
      while (*reinterpret_cast<volatile unsigned*>(&counters->opened) == opened) DBMTL_SPIN();
    }
    __threadfence();
  }
  __syncthreads();
}

// Whether this block is the last of the grid to arrive here; it then sees what the others wrote before.
__device__ inline bool is_last(Counters* counters) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&counters->ticket, 1u) == gridDim.x - 1;
    if (last) counters->ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace dbmtl
