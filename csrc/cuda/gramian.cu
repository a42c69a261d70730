// rows @ rows.T in one pass: a block takes a strip of columns of all rows into shared memory; a thread multiplies four
// rows by four, over some of the columns. Products are summed in fp32 within a strip (fp64 of fp64 rows), then in fp64.
#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 64;
constexpr int kStrip = 64;  // columns
constexpr int kSide = 4;    // rows of a thread's block of pairs
constexpr int kPairs = kSide * kSide;

struct GramianArguments {
  const void* rows;
  int64_t row_stride, num_params;
  int num_tasks, aligned;
  void* gramian;
  int32_t out_dtype;
  double* slots;
  Counters* counters;
};

// Blocks of pairs on and below the diagonal, counted row by row.
__host__ __device__ inline int num_blocks_of_pairs(int num_tasks) {
  const int side = (num_tasks + kSide - 1) / kSide;
  return side * (side + 1) / 2;
}

__device__ inline void place_of(int index, int* row, int* column) {
  int r = 0;
  while ((r + 1) * (r + 2) / 2 <= index) ++r;
  *row = r;
  *column = index - r * (r + 1) / 2;
}

// The strip of columns from `begin` on: zeros for rows and columns that are not there.
template <class S, class V>
__device__ inline void load_strip(V (&strip)[kMaxRows][kStrip + 1], const GramianArguments& a, int64_t begin,
                                  int rows) {
  const S* first = static_cast<const S*>(a.rows) + begin;
  if (a.aligned && begin + kStrip <= a.num_params) {
    constexpr int kPerVector = 16 / sizeof(S), kVectors = kStrip / kPerVector;
    for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kPerVector;
      Vector<S> in = {};
      if (row < a.num_tasks) in = load_vector<Hint::kKeep>(first + row * a.row_stride + column);
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) strip[row][column + k] = V(widen_lane(in.v[k]));
    }
  } else {
    for (int i = threadIdx.x; i < rows * kStrip; i += kThreads) {
      const int row = i / kStrip, column = i % kStrip;
      const bool there = row < a.num_tasks && begin + column < a.num_params;
      strip[row][column] = there ? V(widen_lane(load_one(first + row * a.row_stride + column))) : V(0);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) gramian_kernel(const __grid_constant__ GramianArguments a) {
  using V = Wide<S>;
  __shared__ V strip[kMaxRows][kStrip + 1];
  __shared__ double partial[kThreads];
  const int blocks = num_blocks_of_pairs(a.num_tasks), groups = kThreads / blocks;
  const int mine = threadIdx.x % blocks, group = threadIdx.x / blocks;  // group >= groups: only helps to load
  const int padded = (a.num_tasks + kSide - 1) / kSide * kSide;
  int top, left;
  place_of(mine, &top, &left);
  double total[kPairs] = {};
  for (int64_t begin = int64_t(blockIdx.x) * kStrip; begin < a.num_params; begin += int64_t(gridDim.x) * kStrip) {
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
      for (int i = 0; i < kPairs; ++i) sum[i] = multiply_add(sum[i], x[i / kSide], y[i % kSide]);
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
  if (!is_last(a.counters)) return;
  for (int n = threadIdx.x; n < numbers; n += kThreads) {
    double sum = 0.0;
    for (int b = 0; b < int(gridDim.x); ++b) sum += __ldcg(a.slots + int64_t(b) * numbers + n);
    place_of(n / kPairs, &top, &left);
    const int r = top * kSide + n % kPairs / kSide, c = left * kSide + n % kSide;
    if (r >= a.num_tasks || c >= a.num_tasks) continue;
    for (const int place : {r * a.num_tasks + c, c * a.num_tasks + r}) {
      if (a.out_dtype == DBMTL_F64)
        static_cast<double*>(a.gramian)[place] = sum;
      else
        static_cast<float*>(a.gramian)[place] = float(sum);
    }
  }
}

}  // namespace

int64_t gramian_slots(int64_t num_tasks) {
  return int64_t(num_blocks_of_pairs(int(num_tasks < kMaxRows ? num_tasks : kMaxRows))) * kPairs;
}

}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_gramian(const void* rows, int32_t state_dtype, int64_t row_stride, int64_t num_tasks,
                                 int64_t num_params, void* gramian, int32_t out_dtype, int32_t /*num_threads*/,
                                 void* workspace, void* stream) {
  const Fault fault = check_gramian(rows, state_dtype, row_stride, num_tasks, num_params, gramian, out_dtype);
  if (fault.status) return fail(fault);
  if (num_tasks > kMaxRows) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks: the Gramian takes at most 64");
  const int32_t status = ready(num_tasks, workspace);
  if (status || num_tasks == 0) return status;
  GramianArguments a = {};
  a.rows = rows;
  a.row_stride = num_tasks > 1 ? row_stride : 0;
  a.num_params = num_params;
  a.num_tasks = int(num_tasks);
  a.aligned = on_16_bytes(rows) && a.row_stride * kElementSize[state_dtype] % 16 == 0;
  a.gramian = gramian;
  a.out_dtype = out_dtype;
  a.slots = slots_of(workspace);
  a.counters = counters_of(workspace);
  const int64_t strips = (num_params + kStrip - 1) / kStrip, most = int64_t(current_device().multiprocessors) * 2;
  const int blocks = int(strips < 1 ? 1 : strips < most ? strips : most);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (state_dtype) {
    case DBMTL_F32: return launch_kernel(gramian_kernel<float>, blocks, kThreads, 0, s, false, a);
    case DBMTL_F64: return launch_kernel(gramian_kernel<double>, blocks, kThreads, 0, s, false, a);
    default: return launch_kernel(gramian_kernel<bf16>, blocks, kThreads, 0, s, false, a);
  }
}
