"""The kernel of the dense op `balance_`: both phases in one cooperative launch, or a launch of each."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import combine_tile, double, grid_barrier, not_finite, offset, sum_slots, update_block, weights_of

SLOTS_AT_ONCE = tl.constexpr(2048)


@triton.jit
def update_rows(
    grads, grad_stride, ema, num_params, num_tiles, decay, gain, slots, num_tasks,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase one: the EMA of this program's tiles, and in its slots the sums of squares of each task."""
    index = tl.arange(0, K_PAD)
    sums = tl.zeros([K_PAD], tl.float64)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        lane = offset(tile, BLOCK) + tl.arange(0, BLOCK)
        mask = lane < num_params
        for t in range(num_tasks):
            state, grad = ema + t * num_params + lane, grads + t * grad_stride + lane
            squares = update_block(state, grad, mask, 1, decay, gain)
            sums = tl.where(index == t, sums + tl.sum(squares), sums)
    tl.store(slots + tl.program_id(0) * K_PAD + index, sums)


@triton.jit
def combine_rows(
    ema, out, norms_out, num_params, num_tiles, slots, weights, eps, constant, num_tasks,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Phase two: every program forms the same weights, then combines its tiles, the last ones first."""
    index = tl.arange(0, K_PAD)
    task = index < num_tasks
    sumsq = sum_slots(slots, tl.num_programs(0), K_PAD, SLOTS_AT_ONCE)
    norms, w = weights_of(sumsq, task, eps, constant, num_tasks, K_PAD, SCALE)
    nonfinite = task & not_finite(norms)
    if tl.program_id(0) == 0:
        tl.store(norms_out + index, norms.to(norms_out.dtype.element_ty), mask=task)
    weights += tl.program_id(0) * 2 * num_tasks
    tl.store(weights + index, w, mask=task)
    tl.store(weights + num_tasks + index, nonfinite.to(tl.float64), mask=task)
    tl.debug_barrier()
    clear = tl.sum(nonfinite.to(tl.int32)) > 0
    # The tiles of phase one, backwards: what it touched last is still in the cache.
    mine = (num_tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    for i in range(mine):
        tile = tl.program_id(0) + (mine - 1 - i) * tl.num_programs(0)
        combine_tile(ema, num_params, weights, out, offset(tile, BLOCK), num_params, 0, clear, num_tasks, BLOCK)


@triton.jit(
    do_not_specialize=["units", "grad_units", "decay_bits", "gain_bits", "eps_bits", "constant_bits", "num_tasks"],
    do_not_specialize_on_alignment=["norms", "slots", "weights", "barrier"],
)
def balance_kernel(
    grads, ema, out, norms, slots, weights, barrier,
    units: tl.int64, grad_units: tl.int64, decay_bits: tl.int64, gain_bits: tl.int64, eps_bits: tl.int64,
    constant_bits: tl.int64, num_tasks: tl.int32,
    K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """Phase 1, then phase 2 in a launch of as many programs; or phase 0, both, which must be launched cooperatively."""
    wide: tl.constexpr = tl.float64 if ema.dtype.element_ty == tl.float64 else tl.float32
    num_params = units.to(tl.int64) * VEC
    num_tiles = tl.cdiv(num_params, BLOCK).to(tl.int32)
    if PHASE != 2:
        update_rows(
            grads, grad_units.to(tl.int64) * VEC, ema, num_params, num_tiles, double(decay_bits).to(wide),
            double(gain_bits).to(wide), slots, num_tasks, K_PAD, BLOCK,
        )  # fmt: skip
    if PHASE == 0:
        grid_barrier(barrier)
    if PHASE != 1:
        combine_rows(
            ema, out, norms, num_params, num_tiles, slots, weights, double(eps_bits), double(constant_bits),
            num_tasks, K_PAD, BLOCK, SCALE,
        )  # fmt: skip
