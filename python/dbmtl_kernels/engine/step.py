"""The protocol of a step: K backward passes, each into its row, then the balanced gradient.

`Engine.run` is one backward over all tasks. `Engine.task` is one task of a step that the caller drives, and
`Engine.balance` the end of such a step. All stash ``.grad``, collect gradients into rows, and write ``.grad``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..rows import placement
from ..rows.one_row import NO_ROWS
from ..rows.placement import Buffer
from ..rows.ranks import Ranks
from ..weightings import Weighting
from .attempt import Attempt, Parts
from .balance import BalancedGradient
from .bookkeeping import Steps, Turn, Turns
from .gradients import SharedGradients
from .heads import HeadGradients
from .losses import TaskLosses, loss_scale_on, loss_scale_or_none
from .notices import Notices

Leaves = Sequence[Tensor]
ENDS = "optimizer.step(), or detach()", "balance()"


class Engine:
    """Runs the backward passes of steps, and owns all that outlives one.

    Args:
        rows: the K x P state.
        ranks: those that work on one batch together.
        steps: the bookkeeping.
        weighting: K weights from the rows.
        group_unnamed: the user said nothing of other ranks: there must be none.
        skip_zeros: a gradient that is zero everywhere counts as absent.
        propagate_above: a gradient that is not finite is passed on under factors above this.

    Attributes:
        module: the one whose parameters are shared, where it is known.
        optimizers: those attached.
        frozen: a backward is no update: gradients get the weights of the last balance, and rows stay.
        copied: this is a deep copy of one that has trained, and has not its averages.
    """

    def __init__(
        self,
        rows: Buffer,
        ranks: Ranks,
        steps: Steps,
        weighting: Weighting,
        *,
        group_unnamed: bool,
        skip_zeros: bool,
        propagate_above: float,
    ) -> None:
        self.ranks, self.steps, self.weighting = ranks, steps, weighting
        self.module: weakref.ref[torch.nn.Module] | None = None
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self.frozen = self.copied = False
        self._group_unnamed, self._skip_zeros, self._propagate_above = group_unnamed, skip_zeros, propagate_above
        self.turns = Turns()
        self.use(rows)

    def use(self, rows: Buffer) -> None:
        """Work on these rows from now on."""
        notices = Notices(rows, self.ranks.size > 1 or placement.is_distributed(rows.parameters))
        balanced = BalancedGradient(
            rows, self.steps, self.weighting, self.ranks, self._propagate_above, self._skip_zeros
        )
        grads = SharedGradients(rows, balanced, self.ranks, notices)
        heads = HeadGradients(rows.parameters, self.ranks, rows.device)
        self.parts = Parts(rows, self.steps, balanced, grads, heads, notices)
        self.rows, self.grads, self.heads = rows, grads, heads

    # --- one backward over all tasks --------------------------------------------------------------------------

    def prepare(self, losses: TaskLosses) -> None:
        """Check losses that will be backpropagated. With several ranks their values become the means over the ranks."""
        losses.check_graphs(self.parts.notices.absent)
        if self._group_unnamed:
            placement.refuse_unnamed_group()
        elif self.ranks.size > 1:
            self.heads.refuse_synchronising_wrapper()
            losses.share(self.ranks, self.rows.device)
        losses.check_logarithms()

    def plain(self, losses: TaskLosses) -> Tensor:
        """The sum of the losses (log-losses) as an ordinary tensor: nothing is balanced.

        Raises:
            RuntimeError: of several ranks nobody would average the gradients.
        """
        losses.check_graphs(self.parts.notices.absent)
        self.heads.refuse_without_average(self.rows.parameters)
        losses.share(self.ranks, self.rows.device)
        losses.check_logarithms()
        return losses.plain(self.ranks, self.parts.notices.once)

    def run(
        self, losses: TaskLosses, loss_scale: Tensor | None, retain_graph: bool, inputs: Leaves | None = None
    ) -> None:
        """A backward pass for each task, collected into its row before the next, then the balanced gradient.

        What is left if a pass fails: see `Attempt.recover`.

        Args:
            losses: those of the tasks present.
            loss_scale: the factor that gradients carry.
            retain_graph: keep the graphs of the losses.
            inputs: the only leaves whose ``.grad`` may change; None for all.
        """
        if inputs is None:
            losses.claim(self.rows)
        self._alone("backward()", partial(self._run, losses, loss_scale, retain_graph, inputs))

    @torch.no_grad()
    def _run(self, losses: TaskLosses, loss_scale: Tensor | None, retain_graph: bool, inputs: Leaves | None) -> None:
        self.steps.refuse_pending()
        attempt = self._attempt()
        try:
            self._stash(attempt)
            if not attempt.frozen:
                if self.copied:
                    self._tell_copied()
                self.steps.begin(loss_scale)
            self._passes(attempt, losses, loss_scale, retain_graph, inputs)
            attempt.write(losses.tasks, None if inputs is None else {id(p) for p in inputs})
        except BaseException:
            attempt.recover()
            raise

    def _passes(
        self,
        attempt: Attempt,
        losses: TaskLosses,
        loss_scale: Tensor | None,
        retain_graph: bool,
        inputs: Leaves | None,
    ) -> None:
        """A pass for each loss but those that are not finite: such a task sits out."""
        steps, grads = self.steps, self.grads
        leaves = None if inputs is None else list({id(p): p for p in (*self.rows.parameters, *inputs)}.values())
        grads.hook()
        self._find_heads(losses, look_around=not attempt.frozen)
        finite = losses.finite()
        small = losses.factors(finite, loss_scale) if losses.half else None
        if small is not None:
            self.heads.search_all(losses.losses)
        if None in finite and not attempt.frozen:
            steps.note_finite(losses.tasks, losses.values)
        last = max((index for index, ok in enumerate(finite) if ok is not False), default=-1)
        for index, task in enumerate(losses.tasks):
            if not attempt.frozen:
                steps.losses[task] = losses.values[index]
            if finite[index] is False:
                attempt.spoil(task)
                continue
            attempt.smaller = None if small is None else small[index]
            attempt.collect(task, loss_scale, self._skip_zeros)
            losses.backward(index, loss_scale, retain_graph or index < last, leaves, attempt.smaller)
            attempt.collected(task, loss_scale)
        if not attempt.frozen:
            ran = losses.tasks if False not in finite else attempt.ran
            self.parts.notices.no_gradient(ran, attempt.touched, grads.collected, whole=True)

    def _find_heads(self, losses: TaskLosses, look_around: bool) -> None:
        """In the first step, and ever more rarely, look for parameters that should be shared as well."""
        count = self.steps.started
        whole = look_around and count & (count - 1) == 0
        found = self.heads.begin(self.stepped, losses.losses, whole, losses.tasks)
        if whole:
            self.parts.notices.cached(losses.losses)
            self.parts.notices.undeclared(found, None if self.module is None else self.module())

    # --- task by task -----------------------------------------------------------------------------------------

    @contextmanager
    def task(self, index: int, loss_scale: float | Tensor | None, log_transform: bool) -> Iterator[None]:
        """Whatever is backpropagated inside goes to the row of task ``index``."""
        turn = Turn(threading.get_ident(), index)
        try:
            yield from self._task(turn, index, loss_scale, log_transform)
        finally:  # once more, should an interrupt have come just where it was done
            self.turns.give_back(turn)
        if len(self.steps.pending) == self.steps.num_tasks:
            self._alone("balance()", partial(self._balance, at_once=True))

    def _task(self, turn: Turn, index: int, loss_scale: float | Tensor | None, log_transform: bool) -> Iterator[None]:
        try:
            self.turns.take(turn, f"task({index})")
            self.steps.refuse_entered(index)
            if self._group_unnamed:
                placement.refuse_unnamed_group()
            self.ranks.check_same(f"task {index}", self.rows.device, f"the ranks are not all in task({index})")
            scale = None if loss_scale is None else loss_scale_or_none(loss_scale_on(self.rows.device, loss_scale))
            attempt = self._attempt()
            try:
                self._stash(attempt)
                self.grads.hook()
                self.heads.begin(self.stepped, (), whole=False)
                with self.heads.sharing_logs(index, log_transform) as spoilt:
                    yield
                self._end_task(attempt, index, scale, bool(spoilt))
            except BaseException:
                attempt.recover()
                raise
        finally:
            self.turns.give_back(turn)

    @torch.no_grad()
    def _end_task(self, attempt: Attempt, index: int, scale: Tensor | None, spoilt: bool) -> None:
        if not attempt.frozen:
            if self.copied:
                self._tell_copied()
            self.steps.begin(scale)
            self.steps.losses.pop(index, None)  # that of an earlier backward is not of this gradient
        if spoilt:
            attempt.spoil(index)
        attempt.collect(index, scale, self._skip_zeros)
        attempt.collected(index, scale)
        if not spoilt:
            self.parts.notices.no_gradient([index], attempt.touched, self.grads.collected, whole=False)
        attempt.write_task(index)

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task`."""
        self.turns.refuse_inside("balance()")
        if self.steps.pending:
            self._alone("balance()", partial(self._balance, at_once=False))
        elif not self.steps.complete and not self.frozen:
            raise RuntimeError("balance() has nothing to balance: no task() was entered since the last step")
        self.steps.complete = False

    def _balance(self, at_once: bool) -> None:
        attempt = self._attempt()
        try:
            self._stash(attempt)
            attempt.balance(at_once)
        except BaseException:
            attempt.recover()
            raise

    # --- what both are made of --------------------------------------------------------------------------------

    def _alone(self, what: str, call: Callable[[], None]) -> None:
        """One at a time. Two functions, as an interrupt may come at any line of one, that of a `finally` too."""
        turn = Turn(threading.get_ident(), None)
        try:
            self._in_turn(turn, what, call)
        finally:
            self.turns.give_back(turn)

    def _in_turn(self, turn: Turn, what: str, call: Callable[[], None]) -> None:
        try:
            self.turns.take(turn, what)
            call()
        finally:
            self.turns.give_back(turn)

    def _attempt(self) -> Attempt:
        self.rows.check_unchanged()
        if self.optimizers and not self.attached:
            self.optimizers = []
            self.end_step()
            self.parts.notices.optimizer_gone()
        one = self.parts.balanced.one
        if one is not None and not self.frozen:
            self.end_if_dropped()
            if self.steps.open and self.steps.empty and not any(self.grads.left):
                self.end_step()  # as where no loss was finite
            if self.steps.open and not self.steps.fresh:
                raise RuntimeError(NO_ROWS.format(what="a second backward within a step"))
            if not self.steps.pending:
                one.start()
        if self.frozen and not self.steps.started:
            raise RuntimeError("a backward that is no update needs the weights of a step before it: there was none yet")
        return Attempt(self.parts, self.frozen, ends=not self.attached)

    def _tell_copied(self) -> None:
        """A copy without the averages of the original begins to train."""
        self.copied = False
        self.parts.notices.copied()

    @torch.no_grad()
    def _stash(self, attempt: Attempt) -> None:
        """Set every shared ``.grad`` aside; a step whose gradients were thrown away ends here."""
        if self.grads.stash_grads(keep=attempt.frozen).dropped:
            self.end_step()

    # --- between steps ----------------------------------------------------------------------------------------

    @property
    def attached(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose step ends a step here."""
        return [optimizer for ref in self.optimizers if (optimizer := ref()) is not None] if self.optimizers else []

    @property
    def stepped(self) -> list[Tensor]:
        """The parameters that attached optimizers hold."""
        return [p for optimizer in self.attached for group in optimizer.param_groups for p in group["params"]]

    @property
    def busy(self) -> bool:
        """Whether shared gradients are set aside, as within a pass."""
        return self.grads.aside is not None

    def end_step(self) -> None:
        """The step is over; ``.grad`` is the caller's."""
        self.steps.end()
        self.grads.forget()

    def discard_waiting(self) -> None:
        """No balance will follow: a row that is not finite must not stay."""
        for task in [t for t in self.steps.pending if not bool(self.rows.stats.sumsq[t].isfinite())]:
            self.rows.drop(task)
        self.steps.pending = set()

    def end_if_dropped(self) -> None:
        """End a step whose gradients the caller has thrown away."""
        if self.steps.open and self.grads.was_dropped():
            self.end_step()

    def refuse_within(self, what: str) -> None:
        """Raise RuntimeError within a step."""
        self.turns.refuse_inside(what)
        self.end_if_dropped()
        if self.steps.open:
            raise RuntimeError(f"{what} within a step; end it first: {ENDS[bool(self.steps.pending)]}")

    def reindex_tasks(self, tasks: list[int | None], name: str | None = None) -> None:
        """Let the tasks be these of the former ones, None being a new one, of this name.

        Raises:
            RuntimeError: within a step.
            TypeError, ValueError: the name.
        """
        self.refuse_within("a change of tasks")
        self.steps.reindex_tasks(tasks, name)
        self.rows.reindex_tasks(tasks)
        if hasattr(self.weighting, "reindex_tasks"):
            self.weighting.reindex_tasks(tasks)
