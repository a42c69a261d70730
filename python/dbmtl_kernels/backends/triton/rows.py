"""Kernels of the K x P rows: gather a row from a list of gradients, combine rows, multiply them pairwise."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    ARRIVED,
    TILES,
    any_in_chunk,
    combine_tiles,
    double,
    gain_block,
    is_last,
    next_tile,
    not_finite,
    num_slots,
    offset,
    slot_of,
    static_rounds,
    sum_slots,
    typed,
    update_block,
    weights_of,
    widen,
)
from .squares import add_squares

# Columns of the chunk table: segment, first element of it, column of that element in the row, elements.
CHUNK_COLUMNS = tl.constexpr(4)
SLOTS_AT_ONCE = tl.constexpr(1024)
SLOTS_AT_A_TIME = tl.constexpr(16)


@triton.jit
def gather_chunk(
    squares, row, column, grad, count, address, decay, gain,
    GRAD_ALIGNED: tl.constexpr, ROW_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FAST_FP64: tl.constexpr,
):  # fmt: skip
    """``squares`` and those of ``count`` new elements of the row; without a row, of those that it would get.

    Whole blocks need no mask, so they are loaded 128 bits at a time where both sides are aligned; the rest follows.
    """
    grad_dtype: tl.constexpr = grad.dtype.element_ty
    row_dtype: tl.constexpr = grad_dtype if row is None else row.dtype.element_ty
    either32: tl.constexpr = grad_dtype == tl.float32 or row_dtype == tl.float32
    either64: tl.constexpr = grad_dtype == tl.float64 or row_dtype == tl.float64
    WIDEST: tl.constexpr = 64 if either64 else 32 if either32 else 16
    # A thread takes 16 bytes of the wider, so that a warp's accesses to both are one stretch.
    ADJACENT: tl.constexpr = 128 // WIDEST if GRAD_ALIGNED or (ROW_ALIGNED and row is not None) else 1
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(whole):
        grad_block = grad + block * BLOCK
        if GRAD_ALIGNED:
            grad_block = tl.multiple_of(grad_block, 16 * grad.dtype.element_ty.primitive_bitwidth // WIDEST)
        if row is None:
            x = gain_block(grad_block + lane, True, address, gain)
        else:
            state_block = row + column + block * BLOCK
            if ROW_ALIGNED:
                state_block = tl.multiple_of(state_block, 16 * row.dtype.element_ty.primitive_bitwidth // WIDEST)
            x = update_block(state_block + lane, grad_block + lane, True, address, decay, gain)
        squares = add_squares(squares, x, ADJACENT, FAST_FP64)
    rest = whole * BLOCK + lane
    if whole * BLOCK < count:
        if row is None:
            x = gain_block(grad + rest, rest < count, address, gain)
        else:
            x = update_block(row + column + rest, grad + rest, rest < count, address, decay, gain)
        squares = add_squares(squares, x, 1, FAST_FP64)
    return squares


@triton.jit
def gather_typed(
    squares, row, column, address, start, count, decay, gain,
    CODE: tl.constexpr, ROW_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FAST_FP64: tl.constexpr,
):  # fmt: skip
    """`gather_chunk` from element ``start`` of a gradient whose dtype has the CODE; an address of 0 is for zeros."""
    grad = typed(address, CODE) + start
    address = tl.where(gain == 0, 0, address)  # NaN and inf do not count either
    if grad.to(tl.int64) % 16 == 0:
        squares = gather_chunk(
            squares, row, column, grad, count, address, decay, gain, True, ROW_ALIGNED, BLOCK, FAST_FP64
        )
    else:
        squares = gather_chunk(
            squares, row, column, grad, count, address, decay, gain, False, ROW_ALIGNED, BLOCK, FAST_FP64
        )
    return squares


# Small tensors are views of larger ones: where they begin must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["num_chunks"],
    do_not_specialize_on_alignment=["coefficients", "sumsq", "slots", "counters", "loss_scale"],
)
def accumulate_kernel(
    row, addresses, chunks, coefficients, sumsq, slots, counters, loss_scale, num_chunks: tl.int32,
    CODES: tl.constexpr, ROW_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FAST_FP64: tl.constexpr,
):  # fmt: skip
    """``row <- decay * row + gain / loss_scale * grads`` over all chunks, and the sum of squares of what was stored.

    ``addresses`` holds address and dtype (0 fp32, 1 bf16, 2 fp16, 3 fp64) of each gradient. The bits of CODES say
    which dtypes are there, so that no others are compiled. Without a ``row`` nothing is stored.
    """
    if row is None:
        wide: tl.constexpr = tl.float64 if CODES & 8 else tl.float32
    else:
        wide: tl.constexpr = tl.float64 if row.dtype.element_ty == tl.float64 else tl.float32
    decay = tl.load(coefficients).to(wide)
    gain = tl.load(coefficients + 1)
    if loss_scale is not None:
        factor = tl.load(loss_scale).to(tl.float64)
        gain = tl.where(factor == 0, 0.0, gain / tl.where(factor == 0, 1.0, factor))
    gain = gain.to(wide)
    rounds = static_rounds(num_chunks)
    squares = tl.zeros([BLOCK // 8], tl.float64)
    chunk = tl.program_id(0)
    done = 0
    while chunk < num_chunks:
        entry = chunks + offset(chunk, CHUNK_COLUMNS)
        segment = tl.load(entry)
        start = tl.load(entry + 1)
        column = tl.load(entry + 2)
        count = tl.load(entry + 3).to(tl.int32)
        address = tl.load(addresses + segment * 2)
        dtype = tl.load(addresses + segment * 2 + 1)
        for code in tl.static_range(4):
            if CODES & (1 << code):
                if dtype == code:
                    squares = gather_typed(
                        squares, row, column, address, start, count, decay, gain, code, ROW_ALIGNED, BLOCK, FAST_FP64
                    )
        done += 1
        if done >= rounds:
            tl.store(slots + slot_of(chunk, done, rounds), tl.sum(squares))
            squares = tl.zeros([BLOCK // 8], tl.float64)
        chunk = next_tile(counters + TILES, done, rounds, num_chunks)
    if is_last(counters + ARRIVED):
        tl.store(sumsq, tl.sum(sum_slots(slots, num_slots(rounds, num_chunks), 1, SLOTS_AT_ONCE)))


@triton.jit(do_not_specialize=["num_chunks"], do_not_specialize_on_alignment=["found"])
def any_nonzero_kernel(addresses, chunks, found, num_chunks: tl.int32, CODES: tl.constexpr, BLOCK: tl.constexpr):
    """Sets ``found``, which is 0, to 1 if any element of the gradients is not zero. Reads little more than that takes.

    See `accumulate_kernel` for the arguments.
    """
    chunk = tl.program_id(0)
    while chunk < num_chunks:
        entry = chunks + offset(chunk, CHUNK_COLUMNS)
        segment = tl.load(entry)
        start = tl.load(entry + 1)
        count = tl.load(entry + 3).to(tl.int32)
        address = tl.load(addresses + segment * 2)
        dtype = tl.load(addresses + segment * 2 + 1)
        mine = tl.zeros([], tl.int32)
        for code in tl.static_range(4):
            if CODES & (1 << code):
                if (dtype == code) & (address != 0):
                    mine = any_in_chunk(typed(address, code) + start, count, BLOCK)
        # Not a load: the threads of a program must all see the same.
        known = tl.atomic_max(found, mine)
        chunk = tl.where(known + mine != 0, num_chunks, chunk + tl.num_programs(0))


@triton.jit(
    do_not_specialize=["units", "stride_units", "accumulate", "num_tasks"],
    do_not_specialize_on_alignment=["weights", "counters"],
)
def combine_out_kernel(
    rows, weights, out, counters, units: tl.int64, stride_units: tl.int64, accumulate: tl.int32, num_tasks: tl.int32,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out <- (out if accumulate else 0) + sum_t weights[t] * rows[t]``."""
    bound, stride = units.to(tl.int64) * VEC, stride_units.to(tl.int64) * VEC
    combine_tiles(rows, stride, weights, out, bound, counters + TILES, accumulate, False, num_tasks, BLOCK)


