"""Monitor: what there is to watch of a balancer, on the device until it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import reference
from ..engine.step import Engine
from ..ops.tasks import TaskNames
from ..weightings import Weighting, is_max_norm

PAIRS_UP_TO = 16  # tasks; with more a logger gets each task's mean and least cosine, not all K (K - 1) / 2


class ScalarWriter(Protocol):
    """What `torch.utils.tensorboard.SummaryWriter` has, and what `Monitor.write` needs of it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Write a number under a name."""


class Monitor:
    """Norms, weights and angles of the task gradients (their EMAs) as of now; always those of the balancer's last step.

    Tensors are on the device and computed without a sync. The Gramian reads the K P elements of the state, once per
    step however often it is asked for, if the monitor is kept. Of several ranks the Gramian, and with it `cosine` and
    `conflicts`, is a collective: **every rank must read it**; the rest each rank may read alone.

    Args:
        engine: of the balancer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._steps = engine, engine.steps
        self._gramian: tuple[int, Tensor] | None = None  # of which change of the rows, and what it was

    @property
    def norms(self) -> Tensor:
        """(K,) norms; see `GradientBalancer.norms`."""
        return reference.told(self._engine.rows.stats.norms, self._engine.rows.narrow)

    @property
    def weights(self) -> Tensor:
        """(K,) weights; see `GradientBalancer.weights`.

        0 for a task whose gradient is zero: it has no say, and alpha / (0 + eps) would tell nothing.
        """
        stats, narrow = self._engine.rows.stats, self._engine.rows.narrow
        if not is_max_norm(self._engine.weighting):
            return stats.weights.to(narrow, copy=True)
        return torch.where(stats.norms == 0.0, 0.0, stats.weights).to(narrow)

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's gradient was not finite."""
        return self._engine.rows.stats.nonfinite_steps.clone()

    @property
    def losses(self) -> Tensor:
        """(K,) losses; see `GradientBalancer.losses`."""
        losses = torch.full_like(self.norms, torch.nan)
        for task, loss in self._steps.losses.items():
            losses[task] = loss
        return losses

    @property
    def step(self) -> int:
        """Number of steps begun; reading it is a sync if ``capturable``."""
        return self._steps.count

    @property
    def gramian(self) -> Tensor:
        """(K, K) inner products of the task gradients, float32 (float64 of a float64 state).

        The row and column of a task whose gradient was not finite in the last step are 0.
        """
        steps = self._steps
        # What a replayed CUDA graph changes is not seen here.
        if self._gramian is None or self._gramian[0] != steps.changes or steps.capturable:
            self._gramian = (steps.changes, self._engine.rows.gramian())
        return self._gramian[1].clone()

    @property
    def cosine(self) -> Tensor:
        """(K, K) cosines of the angles between task gradients, in [-1, 1]; 0 where one of the two is zero.

        In the dtype of `gramian`; NaN where that overflowed.
        """
        gramian = self.gramian
        wide = gramian.to(self._engine.rows.stats.norms.dtype)
        norms = wide.diagonal().clamp(min=0.0).sqrt()
        product = norms.outer(norms)
        cosine = torch.where(product == 0.0, 0.0, wide / product).clamp(-1.0, 1.0)
        return torch.where(product.isinf(), torch.nan, cosine).to(gramian.dtype)

    @property
    def conflicts(self) -> Tensor:
        """Int64 scalar: the number of pairs of tasks whose gradients point away from each other (cosine < 0)."""
        return _pairs(self.cosine).lt(0.0).sum()

    @torch.no_grad()
    def as_dict(
        self, prefix: str = "", names: Sequence[str] | None = None, *, gramian: bool = False
    ) -> dict[str, float]:
        """Numbers for a logger, fetched in one transfer (one sync).

        Args:
            prefix: put before each name.
            names: of the K tasks; by default the balancer's, or indices.
            gramian: `conflicts` and cosines besides; of several ranks all must ask for them.

        Returns:
            ``step``, ``norm/NAME``, ``weight/NAME``, ``nonfinite_steps/NAME``; ``loss/NAME`` of tasks whose loss is
            known, and ``loss``, their sum; with ``gramian`` ``conflicts`` and ``cosine/NAME-OTHER``, or with more than
            16 tasks ``cosine_mean/NAME`` and ``cosine_min/NAME``, over the other tasks: some 6 K numbers, where pairs
            would grow as K squared (`cosine` has them).

        Raises:
            ValueError: ``names`` are not K, or two are the same.
        """
        tags, values = zip(*self._entries(_checked(names, self._steps.tasks), gramian), strict=True)
        wide = self._engine.rows.stats.norms.dtype
        packed = torch.cat([value.reshape(-1).to(wide) for value in values])
        return {prefix + tag: x for tag, x in zip([t for own in tags for t in own], packed.tolist(), strict=True)}

    def write(
        self,
        writer: ScalarWriter,
        step: int | None = None,
        *,
        prefix: str = "balancer/",
        names: Sequence[str] | None = None,
        gramian: bool = False,
    ) -> None:
        """Give what `as_dict` gives to a `torch.utils.tensorboard.SummaryWriter`.

        Args:
            writer: anything with its ``add_scalar``.
            step: the step to write under; by default the balancer's.
            prefix: see `as_dict`.
            names: see `as_dict`.
            gramian: see `as_dict`.

        Raises:
            ValueError: as `as_dict`.
        """
        numbers = self.as_dict("", names, gramian=gramian)
        for tag, value in numbers.items():
            writer.add_scalar(prefix + tag, value, int(numbers["step"]) if step is None else step)

    def scalars(self, names: Sequence[str] | None = None, *, gramian: bool = False) -> dict[str, Tensor]:
        """As `as_dict`, but scalars on the device, without a sync."""
        out: dict[str, Tensor] = {}
        for tags, values in self._entries(_checked(names, self._steps.tasks), gramian):
            out.update(zip(tags, values.reshape(-1).unbind(), strict=True))
        return out

    def _entries(self, names: Sequence[str], gramian: bool) -> Iterator[tuple[list[str], Tensor]]:
        yield ["step"], self._steps.count_on(self._engine.rows.device)
        yield [f"norm/{name}" for name in names], self.norms
        yield [f"weight/{name}" for name in names], self.weights
        yield [f"nonfinite_steps/{name}" for name in names], self.nonfinite_steps
        known = sorted(self._steps.losses)
        if known:
            losses = self.losses[known]
            yield ["loss", *(f"loss/{names[task]}" for task in known)], torch.cat([losses.sum()[None], losses])
        if gramian:
            cosine = self.cosine
            yield ["conflicts"], _pairs(cosine).lt(0.0).sum()
            if len(names) <= PAIRS_UP_TO:
                yield [f"cosine/{a}-{b}" for a, b in combinations(names, 2)], _pairs(cosine)
            else:
                own = torch.eye(len(names), dtype=torch.bool, device=cosine.device)
                yield (
                    [f"cosine_mean/{name}" for name in names],
                    cosine.masked_fill(own, 0.0).sum(1) / (len(names) - 1),
                )
                yield [f"cosine_min/{name}" for name in names], cosine.masked_fill(own, torch.inf).amin(1)


