"""Notices: what is said once of a model that trains otherwise than its owner may think."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..rows.placement import Buffer
from .graphs import Meeting

NONE = (
    "no shared parameter got a gradient {}: are they those of the model that gave the losses? "
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

    def once(self, key: str, what: str) -> None:
        """Warn, unless this was said."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(what, RuntimeWarning, stacklevel=2)

    def zero_gradient(self, task: int) -> None:
        """A task's gradient was zero everywhere."""
        self.once(
            "zero",
            f"the gradient of task {task} is exactly zero over all shared parameters: the task counts as absent from "
            "the step. Give None for a task without labels. zero_gradients='count' follows the letter of the "
            "algorithm, which takes its old direction at full length",
        )

    def no_gradient(self, all_tasks: bool, before: Sequence[bool], now: Sequence[bool]) -> None:
        """Complain of shared parameters that had no gradient in the passes of a step.

        Args:
            all_tasks: all tasks are in this step.
            before: for each parameter, whether it had a gradient before these passes.
            now: whether it has one in them.

        Raises:
            RuntimeError: with several ranks, none had one.
        """
        parameters = self._rows.parameters
        if not any(now):
            if (self._several or all_tasks) and any(p.requires_grad for p in parameters):
                self._none()
        elif all_tasks and not all(now):
            lost = [
                self._rows.describe(index)
                for index, p in enumerate(parameters)
                if before[index] and not now[index] and p.requires_grad
            ]
            if lost:
                self.once(
                    "lost",
                    f"{', '.join(lost)} had a gradient in an earlier step and none from any task in this one. If "
                    f"another took its place in the model, that one is not balanced: {REBIND}",
                )

    def no_gradient_of(self, task: int, now: Sequence[bool]) -> None:
        """No shared parameter had a gradient in the context of a task."""
        if not any(now) and any(p.requires_grad for p in self._rows.parameters):
            self.once("none", NONE.format(f"in task({task})"))

    def _none(self) -> None:
        complaint = NONE.format("in this step")
        if self._several:
            raise RuntimeError(
                f"{complaint} fully_shard puts others in their place (make the balancer after it), and with "
                "set_requires_gradient_sync(False) keeps the gradients of all tasks in one sum (leave it True)"
            )
        self.once("none", complaint)

    def undeclared(self, found: Meeting | None, module: nn.Module | None) -> None:
        """Parameters that the tasks share and that are not balanced: as far as a module or the graphs tell.

        Args:
            found: what a walk through the graphs of the losses found.
            module: the one whose parameters are shared, where it is known.
        """
        shared = {id(p) for p in self._rows.parameters}
        strangers = {id(p): p for p in (found.below if found else []) if isinstance(p, nn.Parameter)}
        names = {} if module is None else {id(p): name for name, p in module.named_parameters()}
        if module is not None:
            strangers |= {id(p): p for p in module.parameters() if p.requires_grad and id(p) not in shared}
        if strangers:
            what = [
                repr(names[key]) if key in names else f"one of shape {tuple(p.shape)}" for key, p in strangers.items()
            ]
            self.once(
                "undeclared",
                f"{len(what)} parameter(s) of the part of the model that tasks share were not given to the balancer "
                f"({', '.join(what[:5])}{', ...' if len(what) > 5 else ''}), and get the plain sum of the tasks' "
                f"gradients: a layer replaced, added or thawed? {REBIND}",
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
            warnings.warn(
                f"an interrupt came when the .grad of {self._rows.describe(index)} was written: it is lost",
                RuntimeWarning,
                stacklevel=2,
            )

    def replaced(self) -> None:
        """Nothing of the balanced gradient is left, and other tensors are in its place."""
        self.once(
            "replaced",
            "the balanced gradient of the open step is gone from .grad, and other tensors are in its place: the step "
            "counts as thrown away, and what is there is added to. Change .grad in place, or call optimizer.step() or "
            "zero_grad() first",
        )
