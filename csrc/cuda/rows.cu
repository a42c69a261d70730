// Combining rows: with weights given, or at the end of an engine step, where the weights are formed first and the books
// are kept besides. One launch each.
#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kTileElements = kThreads * kElements;

struct Out {
  void* to;
  int64_t start, numel;
  int32_t dtype;
  int32_t aligned;
};

struct RowsArguments {
  void* rows;
  int64_t row_stride;
  int num_tasks, num_outs, accumulate;
  Out outs[kMaxOuts];
  const void* weights;  // given, in weights_dtype; null at the end of a step
  int32_t weights_dtype;
  // the books of a step
  double* sumsq;
  uint8_t* broken;
  int64_t* nonfinite_steps;
  double* norms;
  double* step_weights;
  const uint8_t* active;
  const void* loss_scale;
  int32_t loss_scale_dtype, scale, fresh;
  double eps, constant;
  Counters* counters;
};

struct Books {
  double norms[kMaxTasks];
  double weights[kMaxTasks];
  double carried[kMaxTasks];
  uint8_t use[kMaxTasks];
  uint8_t broken[kMaxTasks];
  uint8_t now[kMaxTasks];
};

template <class S, class O, bool kAligned>
__device__ void combine(const RowsArguments& a, const Out& out, const Books& books, bool forget) {
  using V = Wide<S>;
  S* rows = static_cast<S*>(a.rows) + out.start;
  O* to = static_cast<O*>(out.to);
  const int64_t tiles = (out.numel + kTileElements - 1) / kTileElements;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place<kAligned> place(tile * kTileElements, threadIdx.x, kThreads);
    V total[kElements];
    load<Hint::kStream>(total, to, place, a.accumulate ? out.numel : 0);
#pragma unroll 4
    for (int t = 0; t < a.num_tasks; ++t) {
      V m[kElements];
      load<Hint::kStream>(m, rows + t * a.row_stride, place, out.numel);
      const V weight = V(books.carried[t]);
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (weight != V(0)) total[e] = multiply_add(total[e], weight, m[e]);
    }
    O result[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) narrow_lane(result + e, total[e]);
    store<Hint::kStream>(to, result, place, out.numel);
    if (forget) {
      const S zeros[kElements] = {};
      for (int t = 0; t < a.num_tasks; ++t)
        if (books.broken[t]) store<Hint::kKeep>(rows + t * a.row_stride, zeros, place, out.numel);
    }
  }
}

template <class S, class O>
__device__ void combine_out(const RowsArguments& a, const Out& out, const Books& books, bool forget) {
  if (out.aligned)
    combine<S, O, true>(a, out, books, forget);
  else
    combine<S, O, false>(a, out, books, forget);
}

// Every block forms the weights for itself. Returns whether a row is to be set to zero.
__device__ bool open_books(const RowsArguments& a, Books& books) {
  bool forget = false;
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    if (a.weights != nullptr) {
      books.carried[t] = number(static_cast<const char*>(a.weights) + t * size_of(a.weights_dtype), a.weights_dtype);
      continue;
    }
    const bool before = a.broken[t] && !a.fresh, now = !is_finite(a.sumsq[t]);
    books.norms[t] = sqrt(a.sumsq[t]);
    books.now[t] = now && !before;
    books.broken[t] = before || now;
    books.use[t] = !books.broken[t] && (a.active == nullptr || a.active[t]);
    forget |= books.broken[t];
  }
  forget = __syncthreads_or(forget);
  if (a.weights != nullptr) return false;
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    const double alpha = alpha_of(books.norms, books.use, a.num_tasks, a.scale, a.constant);
    const double factor = a.loss_scale == nullptr ? 1.0 : number(a.loss_scale, a.loss_scale_dtype);
    books.weights[t] = weight_of(books.norms[t], books.use[t], alpha, a.eps, a.num_tasks, a.scale);
    books.carried[t] = carried_of(books.weights[t], books.broken[t], a.loss_scale != nullptr, factor);
  }
  __syncthreads();
  return forget;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const __grid_constant__ RowsArguments a) {
  __shared__ Books books;
  const bool forget = open_books(a, books);
  for (int i = 0; i < a.num_outs; ++i) {
    const Out& out = a.outs[i];
    switch (out.dtype) {
      case DBMTL_F32: combine_out<S, float>(a, out, books, forget); break;
      case DBMTL_F64: combine_out<S, double>(a, out, books, forget); break;
      case DBMTL_BF16: combine_out<S, bf16>(a, out, books, forget); break;
      default: combine_out<S, f16>(a, out, books, forget);
    }
  }
  // Only when everybody has read the books may they be changed.
  if (a.weights != nullptr || !is_last(a.counters)) return;
  for (int t = threadIdx.x; t < a.num_tasks; t += kThreads) {
    a.norms[t] = books.norms[t];
    a.step_weights[t] = books.weights[t];
    a.nonfinite_steps[t] += books.now[t];
    a.broken[t] = books.broken[t];
    if (books.broken[t]) a.sumsq[t] = 0.0;
  }
}

