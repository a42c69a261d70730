// The dense op: one parallel region, two phases with a barrier between them.
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "common/ema.h"
#include "common/weights.h"

using namespace dbmtl;

extern "C" int32_t dbmtl_balance(const void* grads, int32_t grad_dtype, int64_t grad_row_stride, void* ema,
                                 int32_t state_dtype, int64_t state_row_stride, void* out, int32_t out_dtype,
                                 void* norms_out, int64_t num_tasks, int64_t num_params, double beta, double eps,
                                 int32_t scale, double constant, int32_t stochastic, uint64_t seed,
                                 int32_t num_threads, void* /*workspace*/, void* /*stream*/) {
  const Fault fault = check_balance(grads, grad_dtype, grad_row_stride, ema, state_dtype, state_row_stride, out,
                                    out_dtype, norms_out, num_tasks, num_params, beta, eps, scale, stochastic);
  if (fault.status) return fail(fault);

  const int64_t num_tiles = tiles(num_params);
  auto slots = try_allocate<double>(num_tasks * num_tiles);
  auto numbers = try_allocate<double>(3 * num_tasks);
  auto use = try_allocate<uint8_t>(num_tasks);
  auto rows = try_allocate<const void*>(num_tasks * clamp_threads(num_threads, num_tasks * num_params));
  if (!slots || !numbers || !use || !rows) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  double* norms = numbers.get();
  double* weights = norms + num_tasks;
  double* used = weights + num_tasks;  // the weights of the rows that count, packed
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
                      at(grads, t * grad_row_stride + begin, grad_dtype), n, beta, gain_of(beta),
                      stochastic ? &rounding : nullptr);
      }
    }
#pragma omp single
    {
      for (int64_t t = 0; t < num_tasks; ++t) {
        double sumsq = 0.0;
        for (int64_t tile = 0; tile < num_tiles; ++tile) sumsq += slots[t * num_tiles + tile];
        norms[t] = std::sqrt(sumsq);
        use[t] = is_finite(norms[t]);
      }
      const double alpha = alpha_of(norms, use.get(), num_tasks, scale, constant);
      for (int64_t t = 0; t < num_tasks; ++t) {
        weights[t] = weight_of(norms[t], use[t], alpha, eps, num_tasks, scale);
        if (weights[t] != 0.0) used[num_used++] = weights[t];
      }
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
        else if (!use[t])  // forget what was poisoned
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
