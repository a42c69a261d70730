"""Changes: what may change of a balancer between two steps, its tasks and its forgetting rate."""

from __future__ import annotations

from collections.abc import Callable

from . import checks
from .placement import Buffer
from .steps import Steps
from .weightings import KeepsTasks, Weighting


class Changes:
    """A base of a balancer."""

    num_tasks: int
    beta: float
    beta_sigma: float
    _weighting: Weighting
    buffer: Buffer
    _steps: Steps
    _end_if_thrown_away: Callable[[], None]

    def add_task(self) -> int:
        """Make room for one task more, with a row of zeros; the others keep theirs. Returns its index, the last.

        Raises:
            RuntimeError: within a step.
        """
        self._keep([*range(self.num_tasks), None])
        return self.num_tasks - 1

    def remove_task(self, index: int) -> None:
        """Forget a task; those after it move up by one, all keep their rows.

        Raises:
            RuntimeError: within a step.
            ValueError: the index is out of range, or it is the last task.
        """
        index = checks.check_task(index, self.num_tasks)
        checks.check_num_tasks(self.num_tasks - 1)
        self._keep([task for task in range(self.num_tasks) if task != index])

    def _keep(self, tasks: list[int | None]) -> None:
        self._steps.refuse_inside("a change of tasks")
        self._end_if_thrown_away()
        if self._steps.open:
            raise RuntimeError("a change of tasks within a step; end it first (balance(), or optimizer.step())")
        self.buffer.keep(tasks)
        self._steps.keep(tasks)
        if isinstance(self._weighting, KeepsTasks):
            self._weighting.keep(tasks)
        self.num_tasks = len(tasks)

    def set_beta(self, beta: float, beta_sigma: float) -> None:
        """Change the forgetting rate and its decay from the next step on; the count of steps goes on.

        Raises:
            ValueError: as for the class.
        """
        self.beta, self.beta_sigma = checks.check_beta(beta), checks.check_beta_sigma(beta_sigma)
        self._steps.set_beta(self.beta, self.beta_sigma)
