"""RowCollector: the gradients of one task on their way into its row, while a backward pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .layout import ParameterLayout

# On a CPU a gradient is collected while it is still in cache: as soon as this much of a task's has arrived.
FLUSH_BYTES = 2 << 20


class RowCollector:
    """One update of one row, fed with gradients as a backward pass produces them.

    On a CPU, collecting early finds gradients still in cache. Elsewhere `finish` collects all of them in one launch.

    Args:
        layout: where each parameter lies in the row.
        row: (row_numel,), updated in place.
        sumsq: one number, overwritten with the row's sum of squares.
        coefficients: decay and gain.
        loss_scale: one number that the gradients carry and the row must not.
        backend: "auto" or a name.
        early: collect during the pass.

    Attributes:
        fed: whether the row was written to.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        row: Tensor,
        sumsq: Tensor,
        coefficients: ops.Coefficients,
        loss_scale: Tensor | None,
        backend: str,
        early: bool,
    ) -> None:
        self._layout, self._row, self._sumsq = layout, row, sumsq
        self._coefficients, self._loss_scale = coefficients, loss_scale
        self._backend, self._early = backend, early
        self.fed = False
        self._indices: list[int] = []
        self._grads: list[Tensor | None] = []
        self._bytes = 0
        self._arrived: set[int] = set()
        self._parts: list[Tensor] = []  # sums of squares of what was collected early
        self._twice = False

    def add(self, index: int, grad: Tensor) -> None:
        """The gradient of parameter ``index``. A second one (a re-entrant checkpoint) is added to the first."""
        if index in self._arrived:
            self._flush()
            self._twice = True
            self._accumulate([index], [grad], torch.empty_like(self._sumsq), decayed=True)
            return
        self._arrived.add(index)
        self._indices.append(index)
        self._grads.append(grad)
        self._bytes += grad.nbytes
        if self._bytes >= FLUSH_BYTES and self._early:
            self._flush()

    def finish(self) -> None:
        """The pass is over; a parameter that never had a gradient counts as zeros."""
        count = len(self._layout.parameters)
        if len(self._arrived) < count:
            for index in range(count):
                if index not in self._arrived:
                    self._indices.append(index)
                    self._grads.append(None)
        if not self._parts:  # the usual case on a GPU: all in one call, straight to where the sum belongs
            self._accumulate(self._indices, self._grads, self._sumsq)
        else:
            self._flush()
            self._sumsq.copy_(torch.cat(self._parts).sum())
        if self._twice:
            self._measure()

    def abandon(self) -> None:
        """The pass failed: make the sum of squares that of the row as it is."""
        if self.fed:
            self._measure()

    def _measure(self) -> None:
        count = len(self._layout.parameters)
        self._accumulate(list(range(count)), [None] * count, self._sumsq, decayed=True)

    def _flush(self) -> None:
        if self._indices:
            self._parts.append(torch.empty_like(self._sumsq))
            self._accumulate(self._indices, self._grads, self._parts[-1])
            self._indices, self._grads, self._bytes = [], [], 0

    def _accumulate(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        """Some gradients into the row, and the sum of squares of their part of it into ``sumsq``.

        If ``decayed``, the row had its decay in an earlier call: add to it.
        """
        self.fed = True
        layout, coefficients = self._layout, self._coefficients
        if decayed:
            decay, gain = coefficients
            coefficients = torch.stack([torch.ones_like(gain), gain]) if isinstance(gain, Tensor) else (1.0, gain)
        if layout.permuted:
            grads = [None if g is None else layout.in_row_order(i, g) for i, g in zip(indices, grads, strict=True)]
        segments = layout.segments_of(tuple(indices))
        ops.accumulate_(self._row, sumsq, grads, segments, coefficients, self._loss_scale, self._backend)
