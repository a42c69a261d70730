"""The kernel of the dense op `balance_`: both phases in one cooperative launch, or a launch of each."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    ARRIVED,
    LARGEST,
    OPENED,
    TILES,
    combine_tiles,
    double,
    is_last,
    next_tile,
    not_finite,
    num_slots,
    offset,
    slot_of,
    static_rounds,
    sum_slots,
    update_block,
    weights_of,
)
from .squares import add_squares

SLOTS_AT_ONCE = tl.constexpr(2048)


@triton.jit
def update_rows(
    grads, grad_stride, ema, num_params, num_tiles, decay, gain, slots, counter, num_tasks,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, FAST_FP64: tl.constexpr,
):  # fmt: skip
    """Phase one: the EMA of all tiles, and in the slots the sums of squares of each task."""
    index = tl.arange(0, K_PAD)
    rounds = static_rounds(num_tiles)
    sums = tl.zeros([K_PAD], tl.float64)
    tile = tl.program_id(0)
    done = 0
    while tile < num_tiles:
        lane = offset(tile, BLOCK) + tl.arange(0, BLOCK)
        mask = lane < num_params
        for t in range(num_tasks):
            stored = update_block(ema + t * num_params + lane, grads + t * grad_stride + lane, mask, 1, decay, gain)
            squares = add_squares(tl.zeros([BLOCK // 8], tl.float64), stored, VEC, FAST_FP64)
            sums = tl.where(index == t, sums + tl.sum(squares), sums)
        done += 1
        if done >= rounds:
            tl.store(slots + slot_of(tile, done, rounds) * K_PAD + index, sums)
            sums = tl.zeros([K_PAD], tl.float64)
        tile = next_tile(counter, done, rounds, num_tiles)


@triton.jit
def form_weights(
    slots, num_tiles, norms_out, weights, eps, constant, num_tasks, K_PAD: tl.constexpr, SCALE: tl.constexpr
):
    """Norms, weights, and after these which tasks are not finite, from all slots."""
    index = tl.arange(0, K_PAD)
    task = index < num_tasks
    sumsq = sum_slots(slots, num_slots(static_rounds(num_tiles), num_tiles), K_PAD, SLOTS_AT_ONCE)
    norms, w = weights_of(sumsq, task, eps, constant, num_tasks, K_PAD, SCALE)
    told = norms  # one that is finite does not look as if it were not
    if norms_out.dtype.element_ty == tl.float32:
        told = tl.where(not_finite(norms), norms, tl.minimum(norms, LARGEST))
    tl.store(norms_out + index, told.to(norms_out.dtype.element_ty), mask=task)
    tl.store(weights + index, w, mask=task)
    tl.store(weights + num_tasks + index, (task & not_finite(norms)).to(tl.float64), mask=task)


@triton.jit(
    do_not_specialize=["units", "grad_units", "decay_bits", "gain_bits", "eps_bits", "constant_bits", "num_tasks"],
    do_not_specialize_on_alignment=["norms", "slots", "weights", "counters"],
)
def balance_kernel(
    grads, ema, out, norms, slots, weights, counters,
    units: tl.int64, grad_units: tl.int64, decay_bits: tl.int64, gain_bits: tl.int64, eps_bits: tl.int64,
    constant_bits: tl.int64, num_tasks: tl.int32,
    K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, FAST_FP64: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """Phase 1, then phase 2 in a launch of its own; or phase 0, both, which must be launched cooperatively."""
    wide: tl.constexpr = tl.float64 if ema.dtype.element_ty == tl.float64 else tl.float32
    num_params = units.to(tl.int64) * VEC
    num_tiles = tl.cdiv(num_params, BLOCK).to(tl.int32)
    if PHASE == 0:
        opened = tl.atomic_add(counters + OPENED, 0, sem="acquire", scope="gpu")  # read before anyone can open it
    if PHASE != 2:
        update_rows(
            grads, grad_units.to(tl.int64) * VEC, ema, num_params, num_tiles, double(decay_bits).to(wide),
            double(gain_bits).to(wide), slots, counters + TILES, num_tasks, K_PAD, BLOCK, VEC, FAST_FP64,
        )  # fmt: skip
        if is_last(counters + ARRIVED):
            form_weights(
                slots, num_tiles, norms, weights, double(eps_bits), double(constant_bits), num_tasks, K_PAD, SCALE
            )
            tl.debug_barrier()  # what all its threads wrote comes before the barrier opens
            if PHASE == 0:
                tl.atomic_add(counters + OPENED, 1, sem="release", scope="gpu")
        elif PHASE == 0:
            while tl.atomic_add(counters + OPENED, 0, sem="acquire", scope="gpu") == opened:
                pass
        tl.debug_barrier()
    if PHASE != 1:
        index = tl.arange(0, K_PAD)
        nonfinite = tl.load(weights + num_tasks + index, mask=index < num_tasks, other=0.0)
        combine_tiles(
            ema, num_params, weights, out, num_params, counters + TILES, 0, tl.sum(nonfinite) > 0, num_tasks, BLOCK
        )
