// rows @ rows.T in one pass: a block takes a strip of columns of all rows into shared memory; a thread multiplies four
// rows by four, over some of the columns. Products are summed in fp32 within a strip (fp64 of fp64 rows), then in fp64.
#include <algorithm>

#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 64;
constexpr int kStrip = 64;  // columns
constexpr int kSide = 4;    // rows of a thread's block of pairs
constexpr int kPairs = kSide * kSide;

struct GramianArguments {
  dbmtl_rows rows;
  dbmtl_array gramian;
  int aligned;
  double* slots;
  Counters* counters;
};

// Blocks of pairs on and below the diagonal, counted row by row.
__host__ __device__ inline int num_blocks_of_pairs(int num_tasks) {
  const int side = (num_tasks + kSide - 1) / kSide;
  return side * (side + 1) / 2;
}

__device__ inline void pair_of(int index, int* row, int* column) {
  int r = 0;
  while ((r + 1) * (r + 2) / 2 <= index) ++r;
  *row = r;
  *column = index - r * (r + 1) / 2;
}

// The strip of columns from `begin` on: zeros for rows and columns that are not there.
template <class S, class V>
__device__ inline void load_strip(V (&strip)[kMaxRows][kStrip + 1], const GramianArguments& a, int64_t begin,
                                  int rows) {
  const S* first = static_cast<const S*>(a.rows.data) + begin;
  const int num_tasks = int(a.rows.num_tasks);
  if (a.aligned && begin + kStrip <= a.rows.num_params) {
    constexpr int kPerVector = 16 / sizeof(S), kVectors = kStrip / kPerVector;
    for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kPerVector;
      Pack<S, kPerVector, kPerVector> in;
      load_unit<Hint::kKeep>(in, 0, first + row * a.rows.stride + column, row < num_tasks);
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) strip[row][column + k] = in[k];
    }
  } else {
    for (int i = threadIdx.x; i < rows * kStrip; i += kThreads) {
      const int row = i / kStrip, column = i % kStrip;
      const bool there = row < num_tasks && begin + column < a.rows.num_params;
      Pack<S, 1, 1> in;
      load_unit<Hint::kKeep>(in, 0, first + row * a.rows.stride + column, there);
      strip[row][column] = in[0];
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kGramianBlocks) gramian_kernel(const __grid_constant__ GramianArguments a) {
  using V = Wide<S>;
  __shared__ V strip[kMaxRows][kStrip + 1];
  __shared__ double partial[kThreads];
  const int num_tasks = int(a.rows.num_tasks);
  const int blocks = num_blocks_of_pairs(num_tasks), groups = kThreads / blocks;
  const int mine = threadIdx.x % blocks, group = threadIdx.x / blocks;  // group >= groups: only helps to load
  const int padded = (num_tasks + kSide - 1) / kSide * kSide;
  int top, left;
  pair_of(mine, &top, &left);
  double total[kPairs] = {};
  for (int64_t begin = int64_t(blockIdx.x) * kStrip; begin < a.rows.num_params; begin += int64_t(gridDim.x) * kStrip) {
    __syncthreads();
    load_strip<S>(strip, a, begin, padded);
    __syncthreads();
    if (group >= groups) continue;
    V sum[kPairs] = {};
    for (int column = group; column < kStrip; column += groups) {
      V x[kSide], y[kSide];
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        x[i] = strip[top * kSide + i][column];
        y[i] = strip[left * kSide + i][column];
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) sum[i] = sum[i] + x[i / kSide] * y[i % kSide];
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) total[i] += double(sum[i]);
  }
  const int numbers = blocks * kPairs;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    __syncthreads();
    partial[threadIdx.x] = total[i];
    __syncthreads();
    if (int(threadIdx.x) >= blocks) continue;
    double sum = 0.0;
    for (int g = 0; g < groups; ++g) sum += partial[g * blocks + threadIdx.x];
    a.slots[int64_t(blockIdx.x) * numbers + threadIdx.x * kPairs + i] = sum;
  }
  if (!is_last(&a.counters->finished)) return;
  for (int n = threadIdx.x; n < numbers; n += kThreads) {
    double sum = 0.0;
    for (int b = 0; b < int(gridDim.x); ++b) sum += __ldcg(a.slots + int64_t(b) * numbers + n);
    pair_of(n / kPairs, &top, &left);
    const int r = top * kSide + n % kPairs / kSide, c = left * kSide + n % kSide;
    if (r >= num_tasks || c >= num_tasks) continue;
    for (const int index : {r * num_tasks + c, c * num_tasks + r}) {
      if (a.gramian.dtype == DBMTL_F64)
        static_cast<double*>(a.gramian.data)[index] = sum;
      else
        static_cast<float*>(a.gramian.data)[index] = float(sum);
    }
  }
}

}  // namespace

int64_t gramian_slots(int64_t num_tasks) {
  return int64_t(num_blocks_of_pairs(int(num_tasks < kMaxRows ? num_tasks : kMaxRows))) * kPairs;
}

}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_gramian(const dbmtl_gramian_args* args) {
  DBMTL_TRY(check(*args));
  const dbmtl_rows& rows = args->rows;
  if (rows.num_tasks > kMaxRows) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks: the Gramian takes at most 64");
  DBMTL_TRY(ready(rows.num_tasks, args->where));
  if (rows.num_tasks == 0) return DBMTL_OK;
  GramianArguments a = {rows, args->gramian, 0, slots_of(args->where), counters_of(args->where)};
  if (rows.num_tasks == 1) a.rows.stride = 0;  // any: it is not used
  const int64_t unit = 16 / kElementSize[rows.dtype];
  a.aligned = on_units(unit, rows.data, rows.dtype) && a.rows.stride % unit == 0;
  const int64_t strips = (rows.num_params + kStrip - 1) / kStrip;
  const int blocks = int(std::clamp<int64_t>(strips, 1, int64_t(current_device().multiprocessors) * kGramianBlocks));
  const cudaStream_t stream = static_cast<cudaStream_t>(args->where.stream);
  switch (rows.dtype) {
    case DBMTL_F32: return launch_kernel(gramian_kernel<float>, blocks, kThreads, 0, stream, false, a);
    case DBMTL_F64: return launch_kernel(gramian_kernel<double>, blocks, kThreads, 0, stream, false, a);
    default: return launch_kernel(gramian_kernel<bf16>, blocks, kThreads, 0, stream, false, a);
  }
}
