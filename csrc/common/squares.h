// The sum of squares of a few fp32 numbers, in one of two forms. Doubles: the square of an fp32 number is exact, so that
// one fused multiply-add rounds once. Pairs of floats, for chips whose fp64 has one sixty-fourth of the rate: the numbers
// are scaled by a power of two, after the largest of them, so that no square overflows and those that vanish do not count;
// squares and sums leave their rounding errors in a second float, and a pair is widened once for many numbers.
//
// Bound of the second form: with u = 2^-24, n numbers in a row and then a tree of d levels, the errors of sums and squares
// are together at most (n + d + 1) u times the sum. Adding them, in fp32, rounds at most 2 (n + d) times in a row, each by
// at most u of what they are together: less than 2 (n + d + 1)^2 u^2 in all, 2^-36 for the most that a kernel adds (n = 32,
// d = 5). Squares and errors below 2^-149 are lost, where the scaled sum is at least 2^-44.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/types.h"

namespace dbmtl {

struct FloatPair {
  float high, low;
};

// Without a branch, whichever is larger.
DBMTL_HD inline FloatPair operator+(const FloatPair& a, const FloatPair& b) {
  const float sum = a.high + b.high, part = sum - a.high;
  const float error = (a.high - (sum - part)) + (b.high - part);
  return {sum, (a.low + b.low) + error};
}

// 2^-e where the largest magnitude is at least 2^e, as far as an fp32 number can be that: what is scaled is below 4.
DBMTL_HD inline float scale_of(float largest) {
  const uint32_t exponent = bit_cast<uint32_t>(largest) >> 23;
  return bit_cast<float>((exponent >= 253 ? 1u : 254u - exponent) << 23);
}

DBMTL_HD inline FloatPair squared(float x, float scale) {
  const float y = x * scale, square = y * y;
  return {square, fmaf(y, y, -square)};
}

// Neither infinite nor NaN is left to the errors: inf - inf is NaN.
DBMTL_HD inline double widened(const FloatPair& sum, float scale) {
  const uint64_t exponent = 1023 + 2 * (127 - int64_t(bit_cast<uint32_t>(scale) >> 23));
  const float low = fabsf(sum.high) <= 3.4028234663852886e38f ? sum.low : 0.0f;
  return (double(sum.high) + double(low)) * bit_cast<double>(exponent << 52);
}

}  // namespace dbmtl
