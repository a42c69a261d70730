"""Parts common to the Triton kernels: casts, one block's update, weights, combining, barriers.

Arithmetic is fp32 whatever the storage (fp64 for fp64), sums are fp64, offsets 64 bits; there are no float atomics.
Numbers travel as the int64 of a double's bits, exact and never specialised on. Sizes and strides come in units of VEC
elements, so that the compiler knows what divides them and loads 128 bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# No weight is larger: times the zeros of a task without gradient it still gives zero.
LARGEST = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
# Counters of a workspace, int32: programs that have arrived; of each of four outputs, tiles given out; how often the
# barrier has opened.
ARRIVED = tl.constexpr(0)
TILES = tl.constexpr(1)
OPENED = tl.constexpr(5)
NUM_COUNTERS = 8
# Triton's interpreter rounds to bfloat16 wrongly: there that goes through the bits.
BY_BITS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
def widen(x, wide: tl.constexpr):
    """``x`` in the arithmetic dtype; of a bfloat16 the bits are its upper half."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(wide)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x`` rounded to nearest, ties to even; NaN stays NaN. To bfloat16 by way of float32, as the CPU kernels do."""
    if dtype == tl.bfloat16:
        single = x.to(tl.float32)
        if BY_BITS:
            bits = single.to(tl.uint32, bitcast=True)
            upper = tl.where(single == single, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000) >> 16
            return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return single.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def update_block(state, grad, mask, has_grad, decay, gain):
    """``state <- decay * state + gain * grad``; returns what was stored, in the arithmetic dtype, and 0 where masked.

    Without a gradient ``has_grad`` is 0. A term that is missing is left out, not added as zero, as the CPU kernels do.
    """
    # Triton's interpreter broadcasts numbers, not conditions.
    has_grad = tl.zeros(state.shape, tl.int64) + has_grad != 0
    has_state = tl.zeros(state.shape, decay.dtype) + decay != 0
    # Gradients are read once, state once more: keep the state in the cache.
    g = widen(tl.load(grad, mask=has_grad & mask, other=0.0, eviction_policy="evict_first"), decay.dtype)
    m = widen(tl.load(state, mask=has_state & mask, other=0.0), decay.dtype)
    decayed, gained = decay * m, gain * g
    x = tl.where(has_state, tl.where(has_grad, decayed + gained, decayed), gained)
    stored = narrow(x, state.dtype.element_ty)
    tl.store(state, stored, mask=mask)
    return tl.where(mask, widen(stored, decay.dtype), 0.0)


@triton.jit
def gain_block(grad, mask, has_grad, gain):
    """``gain * grad``; 0 where masked, and without a gradient."""
    has_grad = tl.zeros(grad.shape, tl.int64) + has_grad != 0
    x = gain * widen(tl.load(grad, mask=has_grad & mask, other=0.0), gain.dtype)
    return tl.where(has_grad & mask, x, 0.0)


@triton.jit
def typed(address, CODE: tl.constexpr):
    """The address of a gradient whose dtype has the CODE, as a pointer."""
    GRAD: tl.constexpr = (
        tl.float32 if CODE == 0 else tl.bfloat16 if CODE == 1 else tl.float16 if CODE == 2 else tl.float64
    )
    return address.to(tl.pointer_type(GRAD))


@triton.jit
def any_in_chunk(grad, count, BLOCK: tl.constexpr):
    """1 if any of the elements is not zero, NaN included; blocks after the first that has one are not read."""
    wide: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    found = tl.zeros([], tl.int32)
    begin = tl.zeros([], tl.int32)
    while begin < count:
        lane = begin + tl.arange(0, BLOCK)
        x = widen(tl.load(grad + lane, mask=lane < count, other=0.0), wide)
        found = tl.max(tl.where(x == 0, 0, 1))
        begin = tl.where(found != 0, count, begin + BLOCK)
    return found


