// The dense op in one cooperative launch. Each block keeps as many pieces of its new state (a tile of one task each) in
// shared memory, across the grid barrier, as fit: those are read and written once. The rest is read again, last tiles
// first, as what phase one touched last is still in L2.
#include <algorithm>

#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 512;
constexpr int kMostColumns = kThreads * kElements;  // of a tile
constexpr int kLeastColumns = 256;                  // a warp's
constexpr int kColumnStep = 64;                     // 128 bytes of bf16
// Of a column, loaded before any of it is used: two tasks of fp32 in phase one, four rows in phase two, half of fp64.
constexpr int kTaskBytes = 8;
constexpr int kRowBytes = 16;

struct BalanceArguments {
  dbmtl_balance_args call;
  int num_tasks;
  int columns;  // of a tile
  int cached;   // pieces of each block in shared memory: the first ones, task after task and tile after tile
  Counters* counters;
  double* slots;
};

// Shared memory: sums per warp and task, then norms and weights, then the cached tiles.
struct SharedParts {
  double* sums;     // [K][warps]
  double* norms;    // [K]
  double* weights;  // [K]
  uint8_t* use;     // [K]
  char* tiles;
};

__host__ __device__ inline size_t fixed_shared_bytes(int num_tasks) {
  const size_t bytes = sizeof(double) * size_t(num_tasks) * (kThreads / kWarp + 2) + size_t(num_tasks);
  return (bytes + 15) / 16 * 16;
}

__device__ inline SharedParts parts_of(char* shared, int num_tasks) {
  SharedParts p;
  p.sums = reinterpret_cast<double*>(shared);
  p.norms = p.sums + num_tasks * (kThreads / kWarp);
  p.weights = p.norms + num_tasks;
  p.use = reinterpret_cast<uint8_t*>(p.weights + num_tasks);
  p.tiles = shared + fixed_shared_bytes(num_tasks);
  return p;
}

// A thread's part of piece `index` in shared memory, if it lies below `end`. Aligned, its vectors lie as far apart as
// threads take part, so that a warp uses no bank twice; otherwise a piece is in its own order.
template <class S, bool kAligned>
__device__ inline void store_cached(const BalanceArguments& a, char* tiles, int64_t index, const Slice<kAligned>& slice,
                            int64_t end, const S (&x)[kElements]) {
  S* slot = reinterpret_cast<S*>(tiles) + index * a.columns;
  if (kAligned) {
    constexpr int kPerVector = 16 / sizeof(S);
    if (!inside(slice, end, 0)) return;
#pragma unroll
    for (int j = 0; j < kElements / kPerVector; ++j) {
      Vector<S> out;
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) out.v[k] = x[j * kPerVector + k];
      reinterpret_cast<Vector<S>*>(slot)[threadIdx.x + j * (a.columns / kElements)] = out;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (inside(slice, end, e)) slot[threadIdx.x + e * kThreads] = x[e];
  }
}

template <class S, bool kAligned, class V>
__device__ inline void load_cached(V (&x)[kElements], const BalanceArguments& a, char* tiles, int64_t index,
                              const Slice<kAligned>& slice, int64_t end) {
  const S* slot = reinterpret_cast<S*>(tiles) + index * a.columns;
#pragma unroll
  for (int e = 0; e < kElements; ++e) x[e] = V(0);
  if (kAligned) {
    constexpr int kPerVector = 16 / sizeof(S);
    if (!inside(slice, end, 0)) return;
#pragma unroll
    for (int j = 0; j < kElements / kPerVector; ++j) {
      const Vector<S> in = reinterpret_cast<const Vector<S>*>(slot)[threadIdx.x + j * (a.columns / kElements)];
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) x[j * kPerVector + k] = V(widen_lane(in.v[k]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      if (inside(slice, end, e)) x[e] = V(widen_lane(slot[threadIdx.x + e * kThreads]));
  }
}

// Where the tile that begins at `begin` ends.
__device__ inline int64_t end_of(const BalanceArguments& a, int64_t begin) {
  return begin + a.columns < a.call.ema.num_params ? begin + a.columns : a.call.ema.num_params;
}

enum class Where { kShared, kGlobal, kBoth };

// total += sum_t weights[t] * row t of a tile whose first piece is `first`. Several rows are loaded before the first is
// used: no branch lies between their loads, but where the pieces of one tile are cached in part.
template <Where kWhere, class S, bool kAligned, class V>
__device__ inline void add_rows(V (&total)[kElements], const BalanceArguments& a, const SharedParts& part,
                                const Slice<kAligned>& slice, int64_t end, int64_t first) {
  constexpr int kRowsAtOnce = kRowBytes / sizeof(V);
  const S* ema = static_cast<const S*>(a.call.ema.data);
  for (int t0 = 0; t0 < a.num_tasks; t0 += kRowsAtOnce) {
    V m[kRowsAtOnce][kElements];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const int t = t0 + u < a.num_tasks ? t0 + u : a.num_tasks - 1;  // once more, for nothing
      if (kWhere == Where::kShared || (kWhere == Where::kBoth && first + t < a.cached))
        load_cached<S>(m[u], a, part.tiles, first + t, slice, end);
      else
        load<Hint::kStream>(m[u], ema + t * a.call.ema.stride, slice, t0 + u < a.num_tasks ? end : 0);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const V weight = t0 + u < a.num_tasks ? V(part.weights[t0 + u]) : V(0);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const V more = total[e] + weight * m[u][e];
        total[e] = weight != V(0) ? more : total[e];
      }
    }
  }
}

