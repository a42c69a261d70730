// The dense op in one cooperative launch. Each block keeps as many pieces of its new state (a tile of one task each) in
// shared memory, across the grid barrier, as fit: those are read and written once. The rest is read again, last tiles
// first, as what phase one touched last is still in L2. Where the driver refuses such a launch there are two, one for each
// phase, and nothing is kept.
#include <algorithm>
#include <utility>

#include "deal.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 512;
constexpr int kTasksAtOnce = 2;     // in phase one, loaded before the first of them is used
constexpr int kLeastColumns = 256;  // of a tile
constexpr int kColumnStep = 64;     // 128 bytes of bf16
constexpr int kLargeState = 16;     // times what fits in the shared memory of all multiprocessors
template <class S, int kUnit>
constexpr int kCount = kElements<S, kUnit>;

struct BalanceArguments {
  dbmtl_balance_args call;
  int num_tasks;
  int columns;  // of a tile
  int cached;   // pieces of each block in shared memory: the first ones, task after task and tile after tile
  int64_t kept; // tiles, of all blocks, of which some pieces are; each block's go to it by turns
  int64_t hot;  // positions in phase two before those tiles
  bool first, second;  // phases of this launch
  Deal deals[2];       // of each phase
  Counters* counters;
  double* slots;  // [K][stride], then K sums
  int64_t stride;
};

// Shared memory: sums per warp and task, then norms and weights, then the cached tiles.
template <class V>
struct SharedParts {
  double* sums;   // [K][warps]
  double* norms;  // [K]
  V* weights;     // [K]
  uint8_t* use;   // [K]
  char* tiles;
};

__host__ __device__ inline size_t fixed_shared_bytes(int num_tasks) {
  const size_t bytes = sizeof(double) * size_t(num_tasks) * (kThreads / kWarp + 2) + size_t(num_tasks);
  return (bytes + 15) / 16 * 16;
}

template <class V>
__device__ inline SharedParts<V> parts_of(char* shared, int num_tasks) {
  SharedParts<V> p;
  p.sums = reinterpret_cast<double*>(shared);
  p.norms = p.sums + num_tasks * (kThreads / kWarp);
  p.weights = reinterpret_cast<V*>(p.norms + num_tasks);
  p.use = reinterpret_cast<uint8_t*>(p.norms + 2 * num_tasks);
  p.tiles = shared + fixed_shared_bytes(num_tasks);
  return p;
}

// A thread's part of piece `index` in shared memory, where a piece is in its own order.
template <class S, int kUnit>
__device__ inline Raw<sizeof(S) * kUnit>* cached_units(const BalanceArguments& a, char* tiles, int64_t index) {
  return reinterpret_cast<Raw<sizeof(S) * kUnit>*>(reinterpret_cast<S*>(tiles) + index * a.columns) + threadIdx.x;
}

template <class S, int kUnit, int kCount>
__device__ inline void store_cached(Raw<sizeof(S) * kUnit>* to, const Slice<kUnit, kThreads>& slice,
                                    const S (&x)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount / kUnit; ++j)
    if (slice.holds(j)) to[j * kThreads] = packed<kUnit>(x, j);
}

template <class S, int kUnit, int kCount>
__device__ inline void load_cached(Pack<S, kUnit, kCount>& x, const Raw<sizeof(S) * kUnit>* from,
                                   const Slice<kUnit, kThreads>& slice, bool wanted) {
#pragma unroll
  for (int j = 0; j < x.kUnits; ++j) {
    x.raw[j] = {};
    if (wanted && slice.holds(j)) x.raw[j] = from[j * kThreads];
  }
}

