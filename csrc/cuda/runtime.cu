#include <algorithm>

#include "device.cuh"

namespace dbmtl {

constexpr int64_t kCounterBytes = 256;  // slots begin on a line of their own

int32_t fail_cuda(cudaError_t error) {
  if (error == cudaSuccess) return DBMTL_OK;
  cudaGetLastError();  // it was this call's, not the next one's
  return fail(DBMTL_LAUNCH_FAILED, "CUDA: ", cudaGetErrorString(error));
}

std::atomic<bool> refusals[kMostDevices];
int32_t refused(const Device& device) {
  return refusals[device.index].exchange(true)
             ? DBMTL_OK
             : fail(DBMTL_NOTED, "the driver refuses cooperative launches here: the dense op takes two launches");
}

#ifdef DBMTL_EMULATED
static int32_t available() { return DBMTL_OK; }
Device current_device() {
  return {0, emulated_multiprocessors(), emulated_shared_bytes() - kOwnShared, emulated_large_arguments()};
}
#else

__global__ void probe() {}

static int current_index() {
  int index = 0;
  return cudaGetDevice(&index) == cudaSuccess && index < kMostDevices ? index : 0;
}

// Whether there is code for the current device.
static int32_t available() {
  static thread_local bool found[kMostDevices];  // a device does not go away; a missing one may come
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count < 1) {
    cudaGetLastError();
    return fail(DBMTL_UNAVAILABLE, "no CUDA device to run on: ",
                error == cudaSuccess ? "the driver sees none" : cudaGetErrorString(error));
  }
  const int index = current_index();
  if (found[index]) return DBMTL_OK;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(DBMTL_UNAVAILABLE, "the library has no code for this device: ", cudaGetErrorString(error));
  }
  found[index] = true;
  return DBMTL_OK;
}

Device current_device() {
  static thread_local Device known[kMostDevices];
  const int index = current_index();
  if (known[index].multiprocessors > 0) return known[index];
  Device d = {index, 0, 0, false};
  int major = 0, driver = 0;
  const bool ok =
      cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDriverGetVersion(&driver) == cudaSuccess;
  if (!ok) return {index, 0, 0, false};
  d.shared_bytes -= kOwnShared;
  d.large_arguments = major >= 7 && driver >= 12010;
  return known[index] = d;
}
#endif

int32_t ready(int64_t num_tasks, const dbmtl_where& where) {
  if (num_tasks > kMaxTasks) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks: the CUDA kernels take at most 256");
  DBMTL_TRY(available());
  if (where.workspace == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "workspace is null");
  if (current_device().multiprocessors < 1) return fail(DBMTL_UNAVAILABLE, "the device does not say what it is");
  return DBMTL_OK;
}

Counters* counters_of(const dbmtl_where& where) { return static_cast<Counters*>(where.workspace); }
double* slots_of(const dbmtl_where& where) {
  return reinterpret_cast<double*>(static_cast<char*>(where.workspace) + kCounterBytes);
}

}  // namespace dbmtl

extern "C" {

int32_t dbmtl_abi_version(void) { return DBMTL_ABI_VERSION; }

int32_t dbmtl_available(void) { return dbmtl::available(); }

const char* dbmtl_last_error(void) { return dbmtl::last_error; }

int64_t dbmtl_workspace_bytes(int64_t num_tasks) {
  using namespace dbmtl;
  num_tasks = std::clamp<int64_t>(num_tasks, 1, kMaxTasks);  // no call has more
  const int64_t dense = num_tasks * (kSlots * current_device().multiprocessors + 1);  // a sum besides
  const int64_t a_multiprocessor =
      std::max<int64_t>(gramian_slots(num_tasks) * kGramianBlocks, kGatherBlocks * kSlots);
  return kCounterBytes + int64_t(sizeof(double)) * std::max(dense, a_multiprocessor * current_device().multiprocessors);
}

}  // extern "C"
