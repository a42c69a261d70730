// Just enough of CUDA to run the kernels of csrc/cuda on a CPU: a block is a thread of the system, its CUDA threads are
// fibers that take turns at every barrier and shuffle. Blocks run at the same time, as a cooperative launch's do.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "common/arguments.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define DBMTL_DYNAMIC_SHARED(name) char* name = emulation::block->shared()
#define DBMTL_SPIN() std::this_thread::yield()
#define DBMTL_ACCESS(pointer, bytes, written) emulation::block->access(pointer, bytes, written)
#define threadIdx (emulation::block->thread_index())
#define blockIdx (emulation::block->block_index)
#define gridDim (emulation::block->grid)
#define blockDim (emulation::block->dim)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMisalignedAddress = 716,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801
};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};

namespace emulation {

struct Index {
  unsigned x;
};

// Rows, gradients and results that the kernels moved, since it was last asked for (emulation.cpp). Sectors are the 32 bytes
// in which memory is moved: those that the accesses of a warp touch, each access for itself.
struct Traffic {
  std::atomic<int64_t> read{0}, written{0}, vectors{0}, sectors{0}, misaligned{0}, launches{0};
  std::atomic<int> blocks{0}, threads{0};      // of the last launch
  std::atomic<int> slow_block{-1};             // takes its time
  std::atomic<int64_t> draws[16];              // of a block, modulo 16
};
inline Traffic traffic;

// Whether this launch sums squares in pairs of floats, as it would on some devices.
inline std::atomic<bool> float_pairs{false};

class Block {
 public:
  Index block_index, grid, dim;

  Block(unsigned index, unsigned blocks, unsigned threads, size_t shared_bytes)
      : block_index{index}, grid{blocks}, dim{threads}, fibers_(threads), warps_((threads + 31) / 32),
        shared_(shared_bytes + 16) {}

  ~Block() {
    traffic.read += moved_[0];
    traffic.written += moved_[1];
    traffic.vectors += vectors_;
    count_sectors();
    traffic.sectors += sectors_;
    traffic.misaligned += misaligned_;
  }

  void access(const void* p, int bytes, bool written) {
    moved_[written] += bytes;
    vectors_ += bytes == 16;
    misaligned_ += reinterpret_cast<uintptr_t>(p) % unsigned(bytes) != 0;
    // The n-th accesses of its threads since a barrier are one access of a warp.
    Warp& warp = warps_[current_ / 32];
    const unsigned nth = warp.accesses[lane()]++;
    if (warp.touched.size() <= nth) warp.touched.resize(nth + 1);
    for (uintptr_t at = reinterpret_cast<uintptr_t>(p) / 32; at <= (reinterpret_cast<uintptr_t>(p) + bytes - 1) / 32; ++at)
      if (std::vector<uintptr_t>& t = warp.touched[nth]; std::find(t.begin(), t.end(), at) == t.end()) t.push_back(at);
  }

  // Asks for a tile.
  void draws() {
    if (int(block_index.x) == traffic.slow_block) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ++traffic.draws[block_index.x % 16];
  }

  Index thread_index() const { return {current_}; }
  char* shared() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(shared_.data());
    return shared_.data() + (16 - at % 16) % 16;
  }

