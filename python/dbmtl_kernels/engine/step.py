"""The protocol of a step: K backward passes, each into its row, then the balanced gradient.

`Engine.run` is one backward over all tasks. `Engine.task` is one task of a step that the caller drives, and
`Engine.balance` the end of such a step. All stash ``.grad``, collect gradients into rows, and write ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import check_task
from ..rows import placement
from ..rows.placement import Buffer
from ..rows.ranks import Ranks
from ..weightings import Weighting
from .balance import BalancedGradient
from .bookkeeping import Before, Steps
from .gradients import SharedGradients, Stash
from .heads import HeadGradients
from .losses import TaskLosses, loss_scale_on, loss_scale_or_none


class Engine:
    """Runs the backward passes of steps, and owns all that outlives one.

    Args:
        rows: the K x P state.
        ranks: those that work on one batch together.
        steps: the bookkeeping.
        weighting: K weights from the rows.
        group_unnamed: the user said nothing of other ranks: there must be none.
    """

    def __init__(self, rows: Buffer, ranks: Ranks, steps: Steps, weighting: Weighting, group_unnamed: bool) -> None:
        self.rows, self.ranks, self.steps, self.weighting = rows, ranks, steps, weighting
        self.grads = SharedGradients(rows, BalancedGradient(rows, steps, weighting, ranks), ranks)
        self.heads = HeadGradients(rows.parameters, ranks, rows.device)
        self.attached: torch.optim.Optimizer | None = None
        self._group_unnamed = group_unnamed

    # --- one backward over all tasks --------------------------------------------------------------------------

    def prepare(self, losses: TaskLosses) -> None:
        """Check losses that will be backpropagated. With several ranks their values become the means over the ranks."""
        losses.check_graphs()
        if self._group_unnamed:
            placement.refuse_unnamed_group()
        elif self.ranks.size > 1:
            self.heads.refuse_synchronising_wrapper()
            losses.share(self.ranks, self.rows.device)
        losses.check_logarithms()

    def balanced_loss(self, losses: TaskLosses, retain_graph: bool) -> Tensor:
        """A scalar whose backward is `run`; the gradient that arrives at it is the loss scale."""
        value = losses.total()
        # Autograd calls backward only if an input requires grad, and the losses are deliberately none.
        anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
        out: Tensor = _BalancedLoss.apply(anchor, value, self, losses, retain_graph)  # type: ignore[no-untyped-call]
        return out

    def run(self, losses: TaskLosses, loss_scale: Tensor | None, retain_graph: bool) -> None:
        """A backward pass for each task, collected into its row before the next, then the balanced gradient.

        If a pass fails, rows that were written before it stay as they are. `_recover` says what becomes of ``.grad``.
        Heads keep what the passes that ran have added; with several ranks they are restored.
        """
        steps, grads, rows = self.steps, self.grads, self.rows
        steps.refuse_inside("backward()")
        steps.refuse_pending()
        stash = self._stash()
        before: Before | None = None
        collectors: list[Any] = []
        last = len(losses.tasks) - 1
        try:
            before = steps.begin(loss_scale)
            grads.hook()
            with self.heads.averaging(grads.touched, self._stepped_parameters(), losses.losses):
                for index, task in enumerate(losses.tasks):
                    again = steps.seen[task]
                    collectors.append(rows.collector(task, steps.coefficients(), steps.loss_scale, again))
                    grads.collect_into(collectors[-1])
                    losses.backward(index, loss_scale, retain_graph or index < last)
                    grads.finish_collecting()
                    steps.seen[task] = True
                    steps.losses[task] = losses.values[index]
                grads.check_collected(len(losses.tasks) == len(steps.seen))
        except BaseException:
            self._recover(stash, collectors, before, losses.tasks[len(collectors) - 1])
            raise
        finally:
            grads.stop_collecting()
        self._write(stash)

    # --- task by task -----------------------------------------------------------------------------------------

    @contextmanager
    def task(self, index: int, loss_scale: float | Tensor | None, log_transform: bool) -> Iterator[None]:
        """Whatever is backpropagated inside goes to the row of task ``index``."""
        steps, grads, rows = self.steps, self.grads, self.rows
        index = check_task(index, steps.num_tasks)
        steps.refuse_inside("task()")
        steps.refuse_entered(index)
        if self._group_unnamed:
            placement.refuse_unnamed_group()
        self.ranks.check_same(f"task {index}", rows.device, f"the ranks are not all in task({index})")
        scale = None if loss_scale is None else loss_scale_or_none(loss_scale_on(rows.device, loss_scale))
        stash = self._stash()
        steps.inside = index
        before, collectors = None, []
        try:
            with self.heads.averaging(grads.touched, self._stepped_parameters()):
                with self.heads.sharing_logs(index, log_transform):
                    yield
                before = steps.begin(scale)
                collectors.append(rows.collector(index, steps.coefficients(), steps.loss_scale, steps.seen[index]))
                grads.collect_into(collectors[0])
                grads.finish_collecting()
                steps.seen[index] = True
                steps.losses.pop(index, None)  # that of an earlier backward is not of this gradient
            steps.pending.add(index)
        except BaseException:
            self._recover(stash, collectors, before, index)
            raise
        else:
            grads.restore_grads(stash.grads)
        finally:
            grads.stop_collecting()
            steps.inside = None

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task`."""
        self.steps.refuse_inside("balance()")
        if not self.steps.pending:
            raise RuntimeError("balance() has nothing to balance: no task() was entered since the last step")
        self._write(self._stash())

    # --- what both are made of --------------------------------------------------------------------------------

    @torch.no_grad()
    def _stash(self) -> Stash:
        """Set every shared ``.grad`` aside; a step whose gradients were thrown away ends here."""
        self.rows.check_unchanged()
        stash = self.grads.stash_grads()
        if stash.dropped:
            self.end_step()
        return stash

    @torch.no_grad()
    def _write(self, stash: Stash) -> None:
        """Norms, weights, the balanced gradient, ``.grad``; ends the step unless an optimizer will.

        Should the weighting raise, ``.grad`` is what others put there and the step ends, as its rows are fed and would
        count again.
        """
        try:
            self.grads.write_grads(stash.grads)
        except BaseException:
            self.grads.restore_grads(stash.grads)
            self.end_step()
            raise
        self.steps.balanced()
        if self.attached is None:
            self.end_step()

    @torch.no_grad()
    def _recover(self, stash: Stash, collectors: list[Any], before: Before | None, task: int) -> None:
        """Clean up after an exception.

        - A step that got no gradient does not count; ``.grad`` is what it was.
        - If ``.grad`` held a balanced gradient of the open step, it is computed again from the rows (in one process).
        - If tasks wait for `balance`, the step stays open (in one process).
        - Otherwise the step ends, so that no row counts twice; ``.grad`` has what others put there.

        Several ranks take the last way: the others may not have failed, and would not answer.
        """
        if collectors and collectors[-1].abandon():
            self.rows.drop(task)
        undone = before is not None and not any(collector.fed for collector in collectors)
        if before is not None and undone:
            self.steps.undo_begin(before)
        if stash.balanced and self.rows.local:
            self._write(stash)
            return
        self.grads.restore_grads(stash.grads)
        if not (self.steps.pending and self.rows.local) and not (undone and before is not None and before.began):
            self.end_step()

    def _stepped_parameters(self) -> Iterable[Tensor]:
        """Parameters that an attached optimizer would step."""
        if self.attached is None:
            return []
        return [p for group in self.attached.param_groups for p in group["params"]]

    # --- between steps ----------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """The step is over; ``.grad`` is the caller's."""
        self.steps.end()
        self.grads.forget()

    def end_if_dropped(self) -> None:
        """End a step whose gradients the caller has thrown away."""
        if self.steps.open and self.grads.was_dropped():
            self.end_step()

    def before_optimizer(self) -> None:
        """An attached optimizer is about to step."""
        if self.steps.pending:
            self.steps.refuse_scaled()
            self.balance()

    def reindex_tasks(self, tasks: list[int | None]) -> None:
        """Let the tasks be these of the former ones, None being a new one.

        Raises:
            RuntimeError: within a step.
        """
        self.steps.refuse_inside("a change of tasks")
        self.end_if_dropped()
        if self.steps.open:
            raise RuntimeError("a change of tasks within a step; end it first (balance(), or optimizer.step())")
        self.rows.reindex_tasks(tasks)
        self.steps.reindex_tasks(tasks)
        if hasattr(self.weighting, "reindex_tasks"):
            self.weighting.reindex_tasks(tasks)


class _BalancedLoss(torch.autograd.Function):
    """Hands the gradient that arrives to `Engine.run`; the losses' graphs are not part of the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, engine: Engine, losses: TaskLosses, retain_graph: bool
    ) -> Tensor:
        """The value, cut off from the losses."""
        ctx.work = engine, losses, retain_graph
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Run the backward passes once (more often with retain_graph)."""
        if ctx.work is None:
            raise RuntimeError(
                "backward() through this balanced loss a second time (the first may have failed): its graphs are "
                "freed; compute the losses again, or pass retain_graph=True to balancer(losses)"
            )
        engine, losses, retain_graph = ctx.work
        if not retain_graph:
            ctx.work = None
        engine.run(losses, loss_scale_or_none(grads[0]), retain_graph)
        return None, None, None, None, None
