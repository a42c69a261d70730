#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#ifdef DBMTL_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dbmtl {
namespace {

std::atomic<const KernelTable*> chosen{nullptr};

// Whether the machine has all that setup.py compiles a table for.
bool runs_here(const char* isa) {
#ifdef DBMTL_X86
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // not every compiler's builtin knows its name
  if (std::strcmp(isa, "avx512") == 0)
    return f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx2") == 0) return f16c && __builtin_cpu_supports("avx2");
#endif
  return std::strcmp(isa, "baseline") == 0;
}

const KernelTable* find(const char* isa) {
  if (!runs_here(isa)) return nullptr;
#ifdef DBMTL_X86
  if (std::strcmp(isa, "avx512") == 0) return avx512_kernels();
  if (std::strcmp(isa, "avx2") == 0) return avx2_kernels();
#endif
  return baseline_kernels();
}

const KernelTable* best() {
  for (const char* isa : {"avx512", "avx2"})
    if (const KernelTable* table = find(isa)) return table;
  return baseline_kernels();
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = best();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace dbmtl

extern "C" {

int32_t dbmtl_abi_version(void) { return DBMTL_ABI_VERSION; }

int32_t dbmtl_available(void) { return DBMTL_OK; }

int64_t dbmtl_workspace_bytes(int64_t /*num_tasks*/) { return 0; }

const char* dbmtl_isa(void) { return dbmtl::kernels().isa; }

int32_t dbmtl_set_isa(const char* name) {
  const dbmtl::KernelTable* table = name == nullptr ? dbmtl::best() : dbmtl::find(name);
  if (table == nullptr) return dbmtl::fail(DBMTL_INVALID_ARGUMENT, "name: no such instruction set on this machine");
  dbmtl::chosen.store(table, std::memory_order_release);
  return DBMTL_OK;
}

const char* dbmtl_last_error(void) { return dbmtl::last_error; }

void dbmtl_advise_huge_pages(void* buffer, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + uintptr_t(num_bytes)) / kPage * kPage;
  if (buffer != nullptr && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer;
  (void)num_bytes;
#endif
}

}  // extern "C"