int32_t launch(RowsArguments& a, int32_t state_dtype, void* stream) {
  int64_t tiles = 0;
  for (int i = 0; i < a.num_outs; ++i) {
    Out& out = a.outs[i];
    const char* first = at(static_cast<const void*>(a.rows), out.start, state_dtype);
    out.aligned = on_16_bytes(first, out.to) && out.numel % kElements == 0 && a.row_stride % kElements == 0;
    tiles += (out.numel + kTileElements - 1) / kTileElements;
  }
  const int64_t most = int64_t(current_device().multiprocessors) * 2;
  const int blocks = int(tiles < 1 ? 1 : tiles < most ? tiles : most);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (state_dtype) {
    case DBMTL_F32: return launch_kernel(rows_kernel<float>, blocks, kThreads, 0, s, false, a);
    case DBMTL_F64: return launch_kernel(rows_kernel<double>, blocks, kThreads, 0, s, false, a);
    default: return launch_kernel(rows_kernel<bf16>, blocks, kThreads, 0, s, false, a);
  }
}

}  // namespace
}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_combine(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                 int64_t num_params, const void* weights, int32_t weights_dtype, void* out,
                                 int32_t out_dtype, int32_t accumulate, int32_t /*num_threads*/, void* workspace,
                                 void* stream) {
  const Fault fault =
      check_combine(rows, state_dtype, row_stride, num_tasks, num_params, weights, weights_dtype, out, out_dtype);
  if (fault.status) return fail(fault);
  const int32_t status = ready(num_tasks, workspace);
  if (status) return status;
  if (num_params == 0) return DBMTL_OK;
  RowsArguments a = {};
  a.rows = const_cast<void*>(rows);  // nothing is written without books
  a.row_stride = num_tasks > 1 ? row_stride : 0;
  a.num_tasks = int(num_tasks);
  a.num_outs = 1;
  a.outs[0] = {out, 0, num_params, out_dtype, 0};
  a.accumulate = accumulate;
  // Without a task there is no weight to read, yet this says that there are no books.
  a.weights = weights != nullptr ? weights : workspace;
  a.weights_dtype = weights_dtype;
  return launch(a, state_dtype, stream);
}

extern "C" int32_t dbmtl_balance_rows(void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                      double* sumsq, uint8_t* broken, int64_t* nonfinite_steps, double* norms,
                                      double* weights, int32_t num_outs, void* const* outs, const int32_t* out_dtypes,
                                      const int64_t* starts, const int64_t* numels, const uint8_t* active,
                                      const void* loss_scale, int32_t loss_scale_dtype, double eps, int32_t scale,
                                      double constant, int32_t fresh, int32_t accumulate, int32_t /*num_threads*/,
                                      void* workspace, void* stream) {
  const Fault fault =
      check_balance_rows(rows, state_dtype, row_stride, num_tasks, sumsq, broken, nonfinite_steps, norms, weights,
                         num_outs, outs, out_dtypes, starts, numels, loss_scale, loss_scale_dtype, eps, scale);
  if (fault.status) return fail(fault);
  const int32_t status = ready(num_tasks, workspace);
  if (status) return status;
  RowsArguments a = {};
  a.rows = rows;
  a.row_stride = num_tasks > 1 ? row_stride : 0;
  a.num_tasks = int(num_tasks);
  a.num_outs = num_outs;
  for (int32_t i = 0; i < num_outs; ++i) a.outs[i] = {outs[i], starts[i], numels[i], out_dtypes[i], 0};
  a.accumulate = accumulate;
  a.sumsq = sumsq;
  a.broken = broken;
  a.nonfinite_steps = nonfinite_steps;
  a.norms = norms;
  a.step_weights = weights;
  a.active = active;
  a.loss_scale = loss_scale;
  a.loss_scale_dtype = loss_scale_dtype;
  a.scale = scale;
  a.fresh = fresh;
  a.eps = eps;
  a.constant = constant;
  a.counters = counters_of(workspace);
  return launch(a, state_dtype, stream);
}
