"""SplitTaskGradientBuffer: shared parameters on several devices, or spread over ranks in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import Coefficients, Stats
from .collect import RowCollector
from .layout import describe
from .rows import Flats, TaskGradientBuffer
from .zeros import Zeros


class SplitTaskGradientBuffer:
    """Rows in several parts, each a buffer of its own; only sums of squares and weights cross between them.

    Its methods are those of `TaskGradientBuffer`; the stats are those of the first part (each part has the
    same).

    Args:
        parts: the buffers.
        members: for each parameter, in the order given by the user, its part and its index there.
    """

    def __init__(self, parts: Sequence[TaskGradientBuffer], members: Sequence[tuple[int, int]]) -> None:
        self.parts = list(parts)
        self.members = list(members)
        self.device = self.parts[0].device
        self.narrow = self.parts[0].narrow
        self.early = all(part.early for part in self.parts)
        self.local = all(part.local for part in self.parts)
        self.parameters = [self.parts[part].parameters[index] for part, index in self.members]
        self.names = [self.parts[part].names[index] for part, index in self.members]
        self._given = [[i for i, (part, _) in enumerate(self.members) if part == n] for n in range(len(self.parts))]
        self.deferred = any(part.deferred for part in self.parts)

    @property
    def stats(self) -> Stats:
        return self.parts[0].stats

    @property
    def fed(self) -> Tensor:
        return self.parts[0].fed

    @property
    def empty_tasks(self) -> set[int]:
        return self.parts[0].empty_tasks

    @property
    def allocated(self) -> bool:
        return any(part.allocated for part in self.parts)

    def check_unchanged(self) -> None:
        """See `ParameterLayout.check_unchanged`."""
        for part, given in zip(self.parts, self._given, strict=True):
            part.layout.check_unchanged(given)

    def describe(self, index: int) -> str:
        """See `TaskGradientBuffer.describe`."""
        return describe(index, self.parameters[index], self.names[index])

    def collector(
        self,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None = None,
        again: bool = False,
        skip_zeros: bool = False,
    ) -> SplitCollector:
        collectors = []
        spread = [part.spread for part in self.parts if part.spread.size > 1]
        zeros = Zeros(spread, self.device, self.deferred, self.parts[0].backend) if skip_zeros else None
        for part in self.parts:
            own = coefficients.to(part.device) if isinstance(coefficients, Tensor) else coefficients
            scale = None if loss_scale is None else loss_scale.to(part.device)
            collectors.append(part.collector(task, own, scale, again, zeros or False))
        return SplitCollector(collectors, self.members, zeros)

    def of_one_task(self) -> SplitTaskGradientBuffer:
        """See `TaskGradientBuffer.of_one_task`."""
        return SplitTaskGradientBuffer([part.of_one_task() for part in self.parts], self.members)

    def settle(self) -> None:
        for part in self.parts:
            part.settle()

    def sit_out(self, task: int, count: int) -> None:
        for part in self.parts:
            part.sit_out(task, count)

    def drop(self, task: int) -> None:
        for part in self.parts:
            part.drop(task)

    def copy_stats(self) -> list[Stats]:
        return [stats for part in self.parts for stats in part.copy_stats()]

    def put_stats(self, stats: Sequence[Stats]) -> None:
        for part, before in zip(self.parts, stats, strict=True):
            part.put_stats([before])

    def row_of(self, task: int) -> list[Tensor]:
        rows = [part.row_of(task) for part in self.parts]
        return [rows[part][index] for part, index in self.members]

    def take_over(self, old: Any) -> None:
        """See `TaskGradientBuffer.take_over`."""
        for part in self.parts:
            part.take_over(old)

    def sums(self) -> Tensor:
        """(K,) sums of squares of the whole rows."""
        first, *others = [part.sums() for part in self.parts]
        return sum((other.to(self.device) for other in others), first)

    def balance(
        self,
        flats: Flats,
        eps: float,
        scale: str | float,
        *,
        active: Sequence[bool] | Tensor | None = None,
        loss_scale: Tensor | None = None,
        propagate_above: float = 1.0,
        fresh: bool = True,
        accumulate: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        total = self.sums() if sums is None else sums
        for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True):
            part.balance(
                own, eps, scale, active=active.to(part.device) if isinstance(active, Tensor) else active,
                loss_scale=None if loss_scale is None else loss_scale.to(part.device), propagate_above=propagate_above,
                fresh=fresh, accumulate=accumulate, sums=total.to(part.device, copy=True),
            )  # fmt: skip

    def record(self, sums: Tensor, weights: Tensor, nonfinite: Tensor, now: Tensor, bad: Sequence[int]) -> None:
        for part in self.parts:
            part.record(sums, weights, nonfinite, now, bad)

    def combine(self, weights: Tensor, flats: Flats, accumulate: bool = False) -> None:
        for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True):
            part.combine(weights.to(part.device), own, accumulate)

    def new_flats(self) -> Flats:
        # keys: (part, dtype)
        return {(i, dtype): flat for i, part in enumerate(self.parts) for dtype, flat in part.new_flats().items()}

    def views(self, flats: Flats) -> list[Tensor]:
        views = [part.views(own) for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True)]
        return [views[part][index] for part, index in self.members]

    def gramian(self) -> Tensor:
        first, *others = [part.gramian() for part in self.parts]
        return sum((other.to(self.device) for other in others), first)

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """See `TaskGradientBuffer.reindex_tasks`."""
        for part in self.parts:
            part.reindex_tasks(tasks)

    def state(self) -> dict[str, Any]:
        return {f"part{i}": part.state() for i, part in enumerate(self.parts)}

    def load(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load(state[f"part{i}"])

    def signature(self) -> list[list[Any]]:
        signatures = [part.layout.signature() for part in self.parts]
        return [signatures[part][index] for part, index in self.members]

    def _flats_of_parts(self, flats: Flats) -> list[Flats]:
        """What each part knows of `new_flats`."""
        return [{dtype: flat for (p, dtype), flat in flats.items() if p == i} for i in range(len(self.parts))]


class SplitCollector:
    """Hands each gradient to the collector of its part; see `RowCollector`."""

    def __init__(
        self, collectors: Sequence[RowCollector], members: Sequence[tuple[int, int]], zeros: Zeros | None = None
    ) -> None:
        self._collectors, self._members, self._zeros = collectors, members, zeros

    @property
    def fed(self) -> bool:
        """Whether any part of the row was written to."""
        return any(collector.fed for collector in self._collectors)

    @property
    def empty(self) -> bool | None:
        """The same for all parts."""
        return self._collectors[0].empty

    def add(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """Gradients of some parameters."""
        for collector, (own, some) in zip(self._collectors, self._by_part(indices, grads), strict=True):
            collector.add(own, some)

    def finish(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """The rest, and the pass is over."""
        if self._zeros is not None:
            self._zeros.decide(grads)
        for collector, (own, some) in zip(self._collectors, self._by_part(indices, grads), strict=True):
            collector.finish(own, some)

    def abandon(self) -> bool:
        """The pass failed; whether the row must be dropped. All parts give back what they hold."""
        half_written = [collector.abandon() for collector in self._collectors]
        return any(half_written)

    def _by_part(self, indices: list[int], grads: list[Tensor | None]) -> list[tuple[list[int], list[Tensor | None]]]:
        out: list[tuple[list[int], list[Tensor | None]]] = [([], []) for _ in self._collectors]
        for index, grad in zip(indices, grads, strict=True):
            part, own = self._members[index]
            out[part][0].append(own)
            out[part][1].append(grad)
        return out
