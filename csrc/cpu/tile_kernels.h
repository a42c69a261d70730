// The tile kernels, written once over the 16 lanes of simd.h and compiled for each instruction set.
// fp32 arithmetic for every state dtype but f64; products are summed in f64, 16 lanes wide, then in a fixed tree.
// The square of an fp32 number is exact in f64, so neither contraction nor lane width can change a bit.
#pragma once
#include <type_traits>

#include "common/ema.h"
#include "kernels.h"
#include "simd.h"

namespace dbmtl {
namespace {

template <class S>
using Arithmetic = std::conditional_t<std::is_same<S, double>::value, F64, F32>;

inline double tree_sum(const F64& x) {
  double s[kLanes];
  store(s, x);
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


template <class S, class G>
double ema_sumsq(void* state_, const void* grad_, int64_t n, double decay, double gain) {
  using V = Arithmetic<S>;
  S* state = static_cast<S*>(state_);
  const G* grad = static_cast<const G*>(grad_);
  V d, w;
  broadcast(d, decay);
  broadcast(w, gain);
  F64 sum;
  broadcast(sum, 0.0);
  const auto finish = [&](S* m, V x) {
    store(m, x);
    if (std::is_same<S, bf16>::value) load(x, m);  // the norm is that of what was stored
    const F64 wide = widen(x);
    sum = sum + wide * wide;
  };
  if (state == nullptr) {  // only the sum is wanted
    for (int64_t i = 0; grad != nullptr && i < n; i += kLanes) {
      G tail[kLanes] = {};
      if (n - i < kLanes) std::memcpy(tail, grad + i, sizeof(G) * (n - i));
      V y;
      load(y, n - i < kLanes ? tail : grad + i);
      const F64 wide = widen(w * y);
      sum = sum + wide * wide;
    }
  } else if (grad == nullptr && decay == 0.0) {
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
        acc[u] = acc[u] + w * x;
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
      acc = acc + w * x;
    }
    store(tail_out, acc);
    std::memcpy(out + i, tail_out, sizeof(O) * rest);
  }
  if (streaming) stream_fence();
}

// One block of pairs over whole groups, each pair with its own 16 sums. Part by part, as the baseline has no registers
// for 16 lanes of two rows.
template <int kRows, int kCols, class S>
void gram_block(const S* const* a, const S* const* b, int64_t n, double* out, int64_t stride) {
  F64 acc[kRows][kCols];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) broadcast(acc[r][c], 0.0);
  const auto group = [&](const S* const* a, const S* const* b, int64_t first) {
    for (int part = 0; part < F32::kParts; ++part) {
      const int64_t i = first + part * F32::kWidth;
      Double x[2], y[kCols][2];
      for (int c = 0; c < kCols; ++c) load_wide(y[c], b[c] + i);
      for (int r = 0; r < kRows; ++r) {
        load_wide(x, a[r] + i);
        for (int c = 0; c < kCols; ++c)
          for (int half = 0; half < 2; ++half) acc[r][c].part[2 * part + half] += x[half] * y[c][half];
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) group(a, b, i);
  if (i < n) {
    S tails[kRows + kCols][kLanes] = {};
    const S* rows[kRows + kCols];
    for (int r = 0; r < kRows + kCols; ++r) {
      std::memcpy(tails[r], (r < kRows ? a[r] : b[r - kRows]) + i, sizeof(S) * (n - i));
      rows[r] = tails[r];
    }
    group(rows, rows + kRows, 0);
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

const KernelTable* table_of(const char* isa) {
  static const KernelTable table = [isa] {
    KernelTable t = {};
    t.isa = isa;
    fill_row<float>(t, 0);
    fill_row<double>(t, 1);
    fill_row<bf16>(t, 2);
    return t;
  }();
  return &table;
}

}  // namespace
}  // namespace dbmtl
