"""RowCollector: the gradients of one task on their way into its row, while a backward pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .layout import ParameterLayout

# On a CPU gradients are collected while they are in cache: as soon as this much of a task's has arrived.
FLUSH_BYTES = 2 << 20


class RowCollector:
    """One update of one row, fed with gradients as a backward pass produces them.

    What `add` gets is accumulated at once, while it is in cache. What `finish` gets is accumulated in one launch, or if
    ``early`` 2 MB at a time: the order of sums does not depend on when gradients came.

    Args:
        layout: where each parameter lies in the row.
        row: (row_numel,), updated in place.
        sumsq: one number, overwritten with the row's sum of squares.
        coefficients: decay and gain.
        loss_scale: one number that the gradients carry and the row must not.
        backend: "auto" or a name.
        early: gradients are collected during the pass.

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
        early: bool = False,
    ) -> None:
        self._layout, self._row, self._sumsq = layout, row, sumsq
        self._coefficients, self._loss_scale = coefficients, loss_scale
        self._backend, self._early = backend, early
        self.fed = False
        self._arrived: set[int] = set()
        self._parts: list[Tensor] = []  # sums of squares of what was accumulated early
        self._twice = False

    def add(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """Gradients of some parameters. A second one of a parameter (a re-entrant checkpoint) is added to the first."""
        if not self._arrived.isdisjoint(indices):
            self._add_one_by_one(indices, grads)
            return
        self._arrived.update(indices)
        self._parts.append(torch.empty_like(self._sumsq))
        self._accumulate(indices, grads, self._parts[-1])

    def finish(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """The rest, and the pass is over; a parameter that never had a gradient counts as zeros."""
        if not self._arrived.isdisjoint(indices):
            self._add_one_by_one(indices, grads)
            indices, grads = [], []
        if self._early:
            indices, grads = self._add_large(indices, grads)
        count = len(self._layout.parameters)
        if len(self._arrived) + len(indices) < count:
            self._arrived.update(indices)
            missing = [index for index in range(count) if index not in self._arrived]
            indices, grads = indices + missing, [*grads, *[None] * len(missing)]
        if not self._parts:  # the usual case on a GPU: all in one call, straight to where the sum belongs
            self._accumulate(indices, grads, self._sumsq)
        else:
            if indices:
                self._parts.append(torch.empty_like(self._sumsq))
                self._accumulate(indices, grads, self._parts[-1])
            self._sumsq.copy_(torch.cat(self._parts).sum())
        if self._twice:
            self._measure()

    def abandon(self) -> None:
        """The pass failed: make the sum of squares that of the row as it is."""
        if self.fed:
            self._measure()

    def _add_large(self, indices: list[int], grads: list[Tensor | None]) -> tuple[list[int], list[Tensor | None]]:
        """Add what makes FLUSH_BYTES together, again and again; the rest is returned."""
        start = held = 0
        for end, grad in enumerate(grads, 1):
            held += 0 if grad is None else grad.nbytes
            if held >= FLUSH_BYTES:
                self.add(indices[start:end], grads[start:end])
                start, held = end, 0
        return (indices[start:], grads[start:]) if start else (indices, grads)

    def _add_one_by_one(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """Some are the first of their parameter, some are not."""
        for index, grad in zip(indices, grads, strict=True):
            if index not in self._arrived:
                self.add([index], [grad])
                continue
            self._twice = True
            self._accumulate([index], [grad], torch.empty_like(self._sumsq), decayed=True)

    def _measure(self) -> None:
        count = len(self._layout.parameters)
        self._accumulate(list(range(count)), [None] * count, self._sumsq, decayed=True)

    def _accumulate(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        """Some gradients into the row, and the sum of squares of their part of it into ``sumsq``.

        If ``decayed``, the row had its decay in an earlier call: add to it.
        """
        self.fed = True
        layout, coefficients = self._layout, self._coefficients
        if decayed:
            _, gain = coefficients
            coefficients = torch.stack([torch.ones_like(gain), gain]) if isinstance(gain, Tensor) else (1.0, gain)
        if layout.permuted:
            grads = [None if g is None else layout.in_row_order(i, g) for i, g in zip(indices, grads, strict=True)]
        segments = layout.segments_of(indices)
        ops.accumulate_(self._row, sumsq, grads, segments, coefficients, self._loss_scale, self._backend)
