// The dense op: one parallel region, two phases with a barrier between them.
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "common/ema.h"
#include "common/weights.h"

using namespace dbmtl;

extern "C" int32_t dbmtl_balance(const dbmtl_balance_args* args) {
  DBMTL_TRY(check(args));
  const dbmtl_rows &grads = args->grads, &ema = args->ema;
  const int64_t num_tasks = ema.num_tasks, num_params = ema.num_params, num_tiles = tiles(num_params);
  const int threads = clamp_threads(args->where.num_threads, num_tasks * num_params);
  const Scratch<double> slots(num_tasks * num_tiles), numbers(3 * num_tasks);
  const Scratch<uint8_t> use(num_tasks);
  const Scratch<const void*> rows(num_tasks * threads);
  if (!slots || !numbers || !use || !rows) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  double* norms = &numbers[0];
  double* weights = norms + num_tasks;
  double* used = weights + num_tasks;  // the weights of the rows that count, packed
  int64_t num_used = 0;

  const auto ema_sumsq = kernels().ema_sumsq[ema.dtype][grads.dtype];
  const auto combine = kernels().combine[ema.dtype][args->out.dtype];
  const bool streaming = streams(args->out.data, args->out.dtype, num_params);

  parallel(threads, [&] {
    // Handed out as threads come for more: one that the system disturbs does not keep the others waiting.
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * kTile, n = tile_size(tile, num_params);
      for (int64_t t = 0; t < num_tasks; ++t)
        slots[t * num_tiles + tile] = ema_sumsq(at(ema.data, t * ema.stride + begin, ema.dtype),
                                                at(grads.data, t * grads.stride + begin, grads.dtype), n, args->beta,
                                                1.0 - args->beta);
    }
#pragma omp single
    {
      for (int64_t t = 0; t < num_tasks; ++t) {
        double sumsq = 0.0;
        for (int64_t tile = 0; tile < num_tiles; ++tile) sumsq += slots[t * num_tiles + tile];
        norms[t] = std::sqrt(sumsq);
        use[t] = is_finite(norms[t]);
      }
      const double alpha = alpha_of(norms, &use[0], num_tasks, args->weighting);
      for (int64_t t = 0; t < num_tasks; ++t) {
        weights[t] = weight_of(norms[t], use[t], alpha, num_tasks, args->weighting);
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
        char* row = at(ema.data, t * ema.stride + begin, ema.dtype);
        if (weights[t] != 0.0)
          mine[next++] = row;
        else if (!use[t])  // forget what was poisoned
          std::memset(row, 0, size_t(n * kElementSize[ema.dtype]));
      }
      combine(mine, used, next, at(args->out.data, begin, args->out.dtype), n, false, streaming);
    }
  });
  for (int64_t t = 0; t < num_tasks; ++t) {
    const bool wide = ema.dtype == DBMTL_F64;
    put(args->norms, t, wide, wide ? norms[t] : told(norms[t]));
  }
  return DBMTL_OK;
}
