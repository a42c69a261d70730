// The tile kernels, written once over the 16-lane types of whichever simd_*.h was included before.
// fp32 arithmetic for every state dtype but f64; products are summed in f64, 16 lanes wide, then in a fixed tree.
// The square of an fp32 number is exact in f64, so neither contraction nor lane width can change a bit.
#pragma once
#include <type_traits>

#include "common/ema.h"
#include "kernels.h"

namespace dbmtl {
namespace {

template <class S>
using Arithmetic = std::conditional_t<std::is_same<S, double>::value, F64, F32>;

inline double tree_sum(const F64& x) {
  double s[kLanes];
  spill(s, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// Run `body` on whole groups of 16 in place, and on a zero-padded copy of the last few.
template <class A, class B, class Body>
inline void each_group(A* a, B* b, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(a + i, b ? b + i : nullptr);
  const int64_t rest = n - i;
  if (rest == 0) return;
  A tail_a[kLanes] = {};
  std::remove_const_t<B> tail_b[kLanes] = {};
  std::memcpy(tail_a, a + i, sizeof(A) * rest);
  if (b) std::memcpy(tail_b, b + i, sizeof(B) * rest);
  body(tail_a, b ? tail_b : nullptr);
  std::memcpy(a + i, tail_a, sizeof(A) * rest);
}

// Stores the group and makes x what was stored: the norm is that of the state.
struct ToNearest {
  template <class S, class V>
  void operator()(S* m, V& x) {
    store(m, x);
    if (std::is_same<S, bf16>::value) load(x, m);
  }
};

// Vectors of the compiler's, as wide as this instruction set's: one code for all of them.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef float Float __attribute__((vector_size(kVectorBytes)));

// Rounds the groups of a row in order.
class Stochastic {
 public:
  explicit Stochastic(const Rounding& r) : first_(uint32_t(r.column)), key_low_(U32{} + uint32_t(r.key)) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t column = uint64_t(r.column) + uint64_t(i);
      column_[i / kWidth][i % kWidth] = uint32_t(column);
      salt_[i / kWidth][i % kWidth] = salt(r.key, column);
    }
  }

  void operator()(bf16* m, F32& x) {
    static_assert(sizeof(F32) == 4 * kLanes, "16 floats and nothing else");
    U32 bits[kParts];
    Float values[kParts];
    std::memcpy(bits, &x, sizeof(x));
    std::memcpy(values, &x, sizeof(x));
    for (int p = 0; p < kParts; ++p) {
      const U32 rounded = round_stochastic(bits[p], hash16(column_[p] ^ key_low_, salt_[p]));
      bits[p] = values[p] != values[p] ? bits[p] | 0x400000u : rounded;
      column_[p] += kLanes;
    }
    first_ += kLanes;
    if (first_ + kLanes < 2 * kLanes)  // some lanes may have gone past 2**32
      for (int p = 0; p < kParts; ++p) salt_[p] += U32(column_[p] < kLanes) & kSaltStep;
    std::memcpy(&x, bits, sizeof(x));
    store_top(m, x);
  }

 private:
  static constexpr int kWidth = kVectorBytes / 4, kParts = kLanes / kWidth;
  uint32_t first_;  // low word of the first lane's column
  U32 key_low_, column_[kParts], salt_[kParts];
};

template <class S, class G, class Store>
double update(void* state_, const void* grad_, int64_t n, double decay, double gain, Store rounded_store) {
  using V = Arithmetic<S>;
  S* state = static_cast<S*>(state_);
  const G* grad = static_cast<const G*>(grad_);
  V d, w;
  broadcast(d, decay);
  broadcast(w, gain);
  F64 sum;
  broadcast(sum, 0.0);
  const auto finish = [&](S* m, V x) {
    rounded_store(m, x);
    const F64 wide = widen(x);
    sum = multiply_add(sum, wide, wide);
  };
  if (grad == nullptr && decay == 0.0) {
    std::memset(state, 0, size_t(n) * sizeof(S));
  } else if (grad == nullptr) {
    each_group(state, grad, n, [&](S* m, const G*) {
      V x;
      load(x, m);
      finish(m, updated<true, false>(x, x, d, w));
    });
  } else if (decay == 0.0) {  // nothing is left of the state: do not read it
    each_group(state, grad, n, [&](S* m, const G* g) {
      V y;
      load(y, g);
      finish(m, updated<false, true>(y, y, d, w));
    });
  } else {
    each_group(state, grad, n, [&](S* m, const G* g) {
      V x, y;
      load(x, m);
      load(y, g);
      finish(m, updated<true, true>(x, y, d, w));
    });
  }
  return tree_sum(sum);
}

template <class S, class G>
double ema_sumsq(void* state, const void* grad, int64_t n, double decay, double gain, const Rounding* rounding) {
  if constexpr (std::is_same<S, bf16>::value)
    if (rounding) return update<S, G>(state, grad, n, decay, gain, Stochastic(*rounding));
  return update<S, G>(state, grad, n, decay, gain, ToNearest());
}

template <class S, class O>
void combine(const void* const* rows_, const double* weights, int64_t num_rows, void* out_, int64_t n,
             bool accumulate, bool streaming) {
  using V = Arithmetic<S>;
  const S* const* rows = reinterpret_cast<const S* const*>(rows_);
  O* out = static_cast<O*>(out_);
  constexpr int kUnroll = 4;
  constexpr int64_t kStep = kUnroll * kLanes;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    V acc[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      if (accumulate)
        load(acc[u], out + i + u * kLanes);
      else
        broadcast(acc[u], 0.0);
    }
    for (int64_t t = 0; t < num_rows; ++t) {
      V w;
      broadcast(w, weights[t]);
      for (int u = 0; u < kUnroll; ++u) {
        V x;
        load(x, rows[t] + i + u * kLanes);
        acc[u] = multiply_add(acc[u], w, x);
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      if (streaming)
        stream(out + i + u * kLanes, acc[u]);
      else
        store(out + i + u * kLanes, acc[u]);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t rest = n - i < kLanes ? n - i : kLanes;
    O tail_out[kLanes] = {};
    V acc, x, w;
    broadcast(acc, 0.0);
    if (accumulate) {
      std::memcpy(tail_out, out + i, sizeof(O) * rest);
      load(acc, tail_out);
    }
    for (int64_t t = 0; t < num_rows; ++t) {
      S tail[kLanes] = {};
      std::memcpy(tail, rows[t] + i, sizeof(S) * rest);
      load(x, tail);
      broadcast(w, weights[t]);
      acc = multiply_add(acc, w, x);
    }
    store(tail_out, acc);
    std::memcpy(out + i, tail_out, sizeof(O) * rest);
  }
  if (streaming) stream_fence();
}

// One block of kGramBlock x kGramBlock pairs over whole groups, each pair with its own 16 sums.
template <int kRows, int kCols, class S>
void gram_block(const S* const* a, const S* const* b, int64_t n, double* out, int64_t stride) {
  F64 acc[kRows][kCols];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) broadcast(acc[r][c], 0.0);
  const auto group = [&](auto&& at) {
    F64 y[kCols];
    for (int c = 0; c < kCols; ++c) load(y[c], at(b[c]));
    for (int r = 0; r < kRows; ++r) {
      F64 x;
      load(x, at(a[r]));
      for (int c = 0; c < kCols; ++c) acc[r][c] = multiply_add(acc[r][c], x, y[c]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) group([&](const S* p) { return p + i; });
  if (i < n) {
    S tails[kRows + kCols][kLanes];
    int next = 0;
    group([&](const S* p) {
      S* tail = tails[next++];
      std::memset(tail, 0, sizeof(tails[0]));
      std::memcpy(tail, p + i, sizeof(S) * (n - i));
      return tail;
    });
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) out[r * stride + c] += tree_sum(acc[r][c]);
}

template <class S>
void gramian(const void* const* rows_, int64_t k, int64_t n, double* out) {
  const S* const* rows = reinterpret_cast<const S* const*>(rows_);
  constexpr int B = kGramBlock;
  for (int64_t r = 0; r < k; r += B) {
    int64_t c = 0;
    if (r + B <= k)
      for (; c + B <= k && c <= r; c += B) gram_block<B, B>(rows + r, rows + c, n, out + r * k + c, k);
    for (int64_t i = r; i < k && i < r + B; ++i)
      for (int64_t j = c; j <= i; ++j) gram_block<1, 1>(rows + i, rows + j, n, out + i * k + j, k);
  }
}

template <class S>
void fill_row(KernelTable& t, int s) {
  t.ema_sumsq[s][0] = ema_sumsq<S, float>;
  t.ema_sumsq[s][1] = ema_sumsq<S, double>;
  t.ema_sumsq[s][2] = ema_sumsq<S, bf16>;
  t.ema_sumsq[s][3] = ema_sumsq<S, f16>;
  t.combine[s][0] = combine<S, float>;
  t.combine[s][1] = combine<S, double>;
  t.combine[s][2] = combine<S, bf16>;
  t.combine[s][3] = combine<S, f16>;
  t.gramian[s] = gramian<S>;
}

KernelTable make_table(const char* isa) {
  KernelTable t = {};
  t.isa = isa;
  fill_row<float>(t, 0);
  fill_row<double>(t, 1);
  fill_row<bf16>(t, 2);
  return t;
}

}  // namespace
}  // namespace dbmtl
