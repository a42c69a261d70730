"""OneRowBuffer: in place of K rows the sum of the task gradients, each divided by its norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import Coefficients
from .collect import RowCollector
from .rows import Flats, TaskGradientBuffer
from .sharded import ShardedTaskGradientBuffer, Underway
from .split import SplitTaskGradientBuffer
from .zeros import Zeros

NO_ROWS = (
    "{what} needs a row for each task, and this balancer keeps one for all, as beta is 0: "
    "take DBMTL with keep_rows=True"
)


class Held(NamedTuple):
    """The gradient of a task whose norm is not known everywhere yet: its tensors, and where they belong in the row."""

    task: int
    grads: list[Tensor | None]
    segments: Tensor
    loss_scale: Tensor | None


class OneRowBuffer(TaskGradientBuffer):
    """What a step without a moving average needs: P numbers, however many tasks there are, and K norms.

    ::

        u <- u + g_t / (||g_t|| + eps)          as the pass of each task ends
        balanced gradient = alpha * u           alpha: of all norms, known at the end

    u lies where the balanced gradient will, if that is of one dtype, float32 at least and as wide as the state, and
    nothing is there that must stay; else in a row of its own. Till a pass is over and the norm known, the gradients of
    its task are kept as they came. On a CPU, with parameters of such a dtype, they go to a second row while they are in
    cache: what autograd allocates is then used again, where fresh memory would cost more than the arithmetic. Rows
    besides the balanced gradient go with the step.

    float32 holds u and alpha: norms up to some 1e38, divided by the largest loss scale in use.

    Attributes:
        in_flats: u lies where the balanced gradient will.
    """

    def _reset(self, num_tasks: int) -> None:
        super()._reset(num_tasks)
        self.start()

    @property
    def rows(self) -> Tensor:
        """There are none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(NO_ROWS.format(what="this"))

    def start(self) -> None:
        """Nothing is in the row."""
        self._row: Tensor | None = None
        self._any = self.in_flats = False  # _any: something was added
        self._held: Held | None = None
        self._scratch: Tensor | None = None

    def collector(
        self,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None = None,
        again: bool = False,
        skip_zeros: bool | Zeros = False,
    ) -> RowCollector:
        """What keeps the gradients of one backward pass for `add`; see its base."""
        if skip_zeros is True:
            skip_zeros = Zeros([self.spread] if self.spread.size > 1 else [], self.device, self.deferred, self.backend)
        if self._scratch is None and self.early and self._flat_is_wide():
            self._scratch = ops.allocate(self._row_numel(), dtype=self.layout.wide, device=self.device)
        return OneRowCollector(self, task, loss_scale, skip_zeros or None, self._scratch)

    def hold(self, held: Held) -> None:
        """Keep a gradient for `add`."""
        self._held = held

    def drop(self, task: int) -> None:
        """What is held of the task is not added."""
        super().drop(task)
        self._held = None

    def add(
        self,
        task: int,
        eps: float,
        flats: Flats | None,
        finite: Tensor | None = None,
        sums: Tensor | None = None,
        factor: float = 1.0,
    ) -> None:
        """Add what was collected last, divided by its norm. Of a gradient that is not finite nothing is added.

        Args:
            task: whose it is.
            eps: added to the norm.
            flats: where the balanced gradient will be; None if something is there that must stay.
            finite: (1,) bool, whether the loss was, where only a device knows.
            sums: what takes the place of `sums`, where rows go on in another buffer.
            factor: what it is multiplied by.
        """
        total = (self.sums() if sums is None else sums)[task : task + 1]
        held, self._held = self._held, None
        if held is None or held.task != task:  # zeros, which do not count
            return
        _, grads, segments, loss_scale = held
        decay, coefficients = float(self._any), (0.0, 0.0)  # type: tuple[float, Coefficients]
        if self.deferred:
            norm = total.sqrt()
            keep = norm.isfinite() if finite is None else norm.isfinite() & finite.to(norm.device)
            gain = (norm + eps).reciprocal().mul_(factor).masked_fill_(~keep, 0.0)
            coefficients = torch.cat([torch.full_like(gain, decay), gain])
        else:
            length = math.sqrt(float(total))
            if not math.isfinite(length) or not (finite is None or bool(finite)):
                return
            coefficients = decay, factor / (length + eps)
        if self._any:  # what is missing adds nothing
            there = [index for index, grad in enumerate(grads) if grad is not None]
            if len(there) < len(grads):
                grads, segments = [grads[index] for index in there], segments[there]
        row = self._room(flats)
        self._any = True
        ops.accumulate_(row, torch.empty_like(total), grads, segments, coefficients, loss_scale, self.backend)

    def _flat_is_wide(self) -> bool:
        """Whether the sum may lie where the balanced gradient will."""
        return [group.flat for group in self.layout.groups] == [self.layout.wide]

    def _room(self, flats: Flats | None) -> Tensor:
        """The row; made when something is first added."""
        if self._row is None:
            wide = self.layout.wide
            self.in_flats = flats is not None and self._flat_is_wide()
            if flats is not None and self.in_flats:
                (self._row,) = self._outs(flats)
            else:
                self._row = ops.allocate(self._row_numel(), dtype=wide, device=self.device)
        return self._row

    def balance(
        self,
        flats: Flats,
        eps: float,
        scale: str | float,
        *,
        active: Sequence[bool] | Tensor | None = None,
        loss_scale: Tensor | None = None,
        propagate_above: float = 1.0,
        fresh: bool = True,
        accumulate: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        """Norms, weights and alpha by the kernel that works on rows, here of K numbers; alpha times the row."""
        total = self.sums() if sums is None else sums
        name, constant = (scale, 0.0) if isinstance(scale, str) else ("constant", scale)
        if active is None or isinstance(active, Tensor):
            mask = active
        else:
            mask = None if all(active) else ops.upload(active, torch.bool, self.device)
        # The weight of a task is alpha / (norm + eps): of these rows it makes alpha, times the loss scale, of each task
        # that has a say, zero of the others, and NaN of all where one is to be passed on.
        rows = (total.sqrt() + eps).diag()
        alphas = torch.empty_like(total)
        ops.balance_rows_(
            ops.BalanceRows(
                rows, self.stats._replace(sumsq=total), [alphas], [0], mask, loss_scale, propagate_above, eps, name,
                constant, fresh, False,
            ),
            self.backend,
        )  # fmt: skip
        if total is not self.stats.sumsq:
            self.stats.sumsq.masked_fill_(self.stats.nonfinite, 0.0)
        alpha, row = alphas.max(), self._room(None if accumulate else flats)
        if not self._any:
            with ops.one_thread_if_forked():
                row.zero_()
        if self.in_flats:
            segments, coefficients = self._measured_segments(), torch.stack([alpha, torch.zeros_like(alpha)])
            grads: list[Tensor | None] = [None] * len(segments)
            ops.accumulate_(row, torch.empty_like(total[:1]), grads, segments, coefficients, None, self.backend)
        else:
            for out, start in zip(self._outs(flats), self.starts, strict=True):
                part = row[None, start : start + out.numel()]
                ops.combine_out(part, alpha.reshape(1), out, accumulate, self.backend)
        self.start()
        self._complete(flats)

    def _saved_rows(self) -> dict[str, Tensor]:
        return {}

    def _measure(self) -> None:
        """Sums of squares in a state are of whole gradients: those of tasks absent from now on are shared out."""
        self.stats.sumsq.copy_(self.stats.norms.square() / self.spread.size)


class ShardedOneRowBuffer(OneRowBuffer, ShardedTaskGradientBuffer):
    """The same for replicas: a gradient is reduce-scattered when its pass is over, and added to this rank's columns.

    Memory: P for the balanced gradient, one row in transit, and P / N.
    """

    collector = ShardedTaskGradientBuffer.collector

    def _count(self, row: Underway, task: int, sumsq: Tensor, coefficients: Coefficients) -> None:
        segments, before = self._measured_segments(), sumsq.clone()
        mine: list[Tensor | None] = [row.transit.mine]
        ops.accumulate_(None, sumsq, mine, segments, (0.0, 1.0), row.loss_scale, self.backend)
        if row.nonzero is not None:  # of zeros, which do not count, nothing is told
            sumsq.copy_(torch.where(self.fed[task : task + 1], sumsq, before))
        self.hold(Held(task, mine, segments, row.loss_scale))


class SplitOneRowBuffer(SplitTaskGradientBuffer):
    """The same in parts, each with a row of its own."""

    parts: list[OneRowBuffer]  # type: ignore[assignment]

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state. Norms are those of whole gradients: the first part has them."""
        super().load(state)
        for part in self.parts[1:]:
            part.stats.sumsq.zero_()

    @property
    def in_flats(self) -> bool:
        """See `OneRowBuffer`."""
        return any(part.in_flats for part in self.parts)

    def start(self) -> None:
        """See `OneRowBuffer.start`."""
        for part in self.parts:
            part.start()

    def add(
        self, task: int, eps: float, flats: Flats | None, finite: Tensor | None = None, factor: float = 1.0
    ) -> None:
        """See `OneRowBuffer.add`."""
        total = self.sums()
        rooms = [None] * len(self.parts) if flats is None else self._flats_of_parts(flats)
        for part, room in zip(self.parts, rooms, strict=True):
            part.add(task, eps, room, finite, total.to(part.device), factor)


class OneRowCollector(RowCollector):
    """Keeps the gradients of a pass, in ``row`` if there is one, and measures them.

    On a CPU this is done while they are in cache, else in one launch.
    """

    def __init__(
        self, buffer: OneRowBuffer, task: int, loss_scale: Tensor | None, zeros: Zeros | None, row: Tensor | None
    ) -> None:
        sumsq = buffer.stats.sumsq[task : task + 1]
        state = sumsq if row is None else row
        super().__init__(buffer.layout, state, sumsq, (0.0, 1.0), loss_scale, buffer.backend, buffer.early, zeros=zeros)
        self._buffer, self._task, self._in_row = buffer, task, row
        self._grads: dict[int, Tensor] = {}
        self._before: Tensor | None = None  # sumsq, which stays where only the device knows that all is zero

    def finish(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """The rest, and the pass is over: the buffer has its gradient now, for `OneRowBuffer.add`."""
        super().finish(indices, grads)
        if self._before is not None:
            self._sumsq.copy_(torch.where(self._buffer.fed[self._task], self._sumsq, self._before))
        if self._in_row is not None and not self.empty:  # padding may be anything, and adds to padding
            whole = torch.tensor([[0, self._in_row.numel()]], dtype=torch.int64, device="cpu")
            self._buffer.hold(Held(self._task, [self._in_row], whole, None))
        elif not self.empty:
            kept: list[Tensor | None] = [self._grads.get(index) for index in range(len(self._layout.parameters))]
            self._buffer.hold(Held(self._task, kept, self._layout.segments, self._loss_scale))
        self._grads = {}

    def _defer(self, counts: Tensor) -> None:
        self.empty = None
        self._buffer.fed[self._task] = counts[0]
        self._before = self._sumsq.clone()

    def _accumulate(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        """Keep some gradients, and measure them; if ``decayed``, add to what is kept, and measure all that is."""
        if self._in_row is not None:
            super()._accumulate(indices, grads, sumsq, decayed)
            return
        self.fed = True
        layout, kept = self._layout, self._grads
        for index, grad in zip(indices, grads, strict=True):
            if grad is not None:
                grad = layout.in_row_order(index, grad) if layout.permuted else grad
                kept[index] = kept[index] + grad if index in kept else grad
        there = list(kept) if decayed else [index for index in indices if index in kept]
        measured: list[Tensor | None] = [kept[index] for index in there]
        ops.accumulate_(None, sumsq, measured, layout.segments_of(there), (0.0, 1.0), self._loss_scale, self._backend)
