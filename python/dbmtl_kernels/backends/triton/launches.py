"""Grids, workspaces and launches of the Triton kernels. Every launch goes through `_launch`."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..engine_step import EngineStep
from . import device as driver
from . import rows as row_kernels
from . import tables
from .dense import balance_kernel, combine_kernel, update_kernel
from .tuning import Tuning, choose

# Under TRITON_INTERPRET=1 kernels are plain Python, and their programs run one after another.
INTERPRETED = not isinstance(balance_kernel, triton.runtime.JITFunction)
# The interpreter has no multiprocessors: this many programs stand for them where none waits for another.
INTERPRETED_PROGRAMS = 3
# Blocks of a gradient that a program gathers after one look at the tables.
CHUNK_BLOCKS = 8
GRAMIAN_TILES = 16


def _bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _pad(num_tasks: int, least: int = 2) -> int:
    return max(least, int(triton.next_power_of_2(num_tasks)))


def _vector(*sizes: int) -> int:
    """The largest of 8, 4, 1 that divides all: how many elements the compiler may take together."""
    return next(v for v in (8, 4, 1) if all(size % v == 0 for size in sizes))


def _options(tuning: Tuning, cooperative: bool = False) -> dict[str, Any]:
    """For the compiler. Products and sums are not fused, so that state has the bits of the CPU kernels."""
    options = {"num_warps": tuning.warps, "maxnreg": tuning.registers, "enable_fp_fusion": False}
    return {**options, "launch_cooperative_grid": True} if cooperative else options


def _launch(kernel: Any, grid: int, *args: Any, tuning: Tuning, cooperative: bool = False, **meta: Any) -> None:
    options = {} if INTERPRETED else _options(tuning, cooperative)
    kernel[(grid,)](*args, **meta, **options)


class Workspace:
    """Scratch of one stream: slots, weights, and the counters that set themselves back to zero."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = torch.empty(0, dtype=torch.float64, device=device)
        self._weights = torch.empty(0, dtype=torch.float64, device=device)
        self.counters = torch.zeros(4, dtype=torch.int32, device=device)

    @property
    def barrier(self) -> Tensor:
        """Two counters of the grid barrier."""
        return self.counters[:2]

    @property
    def ticket(self) -> Tensor:
        """The counter of whoever is last."""
        return self.counters[2:3]

    def slots(self, count: int) -> Tensor:
        """Room for ``count`` numbers; what is in it is undefined."""
        if self._slots.numel() < count:
            self._slots = torch.empty(count, dtype=torch.float64, device=self._device)
        return self._slots

    def weights(self, count: int) -> Tensor:
        """Room for ``count`` numbers, apart from the slots."""
        if self._weights.numel() < count:
            self._weights = torch.empty(count, dtype=torch.float64, device=self._device)
        return self._weights


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace(device: torch.device) -> Workspace:
    """The workspace of the current stream. A captured launch gets its own, cleared within the graph."""
    if device.type == "cpu":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return Workspace(device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _workspaces.get((device, stream))
    if found is None:
        found = _workspaces[device, stream] = Workspace(device)
    return found


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _tuning(kernel: str, device: torch.device, size: int) -> Tuning:
    tuning = choose(kernel, _capability(device), size)
    if INTERPRETED:  # every block costs the same there, however long: at most a dozen or so a row
        block = min(1 << 16, int(triton.next_power_of_2(size // 16 + 1)))
        tuning = tuning._replace(block=max(tuning.block, block))
    return tuning


def _programs(device: torch.device, tuning: Tuning, tiles: int) -> int:
    """Programs of a persistent grid in which none waits for another."""
    most = INTERPRETED_PROGRAMS if INTERPRETED else driver.multiprocessors(device) * tuning.programs
    return max(1, min(tiles, most))


_resident: dict[Any, int] = {}


def _resident_programs(device: torch.device, kernel: Any, args: tuple[Any, ...], tuning: Tuning, meta: Any) -> int:
    """How many programs of a cooperative kernel a multiprocessor holds; asked once for each specialisation."""
    dtypes = tuple((a.dtype, a.data_ptr() % 16 == 0) for a in args if isinstance(a, Tensor))
    key = (device, kernel, dtypes, tuning, tuple(sorted(meta.items())))
    found = _resident.get(key)
    if found is None:
        compiled = kernel.warmup(*args, grid=(1,), **meta, **_options(tuning, cooperative=True))
        compiled._init_handles()
        found = driver.resident_programs(compiled.function, 32 * tuning.warps, compiled.metadata.shared)
        if found < 1:
            raise RuntimeError(f"{kernel.__name__} does not fit on {device} with {tuning.warps} warps")
        _resident[key] = found
    return found


class _DensePlan(NamedTuple):
    """What `balance_` needs to know of a problem, worked out once."""

    tuning: Tuning
    units: int
    grad_units: int
    tiles: int
    pad: int
    most: int  # programs, at most
    common: dict[str, Any]
    weighing: dict[str, Any]
    rounding: dict[str, Any]


@lru_cache(1024)
def _dense_plan(
    device: torch.device, num_tasks: int, num_params: int, stride: int, scale: str, stochastic: bool, size: int
) -> _DensePlan:
    grad_stride = stride if num_tasks > 1 else num_params
    vec = _vector(num_params, grad_stride)
    tuning = _tuning("balance", device, num_params)
    if size == 8 or vec == 1:  # float64, and elements one by one, take more registers
        tuning = tuning._replace(block=tuning.block // 2)
    pad = _pad(num_tasks)
    return _DensePlan(
        tuning,
        num_params // vec,
        grad_stride // vec,
        -(-num_params // tuning.block),
        pad,
        max(driver.multiprocessors(device) * tuning.programs, INTERPRETED_PROGRAMS),
        {"K": num_tasks, "K_PAD": pad, "VEC": vec, "BLOCK": tuning.block},
        {"SCALE": scale, "UNROLL": tuning.unroll},
        {"STOCHASTIC": stochastic},
    )


def balance_(
    grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
) -> tuple[Tensor, Tensor]:
    """See `functional.balance_`: one cooperative launch, or two (`device.launches`)."""
    num_tasks, num_params = ema.shape
    device = ema.device
    out = torch.empty(num_params, dtype=grads.dtype, device=device)
    norms = torch.empty(num_tasks, dtype=torch.float64 if ema.dtype == torch.float64 else torch.float32, device=device)
    plan = _dense_plan(device, num_tasks, num_params, grads.stride(0), scale, seed is not None, ema.element_size())
    with _on(device):
        space = workspace(device)
        slots, weights = space.slots(plan.most * plan.pad), space.weights(plan.most * 2 * num_tasks)
        decay, gain, eps_bits, constant_bits = _bits(beta), _bits(1.0 - beta), _bits(eps), _bits(constant)
        if driver.launches(device)[0] == 1:
            args = (
                grads, ema, out, norms, slots, weights, space.barrier, plan.units, plan.grad_units, decay, gain,
                eps_bits, constant_bits, seed or 0,
            )  # fmt: skip
            meta = {**plan.common, **plan.weighing, **plan.rounding}
            grid = 1  # interpreted, programs run one after another: two would wait for each other for ever
            if not INTERPRETED:
                resident = _resident_programs(device, balance_kernel, args, plan.tuning, meta)
                per = min(plan.tuning.programs, resident)
                grid = max(1, min(plan.tiles, driver.multiprocessors(device) * per))
            _launch(balance_kernel, grid, *args, tuning=plan.tuning, cooperative=True, **meta)
        else:
            grid = _programs(device, plan.tuning, plan.tiles)
            _launch(
                update_kernel, grid, grads, ema, slots, plan.units, plan.grad_units, decay, gain, seed or 0,
                tuning=plan.tuning, **plan.common, **plan.rounding,
            )  # fmt: skip
            _launch(
                combine_kernel, grid, ema, out, norms, slots, weights, plan.units, grid, eps_bits, constant_bits,
                tuning=plan.tuning, **plan.common, **plan.weighing,
            )  # fmt: skip
    return out, norms


def accumulate_(
    row: Tensor,
    sumsq: Tensor,
    grads: list[Tensor | None],
    segments: Tensor,
    decay: float,
    gain: float,
    loss_scale: Tensor | None,
    seed: int | None,
    coefficients: Tensor | None,
) -> None:
    """See `ops.accumulate_`: one launch."""
    device = row.device
    tuning = _tuning("accumulate", device, row.numel())
    with _on(device):
        table, codes = tables.addresses(grads, device)
        chunks, aligned = tables.chunks(segments, CHUNK_BLOCKS * tuning.block, device)
        grid = _programs(device, tuning, len(chunks))
        space = workspace(device)
        _launch(
            row_kernels.accumulate_kernel, grid, row, table, chunks, sumsq, space.slots(grid), space.ticket,
            None if loss_scale is None else loss_scale.to(device), coefficients, len(chunks), _bits(decay), _bits(gain),
            seed or 0, F32=0 in codes, BF16=1 in codes, F16=2 in codes, F64=3 in codes,
            ROW_ALIGNED=aligned and row.data_ptr() % 16 == 0, BLOCK=tuning.block, STOCHASTIC=seed is not None,
            tuning=tuning,
        )  # fmt: skip


def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """See `ops.combine_out`: one launch."""
    num_tasks, num_params = rows.shape
    device = rows.device
    tuning = _tuning("combine", device, num_params)
    stride = rows.stride(0) if num_tasks > 1 else num_params
    vec = _vector(num_params, stride)
    grid = _programs(device, tuning, -(-num_params // tuning.block))
    with _on(device):
        _launch(
            row_kernels.combine_out_kernel, grid, rows, weights.contiguous(), out, num_params // vec, stride // vec,
            int(accumulate), K=num_tasks, VEC=vec, BLOCK=tuning.block, UNROLL=tuning.unroll, tuning=tuning,
        )  # fmt: skip


def balance_rows_(step: EngineStep) -> None:
    """See `ops.balance_rows_`: one launch for all of it."""
    rows, outs, active, loss_scale = step.rows, step.outs, step.active, step.loss_scale
    num_tasks, num_params = rows.shape
    device = rows.device
    tuning = _tuning("combine", device, num_params)
    vec = _vector(rows.stride(0), *step.starts, *(out.numel() for out in outs))
    groups: list[Any] = []
    for out, start in zip(outs, step.starts, strict=True):
        groups += (out, start // vec, out.numel() // vec)
    groups += [None, 0, 0] * (4 - len(outs))
    grid = _programs(device, tuning, -(-num_params // tuning.block))
    with _on(device):
        space = workspace(device)
        _launch(
            row_kernels.balance_rows_kernel, grid, rows, step.sumsq, step.broken.view(torch.uint8),
            step.nonfinite_steps, step.norms, step.weights, None if active is None else active.view(torch.uint8),
            None if loss_scale is None else loss_scale.to(device), space.weights(grid * 2 * num_tasks), space.ticket,
            *groups, rows.stride(0) // vec, _bits(step.eps), _bits(step.constant), int(step.fresh),
            int(step.accumulate), K=num_tasks, K_PAD=_pad(num_tasks), VEC=vec, BLOCK=tuning.block, SCALE=step.scale,
            UNROLL=tuning.unroll, tuning=tuning,
        )  # fmt: skip


def gramian(rows: Tensor) -> Tensor:
    """See `ops.gramian`: one launch over the rows, a small one to add the slots."""
    num_tasks, num_params = rows.shape
    if rows.dtype == torch.float64:  # Triton 3.3 has no fp64 product; a rare case, and cuBLAS does it well
        product = rows @ rows.T
        return 0.5 * (product + product.T)
    device = rows.device
    pad = _pad(num_tasks, 16)
    tuning = _tuning("gramian", device, pad)
    block = max(16, tuning.block * 4 // rows.element_size())  # as many bytes of a row in every dtype
    stride = rows.stride(0) if num_tasks > 1 else num_params
    vec = _vector(num_params, stride)
    grid = _programs(device, tuning, -(-num_params // (block * GRAMIAN_TILES)))
    out = torch.empty(num_tasks, num_tasks, device=device)
    with _on(device):
        slots = workspace(device).slots(grid * pad * pad)
        _launch(
            row_kernels.gramian_kernel, grid, rows, slots, num_params // vec, stride // vec,
            K=num_tasks, K_PAD=pad, VEC=vec, BLOCK=block, TILES=GRAMIAN_TILES, tuning=tuning,
        )  # fmt: skip
        _launch(
            row_kernels.add_gramians_kernel, num_tasks, slots, out, grid, K=num_tasks, K_PAD=pad, COLUMNS=pad,
            tuning=tuning,
        )  # fmt: skip
    return out
