// The task-gradient buffer: gather one row from a list of gradients, combine rows, multiply them pairwise.
#include <cmath>

#include "dispatch.h"
#include "parallel.h"

using namespace dbmtl;

extern "C" {

int32_t dbmtl_accumulate(void* row, int32_t state_dtype, int64_t num_segments, const int64_t* segments,
                         const void* const* grads, const uint8_t* grad_dtypes, double decay, double gain,
                         double* sumsq, int32_t stochastic, uint64_t seed, int32_t num_threads, void* /*stream*/) {
  if (num_segments < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_segments is negative");
  if (!is_state_dtype(state_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "state_dtype");
  if (stochastic && state_dtype != DBMTL_BF16) return fail(DBMTL_INVALID_ARGUMENT, kStochasticNeedsBf16);
  if (sumsq == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "sumsq is null");
  if (num_segments > 0 && (segments == nullptr || grads == nullptr || grad_dtypes == nullptr))
    return fail(DBMTL_INVALID_ARGUMENT, "segments, grads or grad_dtypes is null");
  int64_t elements = 0, num_tiles = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    if (segments[2 * i] < 0 || segments[2 * i + 1] < 0)
      return fail(DBMTL_INVALID_ARGUMENT, "segments has a negative offset or size");
    if (!is_dtype(grad_dtypes[i])) return fail(DBMTL_UNSUPPORTED_DTYPE, "grad_dtypes");
    elements += segments[2 * i + 1];
    num_tiles += tiles(segments[2 * i + 1]);
  }
  if (elements > 0 && row == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "row is null");

  auto slots = try_allocate<double>(num_tiles);
  auto first_tile = try_allocate<int64_t>(num_segments + 1);
  if (!slots || !first_tile) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  for (int64_t i = 0; i < num_segments; ++i) first_tile[i + 1] = first_tile[i] + tiles(segments[2 * i + 1]);

  const auto& by_grad = kernels().ema_sumsq[state_dtype];
  const uint64_t key = row_key(seed, 0);
#pragma omp parallel num_threads(clamp_threads(num_threads, elements))
  {
    const Share share(num_tiles);
    int64_t segment = std::upper_bound(&first_tile[0], &first_tile[num_segments] + 1, share.begin) -
                      &first_tile[0] - 1;
    for (int64_t tile = share.begin; tile < share.end; ++tile) {
      while (tile >= first_tile[segment + 1]) ++segment;
      const int64_t offset = segments[2 * segment], numel = segments[2 * segment + 1];
      const int64_t begin = (tile - first_tile[segment]) * kTile;
      const int32_t dtype = grad_dtypes[segment];
      const void* grad = grads[segment] ? at(grads[segment], begin, dtype) : nullptr;
      const Rounding rounding{key, offset + begin};
      slots[tile] = by_grad[dtype](at(row, offset + begin, state_dtype), grad,
                                   tile_size(tile - first_tile[segment], numel), decay, gain,
                                   stochastic ? &rounding : nullptr);
    }
  }
  double sum = 0.0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) sum += slots[tile];
  *sumsq = sum;
  return DBMTL_OK;
}

int32_t dbmtl_combine(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                      int64_t num_params, const double* weights, void* out, int32_t out_dtype, int32_t accumulate,
                      int32_t num_threads, void* /*stream*/) {
  if (num_tasks < 0 || num_params < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks or num_params is negative");
  if (!is_state_dtype(state_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "state_dtype");
  if (!is_dtype(out_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "out_dtype");
  if (num_params > 0 && out == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "out is null");
  if (num_tasks * num_params > 0 && (rows == nullptr || weights == nullptr))
    return fail(DBMTL_INVALID_ARGUMENT, "rows or weights is null");
  if (num_tasks > 1 && row_stride < num_params)
    return fail(DBMTL_INVALID_ARGUMENT, "row_stride is smaller than num_params");

  auto used = try_allocate<double>(num_tasks);
  auto used_rows = try_allocate<const void*>(num_tasks);
  if (!used || !used_rows) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  int64_t num_used = 0;
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (weights[t] == 0.0) continue;
    used_rows[num_used] = at(rows, t * row_stride, state_dtype);
    used[num_used++] = weights[t];
  }

  const int64_t num_tiles = tiles(num_params);
  const auto combine = kernels().combine[state_dtype][out_dtype];
  const bool streaming = !accumulate && num_params * kElementSize[out_dtype] >= kStreamFromBytes &&
                         reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const int threads = clamp_threads(num_threads, num_tasks * num_params);
  auto pointers = try_allocate<const void*>(num_used * threads);
  if (!pointers) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
#pragma omp parallel num_threads(threads)
  {
    const void** mine = &pointers[num_used * thread_index()];
    // Forwards: a backward pass ends with a model's first parameters, which were gathered last.
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * kTile;
      for (int64_t t = 0; t < num_used; ++t) mine[t] = at(used_rows[t], begin, state_dtype);
      combine(mine, used.get(), num_used, at(out, begin, out_dtype), tile_size(tile, num_params), accumulate != 0,
              streaming);
    }
  }
  return DBMTL_OK;
}

int32_t dbmtl_gramian(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                      int64_t num_params, double* gramian, int32_t num_threads, void* /*stream*/) {
  if (num_tasks < 0 || num_params < 0) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks or num_params is negative");
  if (!is_state_dtype(state_dtype)) return fail(DBMTL_UNSUPPORTED_DTYPE, "state_dtype");
  if (num_tasks > 0 && gramian == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "gramian is null");
  if (num_tasks * num_params > 0 && rows == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "rows is null");
  if (num_tasks > 1 && row_stride < num_params)
    return fail(DBMTL_INVALID_ARGUMENT, "row_stride is smaller than num_params");

  // Each stripe of tiles has K x K slots of its own; stripes are as many for one thread as for a hundred.
  const int64_t num_tiles = tiles(num_params), pairs = num_tasks * num_tasks;
  const int64_t stripes = num_tiles < kStripes ? num_tiles : kStripes;
  const int threads = clamp_threads(num_threads, num_tasks * num_params);
  auto slots = try_allocate<double>(stripes * pairs);
  auto pointers = try_allocate<const void*>(num_tasks * threads);
  if (!slots || !pointers) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  const auto tile_gramian = kernels().gramian[state_dtype];
#pragma omp parallel num_threads(threads)
  {
    const Share share(stripes);
    const void** mine = &pointers[num_tasks * thread_index()];
    for (int64_t stripe = share.begin; stripe < share.end; ++stripe) {
      const int64_t end = num_tiles * (stripe + 1) / stripes;
      for (int64_t tile = num_tiles * stripe / stripes; tile < end; ++tile) {
        for (int64_t t = 0; t < num_tasks; ++t) mine[t] = at(rows, t * row_stride + tile * kTile, state_dtype);
        tile_gramian(mine, num_tasks, tile_size(tile, num_params), &slots[stripe * pairs]);
      }
    }
  }
  for (int64_t i = 0; i < num_tasks; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int64_t stripe = 0; stripe < stripes; ++stripe) sum += slots[stripe * pairs + i * num_tasks + j];
      gramian[i * num_tasks + j] = gramian[j * num_tasks + i] = sum;
    }
  return DBMTL_OK;
}

}  // extern "C"
