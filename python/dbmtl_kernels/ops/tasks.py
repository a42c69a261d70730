"""The K tasks: what they are called, and how much each of them is to count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, SupportsIndex

from torch import Tensor

from .arguments import check_finite, check_num_tasks, check_task

# Factors of the tasks' weights: K numbers, or a function from the step, counted from 1, to them.
TaskWeights = Sequence[float] | Callable[[int], Sequence[float]]
MOST = 1e18  # times a weight of as much it still fits into float32


class TaskNames:
    """How many tasks there are, and what they are called, once that is known.

    Args:
        given: K, or K different names.

    Attributes:
        num_tasks: K.
        names: K, or None.

    Raises:
        TypeError: neither an int nor strings.
        ValueError: no task, or a name twice.
    """

    def __init__(self, given: SupportsIndex | Collection[str]) -> None:
        self.names: list[str] | None = None
        if isinstance(given, Collection):
            self.names = [given] if isinstance(given, str) else list(given)
            _check_names(self.names)
        count = given if self.names is None else len(self.names)
        self.num_tasks = check_num_tasks(count)  # type: ignore[arg-type]

    def describe(self, task: int) -> str:
        """What a message calls a task."""
        return f"task {task}" if self.names is None else f"task {task} ({self.names[task]!r})"

    def index(self, task: SupportsIndex | str) -> int:
        """Of a task by index or name.

        Raises:
            TypeError, ValueError: there is no such task.
        """
        if not isinstance(task, str):
            return check_task(task, self.num_tasks)
        if self.names is None:
            raise ValueError(f"task {task!r}: the tasks have no names (num_tasks=[...] gives them some)")
        if task not in self.names:
            raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(map(repr, self.names))}")
        return self.names.index(task)

    def indices(self, names: Collection[str]) -> list[int]:
        """Of the keys of a dict of losses, in their order. The first such dict gives the tasks their names.

        Raises:
            TypeError, ValueError: one is not a name of a task; the first dict has not K.
        """
        if self.names is None:
            names = list(names)
            _check_names(names)
            if len(names) != self.num_tasks:
                raise ValueError(
                    f"the first dict of losses must name all {self.num_tasks} tasks, got {names}: give None for one "
                    "that is absent, or the balancer the names (num_tasks=[...])"
                )
            self.names = names
        return [self.index(name) for name in names]

    def reindex(self, tasks: Sequence[int | None], new: str | None = None) -> None:
        """Let the tasks be these of the former ones, None being a new one, of this name."""
        if self.names is None and new is not None:
            raise ValueError(f"task {new!r}: the other tasks have no names")
        if self.names is not None:
            names = [new if task is None else self.names[task] for task in tasks]
            _check_names(names)
            self.names = [name for name in names if name is not None]
        self.num_tasks = len(tasks)


def _check_names(names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a task must be a string, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"the names of tasks must differ, got {list(names)}")


def check_task_weights(weights: Any, num_tasks: int, capturable: bool = False) -> list[float]:
    """K numbers as a list.

    Raises:
        ValueError: of a balancer that is ``capturable``.
        TypeError, ValueError: they are not, or one is negative, or above 1e18.
    """
    if capturable:
        raise ValueError("task_weights with capturable: they are multiplied in on the host")
    if isinstance(weights, (Mapping, Set)):
        raise TypeError(
            f"task_weights must be {num_tasks} numbers in the order of the tasks, got {type(weights).__name__}"
        )
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if len(values) != num_tasks:
        raise ValueError(f"task_weights must be {num_tasks} numbers, one for each task, got {len(values)}")
    checked = [check_finite(f"task_weights[{task}]", value) for task, value in enumerate(values)]
    if min(checked) < 0.0 or max(checked) > MOST:
        raise ValueError(f"task_weights must be in [0, {MOST:g}], got {checked}")
    return checked