@triton.jit
def combine_group(
    rows, stride, weights, out, first, units, counter, accumulate, clear, num_tasks,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of one parameter dtype: ``units`` of them from ``first`` on, both in units of VEC."""
    start, bound = rows + first.to(tl.int64) * VEC, units.to(tl.int64) * VEC
    combine_tiles(start, stride, weights, out, bound, counter, accumulate, clear, num_tasks, BLOCK)


@triton.jit(
    do_not_specialize=[
        "first0", "units0", "first1", "units1", "first2", "units2", "first3", "units3",
        "stride_units", "above_bits", "eps_bits", "constant_bits", "fresh", "accumulate", "num_tasks",
    ],
    do_not_specialize_on_alignment=[
        "sumsq", "norms", "weights", "nonfinite", "nonfinite_steps", "active", "loss_scale", "scratch", "counters",
    ],
)  # fmt: skip
def balance_rows_kernel(
    rows, sumsq, norms, weights, nonfinite, nonfinite_steps, active, loss_scale, scratch, counters,
    out0, first0: tl.int64, units0: tl.int64, out1, first1: tl.int64, units1: tl.int64,
    out2, first2: tl.int64, units2: tl.int64, out3, first3: tl.int64, units3: tl.int64,
    stride_units: tl.int64, above_bits: tl.int64, eps_bits: tl.int64, constant_bits: tl.int64, fresh: tl.int32,
    accumulate: tl.int32, num_tasks: tl.int32,
    K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Sums of squares to weights to up to four outputs, one a parameter dtype; rows that are not finite are cleared."""
    index = tl.arange(0, K_PAD)
    task = index < num_tasks
    squares = tl.load(sumsq + index, mask=task, other=0.0)
    before = (tl.load(nonfinite + index, mask=task, other=0) != 0) & (tl.zeros([K_PAD], tl.int32) + fresh == 0)
    use = task
    if active is not None:
        use = use & (tl.load(active + index, mask=task, other=0) != 0)
    now = task & not_finite(squares)
    bad = before | now
    found, w = weights_of(squares, use & (bad == 0), double(eps_bits), double(constant_bits), num_tasks, K_PAD, SCALE)
    factor = tl.full([K_PAD], 1.0, tl.float64)
    if loss_scale is not None:
        factor *= tl.load(loss_scale).to(tl.float64)
    carried = tl.where(bad & use & (factor > double(above_bits)), float("nan"), w * factor)
    scratch += tl.program_id(0) * 2 * num_tasks
    tl.store(scratch + index, carried, mask=task)
    tl.store(scratch + num_tasks + index, bad.to(tl.float64), mask=task)
    tl.debug_barrier()
    clear = tl.sum(bad.to(tl.int32)) > 0
    stride = stride_units.to(tl.int64) * VEC
    combine_group(
        rows, stride, scratch, out0, first0, units0, counters + TILES, accumulate, clear, num_tasks, VEC, BLOCK
    )
    if out1 is not None:
        combine_group(
            rows, stride, scratch, out1, first1, units1, counters + TILES + 1, accumulate, clear, num_tasks, VEC, BLOCK
        )
    if out2 is not None:
        combine_group(
            rows, stride, scratch, out2, first2, units2, counters + TILES + 2, accumulate, clear, num_tasks, VEC, BLOCK
        )
    if out3 is not None:
        combine_group(
            rows, stride, scratch, out3, first3, units3, counters + TILES + 3, accumulate, clear, num_tasks, VEC, BLOCK
        )
    # Only when every program has read the stats may they be changed.
    if is_last(counters + ARRIVED):
        tl.store(norms + index, found, mask=task)
        tl.store(weights + index, w, mask=task)
        counted = tl.load(nonfinite_steps + index, mask=task, other=0)
        tl.store(nonfinite_steps + index, counted + (now & (before == 0)).to(tl.int64), mask=task)
        tl.store(nonfinite + index, bad.to(tl.int8), mask=task)
        tl.store(sumsq + index, tl.where(bad, 0.0, squares), mask=task)


@triton.jit(do_not_specialize=["units", "stride_units"])
def gramian_kernel(
    rows, slots, units: tl.int64, stride_units: tl.int64,
    K: tl.constexpr, K_PAD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, TILES_A_PART: tl.constexpr,
):  # fmt: skip
    """This program's part of rows @ rows.T, (K_PAD, K_PAD) fp64, in its slots.

    Products are summed in fp32 over TILES_A_PART tiles, then in fp64.
    """
    # A bfloat16 is a tf32 too: one pass multiplies it exactly, an fp32 number takes three.
    precision: tl.constexpr = "tf32" if rows.dtype.element_ty == tl.bfloat16 else "tf32x3"
    bound = units.to(tl.int64) * VEC
    index = tl.arange(0, K_PAD)
    lane = tl.arange(0, BLOCK)
    pointers = rows + index[:, None].to(tl.int64) * (stride_units.to(tl.int64) * VEC) + lane[None, :]
    total = tl.zeros([K_PAD, K_PAD], tl.float64)
    span: tl.constexpr = BLOCK * TILES_A_PART
    for part in range(tl.program_id(0), tl.cdiv(bound, span).to(tl.int32), tl.num_programs(0)):
        products = tl.zeros([K_PAD, K_PAD], tl.float32)
        for tile in range(TILES_A_PART):
            column = offset(part, span) + tile * BLOCK
            mask = (index[:, None] < K) & (column + lane[None, :] < bound)
            x = widen(tl.load(pointers + column, mask=mask, other=0.0), tl.float32)
            products = tl.dot(x, tl.trans(x), products, input_precision=precision)
        total += products.to(tl.float64)
    at = index[:, None] * K_PAD + index[None, :]
    tl.store(slots + tl.program_id(0).to(tl.int64) * K_PAD * K_PAD + at, total)


@triton.jit(do_not_specialize=["num_slots"])
def add_gramians_kernel(
    slots, gramian, num_slots: tl.int32, K: tl.constexpr, K_PAD: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum of the slots, in order, made symmetric to the bit; each program does one row of the matrix."""
    row = tl.program_id(0)
    index = tl.arange(0, COLUMNS)
    upper = tl.zeros([SLOTS_AT_A_TIME, COLUMNS], tl.float64)
    lower = tl.zeros([SLOTS_AT_A_TIME, COLUMNS], tl.float64)
    for start in range(0, num_slots, SLOTS_AT_A_TIME):
        slot = start + tl.arange(0, SLOTS_AT_A_TIME)[:, None]
        base = slots + offset(slot, K_PAD * K_PAD)
        mask = (slot < num_slots) & (index[None, :] < K)
        upper += tl.load(base + row * K_PAD + index[None, :], mask=mask, other=0.0)
        lower += tl.load(base + index[None, :] * K_PAD + row, mask=mask, other=0.0)
    half = 0.5 * (tl.sum(upper, axis=0) + tl.sum(lower, axis=0))
    tl.store(gramian + row * K + index, half.to(gramian.dtype.element_ty), mask=index < K)
