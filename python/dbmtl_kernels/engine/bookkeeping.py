"""Steps: which step is open, which tasks have a gradient in it, and how the next gradient of a task counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Coefficients
from ..ops.tasks import TaskNames, TaskWeights, check_task_weights


@dataclass
class Settings:
    """What may be set between steps: `GradientBalancer` has a property for each, which checks it.

    Attributes:
        beta: forgetting rate.
        beta_sigma: decay exponent; in step k, beta_k = beta / k ** beta_sigma.
        eps: in the logarithm.
        task_weights: factors of the weights, or None.
        log_transform: of losses their logs.
        enabled: losses are balanced; otherwise summed.
    """

    beta: float
    beta_sigma: float
    eps: float
    task_weights: TaskWeights | None = None
    log_transform: bool = False
    enabled: bool = True


class Turn(NamedTuple):
    """Who is within a step: a thread, and the task whose context is open, if it is one."""

    thread: int
    task: int | None


class Turns:
    """Lets in one thread at a time, and none from within itself."""

    def __init__(self) -> None:
        self._turn: dict[None, Turn] = {}  # setdefault is atomic

    def take(self, mine: Turn, what: str) -> None:
        """Take the turn, until `give_back`.

        Raises:
            RuntimeError: it is somebody else's.
        """
        holder = self._turn.setdefault(None, mine)
        if holder is not mine:
            if holder.thread != mine.thread:
                raise RuntimeError(f"{what} while another thread is within a step of this balancer: one at a time")
            self.refuse_inside(what)
            raise RuntimeError(f"{what} within a backward of the same balancer (in a hook?)")

    def give_back(self, mine: Turn) -> None:
        """The turn is over. More than once does no harm: what an interrupt cut off is done again."""
        if self._turn.get(None) is mine:
            self._turn.pop(None, None)

    def refuse_inside(self, what: str) -> None:
        """Raise RuntimeError if the context of a task is open."""
        turn = self._turn.get(None)
        if turn is not None and turn.task is not None:
            raise RuntimeError(f"{what} inside the context of task({turn.task}); leave it first")


class Before(NamedTuple):
    """The bookkeeping before an attempt to feed gradients, for `Steps.undo`."""

    begun: int
    coefficients: Coefficients
    open: bool
    fresh: bool
    seen: list[bool]
    pending: set[int]
    complete: bool
    sitting_out: set[int]
    finite: Tensor | None
    lengths: dict[int, Tensor]
    losses: dict[int, Tensor]
    loss_scale: Tensor | None


class SavedSteps(NamedTuple):
    """What a checkpoint keeps of `Steps`: its attributes, checked; ``step`` is the count, at least 1 if one is open."""

    step: int
    open: bool
    fresh: bool
    seen: list[bool]
    pending: set[int]
    sitting_out: set[int]
    losses: dict[int, Tensor]
    loss_scale: float | None


class Steps:
    """The bookkeeping of a balancer. A step is one update of the EMA, of one backward pass a task or of several.

    Args:
        tasks: how many, and their names.
        settings: read when a step begins.
        device: None keeps count on the host. A device keeps it there, and with it the coefficients, so that a step
            captured in a CUDA graph counts on when it is replayed.

    Attributes:
        open: a step has begun and not ended.
        fresh: nothing was balanced yet in this step.
        seen: for each task, whether it has a gradient in this step.
        pending: the tasks entered with `GradientBalancer.task` since the last balance.
        complete: the last task entered completed them all, so that they were balanced at once.
        sitting_out: tasks whose loss was not finite in this step, as far as the host knows.
        lengths: of each task, the norm of its first gradient since the last step that is not to update.
        finite: (K,) bool on a device, the tasks whose loss was finite; None where the host knows.
        loss_scale: the factor that this step's gradients carry.
        losses: the last loss of each task in this step, where it is known.
        changes: how often any row was changed, as far as this host knows: a replayed CUDA graph does not count.
        capturable: whether the count is kept on a device.
    """

    def __init__(self, tasks: TaskNames, settings: Settings, device: torch.device | None) -> None:
        self.tasks, self.settings = tasks, settings
        num_tasks, beta = tasks.num_tasks, settings.beta
        self.capturable = device is not None
        self._count: int | Tensor = 0 if device is None else torch.zeros((), dtype=torch.int64, device=device)
        self._coefficients: Coefficients = beta, 1.0 - beta  # of a first gradient in the step now open
        self.open = False
        self.fresh = True
        self.seen = [False] * num_tasks
        self.pending: set[int] = set()
        self.complete = False
        self.sitting_out: set[int] = set()
        self.finite: Tensor | None = None
        self.lengths: dict[int, Tensor] = {}
        self.loss_scale: Tensor | None = None
        self.losses: dict[int, Tensor] = {}
        self.changes = 0
        self._begun = 0  # steps, since this was made
        self._factors: tuple[int, list[float] | None] = (-1, None)  # of which step, and what they are

    @property
    def averages(self) -> bool:
        """Whether gradients of earlier steps have a say."""
        return self.settings.beta > 0.0

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.seen)

    @property
    def count(self) -> int:
        """Number of steps begun; a sync if it is kept on a device."""
        return int(self._count)

    @property
    def started(self) -> int:
        """Number of steps begun, as far as the host knows: a replayed CUDA graph does not count."""
        return self._begun if isinstance(self._count, Tensor) else self._count

    def count_on(self, device: torch.device) -> Tensor:
        """`count` as one number on the device, without a sync."""
        if isinstance(self._count, Tensor):
            return self._count
        return torch.full((), self._count, dtype=torch.int64, device=device)

    def snapshot(self) -> Before:
        """What `undo` needs."""
        return Before(
            self._begun, self._coefficients, self.open, self.fresh, list(self.seen), set(self.pending), self.complete,
            set(self.sitting_out), self.finite, dict(self.lengths), dict(self.losses), self.loss_scale,
        )  # fmt: skip

    def begin(self, loss_scale: Tensor | None) -> None:
        """Gradients that carry ``loss_scale`` are about to come: begin a step, unless one is open."""
        self.complete = False
        self.lengths = {}
        if self.open:
            if self.loss_scale is not None and is_zero(self.loss_scale):
                self.loss_scale = loss_scale  # nothing counted so far
            return
        self._advance(1)
        self._coefficients = self.coefficients_of(self._count)
        self.seen, self.losses, self.sitting_out, self.finite = [False] * len(self.seen), {}, set(), None
        self.loss_scale = loss_scale
        self.open = self.fresh = True

    def undo(self, before: Before) -> None:
        """Nothing came of the attempt since `snapshot`: a step that was begun does not count."""
        if self._begun != before.begun:
            self._advance(-1)
        (
            self._begun, self._coefficients, self.open, self.fresh, self.seen, self.pending, self.complete,
            self.sitting_out, self.finite, self.lengths, self.losses, self.loss_scale,
        ) = before  # fmt: skip

    def coefficients(self) -> Coefficients:
        """How the first gradient that a task has in the open step counts: decay and gain. A row is about to change."""
        self.changes += 1
        return self._coefficients

    def note_finite(self, tasks: Sequence[int], values: Sequence[Tensor]) -> None:
        """Losses whose values only a device knows: a task whose loss is not finite sits out."""
        losses = [torch.ones_like(values[0])] * len(self.seen)
        for task, value in zip(tasks, values, strict=True):
            losses[task] = value.to(values[0].device)
        finite = torch.stack(losses).isfinite()
        self.finite = finite if self.finite is None else self.finite & finite

    def active(self) -> list[bool]:
        """For each task, whether it has a say in this step."""
        if not self.sitting_out:
            return self.seen
        return [seen and task not in self.sitting_out for task, seen in enumerate(self.seen)]

    @property
    def empty(self) -> bool:
        """Balanced, and of nothing: no task had a say."""
        return not (self.fresh or any(self.active()))

    def balanced(self, at_once: bool) -> None:
        """The balanced gradient has been written, ``at_once`` by the last task."""
        self.changes += 1
        self.pending, self.complete = set(), at_once

    def end(self) -> None:
        """The step is over, whether anything came of it or not."""
        self.open = False
        self.pending = set()

    def factors(self) -> list[float] | None:
        """K factors of the weights of the open step, if there are any: as they were when it was first asked.

        Raises:
            ValueError, TypeError: the function that gives them gave something else.
        """
        step, found = self._factors
        if step != self.started:
            given = self.settings.task_weights
            values = given(self.count) if callable(given) else given
            found = None if values is None else check_task_weights(values, self.num_tasks)
            self._factors = self.started, found
        return found

    def turn_factors(self, order: Sequence[int]) -> None:
        """Where ``order`` of the tasks will be their order, let numbers given here stay with their tasks."""
        factors = self.settings.task_weights
        if factors is not None and not callable(factors):
            self.settings.task_weights = [factors[order.index(there)] for there in range(len(order))]

    def reindex_tasks(self, tasks: Sequence[int | None], name: str | None = None) -> None:
        """Let the tasks be these, None being a new one, of this name."""
        self.tasks.reindex(tasks, name)
        weights = self.settings.task_weights
        if weights is not None and not callable(weights):
            self.settings.task_weights = [1.0 if task is None else weights[task] for task in tasks]
        self.changes += 1
        self._factors = -1, None
        self.lengths = {}
        self.seen = [task is not None and self.seen[task] for task in tasks]

    def _advance(self, by: int) -> None:
        """Count; in place on a device, so that a captured step counts on."""
        count = self._count
        self._begun, self._count = self._begun + by, count.add_(by) if isinstance(count, Tensor) else count + by

    def coefficients_of(self, count: int | Tensor) -> Coefficients:
        """Decay and gain of a first gradient in this step. Raises OverflowError if its decay is beyond any float."""
        k = count.to(torch.float64) if isinstance(count, Tensor) else count
        beta = self.settings.beta / k**self.settings.beta_sigma
        return torch.stack([beta, 1.0 - beta]) if isinstance(beta, Tensor) else (beta, 1.0 - beta)

    def refuse_entered(self, task: int) -> None:
        """Raise RuntimeError if the task waits for a balance already."""
        if task in self.pending:
            raise RuntimeError(f"{self.tasks.describe(task)} was entered already in this step; call balance() first")

    def refuse_pending(self) -> None:
        """Raise RuntimeError if any task waits for a balance."""
        if self.pending:
            raise RuntimeError(f"backward() while task(s) {sorted(self.pending)} wait for balance(); call it first")

    def refuse_unbalanced(self, who: str) -> None:
        """Raise RuntimeError if tasks wait for a balance: ``who`` would not see their gradient."""
        if self.pending:
            raise RuntimeError(
                f"{who} while task(s) {sorted(self.pending)} of {self.num_tasks} wait: their gradient is not in .grad "
                "yet. Call balancer.balance() after the last task() of a step (before clipping or unscaling); it is "
                "done by itself only when every task was entered"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, and of the losses a (K,) float64 tensor."""
        known = self.losses if self.open else {}
        losses = torch.zeros(len(self.seen), dtype=torch.float64, device="cpu")
        for task, loss in known.items():
            losses[task] = loss
        return {
            "step": self.count,
            "open": self.open,
            "fresh": self.fresh,
            "seen": [int(x) for x in self.seen],
            "pending": sorted(self.pending),
            "sitting_out": sorted(self.sitting_out) if self.open else [],
            "known": sorted(known),
            "losses": losses,
            "loss_scale": None if self.loss_scale is None else float(self.loss_scale),
        }

    def load(self, saved: SavedSteps, device: torch.device) -> None:
        """Take over what `state` gave, read and checked."""
        self.changes += 1
        self._factors = -1, None
        self._count = self._count.fill_(saved.step) if isinstance(self._count, Tensor) else saved.step
        self.open, self.fresh = saved.open, saved.fresh
        if self.open:
            self._coefficients = self.coefficients_of(self._count)
        self.seen, self.pending, self.sitting_out = list(saved.seen), set(saved.pending), set(saved.sitting_out)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.losses = {task: loss.to(device, wide, copy=True) for task, loss in saved.losses.items()}
        scale = saved.loss_scale
        self.loss_scale = None if scale is None else torch.full((), scale, dtype=wide, device=device)
        self.lengths, self.complete = {}, False


def is_zero(scale: Tensor) -> bool:
    """Whether the loss scale is 0 (off a CPU it would take a sync to know)."""
    return scale.device.type == "cpu" and float(scale) == 0.0
