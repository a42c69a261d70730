"""Grids, workspaces and launches of the Triton kernels. Every launch goes through `_launch`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..arguments import BalanceRows, Coefficients, Gradients
from ..memory import Arena, capturing, stream_of, zeros_of
from . import device as driver
from . import rows as row_kernels
from . import tables
from .dense import balance_kernel
from .kernels import NUM_COUNTERS
from .launcher import INTERPRETED
from .launcher import launch as _launch
from .launcher import options as _options
from .tuning import Tuning, choose, fast_fp64

# The interpreter has no multiprocessors: this many programs stand for them where none waits for another.
INTERPRETED_PROGRAMS = 3
# Blocks of a gradient that a program gathers after one look at the tables.
CHUNK_BLOCKS = 8
GRAMIAN_TILES = 16
# Counters of so many launches are there for a graph that is captured after a step.
CAPTURED = 1024


_doubles, _integers = struct.Struct("<4d"), struct.Struct("<4q")


def _bits(*numbers: float) -> tuple[int, ...]:
    """Of four doubles."""
    return _integers.unpack(_doubles.pack(*numbers))


def _pad(num_tasks: int, least: int = 2) -> int:
    return max(least, int(triton.next_power_of_2(num_tasks)))


def _vector(*sizes: int) -> int:
    """The largest of 8, 4, 1 that divides all: how many elements the compiler may take together.

    Callers take at most 16 bytes of their widest tensor, so that a warp's accesses to every one are one stretch.
    """
    return next(v for v in (8, 4, 1) if all(size % v == 0 for size in sizes))


def _stride(rows: Tensor) -> int:
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


class Workspace:
    """Scratch of one stream or of one captured launch, and counters, which set themselves back to zero."""

    def __init__(self, device: torch.device, counters: Tensor) -> None:
        self.counters = counters
        self._device = device
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, count: int) -> Tensor:
        """At least ``count`` float64; what is in them is undefined."""
        found = self._scratch.get(name)
        if found is None or found.numel() < count:
            found = self._scratch[name] = torch.empty(count, dtype=torch.float64, device=self._device)
        return found


_workspaces: dict[tuple[torch.device, int], tuple[Workspace, Arena]] = {}


def workspace(device: torch.device) -> Workspace:
    """The workspace of the current stream. A captured launch gets its own, with counters that a step before made."""
    size = 4 * NUM_COUNTERS
    if capturing(device):
        return Workspace(device, zeros_of(device).take(size).view(torch.int32))
    key = device, stream_of(device)
    found = _workspaces.get(key)
    if found is None:
        zeros = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        found = _workspaces[key] = Workspace(device, zeros), zeros_of(device)
    found[1].prepare(CAPTURED * size)
    return found[0]


def _tuning(kernel: str, device: torch.device, size: int, element_size: int, vec: int) -> Tuning:
    """The line of the table, its block as many bytes in every dtype.

    Eight elements a thread at least, as squares are summed (`squares.add_squares`); and no more where they are taken
    one by one, which needs more registers.
    """
    tuning = choose(kernel, driver.capability(device), size)
    least = 8 * 32 * tuning.warps
    tuning = tuning._replace(block=least if vec == 1 else max(least, tuning.block * 4 // element_size))
    if INTERPRETED:  # every block costs the same there, however long: at most a dozen or so a row
        block = min(1 << 16, int(triton.next_power_of_2(size // 16 + 1)))
        tuning = tuning._replace(block=max(tuning.block, block))
    return tuning


def _programs(device: torch.device, per_multiprocessor: int, tiles: int) -> int:
    """Programs of a persistent grid."""
    most = INTERPRETED_PROGRAMS if INTERPRETED else driver.multiprocessors(device) * per_multiprocessor
    return max(1, min(tiles, most))


def _num_slots(programs: int, tiles: int) -> int:
    """Slots of a grid of at most so many programs: one each, and one a tile given out (`kernels.num_slots`)."""
    return 3 * programs + tiles // 8


@dataclass(frozen=True, eq=False)
class _DensePlan:
    """What `balance_` needs to know of a problem, worked out once."""

    tuning: Tuning
    tiles: int
    programs: int
    units: int
    grad_units: int
    slots: int
    norms: torch.dtype
    meta: dict[str, Any]
    known: dict[Any, list[Any]] = field(default_factory=dict)

    def launch(
        self, device: torch.device, cooperative: bool, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        """Once or twice. After the first time only what may differ in a plan, and is compiled for, is looked at."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        key = cooperative, addresses[0] % 16 == 0, addresses[1] % 16 == 0, addresses[2] % 16 == 0
        known = self.known.get(key)
        if known is not None:
            for run in known:
                run(*addresses, *numbers)
            return
        args = (*tensors, *numbers)
        grid = _cooperative_programs(device, self, args) if cooperative else self.programs
        runs = [
            _launch(balance_kernel, grid, *args, tuning=self.tuning, cooperative=cooperative, **self.meta, PHASE=phase)
            for phase in ((0,) if cooperative else (1, 2))
        ]
        if None not in runs:
            self.known[key] = runs