  void run(std::function<void()> kernel) {
    kernel_ = std::move(kernel);
    constexpr size_t kStack = 192 * 1024;
    for (unsigned t = 0; t < dim.x; ++t) {
      Fiber& f = fibers_[t];
      f.stack.reset(new char[kStack]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &scheduler_;
      makecontext(&f.context, &Block::enter, 0);
    }
    for (alive_ = dim.x; alive_ > 0;)
      for (current_ = 0; current_ < dim.x; ++current_)
        if (!fibers_[current_].done) swapcontext(&scheduler_, &fibers_[current_].context);
  }

  void synchronize() {
    const unsigned generation = generation_;
    ++arrived_;
    while (generation == generation_ && arrived_ < alive_) wait();
    if (generation == generation_) {
      count_sectors();
      arrived_ = 0;
      ++generation_;
    }
  }

  int synchronize_or(int predicate) {
    any_ |= predicate != 0;
    synchronize();
    const bool result = any_;
    synchronize();
    any_ = false;
    return result;
  }

  unsigned lane() const { return current_ % 32; }

  // What another lane of the warp has; a double holds any of the numbers that are exchanged.
  double from_lane(double value, unsigned other) {
    Warp& warp = warps_[current_ / 32];
    warp.values[lane()] = value;
    warp_barrier(warp);
    const double result = warp.values[other];
    warp_barrier(warp);
    return result;
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  struct Warp {
    double values[32];
    unsigned arrived = 0, generation = 0;
    unsigned accesses[32] = {};
    std::vector<std::vector<uintptr_t>> touched;  // sectors, by access
  };

  static void enter();
  void count_sectors() {
    for (Warp& warp : warps_) {
      for (std::vector<uintptr_t>& touched : warp.touched) {
        sectors_ += int64_t(touched.size());
        touched.clear();
      }
      std::fill(warp.accesses, warp.accesses + 32, 0u);
    }
  }
  void wait() { swapcontext(&fibers_[current_].context, &scheduler_); }
  void warp_barrier(Warp& warp) {
    const unsigned generation = warp.generation;
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.generation;
    }
    while (generation == warp.generation) wait();
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> shared_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  unsigned current_ = 0, alive_ = 0, arrived_ = 0, generation_ = 0;
  bool any_ = false;
  int64_t moved_[2] = {0, 0}, vectors_ = 0, sectors_ = 0, misaligned_ = 0;
};

inline thread_local Block* block = nullptr;

inline void Block::enter() {
  block->kernel_();
  block->fibers_[block->current_].done = true;
  --block->alive_;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->synchronize(); }
inline int __syncthreads_or(int predicate) { return emulation::block->synchronize_or(predicate); }
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const unsigned lane = emulation::block->lane();
  return T(emulation::block->from_lane(value, lane + offset < 32 ? lane + offset : lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return T(emulation::block->from_lane(value, emulation::block->lane() ^ unsigned(mask)));
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
  for (int mask = 16; mask > 0; mask /= 2) value = std::max(value, __shfl_xor_sync(lanes, value, mask));
  return value;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
inline unsigned atomicInc(unsigned* p, unsigned last) {
  emulation::block->draws();
  unsigned before = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &before, before >= last ? 0 : before + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return before;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
void __stwb(T* p, T x) {
  *p = x;
}

namespace dbmtl {

inline int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}
inline int emulated_multiprocessors() { return from_environment("DBMTL_EMULATED_MULTIPROCESSORS", 3); }
inline bool emulated_large_arguments() { return from_environment("DBMTL_EMULATED_LARGE_ARGUMENTS", 1) != 0; }

inline int emulated_shared_bytes() { return from_environment("DBMTL_EMULATED_SHARED_BYTES", 96 * 1024); }

template <class A, class Device, class Prepared>
int32_t prepare(void (*)(A), int, const Device&, Prepared*) {
  return 0;
}

// A cooperative launch can be refused.
template <class A>
cudaError_t start(void (*kernel)(A), int blocks, int threads, size_t shared, cudaStream_t, bool cooperative, A arguments) {
  if (const int error = from_environment("DBMTL_EMULATED_REFUSAL", 0); cooperative && error != 0) return cudaError_t(error);
  emulation::float_pairs = from_environment("DBMTL_EMULATED_FLOAT_PAIRS", 0) != 0;
  emulation::traffic.blocks = blocks;
  emulation::traffic.threads = threads;
  emulation::traffic.slow_block = from_environment("DBMTL_EMULATED_SLOW_BLOCK", -1);
  ++emulation::traffic.launches;
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; ++b)
    running.emplace_back([&, b] {
      emulation::Block own(unsigned(b), unsigned(blocks), unsigned(threads), shared);
      emulation::block = &own;
      own.run([&] { kernel(arguments); });
    });
  for (std::thread& t : running) t.join();
  return emulation::traffic.misaligned.exchange(0) ? cudaErrorMisalignedAddress : cudaSuccess;
}

}  // namespace dbmtl

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMisalignedAddress ? "misaligned address" : "refused";
}
