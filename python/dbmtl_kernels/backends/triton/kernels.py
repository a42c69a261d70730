"""The Triton kernels' common parts: one row's update, weights, combining, and the meetings of programs.

Rules: fp32 arithmetic whatever the storage (fp64 for fp64), sums in fp64, no float atomics, 64-bit offsets. Doubles
come as the int64 of their bits, so that no value is rounded on its way in and none is part of a specialisation.
Sizes and strides come in units of VEC elements, so that the compiler knows what divides them and loads 128 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, to_state, widen

# No weight is larger: times the zeros of a task without gradient it still gives zero.
LARGEST = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))


@triton.jit
def double(bits):
    """The float64 whose bits an int64 argument holds."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def offset(index, size: tl.constexpr):
    """``index * size`` in 64 bits."""
    return tl.full([], size, tl.int64) * index


@triton.jit
def not_finite(x):
    """Where ``x``, which is not negative, is infinite or NaN."""
    return tl.where(x < INF, 0, 1) != 0


@triton.jit
def update(m, g, decay, gain, has_grad):
    """``decay * m + gain * g``; a missing term is left out, not added as zero, as the CPU kernels do."""
    decayed, gained = decay * m, gain * g
    return tl.where(decay == 0, gained, tl.where(has_grad, decayed + gained, decayed))


@triton.jit
def store_row(pointers, x, mask, key, column, lane, STOCHASTIC: tl.constexpr):
    """Store new state; returns it squared in fp64, as it was stored."""
    stored = to_state(x, pointers.dtype.element_ty, key, column, lane, STOCHASTIC)
    tl.store(pointers, stored, mask=mask)
    wide = widen(stored, tl.float64)
    return tl.where(mask, wide * wide, 0.0)


@triton.jit
def weights_of(sumsq, active, eps, constant, K: tl.constexpr, K_PAD: tl.constexpr, SCALE: tl.constexpr):
    """(K_PAD,) norms and weights, fp64, of sums of squares: see `weighting.max_norm_weights`."""
    norms = tl.sqrt(sumsq)
    use = active & (norms < INF)
    count = tl.sum(use.to(tl.int32))
    if SCALE == "constant":
        alpha = constant
    elif SCALE == "max":
        alpha = tl.max(tl.where(use, norms, 0.0))
    elif SCALE == "min":
        alpha = tl.min(tl.where(use, norms, INF))
    elif SCALE == "mean":
        alpha = tl.sum(tl.where(use, norms, 0.0)) / tl.maximum(count, 1).to(tl.float64)
    else:  # the mean of the two middle ones
        ordered = tl.sort(tl.where(use, norms, INF))
        place = tl.arange(0, K_PAD)
        low = tl.sum(tl.where(place == (count - 1) // 2, ordered, 0.0))
        high = tl.sum(tl.where(place == count // 2, ordered, 0.0))
        alpha = 0.5 * (low + high)
    weights = tl.minimum(alpha / (norms + eps), LARGEST)
    if K == 1 and SCALE != "constant":
        weights = weights * 0.0 + 1.0
    return norms, tl.where(use, weights, 0.0)


@triton.jit
def combine_tile(
    rows, row_stride, weights, out, column, bound, accumulate, forget,
    K: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One tile of ``out <- (out if accumulate else 0) + sum_t weights[t] * rows[t]``.

    A row whose weight is 0 is left out. If ``forget``, the rows that ``weights[K:2 K]`` marks are set to zero.
    """
    wide: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    lane = column + tl.arange(0, BLOCK)
    mask = lane < bound
    total = widen(tl.load(out + lane, mask=mask & (tl.zeros([BLOCK], tl.int32) + accumulate != 0), other=0.0), wide)
    for t in tl.range(0, K, loop_unroll_factor=UNROLL):
        weight = widen(tl.load(weights + t), wide)
        x = tl.load(rows + t * row_stride + lane, mask=mask, other=0.0, eviction_policy="evict_first")
        total += tl.where(weight != 0, weight * widen(x, wide), 0.0)
    tl.store(out + lane, narrow(total, out.dtype.element_ty), mask=mask, cache_modifier=".cs")
    if forget:
        for t in range(K):
            if tl.load(weights + K + t) != 0:
                zero = tl.zeros([BLOCK], rows.dtype.element_ty)
                tl.store(rows + t * row_stride + lane, zero, mask=mask)


@triton.jit
def grid_barrier(barrier):
    """Wait until every program of the grid has come here. All of them must be resident at once.

    ``barrier`` points to two int32: how many have come, and how often the barrier has opened. The last to come sets
    the first back to zero before it opens, so nothing has to be cleared between launches.
    """
    tl.debug_barrier()  # everything this program wrote, by any of its threads, comes before what follows
    opened = tl.atomic_add(barrier + 1, 0, sem="acquire", scope="gpu")
    come = tl.atomic_add(barrier, 1, sem="acq_rel", scope="gpu")
    if come == tl.num_programs(0) - 1:
        tl.atomic_xchg(barrier, 0, sem="relaxed", scope="gpu")
        tl.atomic_add(barrier + 1, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(barrier + 1, 0, sem="acquire", scope="gpu") == opened:
            pass
    tl.debug_barrier()


@triton.jit
def is_last(ticket):
    """Whether this program is the last of the grid to come here; it then sees what the others wrote before."""
    tl.debug_barrier()
    come = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = come == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(ticket, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return last


@triton.jit
def sum_slots(slots, count, K_PAD: tl.constexpr, AT_ONCE: tl.constexpr):
    """(K_PAD,) sums of ``count`` rows of slots, always in the same order."""
    STEP: tl.constexpr = AT_ONCE // K_PAD if AT_ONCE > 8 * K_PAD else 8
    place = tl.arange(0, STEP)
    index = tl.arange(0, K_PAD)
    total = tl.zeros([STEP, K_PAD], tl.float64)
    for start in range(0, count, STEP):
        row = start + place[:, None]
        total += tl.load(slots + row * K_PAD + index[None, :], mask=row < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)