// The tile at a position of phase two: from the last ones down, as long as they go by turns; then those that are kept; then
// the rest, dealt out to whoever asks. -1 if there is none.
__device__ inline int64_t tile_at(const BalanceArguments& a, int64_t position) {
  const int64_t tiles = a.deals[0].tiles, after = position - a.hot;
  if (after < 0 || after >= a.kept) {
    const int64_t tile = tiles - 1 - (after < 0 ? position : position - a.kept);
    return tile < a.kept ? -1 : tile;
  }
  const unsigned last = unsigned(a.kept) / gridDim.x - 1;
  const int64_t tile = blockIdx.x + int64_t(last - unsigned(after) / gridDim.x) * gridDim.x;
  return tile < tiles ? tile : -1;
}

// The first of a tile's pieces in its block's shared memory; beyond them if it has none there.
__device__ inline int64_t piece_of(const BalanceArguments& a, int64_t tile) {
  return tile < a.kept ? int64_t(unsigned(tile) / gridDim.x) * a.num_tasks : a.cached;
}

// What phase one leaves: the sum of each task's slots, lanes by turns and then a fixed tree.
__device__ inline void add_slots(const BalanceArguments& a) {
  for (int t = threadIdx.x / kWarp; t < a.num_tasks; t += kThreads / kWarp) {
    double sum = 0.0;
    for (int s = threadIdx.x % kWarp; s < slots_used(a.deals[0]); s += kWarp) sum += __ldcg(a.slots + t * a.stride + s);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) a.slots[a.num_tasks * a.stride + t] = sum;
  }
}

