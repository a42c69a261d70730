// The task-gradient buffer: gather one row from a list of gradients, combine rows, multiply them pairwise.
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "common/ema.h"
#include "common/weights.h"

using namespace dbmtl;

namespace {

// Rows that count, and their weights; and where each thread has the addresses of their tiles.
struct Used {
  int threads;
  Scratch<double> weights;
  Scratch<const void*> rows, tiles;
  int64_t count = 0;
  Used(const dbmtl_rows& r, int64_t num_threads)
      : threads(clamp_threads(num_threads, r.num_tasks * r.num_params)), weights(r.num_tasks), rows(r.num_tasks),
        tiles(r.num_tasks * threads) {}
  bool ok() const { return weights && rows && tiles; }
  void add(double weight, const void* row) {
    if (weight == 0.0) return;
    rows[count] = row;
    weights[count++] = weight;
  }
};

void combine_used(const Used& used, int64_t dtype, const dbmtl_out& out, bool accumulate) {
  const int64_t num_tiles = tiles(out.numel);
  const auto combine = kernels().combine[dtype][out.dtype];
  const bool streaming = !accumulate && streams(out.data, out.dtype, out.numel);
  const int threads = clamp_threads(used.threads, used.count * out.numel);
  parallel(threads, [&] {
    const void** mine = &used.tiles[used.count * thread_index()];
    // Forwards: a backward pass ends with a model's first parameters, which were gathered last.
#pragma omp for schedule(dynamic, kTilesAtOnce)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * kTile;
      for (int64_t t = 0; t < used.count; ++t)
        mine[t] = static_cast<const char*>(used.rows[t]) + (out.start + begin) * kElementSize[dtype];
      combine(mine, &used.weights[0], used.count, at(out.data, begin, out.dtype), tile_size(tile, out.numel),
              accumulate, streaming);
    }
  });
}

}  // namespace

extern "C" {

int32_t dbmtl_accumulate(const dbmtl_accumulate_args* args) {
  DBMTL_TRY(check(args));
  const dbmtl_array &row = args->row, &scale = args->loss_scale;
  const double decay = args->coefficients[0];
  double gain = args->coefficients[1];
  if (scale.data != nullptr) gain = unscaled(gain, number(scale.data, scale.dtype));
  const int64_t num_segments = args->num_segments;
  const Scratch<int64_t> first_tile(num_segments + 1);
  if (!first_tile) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  int64_t elements = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    elements += args->segments[2 * i + 1];
    first_tile[i + 1] = first_tile[i] + tiles(args->segments[2 * i + 1]);
  }
  const int64_t num_tiles = first_tile[num_segments];
  const Scratch<double> slots(num_tiles);
  if (!slots) return fail(DBMTL_OUT_OF_MEMORY, "scratch");

  const auto& by_grad = kernels().ema_sumsq[row.dtype];
  parallel(clamp_threads(args->where.num_threads, elements), [&] {
    const Share share(num_tiles);
    int64_t segment = std::upper_bound(&first_tile[0], &first_tile[num_segments] + 1, share.begin) -
                      &first_tile[0] - 1;
    for (int64_t tile = share.begin; tile < share.end; ++tile) {
      while (tile >= first_tile[segment + 1]) ++segment;
      const int64_t offset = args->segments[2 * segment], numel = args->segments[2 * segment + 1];
      const int64_t index = tile - first_tile[segment], begin = index * kTile;
      const int32_t dtype = args->grad_dtypes[segment];
      const char* grad = gain == 0.0 ? nullptr : static_cast<const char*>(args->grads[segment]);
      slots[tile] = by_grad[dtype](row.data ? at(row.data, offset + begin, row.dtype) : nullptr,
                                   grad ? grad + begin * kElementSize[dtype] : nullptr, tile_size(index, numel), decay,
                                   gain);
    }
  });
  double sum = 0.0;
  for (int64_t tile = 0; tile < num_tiles; ++tile) sum += slots[tile];
  *args->sumsq = sum;
  return DBMTL_OK;
}

int32_t dbmtl_combine(const dbmtl_combine_args* args) {
  DBMTL_TRY(check(args));
  const dbmtl_rows& rows = args->rows;
  const dbmtl_array& weights = args->weights;
  Used used(rows, args->where.num_threads);
  if (!used.ok()) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  if (rows.num_params == 0) return DBMTL_OK;
  for (int64_t t = 0; t < rows.num_tasks; ++t)
    used.add(number(at(weights.data, t, weights.dtype), weights.dtype), at(rows.data, t * rows.stride, rows.dtype));
  combine_used(used, rows.dtype, {args->out.data, args->out.dtype, 0, rows.num_params}, args->accumulate != 0);
  return DBMTL_OK;
}