template <class S, class G, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) balance_kernel(const __grid_constant__ BalanceArguments a) {
  using V = Wide<S>;
  constexpr int kTasksAtOnce = kTaskBytes / sizeof(V);
  DBMTL_DYNAMIC_SHARED(shared);
  const SharedParts part = parts_of(shared, a.num_tasks);
  const G* grads = static_cast<const G*>(a.call.grads.data);
  S* ema = static_cast<S*>(a.call.ema.data);
  const V decay = V(a.call.beta), gain = V(1.0 - a.call.beta);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tiles = (a.call.ema.num_params + a.columns - 1) / a.columns;
  const int64_t mine = tiles > blockIdx.x ? (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  for (int i = threadIdx.x; i < a.num_tasks * (kThreads / kWarp); i += kThreads) part.sums[i] = 0.0;
  __syncthreads();

  for (int64_t i = 0; i < mine; ++i) {
    const int64_t begin = (blockIdx.x + i * gridDim.x) * a.columns, end = end_of(a, begin);
    const Slice<kAligned> slice(begin, threadIdx.x, kThreads);
    for (int t0 = 0; t0 < a.num_tasks; t0 += kTasksAtOnce) {
      V g[kTasksAtOnce][kElements], m[kTasksAtOnce][kElements];
#pragma unroll
      for (int u = 0; u < kTasksAtOnce; ++u) {
        if (t0 + u >= a.num_tasks) break;
        load<Hint::kStream>(g[u], grads + (t0 + u) * a.call.grads.stride, slice, end);
        // A state that does not count is not read.
        load<Hint::kKeep>(m[u], ema + (t0 + u) * a.call.ema.stride, slice, decay == V(0) ? 0 : end);
      }
#pragma unroll
      for (int u = 0; u < kTasksAtOnce; ++u) {
        const int t = t0 + u;
        if (t >= a.num_tasks) break;
        S stored[kElements];
        double sum = 0.0;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          narrow_lane(stored + e, updated(m[u][e], g[u][e], decay, gain, true));
          const double x = double(widen_lane(stored[e]));
          if (inside(slice, end, e)) sum += x * x;
        }
        store<Hint::kKeep>(ema + t * a.call.ema.stride, stored, slice, end);
        if (i * a.num_tasks + t < a.cached) store_cached(a, part.tiles, i * a.num_tasks + t, slice, end, stored);
        sum = warp_sum(sum);
        if (lane == 0) part.sums[t * (kThreads / kWarp) + warp] += sum;
      }
    }
  }
  __syncthreads();
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    double sum = 0.0;
    for (int w = 0; w < kThreads / kWarp; ++w) sum += part.sums[t * (kThreads / kWarp) + w];
    a.slots[int64_t(blockIdx.x) * a.num_tasks + t] = sum;
  }

  grid_barrier(a.counters);

  // Every block adds the slots in the same order: lanes take turns, then a fixed tree.
  for (int t = warp; t < a.num_tasks; t += kThreads / kWarp) {
    double sum = 0.0;
    for (int b = lane; b < int(gridDim.x); b += kWarp) sum += __ldcg(a.slots + int64_t(b) * a.num_tasks + t);
    sum = warp_sum(sum);
    if (lane == 0) {
      part.norms[t] = sqrt(sum);
      part.use[t] = is_finite(part.norms[t]);
    }
  }
  __syncthreads();
  bool forget = false;
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    const double alpha = alpha_of(part.norms, part.use, a.num_tasks, a.call.weighting);
    part.weights[t] = weight_of(part.norms[t], part.use[t], alpha, a.num_tasks, a.call.weighting);
    forget |= !part.use[t];
    if (blockIdx.x == 0) {
      if (std::is_same<S, double>::value)
        static_cast<double*>(a.call.norms)[t] = part.norms[t];
      else
        static_cast<float*>(a.call.norms)[t] = float(part.norms[t]);
    }
  }
  forget = __syncthreads_or(forget);

  for (int64_t i = mine - 1; i >= 0; --i) {
    const int64_t begin = (blockIdx.x + i * gridDim.x) * a.columns, end = end_of(a, begin);
    const Slice<kAligned> slice(begin, threadIdx.x, kThreads);
    V total[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) total[e] = V(0);
    const int64_t first = i * a.num_tasks;
    if (first + a.num_tasks <= a.cached)
      add_rows<Where::kShared, S>(total, a, part, slice, end, first);
    else if (first >= a.cached)
      add_rows<Where::kGlobal, S>(total, a, part, slice, end, first);
    else
      add_rows<Where::kBoth, S>(total, a, part, slice, end, first);
    G out[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) narrow_lane(out + e, total[e]);
    store<Hint::kStream>(static_cast<G*>(a.call.out.data), out, slice, end);
    if (forget) {
      const S zeros[kElements] = {};
      for (int t = 0; t < a.num_tasks; ++t)
        if (!part.use[t]) store<Hint::kKeep>(ema + t * a.call.ema.stride, zeros, slice, end);
    }
  }
}

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class S, class G, bool kAligned>
int32_t launch(BalanceArguments a) {
  const auto kernel = balance_kernel<S, G, kAligned>;
  const Device device = current_device();
  const int64_t num_params = a.call.ema.num_params, most = device.multiprocessors;
  // As many tiles for every block, as narrow as that allows: no block has more to do, or to keep, than another.
  const int64_t rounds = divided_up(num_params, most * kMostColumns);
  const int64_t even = divided_up(divided_up(num_params, most * std::max<int64_t>(rounds, 1)), kColumnStep);
  a.columns = int(std::clamp<int64_t>(even * kColumnStep, kLeastColumns, kMostColumns));
  const size_t fixed = fixed_shared_bytes(a.num_tasks), size = size_t(a.columns) * sizeof(S);
  a.cached = int(std::min<int64_t>((size_t(device.shared_bytes) - fixed) / size, rounds * a.num_tasks));
  static Prepared prepared;
  DBMTL_TRY(prepare(kernel, kThreads, device, &prepared));
  const int blocks = int(std::clamp<int64_t>(divided_up(num_params, a.columns), 1, most));
  return launch_kernel(kernel, blocks, kThreads, fixed + size_t(a.cached) * size,
                       static_cast<cudaStream_t>(a.call.where.stream), true, a);
}

