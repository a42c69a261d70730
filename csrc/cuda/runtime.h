// The device, the workspace, launching, and how a failing call says what was wrong.
#pragma once
#ifdef DBMTL_EMULATED
#include "emulation.h"  // tests/cuda: the kernels as threads of a CPU
#else
#include <cuda_runtime.h>

#define DBMTL_SPIN() ((void)0)
#define DBMTL_ACCESS(pointer, bytes, written) ((void)0)
#define DBMTL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

#include <atomic>
#include <cstdint>

#include "common/arguments.h"

namespace dbmtl {

struct Counters;

constexpr int kMostDevices = 64;
constexpr int kOwnShared = 64;  // bytes at most that the dense kernel declares for itself

// The workspace is as large as these allow, whatever the sizes of a call.
constexpr int kTickets = 4;          // of a block, at most (deal.cuh)
constexpr int kSlots = 1 + kTickets;
constexpr int kGatherBlocks = 3;     // on a multiprocessor
constexpr int kGramianBlocks = 2;

struct Device {
  int index;
  int multiprocessors;   // 0 if the driver would not say
  int shared_bytes;      // that a block may ask for beside its kernel's own
  bool large_arguments;  // 32 KB of kernel arguments, not 4 KB
};

// What a kernel was told once for each device; every kernel has one of its own.
struct Prepared {
  std::atomic<bool> done[kMostDevices];
};

// Of the current device; each thread asks each once.
Device current_device();

// Whether there is a device, a workspace, and room for so many tasks.
int32_t ready(int64_t num_tasks, const dbmtl_where& where);

Counters* counters_of(const dbmtl_where& where);
double* slots_of(const dbmtl_where& where);

// Numbers that a block of the Gramian leaves in the slots.
int64_t gramian_slots(int64_t num_tasks);

// Whether units of so many elements can be loaded from there with one access each.
inline bool on_units(int64_t unit, const void* pointer, int64_t dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(unit * kElementSize[dtype]) == 0;
}

int32_t fail_cuda(cudaError_t error);  // DBMTL_OK if there was none

// A cooperative launch is refused on some devices, under MPS, in a green context. From the first refusal on a device takes
// two launches.
constexpr int32_t kRefused = -2;  // of launch_kernel alone; not a status
inline bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}
extern std::atomic<bool> refusals[kMostDevices];
int32_t refused(const Device& device);  // DBMTL_NOTED, once

#ifndef DBMTL_EMULATED
// Every kernel takes one struct by value.
template <class A>
cudaError_t start(void (*kernel)(A), int blocks, int threads, size_t shared, cudaStream_t stream, bool cooperative,
                  A arguments) {
  void* pointers[] = {&arguments};
  const void* function = reinterpret_cast<const void*>(kernel);
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  return cooperative ? cudaLaunchCooperativeKernel(function, grid, block, pointers, shared, stream)
                     : cudaLaunchKernel(function, grid, block, pointers, shared, stream);
}

// Let a cooperative kernel take all the shared memory there is, and see that a block of it fits on a multiprocessor. Once:
// the limit belongs to the process, and another thread may be launching.
template <class A>
int32_t prepare(void (*kernel)(A), int threads, const Device& device, Prepared* prepared) {
  if (prepared->done[device.index].load(std::memory_order_acquire)) return DBMTL_OK;
  const int shared = device.shared_bytes;
  int count = 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared);
  if (error != cudaSuccess) return fail_cuda(error);
  if (count < 1) return fail(DBMTL_LAUNCH_FAILED, "no block of the dense kernel fits on this device");
  prepared->done[device.index].store(true, std::memory_order_release);
  return DBMTL_OK;
}

#endif

template <class A>
int32_t launch_kernel(void (*kernel)(A), int blocks, int threads, size_t shared, cudaStream_t stream,
                      bool cooperative, const A& arguments) {
  const cudaError_t error = start(kernel, blocks, threads, shared, stream, cooperative, arguments);
  const int32_t status = fail_cuda(error);
  return cooperative && is_refusal(error) ? kRefused : status;
}

}  // namespace dbmtl