int32_t dbmtl_balance_rows(const dbmtl_balance_rows_args* args) {
  DBMTL_TRY(check(args));
  const dbmtl_rows& rows = args->rows;
  const dbmtl_array& scale = args->loss_scale;
  const bool empty = rows.num_params == 0;  // rows may be null then
  const int64_t stride = empty ? 0 : rows.stride, num_outs = empty ? 0 : args->num_outs;
  Used used(rows, args->where.num_threads);
  const Scratch<uint8_t> use(rows.num_tasks);
  if (!used.ok() || !use) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  for (int64_t t = 0; t < rows.num_tasks; ++t) {
    args->norms[t] = std::sqrt(args->sumsq[t]);
    const bool before = args->nonfinite[t] && !args->fresh, now = !is_finite(args->sumsq[t]);
    args->nonfinite_steps[t] += now && !before;
    args->nonfinite[t] = before || now;
    use[t] = !args->nonfinite[t] && is_active(args->active, t);
  }
  const double alpha = alpha_of(args->norms, &use[0], rows.num_tasks, args->weighting);
  const double factor = scale.data == nullptr ? 1.0 : number(scale.data, scale.dtype);
  for (int64_t t = 0; t < rows.num_tasks; ++t) {
    args->weights[t] = weight_of(args->norms[t], use[t], alpha, rows.num_tasks, args->weighting);
    used.add(carried_of(args->weights[t], args->nonfinite[t], is_active(args->active, t), factor,
                        args->propagate_above),
             at(rows.data, t * stride, rows.dtype));
    if (!args->nonfinite[t]) continue;
    args->sumsq[t] = 0.0;
    for (int64_t i = 0; i < num_outs; ++i)
      std::memset(at(rows.data, t * stride + args->outs[i].start, rows.dtype), 0,
                  size_t(args->outs[i].numel * kElementSize[rows.dtype]));
  }
  for (int64_t i = 0; i < num_outs; ++i)
    combine_used(used, rows.dtype, args->outs[i], args->accumulate != 0);
  return DBMTL_OK;
}

int32_t dbmtl_gramian(const dbmtl_gramian_args* args) {
  DBMTL_TRY(check(args));
  const dbmtl_rows& rows = args->rows;
  if (rows.num_tasks == 0) return DBMTL_OK;
  // Each stripe of tiles has K x K slots of its own; stripes are as many for one thread as for a hundred.
  const int64_t num_tasks = rows.num_tasks, num_tiles = tiles(rows.num_params), pairs = num_tasks * num_tasks;
  const int64_t stripes = num_tiles < kStripes ? num_tiles : kStripes;
  const int threads = clamp_threads(args->where.num_threads, num_tasks * rows.num_params);
  const Scratch<double> slots(stripes * pairs);
  const Scratch<const void*> pointers(num_tasks * threads);
  if (!slots || !pointers) return fail(DBMTL_OUT_OF_MEMORY, "scratch");
  const auto tile_gramian = kernels().gramian[rows.dtype];
  parallel(threads, [&] {
    const Share share(stripes);
    const void** mine = &pointers[num_tasks * thread_index()];
    for (int64_t stripe = share.begin; stripe < share.end; ++stripe) {
      const int64_t end = num_tiles * (stripe + 1) / stripes;
      for (int64_t tile = num_tiles * stripe / stripes; tile < end; ++tile) {
        for (int64_t t = 0; t < num_tasks; ++t) mine[t] = at(rows.data, t * rows.stride + tile * kTile, rows.dtype);
        tile_gramian(mine, num_tasks, tile_size(tile, rows.num_params), &slots[stripe * pairs]);
      }
    }
  });
  for (int64_t i = 0; i < num_tasks; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int64_t stripe = 0; stripe < stripes; ++stripe) sum += slots[stripe * pairs + i * num_tasks + j];
      for (const int64_t index : {i * num_tasks + j, j * num_tasks + i})
        put(args->gramian.data, index, args->gramian.dtype == DBMTL_F64, sum);
    }
  return DBMTL_OK;
}

}  // extern "C"
