// Gathering one row from a list of gradients: pointers, sizes and offsets travel in the kernel's own arguments, so
// nothing is uploaded. As many as fit in 4 KB go by default, in 32 KB where the driver and the device take that.
#include <algorithm>

#include "deal.cuh"

namespace dbmtl {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * 32;  // elements between two looks at the list

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
  dbmtl_array loss_scale;
  const double* coefficients;  // decay, gain
  Deal deal;             // of chunks
  int32_t num_pieces;
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

template <int kUnit>
constexpr int kCount = kUnit > 1 ? 4 * kUnit : 8;  // of a thread's elements: 64 bytes of the wider of gradients and row

// The sum of squares of this thread's part of [begin, end): kFull, of whole strides of the block.
template <class S, class G, int kUnit, bool kFull, class V>
__device__ double gather(S* row, const G* grad, int64_t offset, int64_t begin, int64_t end, V decay, V gain) {
  double sum = 0.0;
#pragma unroll 1
  for (; begin < end; begin += kThreads * kCount<kUnit>) {
    const Slice<kUnit, kThreads, kFull> slice(begin, end);
    Pack<G, kUnit, kCount<kUnit>> g;
    Pack<S, kUnit, kCount<kUnit>> m;
    load<Hint::kStream>(g, grad, slice, grad != nullptr);
    load<Hint::kKeep>(m, row + offset, slice, row != nullptr && decay != V(0));
    S stored[kCount<kUnit>];
#pragma unroll
    for (int e = 0; e < kCount<kUnit>; ++e)
      narrow_lane(stored + e, updated(V(m[e]), V(g[e]), decay, gain, grad != nullptr));
    sum += thread_squares(stored, slice);
    if (row != nullptr) store<Hint::kKeep>(row + offset, stored, slice);
  }
  return sum;
}

template <class S, class G, class V>
__device__ double gather_piece(S* row, const Piece& piece, int64_t begin, int64_t end, V decay, V gain) {
  constexpr int kUnit = kUnitOf<S, G>;
  const G* grad = gain == V(0) ? nullptr : static_cast<const G*>(piece.grad);
  const bool aligned_row = reinterpret_cast<uintptr_t>(row + piece.offset) % alignof(Unit<S, kUnit>) == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % alignof(Unit<G, kUnit>) == 0 && (row == nullptr || aligned_row);
  // Whole strides of the block, whole units, and the last few one by one.
  constexpr int kStride = kThreads * kCount<kUnit>;
  const int64_t full = aligned ? begin + (end - begin) / kStride * kStride : begin;
  const int64_t whole = aligned ? full + (end - full) / kUnit * kUnit : begin;
  double sum = gather<S, G, kUnit, true>(row, grad, piece.offset, begin, full, decay, gain);
  if (full < whole) sum += gather<S, G, kUnit, false>(row, grad, piece.offset, full, whole, decay, gain);
  if (whole < end) sum += gather<S, G, 1, false>(row, grad, piece.offset, whole, end, decay, gain);
  return sum;
}

template <class S, int kPieces>
__global__ void __launch_bounds__(kThreads, kGatherBlocks)
    accumulate_kernel(const __grid_constant__ GatherArguments<kPieces> a) {
  using V = Wide<S>;
  __shared__ double scratch[kThreads / kWarp];
  const GatherHead& h = a.head;
  S* row = static_cast<S*>(h.row);
  double scaled = h.coefficients[1];
  if (h.loss_scale.data != nullptr) scaled = unscaled(scaled, number(h.loss_scale.data, h.loss_scale.dtype));
  const V decay = row == nullptr ? V(0) : V(h.coefficients[0]), gain = V(scaled);
  double sum = 0.0;
  const auto gather_chunk = [&](int64_t chunk) {
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
        case DBMTL_F64: sum += gather_piece<S, double>(row, piece, begin, end, decay, gain); break;
        case DBMTL_F32: sum += gather_piece<S, float>(row, piece, begin, end, decay, gain); break;
        case DBMTL_BF16: sum += gather_piece<S, bf16>(row, piece, begin, end, decay, gain); break;
        default: sum += gather_piece<S, f16>(row, piece, begin, end, decay, gain);
      }
    } else if (piece.dtype == DBMTL_F32) {
      sum += gather_piece<S, float>(row, piece, begin, end, decay, gain);
    } else if (piece.dtype == DBMTL_BF16) {
      sum += gather_piece<S, bf16>(row, piece, begin, end, decay, gain);
    } else {
      sum += gather_piece<S, f16>(row, piece, begin, end, decay, gain);
    }
  };
  deal(h.deal, &h.counters->drawn[0], gather_chunk, [&](unsigned slot) {
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) h.slots[slot] = sum;
    sum = 0.0;
  });
  if (!is_last(&h.counters->finished)) return;
  double total = 0.0;
  for (int s = threadIdx.x; s < slots_used(h.deal); s += kThreads) total += __ldcg(h.slots + s);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *h.sumsq = h.add ? *h.sumsq + total : total;
}