template <class S, class G, int kUnit>
__global__ void __launch_bounds__(kThreads, 1) balance_kernel(const __grid_constant__ BalanceArguments a) {
  using V = Wide<S>;
  using Grads = Pack<G, kUnit, kCount<S, kUnit>>;
  using State = Pack<S, kUnit, kCount<S, kUnit>>;
  DBMTL_DYNAMIC_SHARED(shared);
  const SharedParts<V> part = parts_of<V>(shared, a.num_tasks);
  const G* grads = static_cast<const G*>(a.call.grads.data);
  S* ema = static_cast<S*>(a.call.ema.data);
  const V decay = V(a.call.beta), gain = V(1.0 - a.call.beta);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned opened = *reinterpret_cast<volatile unsigned*>(&a.counters->opened);
  const auto slice_of = [&](int64_t tile) {
    const int64_t begin = tile * a.columns, end = begin + a.columns;
    return Slice<kUnit, kThreads>(begin, end < a.call.ema.num_params ? end : a.call.ema.num_params);
  };

  const auto update = [&](int64_t tile) {
    const Slice<kUnit, kThreads> slice = slice_of(tile);
    const int64_t first = piece_of(a, tile);
#pragma unroll 1
    for (int t0 = 0; t0 < a.num_tasks; t0 += kTasksAtOnce) {
      Grads g[kTasksAtOnce];
      State m[kTasksAtOnce];
#pragma unroll
      for (int u = 0; u < kTasksAtOnce; ++u) {
        const bool there = t0 + u < a.num_tasks;
        load<Hint::kStream>(g[u], grads + (t0 + u) * a.call.grads.stride, slice, there);
        // A state that does not count is not read.
        load<Hint::kKeep>(m[u], ema + (t0 + u) * a.call.ema.stride, slice, there && decay != V(0));
      }
      S stored[kTasksAtOnce][kCount<S, kUnit>] = {};
#pragma unroll
      for (int u = 0; u < kTasksAtOnce; ++u) {
        const int t = t0 + u;
        if (t >= a.num_tasks) break;
#pragma unroll
        for (int e = 0; e < kCount<S, kUnit>; ++e)  // zeros where outside
          narrow_lane(&stored[u][e], updated(V(m[u][e]), V(g[u][e]), decay, gain, true));
        store<Hint::kKeep>(ema + t * a.call.ema.stride, stored[u], slice);
        const int64_t piece = first + t;
        if (piece < a.cached) store_cached(cached_units<S, kUnit>(a, part.tiles, piece), slice, stored[u]);
      }
      const double sum = warp_squares(stored);
      const int t = t0 + lane / (kWarp / 2);
      if (lane % (kWarp / 2) == 0 && t < a.num_tasks) part.sums[t * (kThreads / kWarp) + warp] += sum;
    }
  };
  if (a.first) {
    for (int i = threadIdx.x; i < a.num_tasks * (kThreads / kWarp); i += kThreads) part.sums[i] = 0.0;
    __syncthreads();
    deal(a.deals[0], &a.counters->drawn[0], update, [&](unsigned slot) {
      __syncthreads();
      for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
        double sum = 0.0;
        for (int w = 0; w < kThreads / kWarp; ++w) {
          sum += part.sums[t * (kThreads / kWarp) + w];
          part.sums[t * (kThreads / kWarp) + w] = 0.0;
        }
        a.slots[t * a.stride + slot] = sum;
      }
    });
    grid_barrier(a.counters, opened, a.second, [&] { add_slots(a); });
  }
  if (!a.second) return;

  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    part.norms[t] = sqrt(__ldcg(a.slots + a.num_tasks * a.stride + t));
    part.use[t] = is_finite(part.norms[t]);
  }
  __syncthreads();
  bool forget = false;
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    const double alpha = alpha_of(part.norms, part.use, a.num_tasks, a.call.weighting);
    part.weights[t] = V(weight_of(part.norms[t], part.use[t], alpha, a.num_tasks, a.call.weighting));
    forget |= !part.use[t];
    if (blockIdx.x == 0) {
      if (std::is_same<S, double>::value)
        static_cast<double*>(a.call.norms)[t] = part.norms[t];
      else
        static_cast<float*>(a.call.norms)[t] = float(told(part.norms[t]));
    }
  }
  forget = __syncthreads_or(forget);

  const auto combine = [&](int64_t position) {
    const int64_t tile = tile_at(a, position);
    if (tile < 0) return;
    const Slice<kUnit, kThreads> slice = slice_of(tile);
    const int64_t first = piece_of(a, tile);
    V total[kCount<S, kUnit>] = {};
    const auto from_memory = [&](State& row, int t, bool there) {
      load<Hint::kStream>(row, ema + t * a.call.ema.stride, slice, there);
    };
    const auto from_shared = [&](State& row, int t, bool there) {
      load_cached(row, cached_units<S, kUnit>(a, part.tiles, first + t), slice, there);
    };
    if (first >= a.cached)
      add_rows<S, kUnit>(total, a.num_tasks, part.weights, from_memory);
    else if (first + a.num_tasks <= a.cached)
      add_rows<S, kUnit>(total, a.num_tasks, part.weights, from_shared);
    else  // in part
      add_rows<S, kUnit>(total, a.num_tasks, part.weights, [&](State& row, int t, bool there) {
        if (first + t < a.cached)
          from_shared(row, t, there);
        else
          from_memory(row, t, there);
      });
    G out[kCount<S, kUnit>];
#pragma unroll
    for (int e = 0; e < kCount<S, kUnit>; ++e) narrow_lane(out + e, total[e]);
    store<Hint::kStream>(static_cast<G*>(a.call.out.data), out, slice);
    if (forget) {
      const S zeros[kCount<S, kUnit>] = {};
      for (int t = 0; t < a.num_tasks; ++t)
        if (!part.use[t]) store<Hint::kKeep>(ema + t * a.call.ema.stride, zeros, slice);
    }
  };
  deal(a.deals[1], &a.counters->drawn[1], combine, [](unsigned) {});
}

// Deals the tiles out, with so many pieces of each block in shared memory.
void plan(BalanceArguments& a, int64_t tiles, int blocks, int64_t cached) {
  a.cached = int(cached);
  const int64_t rounds = a.num_tasks > 0 ? divided_up(cached, a.num_tasks) : 0;
  a.kept = rounds * blocks;
  a.deals[0] = deal_out(tiles, blocks, std::max<int64_t>(rounds, 1));
  const int64_t others = std::max<int64_t>(tiles - a.kept, 0);
  Deal& second = a.deals[1] = deal_out(others, blocks, others > 0);
  a.hot = second.turns;
  second.turns += a.kept;
  second.tiles = a.kept + std::max(others, a.hot);
}

