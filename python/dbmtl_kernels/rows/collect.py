"""RowCollector: the gradients of one task on their way into its row, while a backward pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .layout import ParameterLayout
from .zeros import Zeros, continued, deferred_coefficients

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
        coefficients: decay and gain of the first gradient in a step.
        loss_scale: one number that the gradients carry and the row must not.
        backend: "auto" or a name.
        early: gradients are collected during the pass.
        again: the task had a pass in this step before: the row is not decayed again.
        zeros: a pass of zeros alone shall leave row and sum as they are: what finds out.
        fed: (1,) bool, whether the task was fed in this step; used and updated if ``zeros`` is deferred.

    Attributes:
        fed: whether the row was written to (if ``zeros`` is deferred, perhaps with what was there).
        empty: after `finish`, whether nothing was fed because all was zero; None where the host does not know.
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
        again: bool = False,
        zeros: Zeros | None = None,
        fed: Tensor | None = None,
    ) -> None:
        self._layout, self._row, self._sumsq = layout, row, sumsq
        if again and (zeros is None or not zeros.deferred):
            coefficients = continued(coefficients)
        self._coefficients, self._loss_scale = coefficients, loss_scale
        self._backend, self._early = backend, early
        self._again, self._zeros, self._was_fed = again, zeros, fed
        self.fed = self._finished = False
        self.empty: bool | None = False
        self._arrived: set[int] = set()
        self._parts: list[Tensor] = []  # sums of squares of what was accumulated early
        self._twice = False

    def add(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """Gradients of some parameters. A second one of a parameter (a re-entrant checkpoint) is added to the first.

        While all are zero, and such a pass would not count, they are left for `finish`.
        """
        if self._zeros is not None and not self._zeros.look(grads):
            return
        if not self._arrived.isdisjoint(indices):
            self._add_one_by_one(indices, grads)
            return
        self._arrived.update(indices)
        self._parts.append(torch.empty_like(self._sumsq))
        self._accumulate(indices, grads, self._parts[-1])

    def finish(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """The rest, and the pass is over; a parameter that never had a gradient counts as zeros."""
        if self._zeros is not None:
            counts = self._zeros.decide(grads)
            if isinstance(counts, Tensor):
                self._defer(counts)
            elif not counts:
                self.empty = True
                return
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
        if self._twice:  # make the sum of squares that of the row as it is
            self._accumulate(list(range(count)), [None] * count, self._sumsq, decayed=True)
        self._finished = True

    def abandon(self) -> bool:
        """The pass failed.

        Returns:
            whether the row is half written, and must be dropped.
        """
        return self.fed and not self._finished

    def _defer(self, counts: Tensor) -> None:
        """Whether the pass counts only the device knows."""
        assert self._was_fed is not None
        self.empty = None
        self._coefficients = deferred_coefficients(
            self._coefficients, counts.to(self._row.device), self._again, self._was_fed, self._sumsq
        )

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

    def _accumulate(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        """Some gradients into the row, and the sum of squares of their part of it into ``sumsq``.

        If ``decayed``, the row had its decay in an earlier call: add to it.
        """
        self.fed = True
        layout, coefficients = self._layout, self._coefficients
        if decayed:
            coefficients = continued(coefficients)
        if layout.permuted:
            grads = [None if g is None else layout.in_row_order(i, g) for i, g in zip(indices, grads, strict=True)]
        segments = layout.segments_of(indices)
        ops.accumulate_(self._row, sumsq, grads, segments, coefficients, self._loss_scale, self._backend)
