"""Kernels of the dense op `balance_`: both phases in one cooperative launch, or one launch for each."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import combine_tile, double, grid_barrier, not_finite, offset, store_row, sum_slots, update, weights_of
from .rounding import row_key, widen

SLOTS_AT_ONCE = tl.constexpr(2048)


@triton.jit
def update_rows(
    grads, grad_stride, ema, num_params, num_tiles, decay, gain, seed, slots,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Phase one: the EMA of this program's tiles, and in its slots the sums of squares of each task."""
    wide: tl.constexpr = tl.float64 if ema.dtype.element_ty == tl.float64 else tl.float32
    lane = tl.arange(0, BLOCK)
    index = tl.arange(0, K_PAD)
    sums = tl.zeros([K_PAD], tl.float64)
    reads = tl.zeros([BLOCK], tl.float64) + decay != 0
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        column = offset(tile, BLOCK)
        mask = column + lane < num_params
        for t in range(K):
            state = ema + t * num_params + column + lane
            # Gradients are read once, state once more: keep the state in the cache.
            grad = grads + t * grad_stride + column + lane
            g = widen(tl.load(grad, mask=mask, other=0.0, eviction_policy="evict_first"), wide)
            m = widen(tl.load(state, mask=mask & reads, other=0.0), wide)
            key = row_key(seed, t) if STOCHASTIC else 0
            x = update(m, g, decay.to(wide), gain.to(wide), True)
            squares = store_row(state, x, mask, key, column, lane, STOCHASTIC)
            sums = tl.where(index == t, sums + tl.sum(squares), sums)
    tl.store(slots + tl.program_id(0) * K_PAD + index, sums)


@triton.jit
def combine_rows(
    ema, out, norms_out, num_params, num_tiles, slots, num_slots, weights, eps, constant,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Phase two: every program forms the same weights, then combines its tiles, the last ones first."""
    index = tl.arange(0, K_PAD)
    task = index < K
    norms, w = weights_of(sum_slots(slots, num_slots, K_PAD, SLOTS_AT_ONCE), task, eps, constant, K, K_PAD, SCALE)
    broken = task & not_finite(norms)
    if tl.program_id(0) == 0:
        tl.store(norms_out + index, norms.to(norms_out.dtype.element_ty), mask=task)
    weights += tl.program_id(0) * 2 * K
    tl.store(weights + index, w, mask=task)
    tl.store(weights + K + index, broken.to(tl.float64), mask=task)
    tl.debug_barrier()
    forget = tl.sum(broken.to(tl.int32)) > 0
    # The tiles of phase one, backwards: what it touched last is still in the cache.
    mine = (num_tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    for i in range(mine):
        tile = tl.program_id(0) + (mine - 1 - i) * tl.num_programs(0)
        combine_tile(ema, num_params, weights, out, offset(tile, BLOCK), num_params, 0, forget, K, BLOCK, UNROLL)


_CHANGING = ["units", "grad_units", "decay_bits", "gain_bits", "eps_bits", "constant_bits", "seed", "num_slots"]
# Scratch may begin anywhere without compiling a kernel anew.
_SMALL = ["norms", "slots", "weights", "barrier"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_SMALL)
def balance_kernel(
    grads, ema, out, norms, slots, weights, barrier,
    units: tl.int64, grad_units: tl.int64, decay_bits: tl.int64, gain_bits: tl.int64, eps_bits: tl.int64,
    constant_bits: tl.int64, seed: tl.int64,
    K: tl.constexpr, K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    UNROLL: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Both phases, a barrier of the whole grid between them. The launch must be cooperative."""
    num_params = units.to(tl.int64) * VEC
    num_tiles = tl.cdiv(num_params, BLOCK).to(tl.int32)
    update_rows(
        grads, grad_units.to(tl.int64) * VEC, ema, num_params, num_tiles, double(decay_bits), double(gain_bits), seed,
        slots, K, K_PAD, BLOCK, STOCHASTIC,
    )  # fmt: skip
    grid_barrier(barrier)
    combine_rows(
        ema, out, norms, num_params, num_tiles, slots, tl.num_programs(0), weights, double(eps_bits),
        double(constant_bits), K, K_PAD, BLOCK, SCALE, UNROLL,
    )  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_SMALL)
def update_kernel(
    grads, ema, slots, units: tl.int64, grad_units: tl.int64, decay_bits: tl.int64, gain_bits: tl.int64, seed: tl.int64,
    K: tl.constexpr, K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Phase one alone."""
    num_params = units.to(tl.int64) * VEC
    update_rows(
        grads, grad_units.to(tl.int64) * VEC, ema, num_params, tl.cdiv(num_params, BLOCK).to(tl.int32),
        double(decay_bits), double(gain_bits), seed, slots, K, K_PAD, BLOCK, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_SMALL)
def combine_kernel(
    ema, out, norms, slots, weights, units: tl.int64, num_slots: tl.int32, eps_bits: tl.int64, constant_bits: tl.int64,
    K: tl.constexpr, K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Phase two alone, after a launch of phase one with ``num_slots`` programs."""
    num_params = units.to(tl.int64) * VEC
    combine_rows(
        ema, out, norms, num_params, tl.cdiv(num_params, BLOCK).to(tl.int32), slots, num_slots, weights,
        double(eps_bits), double(constant_bits), K, K_PAD, BLOCK, SCALE, UNROLL,
    )  # fmt: skip
