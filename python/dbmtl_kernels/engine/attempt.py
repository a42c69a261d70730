"""Attempt: one go at feeding gradients, that comes to its end as a whole or leaves things as they were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Stats
from ..rows.placement import Buffer
from ..rows.rows import Flats
from .balance import BalancedGradient
from .bookkeeping import Steps, is_zero
from .gradients import SharedGradients
from .heads import HeadGradients
from .notices import Notices

OVERWRITTEN = (
    "between two tasks a .grad was set to a balanced gradient of an earlier step, whose memory has that of the open "
    "step by now: clone what is to be kept, or make the balancer with keep_rows=True"
)


class Parts(NamedTuple):
    """What a step works on."""

    rows: Buffer
    steps: Steps
    balanced: BalancedGradient
    grads: SharedGradients
    heads: HeadGradients
    notices: Notices


class Attempt:
    """What is done between taking every ``.grad`` away and leaving the result there.

    Args:
        parts: see `Parts`.
        frozen: gradients get the weights of the last balance; rows stay as they are.
        ends: with the balanced gradient the step is over; otherwise an optimizer's step will end it.
    """

    def __init__(self, parts: Parts, frozen: bool, ends: bool) -> None:
        self.rows, self.steps, self._balanced, self.grads, self.heads, self._notices = parts
        self.frozen, self._ends = frozen, ends
        self.touched = list(self.grads.touched)
        self._before, self._writes = self.steps.snapshot(), self._balanced.writes
        self._collectors: dict[int, Any] = {}  # by task
        self._spoilt: list[int] = []  # whose loss is not finite
        self._counts: dict[int, int] = {}  # of tasks that sit out, their `nonfinite_steps` when this is over
        self._out: set[int] = set()  # tasks that leave nothing in heads
        self._zero: list[int] = []  # whose gradient was
        self._scratch: tuple[Buffer, Any] | None = None
        self._evaluated = self._at_once = False
        self._sums: Tensor | None = None
        # A power of two by which the gradients of a pass are; see `TaskLosses.smaller`.
        self.smaller: Tensor | None = None
        self._stats: list[Stats] | None = None  # before they were computed

    # --- a pass -----------------------------------------------------------------------------------------------

    def collect(self, task: int, loss_scale: Tensor | None, skip_zeros: bool) -> None:
        """The pass that comes now is that of this task."""
        steps = self.steps
        if self.frozen:
            self._scratch = self._scratch or (self.rows.of_one_task(), self.rows.new_flats())
            collector = self._scratch[0].collector(0, (0.0, 1.0), self._carried(loss_scale))
        else:
            collector = self._collectors[task] = self.rows.collector(
                task, steps.coefficients(),
                steps.loss_scale if self.smaller is None else self._carried(steps.loss_scale), again=steps.seen[task],
                skip_zeros=skip_zeros and (loss_scale is None or not is_zero(loss_scale)),
            )  # fmt: skip
        self.grads.collect_into(collector)

    def collected(self, task: int, loss_scale: Tensor | None) -> None:
        """The pass is over. One that was zero everywhere does not count."""
        self.grads.finish_collecting()
        self.heads.collect(task, self.smaller)
        if self.frozen:
            self._weigh(task, loss_scale)
        elif self._collectors[task].empty is True:
            self._zero.append(task)
        else:
            self.steps.seen[task] = True
            if self._balanced.one is not None and task not in (*self._spoilt, *self.steps.sitting_out):
                self._balanced.add(task, self._free())

    def _carried(self, loss_scale: Tensor | None) -> Tensor | None:
        """The factor that the gradients of this pass carry."""
        smaller = self.smaller
        return loss_scale if smaller is None else smaller if loss_scale is None else smaller.to(loss_scale) * loss_scale

    def _free(self) -> Flats | None:
        """Where the balanced gradient will be, unless something is there that was set aside."""
        assert self.grads.aside is not None
        return self.grads.flat.free(self.grads.aside.grads)

    def _weigh(self, task: int, loss_scale: Tensor | None) -> None:
        """Add the gradient with the weight that the task had last, and the length of its average; not if not finite.

        The length is divided by that of the first such gradient in a step, so that the weights stay the same in it.
        Without a moving average there is nothing to scale to: the weights are those of the step.
        """
        assert self._scratch is not None
        one, flats = self._scratch
        norm, stats, lengths = one.sums().sqrt(), self.rows.stats, self.steps.lengths
        finite, factor = norm.isfinite(), torch.ones_like(norm) if loss_scale is None else loss_scale.to(norm)
        passed_on = factor > self._balanced.propagate_above
        first = lengths.get(task, norm if self.steps.averages else stats.norms[task])
        lengths[task] = first = torch.where(first.isfinite() & (first > 0), first, norm)
        weight, length = stats.weights[task : task + 1], stats.norms[task : task + 1]
        length = torch.where(length.isnan(), first, length)  # never measured, as `OnePassDBMTL` may have it
        share = torch.where((weight != 0) & (first > 0), weight * length / first, 0.0)
        share = torch.where(finite, share * factor, torch.zeros_like(share).masked_fill(passed_on, torch.nan))
        one.combine(share, flats, self._evaluated)
        self._evaluated, kept = True, finite | passed_on
        if self.rows.deferred:
            self.heads.clear({task: kept[0]})
        elif not bool(kept):
            self._out.add(task)

    @property
    def ran(self) -> list[int]:
        """The tasks that had a pass."""
        return list(self._collectors)

    def spoil(self, task: int) -> None:
        """The loss of a task is not finite: it sits out the step, and its row will begin anew."""
        self._spoilt.append(task)
        self._out.add(task)

    # --- the end ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, tasks: Sequence[int], named: Collection[int] | None) -> None:
        """Norms, weights, the balanced gradient, ``.grad``; ends the step unless an optimizer will.

        Should the weighting raise, ``.grad`` is what others put there and the step ends: its rows are fed, and would
        count again.

        Args:
            tasks: those present.
            named: ids of the parameters to write to; None for all.
        """
        self.heads.collect_rest()
        if self.frozen:
            self._take_evaluated()
        else:
            self._look(tasks)
            self._compute(named)
        self._commit()

    @torch.no_grad()
    def write_task(self, task: int) -> None:
        """The gradient of a single task: shared ones wait for a balance, unless frozen."""
        if self.frozen:
            self._take_evaluated()
            self._commit()
            return
        self._look([task])
        self.heads.average(self.grads.touched, self._out)
        try:
            self._give_back(task)
        except BaseException:
            self._give_back(task)
            raise

    @torch.no_grad()
    def balance(self, at_once: bool) -> None:
        """The balanced gradient of the rows as they are.

        Args:
            at_once: by the last `task`, and not because the caller said so.
        """
        self._at_once = at_once
        self._compute(None)
        self._commit()

    def _look(self, tasks: Sequence[int]) -> None:
        """Which tasks had nothing, or sit out and leave nothing in heads; what only the device knows it clears."""
        steps = self.steps
        sums = self.rows.sums()
        for task in self._collectors:
            if task in self.rows.empty_tasks:  # of replicas only now is known that all had zeros
                steps.seen[task] = False
                self._zero.append(task)
        for task in self._zero:
            if task not in self._spoilt and any(self.grads.collected):
                self._notices.zero_gradient(task)
        for task in self._spoilt:
            steps.seen[task] = True
            if steps.fresh or not bool(self.rows.stats.nonfinite[task]):
                steps.sitting_out.add(task)  # else its gradient was not finite before, which may have to be passed on
        self._sums = sums
        above, scale = self._balanced.propagate_above, steps.loss_scale
        if not self.rows.deferred:
            if (1.0 if scale is None else float(scale)) <= above and not bool(sums.isfinite().all()):
                self._out |= {task for task in tasks if not math.isfinite(float(sums[task]))}
            return
        keep = sums.isfinite() if scale is None else sums.isfinite() | (scale.to(sums.device) > above)
        if steps.finite is not None:
            keep = keep & steps.finite
        self.heads.clear({task: keep[task] for task in tasks})

    def _compute(self, named: Collection[int] | None) -> None:
        stats, fresh = self.rows.stats, self.steps.fresh
        # A plain backward on a device is spared the launches: only rows that it fed have a say in it, and recover()
        # drops those.
        if not (self.rows.deferred and fresh) or self.steps.pending:
            self._stats = self.rows.copy_stats()
        for task in self.steps.sitting_out:
            self._counts[task] = int(stats.nonfinite_steps[task]) + (fresh or not bool(stats.nonfinite[task]))
        try:
            self.heads.average(self.grads.touched, self._out)
            if self._balanced.one is not None and self._balanced.one.in_flats and self._free() is None:
                raise RuntimeError(OVERWRITTEN)
            self.grads.compute_grads(self._sums, named)
        except Exception:
            self.heads.restore()
            self.grads.undefined = set()  # a weighting raises before anything is added
            self.grads.restore_grads()
            self._sit_out()
            self._end_step()
            raise

    def _take_evaluated(self) -> None:
        self.heads.average(self.grads.touched, self._out)
        if self._scratch is None:
            self.grads.restore_grads()
        else:
            self.grads.take_grads(self._scratch[1])

    def _commit(self) -> None:
        """Leave in ``.grad`` what is due; done even if interrupted."""
        try:
            self._put()
        except BaseException:
            self._put()
            raise

    def _put(self) -> None:
        if self._counts:
            self._sit_out()
        self.grads.put_grads()
        self.heads.put(self._out)
        if not self.frozen:
            self.steps.balanced(self._at_once)
            if self._ends:
                self._end_step()

    def _sit_out(self) -> None:
        for task, count in self._counts.items():
            self.rows.sit_out(task, count)

    def _give_back(self, task: int) -> None:
        self.grads.restore_grads()
        self.heads.put(self._out)
        self.steps.pending.add(task)

    def _end_step(self) -> None:
        self.steps.end()
        self.grads.forget()

    # --- or not -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recover(self) -> None:
        """Clean up after an exception, also an interrupt: ``.grad``, of heads too, is what it was.

        In one process it is as if the attempt had not been made, but that the rows which it fed are lost: those tasks
        begin anew, which is said by name. The attempt may be made again, and counts once. If ``.grad`` held a balanced
        gradient of the open step, that is computed again from the rows: without the tasks that begin anew.

        Of several ranks the others may not have failed, and would not answer. There the step ends, and rows that were
        fed stay fed.
        """
        steps, grads, rows, stash = self.steps, self.grads, self.rows, self.grads.aside
        one = self._balanced.one
        grads.stop_collecting()
        if grads.due is not None:  # all was done but to leave it there
            self._commit()
            return
        self.heads.restore()
        if stash is None:  # nothing was done yet, or all of it
            return
        fed = [task for task, collector in self._collectors.items() if collector.fed]
        half = [task for task, collector in self._collectors.items() if collector.abandon()]
        if not rows.local:
            for task in half:
                rows.drop(task)
            if not fed:
                steps.undo(self._before)
            grads.restore_grads()
            self._end_step()
            if one is not None:
                one.start()
            return
        grads.touched[:] = self.touched
        steps.undo(self._before)
        if self._stats is not None:  # a row that overflowed may be zeros by now: its sum of squares tells again
            rows.put_stats(self._stats)
            if not (steps.fresh or rows.deferred):  # rows that a balance clears, and may have cleared
                for task in rows.stats.nonfinite.nonzero().flatten().tolist():
                    rows.drop(task)
        lost, where = fed, "the moving average"
        if one is not None:  # what tasks that wait have added cannot be told apart any more
            where = "the one row, which has the gradients"
            lost = sorted(steps.pending) if self._balanced.writes != self._writes else []
            if lost or not steps.pending:
                one.start()
        for task in {*fed, *lost}:
            rows.drop(task)
            steps.seen[task] = False
            steps.pending.discard(task)
        if stash.balanced:
            grads.drop_undefined()
            self._sums, self._counts, self._out = None, {}, set()
            self.balance(at_once=steps.complete)
        else:
            grads.restore_grads()
        if stash.dropped:
            self._end_step()
        if lost and steps.started:
            warnings.warn(
                f"a backward failed after it had fed {where} of task(s) {sorted(lost)}: these begin anew",
                RuntimeWarning,
                stacklevel=2,
            )
