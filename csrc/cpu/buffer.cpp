// The task-gradient buffer: gather one row from a list of gradients, combine rows, multiply them pairwise.
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "common/ema.h"
#include "common/weights.h"

using namespace dbmtl;

namespace {

// Rows that count, and their weights.
struct Used {
  std::unique_ptr<double[]> weights;
  std::unique_ptr<const void*[]> rows;
  int64_t count = 0;
  explicit Used(int64_t num_tasks)
      : weights(try_allocate<double>(num_tasks)), rows(try_allocate<const void*>(num_tasks)) {}
  bool ok() const { return weights && rows; }
  void add(double weight, const void* row) {
    if (weight == 0.0) return;
    rows[count] = row;
    weights[count++] = weight;
  }
};

int32_t combine_used(const Used& used, int32_t state_dtype, int64_t first, int64_t numel, void* out, int32_t out_dtype,
                     bool accumulate, int32_t num_threads) {
  const int64_t num_tiles = tiles(numel);
  const auto combine = kernels().combine[state_dtype][out_dtype];
  const bool streaming = !accumulate && numel * kElementSize[out_dtype] >= kStreamFromBytes &&
                         reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const int threads = clamp_threads(num_threads, used.count * numel);
  auto pointers = try_allocate<const void*>(used.count * threads);
  if (!pointers) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
#pragma omp parallel num_threads(threads)
  {
    const void** mine = &pointers[used.count * thread_index()];
    // Forwards: a backward pass ends with a model's first parameters, which were gathered last.
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * kTile;
      for (int64_t t = 0; t < used.count; ++t) mine[t] = at(used.rows[t], first + begin, state_dtype);
      combine(mine, used.weights.get(), used.count, at(out, begin, out_dtype), tile_size(tile, numel), accumulate,
              streaming);
    }
  }
  return DBMTL_OK;
}

}  // namespace

extern "C" {

int32_t dbmtl_accumulate(void* row, int32_t state_dtype, int64_t num_segments, const int64_t* segments,
                         const void* const* grads, const uint8_t* grad_dtypes, double decay, double gain,
                         const void* loss_scale, int32_t loss_scale_dtype, double* sumsq, int32_t stochastic,
                         uint64_t seed, const void* coefficients, int32_t num_threads, void* /*workspace*/,
                         void* /*stream*/) {
  const Fault fault = check_accumulate(row, state_dtype, num_segments, segments, grads, grad_dtypes, loss_scale,
                                       loss_scale_dtype, sumsq, stochastic);
  if (fault.status) return fail(fault);
  Coefficients c = {decay, gain, seed};
  if (coefficients != nullptr) c = coefficients_at(coefficients);
  if (loss_scale != nullptr) c.gain = unscaled(c.gain, number(loss_scale, loss_scale_dtype));
  int64_t elements = 0, num_tiles = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    elements += segments[2 * i + 1];
    num_tiles += tiles(segments[2 * i + 1]);
  }

  auto slots = try_allocate<double>(num_tiles);
  auto first_tile = try_allocate<int64_t>(num_segments + 1);
  if (!slots || !first_tile) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  for (int64_t i = 0; i < num_segments; ++i) first_tile[i + 1] = first_tile[i] + tiles(segments[2 * i + 1]);

  const auto& by_grad = kernels().ema_sumsq[state_dtype];
  const uint64_t key = row_key(c.seed, 0);
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
                                   tile_size(tile - first_tile[segment], numel), c.decay, c.gain,
                                   stochastic ? &rounding : nullptr);
    }
  }
  double sum = 0.0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) sum += slots[tile];
  *sumsq = sum;
  return DBMTL_OK;
}

int32_t dbmtl_combine(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                      int64_t num_params, const void* weights, int32_t weights_dtype, void* out, int32_t out_dtype,
                      int32_t accumulate, int32_t num_threads, void* /*workspace*/, void* /*stream*/) {
  const Fault fault = check_combine(rows, state_dtype, row_stride, num_tasks, num_params, weights, weights_dtype, out,
                                    out_dtype);
  if (fault.status) return fail(fault);
  Used used(num_tasks);
  if (!used.ok()) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  for (int64_t t = 0; t < num_tasks; ++t)
    used.add(number(at(weights, t, weights_dtype), weights_dtype), at(rows, t * row_stride, state_dtype));
  return combine_used(used, state_dtype, 0, num_params, out, out_dtype, accumulate != 0, num_threads);
}

int32_t dbmtl_balance_rows(void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks, double* sumsq,
                           uint8_t* broken, int64_t* nonfinite_steps, double* norms, double* weights, int32_t num_outs,
                           void* const* outs, const int32_t* out_dtypes, const int64_t* starts, const int64_t* numels,
                           const uint8_t* active, const void* loss_scale, int32_t loss_scale_dtype, double eps,
                           int32_t scale, double constant, int32_t fresh, int32_t accumulate, int32_t num_threads,
                           void* /*workspace*/, void* /*stream*/) {
  const Fault fault =
      check_balance_rows(rows, state_dtype, row_stride, num_tasks, sumsq, broken, nonfinite_steps, norms, weights,
                         num_outs, outs, out_dtypes, starts, numels, loss_scale, loss_scale_dtype, eps, scale);
  if (fault.status) return fail(fault);
  Used used(num_tasks);
  auto use = try_allocate<uint8_t>(num_tasks);
  if (!used.ok() || !use) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  for (int64_t t = 0; t < num_tasks; ++t) {
    norms[t] = std::sqrt(sumsq[t]);
    const bool before = broken[t] && !fresh, now = !is_finite(sumsq[t]);
    nonfinite_steps[t] += now && !before;
    broken[t] = before || now;
    use[t] = !broken[t] && (active == nullptr || active[t]);
  }
  const double alpha = alpha_of(norms, use.get(), num_tasks, scale, constant);
  const double factor = loss_scale == nullptr ? 1.0 : number(loss_scale, loss_scale_dtype);
  for (int64_t t = 0; t < num_tasks; ++t) {
    weights[t] = weight_of(norms[t], use[t], alpha, eps, num_tasks, scale);
    used.add(carried_of(weights[t], broken[t], loss_scale != nullptr, factor), at(rows, t * row_stride, state_dtype));
    if (!broken[t]) continue;
    sumsq[t] = 0.0;
    for (int32_t i = 0; i < num_outs; ++i)
      std::memset(at(rows, t * row_stride + starts[i], state_dtype), 0, size_t(numels[i] * kElementSize[state_dtype]));
  }
  int32_t status = DBMTL_OK;
  for (int32_t i = 0; i < num_outs && status == DBMTL_OK; ++i)
    status = combine_used(used, state_dtype, starts[i], numels[i], outs[i], out_dtypes[i], accumulate != 0,
                          num_threads);
  return status;
}

int32_t dbmtl_gramian(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks, int64_t num_params,
                      void* gramian, int32_t out_dtype, int32_t num_threads, void* /*workspace*/, void* /*stream*/) {
  const Fault fault = check_gramian(rows, state_dtype, row_stride, num_tasks, num_params, gramian, out_dtype);
  if (fault.status) return fail(fault);

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
      for (const int64_t place : {i * num_tasks + j, j * num_tasks + i}) {
        if (out_dtype == DBMTL_F64)
          static_cast<double*>(gramian)[place] = sum;
        else
          static_cast<float*>(gramian)[place] = float(sum);
      }
    }
  return DBMTL_OK;
}

}  // extern "C"
