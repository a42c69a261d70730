// rows @ rows.T in one pass: a block takes a strip of columns of all rows into shared memory; a thread multiplies four rows
// by four, over some of the columns. Up to 128 products are summed in fp32 (fp64 of fp64 rows), then in fp64.
#include <algorithm>

#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 64;
constexpr int kSide = 4;            // rows of a thread's block of pairs
constexpr int kPairs = kSide * kSide;
constexpr int kStripBytes = 32768;  // of all rows
constexpr int kAtOnce = kStripBytes / 16 / kThreads;  // vectors of a strip that a thread loads
constexpr int kInARow = 16;         // vectors whose products are summed in fp32

struct GramianArguments {
  dbmtl_rows rows;
  dbmtl_array gramian;
  int aligned;
  int columns, shift;  // of a strip: 2^shift
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

template <class S>
using Vector = Pack<S, 16 / sizeof(S), 16 / sizeof(S)>;

// Some columns of all rows, in shared memory. Zeros for rows and columns that are not there.
template <class S>
struct Strip {
  static constexpr int kPerVector = 16 / sizeof(S);
  const GramianArguments& a;
  int4* shared;

  __device__ int pitch() const { return a.columns / kPerVector + 1; }  // in vectors: eight rows lie in different banks
  __device__ Vector<S>& at(int row, int vector) const {
    return reinterpret_cast<Vector<S>*>(shared)[row * pitch() + vector];
  }
  __device__ const S* address(int row, int64_t column) const {
    return static_cast<const S*>(a.rows.data) + row * a.rows.stride + column;
  }
  // Of the vectors that this thread loads, the u-th: a row of `padded`, and its first column in the strip.
  __device__ int row_of(int u) const { return (int(threadIdx.x) + u * kThreads) * kPerVector >> a.shift; }
  __device__ int column_of(int u) const { return (int(threadIdx.x) + u * kThreads) * kPerVector & (a.columns - 1); }

  // All of a thread's loads are in flight together.
  __device__ void load(int64_t begin, int padded) const {
    Vector<S> loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = row_of(u), column = column_of(u);
      load_unit<Hint::kKeep>(loaded[u], 0, address(row, begin + column), whole(row, begin + column));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (row_of(u) < padded) at(row_of(u), column_of(u) / kPerVector) = loaded[u];
    if (a.aligned && begin + a.columns <= a.rows.num_params) return;
    // One by one, what does not lie on 16 bytes or is less than a vector.
#pragma unroll 1
    for (int u = 0; u < kAtOnce; ++u) {
      const int row = row_of(u);
      const int64_t column = begin + column_of(u);
      if (row >= int(a.rows.num_tasks) || whole(row, column)) continue;
#pragma unroll 1
      for (int k = 0; k < kPerVector && column + k < a.rows.num_params; ++k) {
        Pack<S, 1, 1> one;
        load_unit<Hint::kKeep>(one, 0, address(row, column + k), true);
        memcpy(reinterpret_cast<S*>(&at(row, column_of(u) / kPerVector)) + k, &one, sizeof(S));
      }
    }
  }

  __device__ bool whole(int row, int64_t column) const {
    return a.aligned && row < int(a.rows.num_tasks) && column + kPerVector <= a.rows.num_params;
  }
};

template <class S>
__global__ void __launch_bounds__(kThreads, kGramianBlocks) gramian_kernel(const __grid_constant__ GramianArguments a) {
  using V = Wide<S>;
  __shared__ int4 shared[kStripBytes / 16 + kMaxRows];
  __shared__ double partial[kThreads];
  const Strip<S> strip = {a, shared};
  const int num_tasks = int(a.rows.num_tasks), side = (num_tasks + kSide - 1) / kSide;
  const int blocks = num_blocks_of_pairs(num_tasks), groups = kThreads / blocks;
  const int mine = threadIdx.x % blocks, group = threadIdx.x / blocks;  // group >= groups: only helps to load
  const int vectors = a.columns / Strip<S>::kPerVector;
  int top, left;
  pair_of(mine, &top, &left);
  double total[kPairs] = {};
  const auto multiply = [&](V (&sum)[kPairs], int v) {
    Vector<S> x[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) x[i] = strip.at(top + i * side, v);
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const Vector<S> y = strip.at(left + j * side, v);
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int e = 0; e < Strip<S>::kPerVector; ++e)
          sum[i * kSide + j] = sum[i * kSide + j] + V(x[i][e]) * V(y[e]);
    }
  };
#pragma unroll 1
  for (int64_t begin = int64_t(blockIdx.x) * a.columns; begin < a.rows.num_params;
       begin += int64_t(gridDim.x) * a.columns) {
    __syncthreads();
    strip.load(begin, side * kSide);
    __syncthreads();
    if (group >= groups) continue;
    if constexpr (std::is_same<S, double>::value) {
#pragma unroll 1
      for (int v = group; v < vectors; v += groups) multiply(total, v);
    } else {
#pragma unroll 1
      for (int v0 = group; v0 < vectors; v0 += groups * kInARow) {
        V sum[kPairs] = {};
        const int end = v0 + groups * kInARow < vectors ? v0 + groups * kInARow : vectors;
#pragma unroll 1
        for (int v = v0; v < end; v += groups) multiply(sum, v);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) total[i] += double(sum[i]);
      }
    }
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
    const int r = top + n % kPairs / kSide * side, c = left + n % kSide * side;
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
  DBMTL_TRY(check(args));
  const dbmtl_rows& rows = args->rows;
  if (rows.num_tasks > kMaxRows) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks: the Gramian takes at most 64");
  DBMTL_TRY(ready(rows.num_tasks, args->where));
  if (rows.num_tasks == 0) return DBMTL_OK;
  GramianArguments a = {rows, args->gramian, 0, 0, 0, slots_of(args->where), counters_of(args->where)};
  if (rows.num_tasks == 1) a.rows.stride = 0;  // any: it is not used
  const int64_t unit = 16 / kElementSize[rows.dtype];
  a.aligned = on_units(unit, rows.data, rows.dtype) && a.rows.stride % unit == 0;
  // As many columns as fit, but a strip for every block.
  const int64_t padded = (rows.num_tasks + kSide - 1) / kSide * kSide;
  const int64_t most = int64_t(current_device().multiprocessors) * kGramianBlocks;
  a.shift = 6;
  while (padded * kElementSize[rows.dtype] << (a.shift + 1) <= kStripBytes && most << (a.shift + 1) <= rows.num_params)
    ++a.shift;
  a.columns = 1 << a.shift;
  const int64_t strips = (rows.num_params + a.columns - 1) / a.columns;
  const int blocks = int(std::clamp<int64_t>(strips, 1, most));
  const cudaStream_t stream = static_cast<cudaStream_t>(args->where.stream);
  switch (rows.dtype) {
    case DBMTL_F32: return launch_kernel(gramian_kernel<float>, blocks, kThreads, 0, stream, false, a);
    case DBMTL_F64: return launch_kernel(gramian_kernel<double>, blocks, kThreads, 0, stream, false, a);
    default: return launch_kernel(gramian_kernel<bf16>, blocks, kThreads, 0, stream, false, a);
  }
}