@lru_cache(1024)
def _dense_plan(
    device: torch.device, shape: torch.Size, grad_stride: int, grad: torch.dtype, state: torch.dtype, scale: str
) -> _DensePlan:
    num_tasks, num_params = shape
    size = max(grad.itemsize, state.itemsize)
    vec = min(_vector(num_params, grad_stride), 16 // size)
    fast = size == 8 or fast_fp64(driver.capability(device))
    tuning = _tuning("balance" if fast else "balance in pairs", device, num_params, size, vec)
    pad = _pad(num_tasks)
    meta = {
        "K_PAD": pad, "VEC": vec, "BLOCK": tuning.block, "SCALE": scale, "FAST_FP64": fast,
    }  # fmt: skip
    tiles = -(-num_params // tuning.block)
    programs = _programs(device, tuning.programs, tiles)
    return _DensePlan(
        tuning, tiles, programs, num_params // vec, grad_stride // vec, _num_slots(programs, tiles) * pad,
        torch.float64 if state == torch.float64 else torch.float32, meta,
    )  # fmt: skip


_resident: dict[Any, int] = {}


def _cooperative_programs(device: torch.device, plan: _DensePlan, args: tuple[Any, ...]) -> int:
    """Programs of the one-launch form, all of them resident; the driver is asked once for each specialisation."""
    if INTERPRETED:  # two would wait for each other for ever
        return 1
    inputs = tuple((a.dtype, a.data_ptr() % 16 == 0) for a in args[:3])
    key = (device, inputs, plan.tuning, *plan.meta.values())
    found = _resident.get(key)
    if found is None:
        options = {**plan.meta, "PHASE": 0, **_options(plan.tuning, cooperative=True)}
        found = driver.resident_programs(balance_kernel, args, options)
        if found < 1:
            raise RuntimeError(f"balance_kernel does not fit on {device} with {plan.tuning.warps} warps")
        _resident[key] = found
    return _programs(device, min(plan.tuning.programs, found), plan.tiles)


def balance_(grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float) -> tuple[Tensor, Tensor]:
    """One cooperative launch, or two (`device.launches`)."""
    shape, device = ema.shape, ema.device
    num_tasks, num_params = shape
    plan = _dense_plan(device, shape, _stride(grads), grads.dtype, ema.dtype, scale)
    out, norms = grads.new_empty(num_params), grads.new_empty(num_tasks, dtype=plan.norms)
    with driver.current(device):
        space = workspace(device)
        tensors = (
            grads, ema, out, norms, space.scratch("slots", plan.slots), space.scratch("weights", 2 * num_tasks),
            space.counters,
        )  # fmt: skip
        numbers = (plan.units, plan.grad_units, *_bits(beta, 1.0 - beta, eps, constant), num_tasks)
        if driver.launches(device)[0] == 1:
            try:
                plan.launch(device, True, tensors, numbers)
                return out, norms
            except RuntimeError as error:
                driver.refuse(device, error)
        plan.launch(device, False, tensors, numbers)
    return out, norms


def accumulate_(
    row: Tensor | None,
    sumsq: Tensor,
    grads: Gradients,
    segments: Tensor,
    coefficients: Coefficients,
    loss_scale: Tensor | None,
) -> None:
    """One launch."""
    device = sumsq.device
    with driver.current(device):
        if not isinstance(coefficients, Tensor):
            coefficients = tables.numbers(coefficients, device)
        addresses, codes = tables.addresses(grads, device)
        size = max(tables.widest(codes), 0 if row is None else row.element_size())
        fast = size == 8 or fast_fp64(driver.capability(device))
        line = "accumulate narrow" if size == 2 else "accumulate"
        if row is None:
            line = "sum" if fast else "sum in pairs"
        numel = int(segments[:, 1].sum()) if row is None else row.numel()
        tuning = _tuning(line, device, numel, size, vec=16 // size)
        chunks, aligned = tables.chunks(segments, CHUNK_BLOCKS * tuning.block, device)
        grid = _programs(device, tuning.programs, len(chunks))
        space = workspace(device)
        _launch(
            row_kernels.accumulate_kernel, grid, row, addresses, chunks, coefficients, sumsq,
            space.scratch("slots", _num_slots(grid, len(chunks))), space.counters,
            None if loss_scale is None else loss_scale.to(device), len(chunks),
            CODES=codes, BLOCK=tuning.block, tuning=tuning,
            ROW_ALIGNED=row is None or (aligned and row.data_ptr() % 16 == 0),
            FAST_FP64=fast,
        )  # fmt: skip


def any_nonzero(grads: Sequence[Tensor]) -> Tensor:
    """A fill and a launch, which reads a block a program of most gradients."""
    device, (given, segments) = grads[0].device, tables.in_any_order(grads)
    with driver.current(device):
        addresses, codes = tables.addresses(given, device)
        tuning = _tuning("sum", device, int(segments[:, 1].sum()), tables.widest(codes), vec=1)
        chunks, _ = tables.chunks(segments, CHUNK_BLOCKS * tuning.block, device)
        grid, found = _programs(device, 2, len(chunks)), torch.zeros(1, dtype=torch.int32, device=device)
        args = addresses, chunks, found, len(chunks)
        _launch(row_kernels.any_nonzero_kernel, grid, *args, CODES=codes, BLOCK=tuning.block, tuning=tuning)
    return found.view(torch.bool)[:1]  # its lowest byte


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """One launch."""
    num_tasks, num_params = rows.shape
    device, stride = rows.device, _stride(rows)
    size = out.element_size()
    vec = min(_vector(num_params, stride), 16 // max(rows.element_size(), size))
    tuning = _tuning("combine", device, num_params, max(rows.element_size(), size // 2), vec)
    grid = _programs(device, tuning.programs, -(-num_params // tuning.block))
    with driver.current(device):
        _launch(
            row_kernels.combine_out_kernel, grid, rows, weights.contiguous(), out, workspace(device).counters,
            num_params // vec, stride // vec, int(accumulate), num_tasks, VEC=vec, BLOCK=tuning.block, tuning=tuning,
        )  # fmt: skip


def balance_rows_(step: BalanceRows) -> None:
    """One launch for all of it."""
    rows, stats, active, loss_scale = step.rows, step.stats, step.active, step.loss_scale
    num_tasks, num_params = rows.shape
    device = rows.device
    size = max(out.element_size() for out in step.outs)
    vec = _vector(rows.stride(0), *step.starts, *(out.numel() for out in step.outs))
    vec = min(vec, 16 // max(rows.element_size(), size))
    tuning = _tuning("combine", device, num_params, max(rows.element_size(), size // 2), vec)
    groups: list[Any] = []
    for out, start in zip(step.outs, step.starts, strict=True):
        groups += (out, start // vec, out.numel() // vec)
    groups += [None, 0, 0] * (4 - len(step.outs))
    grid = _programs(device, tuning.programs, -(-num_params // tuning.block))
    with driver.current(device):
        space = workspace(device)
        _launch(
            row_kernels.balance_rows_kernel, grid, rows, stats.sumsq, stats.norms, stats.weights,
            stats.nonfinite.view(torch.uint8), stats.nonfinite_steps,
            None if active is None else active.view(torch.uint8), None if loss_scale is None else loss_scale.to(device),
            space.scratch("weights", grid * 2 * num_tasks), space.counters, *groups, rows.stride(0) // vec,
            *_bits(step.propagate_above, step.eps, step.constant, 0.0)[:3], int(step.fresh), int(step.accumulate),
            num_tasks, K_PAD=_pad(num_tasks), VEC=vec, BLOCK=tuning.block, SCALE=step.scale,
            tuning=tuning,
        )  # fmt: skip


def gramian(rows: Tensor) -> Tensor:
    """One launch over the rows, a small one to add the slots."""
    num_tasks, num_params = rows.shape
    if rows.dtype == torch.float64:  # Triton 3.3 has no fp64 product; a rare case, and cuBLAS does it well
        product = rows @ rows.T
        return 0.5 * (product + product.T)
    device, stride = rows.device, _stride(rows)
    pad = _pad(num_tasks, 16)
    tuning = choose("gramian", driver.capability(device), pad)
    block = max(16, tuning.block * 4 // rows.element_size())  # as many bytes of a row in every dtype
    vec = _vector(num_params, stride)
    grid = _programs(device, tuning.programs, -(-num_params // (block * GRAMIAN_TILES)))
    out = torch.empty(num_tasks, num_tasks, dtype=torch.float32, device=device)
    with driver.current(device):
        slots = workspace(device).scratch("slots", grid * pad * pad)
        _launch(
            row_kernels.gramian_kernel, grid, rows, slots, num_params // vec, stride // vec,
            K=num_tasks, K_PAD=pad, VEC=vec, BLOCK=block, TILES_A_PART=GRAMIAN_TILES, tuning=tuning,
        )  # fmt: skip
        _launch(
            row_kernels.add_gramians_kernel, num_tasks, slots, out, grid, K=num_tasks, K_PAD=pad, COLUMNS=pad,
            tuning=tuning,
        )  # fmt: skip
    return out
