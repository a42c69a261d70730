// Combining rows: with weights given, or at the end of an engine step, where the weights are formed first and the
// statistics are kept besides. One launch each.
#include <algorithm>

#include "deal.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256, kBlocks = 2;  // of them on a multiprocessor

struct RowsArguments {
  dbmtl_balance_rows_args step;          // without stats where weights are given
  dbmtl_array given;                     // weights, or null at the end of a step
  int32_t aligned[DBMTL_MAX_OUTS];
  int64_t first_tile[DBMTL_MAX_OUTS];    // of each out, among the tiles of all
  Deal deal;
  Counters* counters;
};

template <class V>
struct Stats {
  double norms[kMaxTasks];
  double weights[kMaxTasks];
  V carried[kMaxTasks];
  uint8_t use[kMaxTasks];
  uint8_t nonfinite[kMaxTasks];
  uint8_t now[kMaxTasks];
};

// One tile.
template <class S, class O, int kUnit>
__device__ void combine(const RowsArguments& a, const dbmtl_out& out, int64_t tile, const Stats<Wide<S>>& stats,
                        bool forget) {
  using V = Wide<S>;
  const int num_tasks = int(a.step.rows.num_tasks);
  S* rows = static_cast<S*>(a.step.rows.data) + out.start;
  O* to = static_cast<O*>(out.data);
  constexpr int kCount = kElements<S, kUnit>;
  const Slice<kUnit, kThreads> slice(tile * (kThreads * kCount), out.numel);
  Pack<O, kUnit, kCount> before;
  V total[kCount];
  load<Hint::kStream>(before, to, slice, a.step.accumulate != 0);
#pragma unroll
  for (int e = 0; e < kCount; ++e) total[e] = V(before[e]);
  add_rows<S, kUnit>(total, num_tasks, stats.carried, [&](auto& row, int t, bool there) {
    load<Hint::kStream>(row, rows + t * a.step.rows.stride, slice, there);
  });
  O result[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) narrow_lane(result + e, total[e]);
  store<Hint::kStream>(to, result, slice);
  if (!forget) return;
  const S zeros[kCount] = {};
  for (int t = 0; t < num_tasks; ++t)
    if (stats.nonfinite[t]) store<Hint::kKeep>(rows + t * a.step.rows.stride, zeros, slice);
}

template <class S, class O>
__device__ void combine_out(const RowsArguments& a, int index, int64_t tile, const Stats<Wide<S>>& stats, bool forget) {
  if (a.aligned[index])
    combine<S, O, kUnitOf<S, O>>(a, a.step.outs[index], tile, stats, forget);
  else
    combine<S, O, 1>(a, a.step.outs[index], tile, stats, forget);
}

