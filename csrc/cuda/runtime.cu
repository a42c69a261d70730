#include <cstdio>
#include <mutex>

#include "device.cuh"

namespace dbmtl {
namespace {

thread_local const char* last_error = "";
constexpr int64_t kCounterBytes = 256;  // slots begin on a line of their own
constexpr int kBlocksAMultiprocessor = 2;

}  // namespace

int32_t fail(int32_t status, const char* message) {
  last_error = message;
  return status;
}

#ifdef DBMTL_EMULATED
static int32_t available() { return DBMTL_OK; }
Device current_device() { return {emulated_multiprocessors(), 96 * 1024, emulated_large_arguments()}; }
#else

static thread_local char composed[256];

int32_t fail_cuda(cudaError_t error) {
  if (error == cudaSuccess) return DBMTL_OK;
  cudaGetLastError();  // it was this call's, not the next one's
  std::snprintf(composed, sizeof(composed), "CUDA: %s", cudaGetErrorString(error));
  return fail(DBMTL_LAUNCH_FAILED, composed);
}

static int32_t available() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return DBMTL_OK;
  cudaGetLastError();
  std::snprintf(composed, sizeof(composed), "no CUDA device to run on: %s",
                error == cudaSuccess ? "the driver sees none" : cudaGetErrorString(error));
  return fail(DBMTL_UNAVAILABLE, composed);
}

Device current_device() {
  constexpr int kMost = 64;
  static Device devices[kMost];
  static std::once_flag asked[kMost];
  int index = 0;
  cudaGetDevice(&index);
  if (index >= kMost) index = kMost - 1;
  std::call_once(asked[index], [index] {
    Device& d = devices[index];
    int major = 0, driver = 0;
    cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDriverGetVersion(&driver);
    d.large_arguments = major >= 7 && driver >= 12010;
  });
  return devices[index];
}
#endif

int32_t ready(int64_t num_tasks, const void* workspace) {
  if (num_tasks > kMaxTasks) return fail(DBMTL_INVALID_ARGUMENT, "num_tasks: the CUDA kernels take at most 256");
  const int32_t status = available();
  if (status) return status;
  if (workspace == nullptr) return fail(DBMTL_INVALID_ARGUMENT, "workspace is null");
  return DBMTL_OK;
}

Counters* counters_of(void* workspace) { return static_cast<Counters*>(workspace); }
double* slots_of(void* workspace) {
  return reinterpret_cast<double*>(static_cast<char*>(workspace) + kCounterBytes);
}

}  // namespace dbmtl

extern "C" {

int32_t dbmtl_abi_version(void) { return DBMTL_ABI_VERSION; }

int32_t dbmtl_available(void) { return dbmtl::available(); }

const char* dbmtl_last_error(void) { return dbmtl::last_error; }

int64_t dbmtl_workspace_bytes(int64_t num_tasks) {
  using namespace dbmtl;
  if (num_tasks < 1) num_tasks = 1;
  const int64_t gramian = gramian_slots(num_tasks);
  const int64_t a_block = gramian > num_tasks ? gramian : num_tasks;
  return kCounterBytes + int64_t(sizeof(double)) * a_block * kBlocksAMultiprocessor * current_device().multiprocessors;
}

}  // extern "C"
