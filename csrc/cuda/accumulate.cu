// Gathering one row from a list of gradients: pointers, sizes and offsets travel in the kernel's own arguments, so nothing
// is uploaded. As many as fit in 4 KB go by default, in 32 KB where the driver and the device take that.
#include <algorithm>

#include "device.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * kElements * 4;  // elements between two looks at the list

struct Piece {
  const void* grad;
  int64_t offset;  // in the row
  int64_t numel;
  int32_t first_chunk;
  int32_t dtype;
};

struct GatherHead {
  void* row;
  double* sumsq;
  double* slots;
  Counters* counters;
  const void* loss_scale;
  const void* coefficients;  // null, or what replaces the three below, read when the kernel runs
  double decay, gain;
  uint64_t key;
  int32_t loss_scale_dtype;
  int32_t num_pieces, num_chunks;
  int32_t add;  // to what an earlier launch left in sumsq
};

template <int kPieces>
struct GatherArguments {
  GatherHead head;
  Piece pieces[kPieces];
};

constexpr int kSmall = (4096 - int(sizeof(GatherHead))) / int(sizeof(Piece));
constexpr int kLarge = (32764 - int(sizeof(GatherHead))) / int(sizeof(Piece));
static_assert(sizeof(GatherArguments<kSmall>) <= 4096 && sizeof(GatherArguments<kLarge>) <= 32764, "argument space");

// The sum of squares of this thread's part of one chunk.
template <class S, class G, bool kAligned, bool kStochastic, class V>
__device__ double gather(S* row, const G* grad, int64_t offset, int64_t begin, int64_t end, V decay, V gain,
                         uint64_t key) {
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += kThreads * kElements) {
    const Place<kAligned> place(at, threadIdx.x, kThreads);
    V g[kElements], m[kElements];
    load<Hint::kStream>(g, grad, place, grad == nullptr ? 0 : end);
    load<Hint::kKeep>(m, row + offset, place, decay == V(0) ? 0 : end);
    S stored[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      stored[e] = rounded<kStochastic, S>(updated(m[e], g[e], decay, gain, grad != nullptr), key,
                                          offset + place.first + int64_t(e) * place.step);
      const double x = double(widen_lane(stored[e]));
      if (inside(place, end, e)) sum = multiply_add(sum, x, x);
    }
    store<Hint::kKeep>(row + offset, stored, place, end);
  }
  return sum;
}

template <class S, class G, bool kStochastic, class V>
__device__ double gather_piece(S* row, const Piece& piece, int64_t begin, int64_t end, V decay, V gain, uint64_t key) {
  const G* grad = static_cast<const G*>(piece.grad);
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(row + piece.offset) % 16 == 0;
  if (!aligned) return gather<S, G, false, kStochastic>(row, grad, piece.offset, begin, end, decay, gain, key);
  // Whole groups of kElements 128 bits at a time, the last few one by one.
  const int64_t whole = begin + (end - begin) / kElements * kElements;
  double sum = gather<S, G, true, kStochastic>(row, grad, piece.offset, begin, whole, decay, gain, key);
  if (whole < end) sum += gather<S, G, false, kStochastic>(row, grad, piece.offset, whole, end, decay, gain, key);
  return sum;
}

template <class S, bool kStochastic, int kPieces>
__global__ void __launch_bounds__(kThreads, 2) accumulate_kernel(const __grid_constant__ GatherArguments<kPieces> a) {
  using V = Wide<S>;
  __shared__ double scratch[kThreads / kWarp];
  const GatherHead& h = a.head;
  S* row = static_cast<S*>(h.row);
  Coefficients c = {h.decay, h.gain, 0};
  uint64_t key = h.key;
  if (h.coefficients != nullptr) {
    c = coefficients_at(h.coefficients);
    if (kStochastic) key = row_key(c.seed, 0);
  }
  if (h.loss_scale != nullptr) c.gain = unscaled(c.gain, number(h.loss_scale, h.loss_scale_dtype));
  const V decay = V(c.decay), gain = V(c.gain);
  double sum = 0.0;
  for (int chunk = blockIdx.x; chunk < h.num_chunks; chunk += gridDim.x) {
    int low = 0, high = h.num_pieces - 1;  // the last piece that does not begin after this chunk
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (a.pieces[middle].first_chunk <= chunk)
        low = middle;
      else
        high = middle - 1;
    }
    const Piece& piece = a.pieces[low];
    const int64_t begin = int64_t(chunk - piece.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < piece.numel ? begin + kChunk : piece.numel;
    if (std::is_same<S, double>::value || piece.dtype == DBMTL_F64) {
      switch (piece.dtype) {
        case DBMTL_F64: sum += gather_piece<S, double, kStochastic>(row, piece, begin, end, decay, gain, key); break;
        case DBMTL_F32: sum += gather_piece<S, float, kStochastic>(row, piece, begin, end, decay, gain, key); break;
        case DBMTL_BF16: sum += gather_piece<S, bf16, kStochastic>(row, piece, begin, end, decay, gain, key); break;
        default: sum += gather_piece<S, f16, kStochastic>(row, piece, begin, end, decay, gain, key);
      }
    } else if (piece.dtype == DBMTL_F32) {
      sum += gather_piece<S, float, kStochastic>(row, piece, begin, end, decay, gain, key);
    } else if (piece.dtype == DBMTL_BF16) {
      sum += gather_piece<S, bf16, kStochastic>(row, piece, begin, end, decay, gain, key);
    } else {
      sum += gather_piece<S, f16, kStochastic>(row, piece, begin, end, decay, gain, key);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) h.slots[blockIdx.x] = sum;
  if (!is_last(h.counters)) return;
  double total = 0.0;
  for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) total += __ldcg(h.slots + b);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *h.sumsq = h.add ? *h.sumsq + total : total;
}