template <class S, int kPieces>
int32_t launch(const GatherHead& head, const Piece* pieces, int blocks, cudaStream_t stream) {
  GatherArguments<kPieces> a;
  a.head = head;
  std::copy(pieces, pieces + head.num_pieces, a.pieces);
  return launch_kernel(accumulate_kernel<S, kPieces>, blocks, kThreads, 0, stream, false, a);
}

template <class S>
int32_t launch_pieces(const GatherHead& head, const Piece* pieces, int blocks, cudaStream_t stream) {
  return head.num_pieces <= kSmall ? launch<S, kSmall>(head, pieces, blocks, stream)
                                   : launch<S, kLarge>(head, pieces, blocks, stream);
}

}  // namespace
}  // namespace dbmtl

using namespace dbmtl;

extern "C" int32_t dbmtl_accumulate(const dbmtl_accumulate_args* args) {
  DBMTL_TRY(check(args));
  DBMTL_TRY(ready(1, args->where));
  const int64_t* segments = args->segments;
  for (int64_t i = 0; i < args->num_segments; ++i)
    if (segments[2 * i + 1] / kChunk >= INT32_MAX) return fail(DBMTL_INVALID_ARGUMENT, "segments: too large a size");
  const Device device = current_device();
  const int at_once = device.large_arguments ? kLarge : kSmall;
  GatherHead head = {args->row.data, args->sumsq, slots_of(args->where), counters_of(args->where),
                     args->loss_scale, args->coefficients, {}, 0, 0};
  const cudaStream_t stream = static_cast<cudaStream_t>(args->where.stream);
  Piece pieces[kLarge];
  int64_t i = 0;
  do {  // once at least: without a segment the sum is still to be set to zero
    head.num_pieces = 0;
    int64_t chunks = 0;
    for (; i < args->num_segments && head.num_pieces < at_once; ++i) {
      const int64_t numel = segments[2 * i + 1];
      if (numel == 0) continue;
      const int64_t more = (numel + kChunk - 1) / kChunk;
      if (chunks + more > INT32_MAX) break;
      pieces[head.num_pieces++] = {args->grads[i], segments[2 * i], numel, int32_t(chunks), args->grad_dtypes[i]};
      chunks += more;
    }
    const int blocks = int(std::clamp<int64_t>(chunks, 1, int64_t(device.multiprocessors) * kGatherBlocks));
    head.deal = deal_out(chunks, blocks);
    switch (args->row.dtype) {
      case DBMTL_F64: DBMTL_TRY(launch_pieces<double>(head, pieces, blocks, stream)); break;
      case DBMTL_F32: DBMTL_TRY(launch_pieces<float>(head, pieces, blocks, stream)); break;
      default: DBMTL_TRY(launch_pieces<bf16>(head, pieces, blocks, stream));
    }
    head.add = 1;
  } while (i < args->num_segments);
  return DBMTL_OK;
}
