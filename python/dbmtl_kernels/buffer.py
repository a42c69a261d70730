"""TaskGradientBuffer: the K x P state, one padded row per task, and the four things done to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, ops
from .backends import native
from .layout import ParameterLayout
from .rounding import update_seed

# On a CPU a gradient is gathered while it is still in cache: as soon as this much of a task's has arrived.
FLUSH_BYTES = 2 << 20


class Coefficients(NamedTuple):
    """Of a row's update; see `ops.accumulate_`."""

    decay: float
    gain: float
    loss_scale: Tensor | None = None
    seed: int | None = None


def allocate(*shape: int, dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """An empty (or zeroed) tensor; on a CPU with huge pages under it where that helps."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    native.advise_huge_pages(out)
    return out.zero_() if zero else out


class TaskGradientBuffer:
    """The task gradients (their EMA) of K tasks, as one (K, row_numel) tensor.

    Args:
        layout: where each parameter lies in a row.
        num_tasks: K.
        backend: "auto" or a backend by name.

    Attributes:
        rows: (K, row_numel) in ``layout.state_dtype``; padding is zero.
        sumsq: (K,) sums of squares of the rows, float64 where the device has it.
        norms, weights: (K,) of the last `balance`, in the dtype of ``sumsq``.
        broken: (K,) bool, tasks whose gradient was not finite in the step of the last `balance`.
        nonfinite_steps: (K,) int64, in how many steps that was so.
        early: whether gradients are gathered while a backward pass runs (on a CPU), or at its end in one call.
    """

    def __init__(self, layout: ParameterLayout, num_tasks: int, backend: str = "auto") -> None:
        self.layout = layout
        self.backend = backend
        device = layout.device
        self.rows = allocate(num_tasks, layout.row_numel, dtype=layout.state_dtype, device=device, zero=True)
        self.early = backends.resolve(backend, device).gathers_early(device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sumsq = torch.zeros(num_tasks, dtype=wide, device=device)
        self.norms = torch.zeros_like(self.sumsq)
        self.weights = torch.zeros_like(self.sumsq)
        self.broken = torch.zeros(num_tasks, dtype=torch.bool, device=device)
        self.nonfinite_steps = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def accumulate(
        self,
        task: int,
        grads: list[Tensor | None],
        decay: float,
        gain: float,
        loss_scale: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        """``rows[task] <- decay * rows[task] + gain / loss_scale * grads`` in one pass; see `ops.accumulate_`.

        Args:
            task: which row.
            grads: a gradient or None for each parameter of the layout, in its order.
            decay: factor of the row.
            gain: factor of the gradients.
            loss_scale: one number that the gradients carry and the state must not.
            seed: of the stochastic rounding of bfloat16 rows; None rounds to nearest.
        """
        RowUpdate(self, task, lambda: Coefficients(decay, gain, loss_scale, seed)).finish(grads)

    def balance(
        self,
        flats: dict[torch.dtype, Tensor],
        eps: float,
        scale: str | float,
        *,
        active: Sequence[bool] | None = None,
        loss_scale: Tensor | None = None,
        fresh: bool = True,
        accumulate: bool = False,
    ) -> None:
        """Weights, books and the balanced gradient in one call; see `ops.balance_rows_`.

        Args:
            flats: see `new_flats`; overwritten, or added to if ``accumulate``.
            eps: added to the norms.
            scale: alpha: a name or a number.
            active: which tasks have a say; None for all.
            loss_scale: one number that the balanced gradient shall carry.
            fresh: whether this is the first call of a step.
            accumulate: add to ``flats``.
        """
        name, constant = (scale, 0.0) if isinstance(scale, str) else ("constant", scale)
        groups = self.layout.groups
        ops.balance_rows_(
            self.rows, self.sumsq, self.broken, self.nonfinite_steps, self.norms, self.weights,
            [flats[g.dtype] for g in groups], [g.start for g in groups], self._mask(active), loss_scale, eps, name,
            constant, fresh, accumulate, self.backend,
        )  # fmt: skip

    def _mask(self, active: Sequence[bool] | None) -> Tensor | None:
        """On the device; remembered, as steps repeat them."""
        if active is None or all(active):
            return None
        key = tuple(active)
        if key not in self._masks:
            if len(self._masks) >= 256:
                self._masks.clear()
            mask = torch.tensor(key)
            pinned = mask.pin_memory() if self.rows.device.type == "cuda" else mask
            self._masks[key] = pinned.to(self.rows.device, non_blocking=True)
        return self._masks[key]

    def combine(self, weights: Tensor, flats: dict[torch.dtype, Tensor], accumulate: bool = False) -> None:
        """``sum_t weights[t] * rows[t]`` into one flat tensor per parameter dtype (see `new_flats`), in place."""
        for group in self.layout.groups:
            rows = self.rows[:, group.start : group.stop]
            ops.combine_out(rows, weights, flats[group.dtype], accumulate, self.backend)

    def new_flats(self) -> dict[torch.dtype, Tensor]:
        """Room for a balanced gradient: one tensor of bytes, seen as one flat tensor per parameter dtype."""
        groups = self.layout.groups
        sizes = [(g.stop - g.start) * g.dtype.itemsize for g in groups]
        if len(groups) == 1:
            only = groups[0]
            return {only.dtype: allocate(only.stop - only.start, dtype=only.dtype, device=self.layout.device)}
        storage = allocate(sum(sizes), dtype=torch.uint8, device=self.layout.device)
        parts = storage.split(sizes)
        return {group.dtype: part.view(group.dtype) for group, part in zip(groups, parts, strict=True)}

    def gramian(self) -> Tensor:
        """(K, K) inner products of the rows, float32 (float64 of float64 rows)."""
        return torch.as_tensor(ops.gramian(self.rows, self.backend))


class RowUpdate:
    """One update of one row, fed with gradients as a backward pass produces them.

    On a CPU, gathering early finds gradients still in cache. Elsewhere all is gathered by `finish`, in one launch.

    Args:
        buffer: whose row.
        task: which row.
        begin: gives the coefficients; called once, before anything is written.
    """

    def __init__(self, buffer: TaskGradientBuffer, task: int, begin: Callable[[], Coefficients]) -> None:
        self._buffer = buffer
        self._task = task
        self._sumsq = buffer.sumsq[task : task + 1]
        self._begin = begin
        self._coefficients: Coefficients | None = None
        self._indices: list[int] = []
        self._grads: list[Tensor | None] = []
        self._bytes = 0
        self._arrived: set[int] = set()
        self._parts: list[Tensor] = []  # sums of squares of what was gathered early
        self._again = False

    def add(self, index: int, grad: Tensor) -> None:
        """The gradient of parameter ``index``. A second one (a re-entrant checkpoint) is added to the first."""
        if index in self._arrived:
            self._flush()
            self._again = True
            self._gather([index], [grad], torch.empty_like(self._sumsq), decayed=True)
            return
        self._arrived.add(index)
        self._indices.append(index)
        self._grads.append(grad)
        self._bytes += grad.nbytes
        if self._bytes >= FLUSH_BYTES and self._buffer.early:
            self._flush()

    def finish(self, grads: list[Tensor | None]) -> None:
        """The gradients that `add` did not get; a parameter that never had one counts as zeros."""
        for index, grad in enumerate(grads):
            if grad is not None:
                self.add(index, grad)
        if len(self._arrived) < len(grads):
            for index in range(len(grads)):
                if index not in self._arrived:
                    self._indices.append(index)
                    self._grads.append(None)
        if not self._parts:  # the usual case on a GPU: all in one call, straight to where the sum belongs
            self._gather(self._indices, self._grads, self._sumsq)
        else:
            self._flush()
            self._sumsq.copy_(torch.cat(self._parts).sum())
        if self._again:
            self._measure()

    def abandon(self) -> None:
        """The pass failed: make the sum of squares that of the row as it is."""
        if self._coefficients is not None:
            self._measure()

    def _measure(self) -> None:
        count = len(self._buffer.layout.parameters)
        self._gather(list(range(count)), [None] * count, self._sumsq, decayed=True)

    def _flush(self) -> None:
        if self._indices:
            self._parts.append(torch.empty_like(self._sumsq))
            self._gather(self._indices, self._grads, self._parts[-1])
            self._indices, self._grads, self._bytes = [], [], 0

    def _gather(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        """Gather some gradients and leave the sum of squares of their part of the row in ``sumsq``.

        If ``decayed``, the row had its decay in an earlier call: add to it.
        """
        if self._coefficients is None:
            self._coefficients = self._begin()
        decay, gain, loss_scale, seed = self._coefficients
        if decayed:
            decay, seed = 1.0, None if seed is None else update_seed(seed, 1)
        buffer, layout = self._buffer, self._buffer.layout
        if layout.permuted:
            grads = [None if g is None else layout.in_row_order(i, g) for i, g in zip(indices, grads, strict=True)]
        segments = layout.segments_of(tuple(indices))
        ops.accumulate_(buffer.rows[self._task], sumsq, grads, segments, decay, gain, loss_scale, seed, buffer.backend)
