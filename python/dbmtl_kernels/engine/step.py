"""The protocol of a step: K backward passes, each into its row, then the balanced gradient.

`Engine.run` is one backward over all tasks, `Engine.task` one task of a step that the caller drives. `Engine.balance`
the end of such a step. All three are the same few words: stash, collect, write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..rows import placement
from ..rows.placement import Buffer
from ..rows.ranks import Ranks
from ..weightings import Weighting
from .balance import BalancedGradient
from .bookkeeping import Steps
from .gradients import SharedGradients, Stash
from .heads import HeadGradients
from .losses import TaskLosses, factor_on, factor_or_none


class Engine:
    """Runs the backward passes of steps, and owns all that outlives one.

    Args:
        rows: the K x P state.
        ranks: those that work on one batch together.
        steps: the bookkeeping.
        weighting: K weights from the rows.
        alone: nobody said anything about other ranks: there must be none.
    """

    def __init__(self, rows: Buffer, ranks: Ranks, steps: Steps, weighting: Weighting, alone: bool) -> None:
        self.rows, self.ranks, self.steps, self.weighting = rows, ranks, steps, weighting
        self.grads = SharedGradients(rows, BalancedGradient(rows, steps, weighting, ranks), ranks)
        self.heads = HeadGradients(rows.parameters, ranks, rows.device)
        self.attached: torch.optim.Optimizer | None = None
        self._alone = alone

    # --- one backward over all tasks --------------------------------------------------------------------------

    def check(self, losses: TaskLosses) -> None:
        """Check losses that will be backpropagated; those of several ranks become the means."""
        losses.check_graphs()
        if self._alone:
            placement.refuse_unnamed_group()
        elif self.ranks.size > 1:
            self.heads.refuse_synchronising_wrapper()
            losses.share(self.ranks, self.rows.device)
        losses.check_logarithms()

    def loss(self, losses: TaskLosses, retain_graph: bool) -> Tensor:
        """A scalar whose backward is `run`, with the gradient that arrives as the factor."""
        value = losses.total()
        anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
        out: Tensor = _BalancedLoss.apply(anchor, value, self, losses, retain_graph)  # type: ignore[no-untyped-call]
        return out

    def run(self, losses: TaskLosses, factor: Tensor | None, retain_graph: bool) -> None:
        """A backward pass for each task, collected into its row before the next, then the balanced gradient.

        If a pass fails, rows that were fed before it stay fed; see `_recover` for what becomes of ``.grad``.
        """
        steps, grads, rows = self.steps, self.grads, self.rows
        steps.refuse_inside("backward()")
        steps.refuse_pending()
        stash = self._stash()
        begun = steps.begin(factor)
        collectors: list[Any] = []
        last = len(losses.tasks) - 1
        try:
            with self.heads.averaging(grads.touched, self._stepped_parameters(), losses.losses):
                for index, task in enumerate(losses.tasks):
                    collectors.append(rows.collect(task, steps.coefficients(task), steps.loss_scale))
                    grads.collect_into(collectors[-1])
                    losses.backward(index, factor, retain_graph or index < last)
                    grads.finish_collecting()
                    steps.seen[task] = True
                    steps.losses[task] = losses.values[index]
                grads.check_collected(len(losses.tasks) == len(steps.seen))
        except BaseException:
            self._recover(stash, collectors, begun)
            raise
        finally:
            grads.stop_collecting()
        self._write(stash)

    # --- task by task -----------------------------------------------------------------------------------------

    @contextmanager
    def task(self, index: int, loss_scale: float | Tensor | None, log_transform: bool) -> Iterator[None]:
        """Whatever is backpropagated inside goes to the row of task ``index``."""
        steps, grads, rows = self.steps, self.grads, self.rows
        steps.refuse_inside("task()")
        steps.refuse_entered(index)
        if self._alone:
            placement.refuse_unnamed_group()
        self.ranks.check_same(f"task {index}", rows.device, f"the ranks are not all in task({index})")
        factor = None if loss_scale is None else factor_or_none(factor_on(rows.device, loss_scale))
        stash = self._stash()
        steps.inside = index
        begun, collectors = None, []
        try:
            with self.heads.averaging(grads.touched, self._stepped_parameters()):
                with self.heads.sharing_logs(index, log_transform):
                    yield
                begun = steps.begin(factor)
                collectors.append(rows.collect(index, steps.coefficients(index), steps.loss_scale))
                grads.collect_into(collectors[0])
                grads.finish_collecting()
                steps.seen[index] = True
                steps.losses.pop(index, None)  # what is known is not that of this gradient
            steps.pending.add(index)
        except BaseException:
            self._recover(stash, collectors, begun)
            raise
        else:
            grads.restore_grads(stash.grads)
        finally:
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
        self.rows.settle()
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
    def _recover(self, stash: Stash, collectors: list[Any], begun: dict[str, Any] | None) -> None:
        """After a failure: ``.grad`` as it was, as far as the rows still allow.

        A step that got nothing does not count. One with nothing but the rows fed before the failure ends, so that
        nothing counts twice; in a longer one ``.grad`` is balanced anew. Not with several ranks, as the others may not
        have failed and would not answer: there the step ends, and ``.grad`` has what others put there.
        """
        if collectors:
            collectors[-1].abandon()
        if stash.balanced and self.rows.local:
            self.grads.restore_grads([None] * len(stash.grads))
            self._write(stash)
            return
        self.grads.restore_grads(stash.grads)
        if begun is not None and not any(collector.fed for collector in collectors):
            self.steps.undo_begin(begun)
        elif not (self.steps.pending and self.rows.local):
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
                "backward() through this balanced loss a second time: its graphs are freed; pass retain_graph=True to "
                "balancer(losses)"
            )
        engine, losses, retain_graph = ctx.work
        if not retain_graph:
            ctx.work = None
        engine.run(losses, factor_or_none(grads[0]), retain_graph)
        return None, None, None, None, None