template <class S, bool kStochastic, int kPieces>
int32_t launch(const GatherHead& head, const Piece* pieces, int blocks, cudaStream_t stream) {
  GatherArguments<kPieces> a;
  a.head = head;
  std::copy(pieces, pieces + head.num_pieces, a.pieces);
  return launch_kernel(accumulate_kernel<S, kStochastic, kPieces>, blocks, kThreads, 0, stream, false, a);
}

template <class S, bool kStochastic>
int32_t launch_pieces(const GatherHead& head, const Piece* pieces, int blocks, cudaStream_t stream) {
  return head.num_pieces <= kSmall ? launch<S, kStochastic, kSmall>(head, pieces, blocks, stream)
                                   : launch<S, kStochastic, kLarge>(head, pieces, blocks, stream);
}

}  // namespace
}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_accumulate(void* row, int32_t state_dtype, int64_t num_segments, const int64_t* segments,
                                    const void* const* grads, const uint8_t* grad_dtypes, double decay, double gain,
                                    const void* loss_scale, int32_t loss_scale_dtype, double* sumsq,
                                    int32_t stochastic, uint64_t seed, const void* coefficients,
                                    int32_t /*num_threads*/, void* workspace, void* stream) {
  const Fault fault = check_accumulate(row, state_dtype, num_segments, segments, grads, grad_dtypes, loss_scale,
                                       loss_scale_dtype, sumsq, stochastic);
  if (fault.status) return fail(fault);
  int32_t status = ready(1, workspace);
  if (status) return status;
  for (int64_t i = 0; i < num_segments; ++i)
    if (segments[2 * i + 1] / kChunk >= INT32_MAX) return fail(DBMTL_INVALID_ARGUMENT, "segments has too large a size");
  const Device device = current_device();
  const int at_once = device.large_arguments ? kLarge : kSmall;
  GatherHead head = {};
  head.row = row;
  head.sumsq = sumsq;
  head.slots = slots_of(workspace);
  head.counters = counters_of(workspace);
  head.loss_scale = loss_scale;
  head.loss_scale_dtype = loss_scale_dtype;
  head.coefficients = coefficients;
  head.decay = decay;
  head.gain = gain;
  head.key = row_key(seed, 0);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  Piece pieces[kLarge];
  int64_t i = 0;
  do {  // once at least: without a segment the sum is still to be set to zero
    head.num_pieces = 0;
    int64_t chunks = 0;
    for (; i < num_segments && head.num_pieces < at_once; ++i) {
      const int64_t numel = segments[2 * i + 1];
      if (numel == 0) continue;
      const int64_t more = (numel + kChunk - 1) / kChunk;
      if (chunks + more > INT32_MAX) break;
      pieces[head.num_pieces++] = {grads[i], segments[2 * i], numel, int32_t(chunks), grad_dtypes[i]};
      chunks += more;
    }
    head.num_chunks = int32_t(chunks);
    const int64_t most = int64_t(device.multiprocessors) * 2;
    const int blocks = int(chunks < 1 ? 1 : chunks < most ? chunks : most);
    if (state_dtype == DBMTL_F64)
      status = launch_pieces<double, false>(head, pieces, blocks, s);
    else if (state_dtype == DBMTL_F32)
      status = launch_pieces<float, false>(head, pieces, blocks, s);
    else
      status = stochastic ? launch_pieces<bf16, true>(head, pieces, blocks, s)
                          : launch_pieces<bf16, false>(head, pieces, blocks, s);
    head.add = 1;
  } while (status == DBMTL_OK && i < num_segments);
  return status;
}