// Every block forms the weights for itself. Returns whether a row is to be set to zero.
template <class V>
__device__ bool form_weights(const RowsArguments& a, Stats<V>& stats) {
  const dbmtl_balance_rows_args& step = a.step;
  const int num_tasks = int(step.rows.num_tasks);
  bool forget = false;
  for (int t = threadIdx.x; t < num_tasks; t += kThreads) {
    if (a.given.data != nullptr) {
      stats.carried[t] = V(number(static_cast<const char*>(a.given.data) + t * size_of(a.given.dtype), a.given.dtype));
      continue;
    }
    const bool before = step.nonfinite[t] && !step.fresh, now = !is_finite(step.sumsq[t]);
    stats.norms[t] = sqrt(step.sumsq[t]);
    stats.now[t] = now && !before;
    stats.nonfinite[t] = before || now;
    stats.use[t] = !stats.nonfinite[t] && is_active(step.active, t);
    forget |= stats.nonfinite[t];
  }
  forget = __syncthreads_or(forget);
  if (a.given.data != nullptr) return false;
  const dbmtl_array& scale = step.loss_scale;
  for (int t = threadIdx.x; t < num_tasks; t += kThreads) {
    const double alpha = alpha_of(stats.norms, stats.use, num_tasks, step.weighting);
    const double factor = scale.data == nullptr ? 1.0 : number(scale.data, scale.dtype);
    stats.weights[t] = weight_of(stats.norms[t], stats.use[t], alpha, num_tasks, step.weighting);
    stats.carried[t] = V(carried_of(stats.weights[t], stats.nonfinite[t], is_active(step.active, t), factor,
                                    step.propagate_above));
  }
  __syncthreads();
  return forget;
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks) rows_kernel(const __grid_constant__ RowsArguments a) {
  __shared__ Stats<Wide<S>> stats;
  const bool forget = form_weights(a, stats);
  deal(
      a.deal, &a.counters->drawn[0],
      [&](int64_t tile) {
        int i = 0;
        while (i + 1 < int(a.step.num_outs) && a.first_tile[i + 1] <= tile) ++i;
        tile -= a.first_tile[i];
        switch (a.step.outs[i].dtype) {
          case DBMTL_F32: combine_out<S, float>(a, i, tile, stats, forget); break;
          case DBMTL_F64: combine_out<S, double>(a, i, tile, stats, forget); break;
          case DBMTL_BF16: combine_out<S, bf16>(a, i, tile, stats, forget); break;
          default: combine_out<S, f16>(a, i, tile, stats, forget);
        }
      },
      [](unsigned) {});
  // Only when every block has read them may they be changed.
  if (a.given.data != nullptr || !is_last(&a.counters->finished)) return;
  for (int t = threadIdx.x; t < int(a.step.rows.num_tasks); t += kThreads) {
    a.step.norms[t] = stats.norms[t];
    a.step.weights[t] = stats.weights[t];
    a.step.nonfinite_steps[t] += stats.now[t];
    a.step.nonfinite[t] = stats.nonfinite[t];
    if (stats.nonfinite[t]) a.step.sumsq[t] = 0.0;
  }
}

int32_t launch(RowsArguments& a) {
  dbmtl_rows& rows = a.step.rows;
  if (rows.num_tasks < 2) rows.stride = 0;  // any: it is not used
  a.counters = counters_of(a.step.where);
  int64_t tiles = 0;
  for (int i = 0; i < a.step.num_outs; ++i) {
    const dbmtl_out& out = a.step.outs[i];
    const int64_t unit = 16 / std::max(kElementSize[rows.dtype], kElementSize[out.dtype]);
    a.aligned[i] = on_units(unit, at(rows.data, out.start, rows.dtype), rows.dtype) &&
                   on_units(unit, out.data, out.dtype) && out.numel % unit == 0 && rows.stride % unit == 0;
    const int64_t columns = kThreads * elements_of(int(kElementSize[rows.dtype]), a.aligned[i] ? int(unit) : 1);
    a.first_tile[i] = tiles;
    tiles += divided_up(out.numel, columns);
  }
  const int blocks = int(std::clamp<int64_t>(tiles, 1, int64_t(current_device().multiprocessors) * kBlocks));
  a.deal = deal_out(tiles, blocks);
  const cudaStream_t stream = static_cast<cudaStream_t>(a.step.where.stream);
  switch (rows.dtype) {
    case DBMTL_F32: return launch_kernel(rows_kernel<float>, blocks, kThreads, 0, stream, false, a);
    case DBMTL_F64: return launch_kernel(rows_kernel<double>, blocks, kThreads, 0, stream, false, a);
    default: return launch_kernel(rows_kernel<bf16>, blocks, kThreads, 0, stream, false, a);
  }
}

}  // namespace
}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_combine(const dbmtl_combine_args* args) {
  DBMTL_TRY(check(args));
  DBMTL_TRY(ready(args->rows.num_tasks, args->where));
  if (args->rows.num_params == 0) return DBMTL_OK;
  RowsArguments a = {};
  a.step.rows = args->rows;
  a.step.outs[0] = {args->out.data, args->out.dtype, 0, args->rows.num_params};
  a.step.num_outs = 1;
  a.step.accumulate = args->accumulate;
  a.step.where = args->where;
  a.given = args->weights;
  if (args->rows.num_tasks == 0) a.given.data = args->where.workspace;  // not read: says that there are no stats
  return launch(a);
}

extern "C" int32_t dbmtl_balance_rows(const dbmtl_balance_rows_args* args) {
  DBMTL_TRY(check(args));
  DBMTL_TRY(ready(args->rows.num_tasks, args->where));
  RowsArguments a = {};
  a.step = *args;
  return launch(a);
}
