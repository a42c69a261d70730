"""Between storage and arithmetic dtypes: to nearest, or by the stochastic rounding of `dbmtl_kernels.rounding`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(z):
    """The finaliser of SplitMix64; z is a uint64 scalar."""
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def row_key(seed, row):
    """The key of a row; ``seed`` is an int64 that stands for a uint64."""
    return mix64(mix64(seed.to(tl.int64).to(tl.uint64, bitcast=True)) + row)


@triton.jit
def random_bits(key, column, lane):
    """Random uint32 < 2**16 of the columns ``column + lane``; ``column`` is int64, the sum may cross 2**32."""
    low = (column & 0xFFFFFFFF).to(tl.uint32)
    high = (column >> 32).to(tl.uint32)
    x = low + lane.to(tl.uint32)
    word = (key >> 32).to(tl.uint32) + high * 0x9E3779B1
    word = tl.where(x < low, word + 0x9E3779B1, word)
    x = x ^ (key & 0xFFFFFFFF).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ word
    return ((x ^ (x >> 15)) * 0x846CA68B) >> 16


@triton.jit
def widen(x, wide: tl.constexpr):
    """``x`` in the arithmetic dtype. bfloat16 goes through its bits: Triton's interpreter gets some casts wrong."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(wide)


@triton.jit
def bfloat16_of(bits, x):
    """The upper half of an fp32 number's rounded ``bits``; NaN stays NaN."""
    upper = tl.where(x == x, bits, x.to(tl.uint32, bitcast=True) | 0x400000) >> 16
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x`` rounded to nearest, ties to even."""
    if dtype == tl.bfloat16:
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        return bfloat16_of(bits + 0x7FFF + ((bits >> 16) & 1), single)
    else:
        return x.to(dtype)


@triton.jit
def to_state(x, dtype: tl.constexpr, key, column, lane, STOCHASTIC: tl.constexpr):
    """``x`` (fp32, or fp64 for fp64) as it will be stored."""
    if STOCHASTIC:
        return bfloat16_of(x.to(tl.uint32, bitcast=True) + random_bits(key, column, lane), x)
    else:
        return narrow(x, dtype)
