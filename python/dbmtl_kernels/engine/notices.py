"""Notices: what is said once of a model that trains otherwise than its owner may think."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from ..rows import dtensors
from ..rows.placement import Buffer
from .graphs import Meeting, may_be_cached
from .losses import SEVERAL_PASSES

NONE = (
    "no shared parameter got a gradient from any task: are they those of the model that gave the losses? "
    "(balancer.rebind(parameters) goes on with others)"
)
REBIND = "balancer.rebind(parameters) goes on with others"


class Notices:
    """Warnings, each given once in the life of a balancer, by name where names are known.

    Args:
        rows: knows the parameters.
        several: there are several ranks; then a step without any gradient is an error.
    """

    def __init__(self, rows: Buffer, several: bool) -> None:
        self._rows, self._several = rows, several
        self._said: set[str] = set()
        self._ran = self._idle = (
            0  # bits of tasks: those that ever had a pass; those since any parameter had a gradient
        )
        self._missed: dict[int, int] = {}  # the same for each parameter, since it had one
        self._lost: set[int] = set()  # parameters that were named
        self._strangers: set[int] = set()  # ids of others that were

    def once(self, key: str, what: str) -> None:
        """Warn, unless this was said."""
        if key not in self._said:
            self._said.add(key)
            self._warn(what)

    def _warn(self, what: str) -> None:
        warnings.warn(what, RuntimeWarning, stacklevel=3)

    def zero_gradient(self, task: int) -> None:
        """A task's gradient was zero everywhere."""
        self.once(
            "zero",
            f"the gradient of task {task} is exactly zero over all shared parameters: the task counts as absent from "
            "the step. Give None for a task without labels. zero_gradients='count' follows the letter of the "
            "algorithm, which takes its old direction at full length",
        )

    def absent(self, tasks: Sequence[str]) -> None:
        """Losses of these were zeros without a graph."""
        what = "is a zero without a graph, and counts as absent, as None does"
        self.once("absent", f"the loss of {', '.join(tasks)} {what}")

    def no_gradient(self, ran: Sequence[int], before: Sequence[bool], now: Sequence[bool], whole: bool) -> None:
        """Complain of shared parameters that had a gradient before, and none since from any task that ever had a pass.

        Args:
            ran: the tasks that had a pass just now.
            before: for each parameter, whether it had a gradient before these passes.
            now: whether it has one in them.
            whole: these are all passes of the step.

        Raises:
            RuntimeError: with several ranks, none had one in a whole step.
        """
        tasks = 0
        for task in ran:
            tasks |= 1 << task
        self._ran |= tasks
        if all(now):
            self._idle, self._missed = 0, {}
            return
        trains = [p.requires_grad for p in self._rows.parameters]
        self._idle = 0 if any(now) else self._idle | tasks
        if not any(now) and any(trains) and ((self._several and whole) or self._idle == self._ran):
            self._none(whole)
            return
        for index, has in enumerate(now):
            if has or not (before[index] and trains[index]):
                self._missed.pop(index, None)
            else:
                self._missed[index] = self._missed.get(index, 0) | tasks
        lost = [index for index, missed in self._missed.items() if missed == self._ran and index not in self._lost]
        self._lost.update(lost)
        if lost:
            self._warn(
                f"{', '.join(map(self._rows.describe, lost))} had a gradient in an earlier step, and none from any "
                f"task since. If another took its place in the model, that one is not balanced: {REBIND}"
            )

    def _none(self, whole: bool) -> None:
        if self._several and whole:
            raise RuntimeError(
                f"{NONE} fully_shard puts others in their place (make the balancer after it), and with "
                "set_requires_gradient_sync(False) keeps the gradients of all tasks in one sum (leave it True)"
            )
        self.once("none", NONE)

    def undeclared(self, found: Meeting | None, module: nn.Module | None) -> None:
        """Parameters that the tasks share and that are not balanced: as far as a module or the graphs tell.

        Args:
            found: what a walk through the graphs of the losses found.
            module: the one whose parameters are shared, where it is known.
        """
        shared = {id(p) for p in self._rows.parameters}
        strangers: dict[int, Tensor] = {id(p): p for p in (found.below if found else []) if isinstance(p, nn.Parameter)}
        names = {} if module is None else {id(p): name for name, p in module.named_parameters()}
        if module is not None:
            mine: list[Tensor] = [p for p in module.parameters() if p.requires_grad and id(p) not in shared]
            if any(map(dtensors.is_dtensor, self._rows.parameters)):  # what is gathered just now stands for one of ours
                mine = [p for p in mine if dtensors.is_dtensor(p)]
            strangers |= {id(p): p for p in mine}
        strangers = {key: p for key, p in strangers.items() if key not in self._strangers}
        if strangers:
            self._strangers |= strangers.keys()
            what = [
                repr(names[key]) if key in names else f"one of shape {tuple(p.shape)}" for key, p in strangers.items()
            ]
            self._warn(
                f"{len(what)} parameter(s) of the part of the model that tasks share were not given to the balancer "
                f"({', '.join(what[:5])}{', ...' if len(what) > 5 else ''}), and get the plain sum of the tasks' "
                f"gradients: a layer replaced, added or thawed? {REBIND}"
            )

    def cached(self, losses: Sequence[Tensor], passes: int = 1) -> None:
        """So many passes from each loss may go through a graph that was compiled for one: nothing else would tell."""
        if "cached" not in self._said and may_be_cached(losses, passes):
            self.once(
                "cached",
                "PyTorch took compiled graphs from its cache on disk. If one is of a training with a single backward "
                "pass, it overwrites what the next pass needs, and gradients are wrong without an error: set "
                f"{SEVERAL_PASSES} before the first call of the compiled model",
            )

    def copied(self) -> None:
        """This is a deep copy, and trains."""
        self.once(
            "copied",
            "this balancer is a deep copy, whose moving averages begin with zeros: "
            "copy.load_state_dict(original.state_dict()) gives it those of the original",
        )

    def lost_grads(self, indices: Sequence[int]) -> None:
        """An interrupt came while the balanced gradient was added to what was in ``.grad``."""
        for index in indices:
            self._warn(f"an interrupt came when the .grad of {self._rows.describe(index)} was written: it is lost")

    def optimizer_gone(self) -> None:
        """The balancer was attached, and the optimizers do not exist any more."""
        self._warn(
            "the optimizer that this balancer was attached to is gone: each backward is a step of its own now. Attach "
            "the one in its place: balancer.attach(optimizer)"
        )

    def replaced(self) -> None:
        """Nothing of the balanced gradient is left, and other tensors are in its place."""
        self.once(
            "replaced",
            "the balanced gradient of the open step is gone from .grad, and other tensors are in its place: the step "
            "counts as thrown away, and what is there is added to. Change .grad in place, or call optimizer.step() or "
            "zero_grad() first",
        )