@triton.jit
def weights_of(sumsq, active, eps, constant, num_tasks, K_PAD: tl.constexpr, SCALE: tl.constexpr):
    """(K_PAD,) norms and weights ``alpha / (norm + eps)``, fp64; 0 for a task not active or not finite."""
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
        index = tl.arange(0, K_PAD)
        low = tl.sum(tl.where(index == (count - 1) // 2, ordered, 0.0))
        high = tl.sum(tl.where(index == count // 2, ordered, 0.0))
        alpha = 0.5 * (low + high)
    weights = tl.minimum(alpha / (norms + eps), LARGEST)
    if SCALE != "constant":
        weights = tl.where(tl.zeros([K_PAD], tl.int32) + num_tasks == 1, 1.0, weights)
    return norms, tl.where(use, weights, 0.0)


@triton.jit
def load_row(rows, row_stride, t, lane, mask, num_tasks):
    """Numbers of row ``t``, which nobody reads again; zeros if there is no such row."""
    mask &= tl.zeros(lane.shape, tl.int32) + t < num_tasks
    return tl.load(rows + t * row_stride + lane, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_row(total, x, weights, t, num_tasks):
    """``total`` and the weight of row ``t`` times its numbers; a row whose weight is 0 is left out."""
    weight = widen(tl.load(weights + t, mask=tl.full([], t, tl.int32) < num_tasks, other=0.0), total.dtype)
    return tl.where(weight != 0, total + weight * widen(x, total.dtype), total)


@triton.jit
def combine_tile(rows, row_stride, weights, out, column, bound, accumulate, clear, num_tasks, BLOCK: tl.constexpr):
    """One tile of ``out <- (out if accumulate else 0) + sum_t weights[t] * rows[t]``.

    Four rows are asked for before any of them is used. If ``clear``, the rows that ``weights[K:2 K]`` marks are set to
    zero.
    """
    wide: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    lane = column + tl.arange(0, BLOCK)
    mask = lane < bound
    total = widen(tl.load(out + lane, mask=mask & (tl.zeros([BLOCK], tl.int32) + accumulate != 0), other=0.0), wide)
    for t in range(0, num_tasks, 4):
        x0 = load_row(rows, row_stride, t, lane, mask, num_tasks)
        x1 = load_row(rows, row_stride, t + 1, lane, mask, num_tasks)
        x2 = load_row(rows, row_stride, t + 2, lane, mask, num_tasks)
        x3 = load_row(rows, row_stride, t + 3, lane, mask, num_tasks)
        total = add_row(total, x0, weights, t, num_tasks)
        total = add_row(total, x1, weights, t + 1, num_tasks)
        total = add_row(total, x2, weights, t + 2, num_tasks)
        total = add_row(total, x3, weights, t + 3, num_tasks)
    tl.store(out + lane, narrow(total, out.dtype.element_ty), mask=mask, cache_modifier=".cs")
    if clear:
        for t in range(num_tasks):
            if tl.load(weights + num_tasks + t) != 0:
                zero = tl.zeros([BLOCK], rows.dtype.element_ty)
                tl.store(rows + t * row_stride + lane, zero, mask=mask)


@triton.jit
def static_rounds(num_tiles):
    """How many tiles each program takes in turn, one at least; the rest, an eighth of many, goes to whoever is free."""
    return tl.maximum(num_tiles // tl.num_programs(0) * 7 // 8, 1)


@triton.jit
def next_tile(counter, done, rounds, num_tiles):
    """The tile of this program after ``done`` others; ``num_tiles`` or more if there is none left.

    ``counter`` points to an int32 that counts the tiles given out. Every program asks once in vain, and whoever is the
    last to do so sets it back to zero, so nothing has to be cleared between launches.
    """
    first = rounds * tl.num_programs(0)
    tile = tl.program_id(0) + done * tl.num_programs(0)
    if done >= rounds:
        tile = num_tiles
        if first < num_tiles:
            tile = first + tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
            if tile == num_tiles + tl.num_programs(0) - 1:
                tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    return tile


@triton.jit
def slot_of(tile, done, rounds):
    """Where the sums of a program's tiles belong that it takes in turn, and those of a tile given out."""
    return tl.where(done <= rounds, tl.program_id(0), tile - (rounds - 1) * tl.num_programs(0))


@triton.jit
def num_slots(rounds, num_tiles):
    """How many slots are written."""
    return tl.minimum(num_tiles, tl.num_programs(0) + tl.maximum(num_tiles - rounds * tl.num_programs(0), 0))


@triton.jit
def combine_tiles(rows, row_stride, weights, out, bound, counter, accumulate, clear, num_tasks, BLOCK: tl.constexpr):
    """`combine_tile` of all columns below ``bound``, backwards: what was written last is still in the cache."""
    num_tiles = tl.cdiv(bound, BLOCK).to(tl.int32)
    rounds = static_rounds(num_tiles)
    tile = tl.program_id(0)
    done = 0
    while tile < num_tiles:
        column = offset(num_tiles - 1 - tile, BLOCK)
        combine_tile(rows, row_stride, weights, out, column, bound, accumulate, clear, num_tasks, BLOCK)
        done += 1
        tile = next_tile(counter, done, rounds, num_tiles)


@triton.jit
def is_last(counter):
    """Whether this program is the last of the grid to arrive; it then sees what the others wrote before."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return last


@triton.jit
def sum_slots(slots, count, K_PAD: tl.constexpr, AT_ONCE: tl.constexpr):
    """(K_PAD,) sums of ``count`` rows of slots, always in the same order."""
    STEP: tl.constexpr = AT_ONCE // K_PAD if AT_ONCE > 8 * K_PAD else 8
    index = tl.arange(0, K_PAD)
    total = tl.zeros([STEP, K_PAD], tl.float64)
    for start in range(0, count, STEP):
        slot = start + tl.arange(0, STEP)[:, None]
        total += tl.load(slots + slot * K_PAD + index[None, :], mask=slot < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)
