// Which instruction set runs, and how a failing call says what was wrong.
#pragma once
#include "common/arguments.h"
#include "kernels.h"

namespace dbmtl {

const KernelTable& kernels();

// Remembers `message` for dbmtl_last_error() and returns `status`.
int32_t fail(int32_t status, const char* message);

inline int32_t fail(const Fault& fault) { return fail(fault.status, fault.message); }

}  // namespace dbmtl
