// The dense op: one parallel region, two phases with a barrier between them.
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "weights.h"

using namespace dbmtl;

extern "C" int32_t dbmtl_balance(const void* grads, int32_t grad_dtype, int64_t grad_row_stride, void* ema,
                                 int32_t state_dtype, int64_t state_row_stride, void* out, int32_t out_dtype,
                                 void* norms_out, int64_t num_tasks, int64_t num_params, double beta, double eps,
                                 int32_t scale, double constant, int32_t stochastic, uint64_t seed,
                                 int32_t num_threads, void* /*stream*/) {
  if (num_tasks < 1) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks must be at least 1");
  if (num_params < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_params is negative");
  if (!is_dtype(grad_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "grad_dtype");
  if (!is_dtype(out_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "out_dtype");
  if (!is_state_dtype(state_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "state_dtype");
  if (norms_out == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "norms is null");
  if (num_params > 0 && grads == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "grads is null");
  if (num_params > 0 && ema == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "ema is null");
  if (num_params > 0 && out == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "out is null");
  if (num_tasks > 1 && (grad_row_stride < num_params || state_row_stride < num_params))
    return fail(DBMTL_INVALID_ARGUMENT, "row stride smaller than num_params");
  if (!(beta >= 0.0 && beta < 1.0)) return fail(DBMTL_INVALID_ARGUMENT, "beta is outside [0, 1)");
  if (!(eps > 0.0)) return fail(DBMTL_INVALID_ARGUMENT, "eps must be positive");
  if (scale < DBMTL_SCALE_MAX || scale > DBMTL_SCALE_CONSTANT) return fail(DBMTL_INVALID_ARGUMENT, "scale");
  if (stochastic && state_dtype != DBMTL_BF16) return fail(DBMTL_INVALID_ARGUMENT, kStochasticNeedsBf16);

  const int64_t num_tiles = tiles(num_params);
  auto slots = try_allocate<double>(num_tasks * num_tiles);
  auto numbers = try_allocate<double>(5 * num_tasks);
  auto rows = try_allocate<const void*>(num_tasks * clamp_threads(num_threads, num_tasks * num_params));
  if (!slots || !numbers || !rows) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  double* sumsq = numbers.get();
  double* norms = sumsq + num_tasks;
  double* weights = norms + num_tasks;
  double* scratch = weights + num_tasks;
  double* used = scratch + num_tasks;  // the weights of the rows that count, packed
  int64_t num_used = 0;

  const auto ema_sumsq = kernels().ema_sumsq[state_dtype][grad_dtype];
  const auto combine = kernels().combine[state_dtype][out_dtype];
  const bool streaming = num_params * kElementSize[out_dtype] >= kStreamFromBytes &&
                         reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const int threads = clamp_threads(num_threads, num_tasks * num_params);

#pragma omp parallel num_threads(threads)
  {
    // Handed out as threads come for more: one that the system disturbs does not keep the others waiting.
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * kTile, n = tile_size(tile, num_params);
      for (int64_t t = 0; t < num_tasks; ++t) {
        const Rounding rounding{row_key(seed, t), begin};
        slots[t * num_tiles + tile] =
            ema_sumsq(at(ema, t * state_row_stride + begin, state_dtype),
                      at(grads, t * grad_row_stride + begin, grad_dtype), n, beta, 1.0 - beta,
                      stochastic ? &rounding : nullptr);
      }
    }
#pragma omp single
    {
      for (int64_t t = 0; t < num_tasks; ++t) {
        sumsq[t] = 0.0;
        for (int64_t tile = 0; tile < num_tiles; ++tile) sumsq[t] += slots[t * num_tiles + tile];
      }
      weights_from_sumsq(sumsq, num_tasks, eps, scale, constant, norms, weights, scratch);
      for (int64_t t = 0; t < num_tasks; ++t)
        if (weights[t] != 0.0) used[num_used++] = weights[t];
    }
    // Backwards, so that what the first phase touched last is still in cache.
    const void** mine = &rows[num_tasks * thread_index()];
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t tile = num_tiles - 1 - i;
      const int64_t begin = tile * kTile, n = tile_size(tile, num_params);
      int64_t next = 0;
      for (int64_t t = 0; t < num_tasks; ++t) {
        char* row = at(ema, t * state_row_stride + begin, state_dtype);
        if (weights[t] != 0.0)
          mine[next++] = row;
        else if (!std::isfinite(norms[t]))  // forget what was poisoned
          std::memset(row, 0, size_t(n * kElementSize[state_dtype]));
      }
      combine(mine, used, next, at(out, begin, out_dtype), n, false, streaming);
    }
  }
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (state_dtype == DBMTL_F64)
      static_cast<double*>(norms_out)[t] = norms[t];
    else
      static_cast<float*>(norms_out)[t] = float(norms[t]);
  }
  return DBMTL_OK;
}