class Watched:
    """What a balancer tells: copies, that later steps do not change."""

    _engine: Engine

    @property
    def num_tasks(self) -> int:
        """K."""
        return self._engine.steps.num_tasks

    @property
    def task_names(self) -> list[str] | None:
        """The names of the K tasks, if they have any."""
        names = self._engine.steps.tasks.names
        return None if names is None else list(names)

    @property
    def shared_parameters(self) -> list[Tensor]:
        """The parameters that are balanced, in the order given."""
        return list(self._engine.rows.parameters)

    @property
    def weighting(self) -> Weighting:
        """What weighs the task gradients; another takes another balancer."""
        return self._engine.weighting

    @property
    def step(self) -> int:
        """Number of EMA updates begun; reading it is a sync if ``capturable``."""
        return self._engine.steps.count

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the task gradients (their EMA) at the last balance, on the device, without a sync.

        float32, or float64 with a float64 state. Not finite where the gradient was not; 0 where the loss was not, as
        its pass is not run then (on a CPU).
        """
        return self.monitor().norms

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients at the last balance, on the device, without a sync."""
        return self.monitor().weights

    @property
    def losses(self) -> Tensor:
        """(K,) losses as they were given, no logarithm taken, of the last step, on the device, without a sync.

        What to watch: their sum goes down as the model learns, and stays positive, where the value of a balanced loss
        is a sum of logarithms. Of several ranks the means. NaN of tasks that were absent, and of `task`, which is
        given no loss.
        """
        return self.monitor().losses

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's loss or gradient was not finite."""
        return self.monitor().nonfinite_steps

    def monitor(self) -> Monitor:
        """Norms, weights, cosines and conflicts of the tasks, for a logger; see `Monitor`."""
        return Monitor(self._engine)


def _pairs(matrix: Tensor) -> Tensor:
    """(K (K - 1) / 2,) entries above the diagonal, row by row, without a sync."""
    rows, columns = matrix.shape
    row, column = torch.triu_indices(rows, columns, 1, dtype=torch.int64, device=matrix.device)
    return matrix[row, column]


def _checked(names: Sequence[str] | None, tasks: TaskNames) -> list[str]:
    given = names or tasks.names
    if given is None:
        return [str(task) for task in range(tasks.num_tasks)]
    if not len(given) == len(set(given)) == tasks.num_tasks:
        raise ValueError(f"names must be {tasks.num_tasks} different names, one for each task, got {list(given)}")
    return list(given)
