// Threads and tiles. A tile is the unit of both work and summation: it depends on sizes alone, never on the
// number of threads, which is what makes the sums reproducible.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dbmtl {

constexpr int64_t kTile = 16384;                   // elements
constexpr int64_t kTilesAtOnce = 4;                // how many a thread takes at a time
constexpr int64_t kSerialBelow = 2 * kTile;        // not worth waking a thread for
constexpr int64_t kStreamFromBytes = 4 << 20;      // an output this large will not be read from cache
constexpr int64_t kManyThreads = 64;               // may be more than there are processors
constexpr int64_t kStripes = 256;                  // partial Gramians, and so the most threads that share one

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t tile_size(int64_t tile, int64_t n) {
  const int64_t left = n - tile * kTile;
  return left < kTile ? left : kTile;
}

// One at least; of many no more than the machine has processors, as OpenMP ends the process if it cannot start one.
inline int clamp_threads(int64_t num_threads, int64_t elements) {
  if (elements < kSerialBelow || num_threads < 1) return 1;
#ifdef _OPENMP
  if (num_threads <= kManyThreads) return int(num_threads);
  return int(std::clamp<int64_t>(omp_get_num_procs(), kManyThreads, num_threads));
#else
  return 1;
#endif
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// `body` in each of so many threads, which share the `omp for` and `omp single` in it. One thread starts no team, which
// takes longer than a small call's arithmetic, unless the caller is one of a team, which would share them.
template <class Body>
inline void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 || omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body();
    return;
  }
#endif
  body();
}

// This thread's contiguous share [begin, end) of `count` items; call inside a parallel region.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t count) {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads();
#else
    const int64_t threads = 1;
#endif
    const int64_t thread = thread_index();
    begin = count * thread / threads;
    end = count * (thread + 1) / threads;
  }
};

}  // namespace dbmtl