template <class S, class G, int kUnit>
int32_t launch(BalanceArguments a) {
  constexpr int64_t kMostColumns = kThreads * kCount<S, kUnit>;
  const auto kernel = balance_kernel<S, G, kUnit>;
  const Device device = current_device();
  const int64_t num_params = a.call.ema.num_params, most = device.multiprocessors;
  // As many tiles for every block, as narrow as that allows: no block has more to do, or to keep, than another.
  const int64_t rounds = divided_up(num_params, most * kMostColumns);
  const int64_t even = divided_up(divided_up(num_params, most * std::max<int64_t>(rounds, 1)), kColumnStep);
  a.columns = int(std::clamp<int64_t>(even * kColumnStep, kLeastColumns, kMostColumns));
  a.stride = most * kSlots;
  const int64_t tiles = divided_up(num_params, a.columns), pieces = rounds * a.num_tasks;
  const int blocks = int(std::clamp<int64_t>(tiles, 1, most));
  const size_t fixed = fixed_shared_bytes(a.num_tasks), size = size_t(a.columns) * sizeof(S);
  const int64_t fit = (size_t(device.shared_bytes) - fixed) / size;
  static Prepared prepared;
  DBMTL_TRY(prepare(kernel, kThreads, device, &prepared));
  const cudaStream_t stream = static_cast<cudaStream_t>(a.call.where.stream);
  a.first = a.second = true;
  if (!refusals[device.index]) {
    // A small part of a large state is not worth the room, which is the L1 cache's otherwise.
    plan(a, tiles, blocks, pieces > kLargeState * fit ? 0 : std::min(fit, pieces));
    const int32_t status = launch_kernel(kernel, blocks, kThreads, fixed + a.cached * size, stream, true, a);
    if (status != kRefused) return status;
  }
  plan(a, tiles, blocks, 0);
  a.second = false;
  DBMTL_TRY(launch_kernel(kernel, blocks, kThreads, fixed, stream, false, a));
  std::swap(a.first, a.second);
  DBMTL_TRY(launch_kernel(kernel, blocks, kThreads, fixed, stream, false, a));
  return refused(device);
}

template <class S, class G>
int32_t launch_aligned(const BalanceArguments& a) {
  constexpr int kUnit = kUnitOf<S, G>;
  const dbmtl_rows &grads = a.call.grads, &ema = a.call.ema;
  const bool aligned = on_units(kUnit, grads.data, grads.dtype) && on_units(kUnit, ema.data, ema.dtype) &&
                       on_units(kUnit, a.call.out.data, grads.dtype) && ema.num_params % kUnit == 0 &&
                       grads.stride % kUnit == 0 && ema.stride % kUnit == 0;
  return aligned ? launch<S, G, kUnit>(a) : launch<S, G, 1>(a);
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
  DBMTL_TRY(check(args));
  BalanceArguments a = {};
  a.call = *args;
  dbmtl_rows &grads = a.call.grads, &ema = a.call.ema;
  if (a.call.out.dtype != grads.dtype) return fail(DBMTL_UNSUPPORTED_DTYPE, "out: dtype is not that of grads");
  if ((grads.dtype == DBMTL_F64) != (ema.dtype == DBMTL_F64))
    return fail(DBMTL_UNSUPPORTED_DTYPE, "grads: dtype float64 goes with a float64 ema");
  DBMTL_TRY(ready(ema.num_tasks, args->where));
  a.num_tasks = int(ema.num_tasks);
  a.counters = counters_of(args->where);
  a.slots = slots_of(args->where);
  if (ema.num_tasks < 2) grads.stride = ema.stride = 0;  // any: it is not used
  switch (ema.dtype) {
    case DBMTL_F64: return launch_aligned<double, double>(a);
    case DBMTL_F32: return launch_for<float>(a);
    default: return launch_for<bf16>(a);
  }
}