template <class S, class G>
int32_t launch_aligned(const BalanceArguments& a) {
  const dbmtl_rows &grads = a.call.grads, &ema = a.call.ema;
  const bool aligned = on_16_bytes(grads.data, ema.data, a.call.out.data) && ema.num_params % kElements == 0 &&
                       grads.stride % kElements == 0 && ema.stride % kElements == 0;
  return aligned ? launch<S, G, true>(a) : launch<S, G, false>(a);
}

template <class S>
int32_t launch_for(const BalanceArguments& a) {
  switch (a.call.grads.dtype) {
    case DBMTL_F32: return launch_aligned<S, float>(a);
    case DBMTL_BF16: return launch_aligned<S, bf16>(a);
    default: return launch_aligned<S, f16>(a);
  }
}

}  // namespace
}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_balance(const dbmtl_balance_args* args) {
  DBMTL_TRY(check(*args));
  BalanceArguments a = {*args, int(args->ema.num_tasks), 0, 0, counters_of(args->where), slots_of(args->where)};
  dbmtl_rows &grads = a.call.grads, &ema = a.call.ema;
  if (a.call.out.dtype != grads.dtype) return fail(DBMTL_UNSUPPORTED_DTYPE, "out: dtype is not that of grads");
  if ((grads.dtype == DBMTL_F64) != (ema.dtype == DBMTL_F64))
    return fail(DBMTL_UNSUPPORTED_DTYPE, "grads: dtype float64 goes with a float64 ema");
  DBMTL_TRY(ready(ema.num_tasks, args->where));
  if (ema.num_tasks < 2) grads.stride = ema.stride = 0;  // any: it is not used
  switch (ema.dtype) {
    case DBMTL_F64: return launch_aligned<double, double>(a);
    case DBMTL_F32: return launch_for<float>(a);
    default: return launch_for<bf16>(a);
  }
}
