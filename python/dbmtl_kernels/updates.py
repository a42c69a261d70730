"""RowUpdate: one update of one row, fed while a backward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops
from .layout import ParameterLayout

# On a CPU a gradient is gathered while it is still in cache: as soon as this much of a task's has arrived.
FLUSH_BYTES = 2 << 20
# Turns the seed of an update into another, far from those of all updates, which are consecutive numbers.
AGAIN = 1 << 62


class Coefficients(NamedTuple):
    """Of a row's update; see `ops.accumulate_`. ``device`` holds decay, gain and seed where a graph is captured."""

    decay: float
    gain: float
    loss_scale: Tensor | None = None
    seed: int | None = None
    device: Tensor | None = None

    def again(self) -> Coefficients:
        """For more of the same update: the row had its decay."""
        if self.device is None:
            return self._replace(decay=1.0, seed=None if self.seed is None else self.seed ^ AGAIN)
        _, gain, bits = self.device.split(1)
        return self._replace(
            device=torch.cat([torch.ones_like(gain), gain, (bits.view(torch.int64) ^ AGAIN).view(gain.dtype)])
        )


class Update(Protocol):
    """One update of one row."""

    def add(self, index: int, grad: Tensor) -> None:
        """The gradient of parameter ``index``. A second one (a re-entrant checkpoint) is added to the first."""

    def finish(self, grads: list[Tensor | None]) -> None:
        """The gradients that `add` did not get; a parameter that never had one counts as zeros."""

    def abandon(self) -> None:
        """The backward pass failed: leave the books true to the row as it is."""


class RowUpdate:
    """One update of one row, fed with gradients as a backward pass produces them (an `Update`).

    On a CPU, gathering early finds gradients still in cache. Elsewhere all is gathered by `finish`, in one launch.

    Args:
        layout: where each parameter lies in the row.
        row: (row_numel,), updated in place.
        sumsq: one number, overwritten with the row's sum of squares.
        begin: gives the coefficients; called once, before anything is written.
        backend: "auto" or a name.
        early: gather during the pass.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        row: Tensor,
        sumsq: Tensor,
        begin: Callable[[], Coefficients],
        backend: str,
        early: bool,
    ) -> None:
        self._layout = layout
        self._row = row
        self._sumsq = sumsq
        self._begin = begin
        self._backend = backend
        self._early = early
        self._coefficients: Coefficients | None = None
        self._indices: list[int] = []
        self._grads: list[Tensor | None] = []
        self._bytes = 0
        self._arrived: set[int] = set()
        self._parts: list[Tensor] = []  # sums of squares of what was gathered early
        self._again = False

    def add(self, index: int, grad: Tensor) -> None:
        """See `Update`."""
        if index in self._arrived:
            self._flush()
            self._again = True
            self._gather([index], [grad], torch.empty_like(self._sumsq), decayed=True)
            return
        self._arrived.add(index)
        self._indices.append(index)
        self._grads.append(grad)
        self._bytes += grad.nbytes
        if self._bytes >= FLUSH_BYTES and self._early:
            self._flush()

    def finish(self, grads: list[Tensor | None]) -> None:
        """See `Update`."""
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
        count = len(self._layout.parameters)
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
        c = self._coefficients.again() if decayed else self._coefficients
        layout = self._layout
        if layout.permuted:
            grads = [None if g is None else layout.in_row_order(i, g) for i, g in zip(indices, grads, strict=True)]
        segments = layout.segments_of(tuple(indices))
        ops.accumulate_(
            self._row, sumsq, grads, segments, c.decay, c.gain, c.loss_scale, c.seed, self._backend, c.device
        )
