"""Sums of squares in fp64; where fp64 is slow, of eight as a pair of fp32 numbers, which is widened once."""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def halves(x, ADJACENT: tl.constexpr):
    """Two tensors of half as many elements: of neighbours, or of what lies half of ``x`` apart.

    Which of both a thread holds itself, so that nothing moves between threads, depends on how it loaded them.
    """
    HALF: tl.constexpr = x.shape[0] // 2
    if ADJACENT:
        return tl.split(tl.reshape(x, [HALF, 2]))
    else:
        return tl.split(tl.trans(tl.reshape(x, [2, HALF])))


@triton.jit
def two_sum(a, b):
    """``a + b`` rounded, and the rounding error, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def add_pairs(high, low, more_high, more_low):
    """The sum of two pairs; only the low parts are rounded."""
    total, error = two_sum(high, more_high)
    return total, error + (low + more_low)


@triton.jit
def square_pair(x, y):
    """``x * x + y * y`` as a pair. Each product is one exactly."""
    high, low = x * x, y * y
    return add_pairs(high, tl.fma(x, x, -high), low, tl.fma(y, y, -low))


@triton.jit
def largest(a, b, c, d):
    """The largest magnitude of four."""
    return tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))


@triton.jit
def add_squares(total, x, ADJACENT: tl.constexpr, FAST_FP64: tl.constexpr):
    """``total`` (BLOCK / 8, fp64) and the squares of ``x`` (BLOCK), eight to each.

    ``ADJACENT`` (1, 2, 4 or 8) of the eight lie side by side. In fp64 (``FAST_FP64``, or of fp64 numbers) the square of
    an fp32 number is exact, so ``fma`` rounds only the sum. Else eight numbers are scaled by a power of two that brings
    the largest below 4, and to 1 at least if it is a normal number; their squares are summed as a pair of fp32 numbers,
    and that is widened. The pair is within 2**-43 of the exact sum S, and inf or NaN where that is: with u = 2**-24 the
    low parts are rounded by 3 u**2 S in the four pairs of squares and by 5, 7 and 9 u**2 S where these are added up.
    What underflows meanwhile is less than 2**-120 of the largest square.
    """
    a, b = halves(x, ADJACENT >= 2)
    aa, ab = halves(a, ADJACENT >= 4)
    ba, bb = halves(b, ADJACENT >= 4)
    x0, x1 = halves(aa, ADJACENT >= 8)
    x2, x3 = halves(ab, ADJACENT >= 8)
    x4, x5 = halves(ba, ADJACENT >= 8)
    x6, x7 = halves(bb, ADJACENT >= 8)
    if FAST_FP64 or x.dtype == tl.float64:
        for part in tl.static_range(8):
            one = (x0, x1, x2, x3, x4, x5, x6, x7)[part].to(tl.float64)
            total = tl.fma(one, one, total)
        return total
    else:
        most = tl.maximum(largest(x0, x1, x2, x3), largest(x4, x5, x6, x7))
        # Of inf as of the largest finite number; 2**-126 is the least normal scale.
        exponent = tl.minimum(most.to(tl.int32, bitcast=True) >> 23, 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        high, low = square_pair(x0 * scale, x1 * scale)
        more_high, more_low = square_pair(x2 * scale, x3 * scale)
        high, low = add_pairs(high, low, more_high, more_low)
        more_high, more_low = square_pair(x4 * scale, x5 * scale)
        high, low = add_pairs(high, low, more_high, more_low)
        more_high, more_low = square_pair(x6 * scale, x7 * scale)
        high, low = add_pairs(high, low, more_high, more_low)
        back = ((769 + 2 * exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)  # 2**(2 * (exponent - 127))
        # An error of infinite parts is NaN.
        found = high.to(tl.float64) + tl.where(most < INF, low, 0.0).to(tl.float64)
        return tl.fma(found, back, total)
