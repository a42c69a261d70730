// Stochastic rounding to bf16, bit for bit as python/dbmtl_kernels/rounding.py specifies it. Integers only, on one
// lane (U = uint32_t) or on a vector of them. Functions are static, for the reason given in types.h.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace dbmtl {

// How to round a piece of a row stochastically: the key of the row, and where in the row the piece begins.
struct Rounding {
  uint64_t key;
  int64_t column;
};

// The finaliser of SplitMix64.
DBMTL_HD static constexpr uint64_t mix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

DBMTL_HD static constexpr uint64_t row_key(uint64_t seed, int64_t row) { return mix64(mix64(seed) + uint64_t(row)); }

// What sets rows, and columns beyond 2**32, apart: one number for each run of 2**32 columns.
constexpr uint32_t kSaltStep = 0x9E3779B1u;
DBMTL_HD static constexpr uint32_t salt(uint64_t key, uint64_t column) {
  return uint32_t(key >> 32) + uint32_t(column >> 32) * kSaltStep;
}

// 16 random bits. `mixed`: the low words of column and key, xor.
template <class U>
DBMTL_HD static constexpr U hash16(U mixed, U salt) {
  const U x = ((mixed ^ (mixed >> 16)) * 0x7FEB352Du) ^ salt;
  return ((x ^ (x >> 15)) * 0x846CA68Bu) >> 16;
}
DBMTL_HD static constexpr uint32_t random16(uint64_t key, int64_t column) {
  return hash16<uint32_t>(uint32_t(column) ^ uint32_t(key), salt(key, uint64_t(column)));
}

// The bits of an fp32 number, not NaN, to those of one of its two bf16 neighbours, still as fp32.
template <class U>
DBMTL_HD static constexpr U round_stochastic(U bits, U random) {
  return (bits + random) & 0xFFFF0000u;
}

// One number in full; NaN stays NaN.
DBMTL_HD static constexpr uint16_t to_bf16_stochastic(uint32_t bits, uint64_t key, int64_t column) {
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return uint16_t((nan ? bits | 0x400000u : round_stochastic(bits, random16(key, column))) >> 16);
}

// The specification's own numbers; the first is the well-known first output of SplitMix64 seeded with 0.
static_assert(mix64(0) == 0xE220A8397B1DCDAFu && row_key(7, 3) == 0xF53A29A2695577C0u, "row_key");
static_assert(random16(row_key(7, 3), 5) == 0x1054 && random16(row_key(7, 3), 12884901893) == 0xF2F3, "random16");
static_assert(to_bf16_stochastic(0x3F804000u, row_key(7, 3), 5) == 0x3F80 &&
                  to_bf16_stochastic(0x3F804000u, row_key(7, 3), 12884901893) == 0x3F81 &&
                  to_bf16_stochastic(0x7FFFFFFFu, row_key(7, 3), 5) == 0x7FFF,
              "to_bf16_stochastic");

}  // namespace dbmtl
