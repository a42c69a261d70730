"""ShardedTaskGradientBuffer: replicas of one model, each keeping the state of a part of every row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..ops import Coefficients
from . import dtensors
from .collect import RowCollector
from .layout import ParameterLayout
from .ranks import Ranks, all_gather, naming, reduce_scatter
from .rows import Flats, TaskGradientBuffer
from .zeros import Zeros, continued, deferred_coefficients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """This rank's columns of a group of the layout: from ``start`` in a whole row, from ``local`` in one kept here."""

    start: int
    local: int
    columns: int


class Transit(NamedTuple):
    """Room for a row on its way: collected here, summed over the ranks, then added to the state."""

    whole: Tensor
    mine: Tensor


class Underway(NamedTuple):
    """A row being reduced: what to wait for, and how it then counts.

    ``task`` is None if it no longer does. ``nonzero``, if there, is how many ranks had a gradient other than zero.
    """

    transit: Transit
    task: int | None
    works: list[Any]
    coefficients: Coefficients
    loss_scale: Tensor | None
    again: bool
    nonzero: Tensor | None


class ShardedTaskGradientBuffer(TaskGradientBuffer):
    """Like its base for the mean of the ranks' gradients, of which each rank keeps K rows of P / N columns.

    A task's gradient is collected into a whole row, reduce-scattered while the next backward pass runs, and updates the
    state of this rank's columns. K sums of squares are all-reduced, the balanced gradient is all-gathered: the same
    bits on every rank. Memory: K P / N of state, P for the balanced gradient, and one row (two on a CPU) in transit,
    in float32 (float64 if a parameter or the state is).

    Args:
        layout: made with ``shards`` = the number of ranks.
        num_tasks: K.
        backend: "auto" or a backend by name.
        group: the ranks that hold replicas.
    """

    def __init__(self, layout: ParameterLayout, num_tasks: int, backend: str, group: ProcessGroup) -> None:
        self.group = group
        self.rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.shards: list[Shard] = []
        end = 0
        for g in layout.groups:
            columns = (g.stop - g.start) // size
            self.shards.append(Shard(g.start + self.rank * columns, end, columns))
            end += columns
        super().__init__(layout, num_tasks, backend, Ranks([group]))
        self.starts = [shard.local for shard in self.shards]
        self._free: deque[Transit] = deque()
        self._underway: deque[Underway] = deque()
        self._mesh: Any = None

    def collector(
        self,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None = None,
        again: bool = False,
        skip_zeros: bool | Zeros = False,
    ) -> RowCollector:
        """What takes the gradients of a pass; see its base. The coefficients are used when the row has been reduced.

        With ``skip_zeros``, whether any rank had something is only known then: `RowCollector.empty` stays None, and
        ``empty_tasks`` tells after `settle`. Hence ``again`` says here whether there was any pass before.
        """
        return ShardedCollector(self, task, coefficients, loss_scale, again, skip_zeros)

    def of_one_task(self) -> ShardedTaskGradientBuffer:
        return ShardedTaskGradientBuffer(self.layout, 1, self.backend, self.group)

    def drop(self, task: int) -> None:
        super().drop(task)
        self._underway = deque(row._replace(task=None) if row.task == task else row for row in self._underway)

    def row_of(self, task: int) -> list[Tensor]:
        self.settle()
        mine = self.rows[task]
        whole = mine.new_empty(self.layout.row_numel)
        for g, shard in zip(self.layout.groups, self.shards, strict=True):
            with naming(f"all-gather of the row of task {task}"):
                all_gather(whole[g.start : g.stop], mine[shard.local : shard.local + shard.columns], group=self.group)
        return self.layout.parts(whole)

    def set_row(self, task: int, numbers: Sequence[Tensor | None]) -> None:
        mine = self.rows[task]
        whole = mine.new_zeros(self.layout.row_numel)
        self.layout.fill(whole, numbers)
        for shard in self.shards:
            mine[shard.local : shard.local + shard.columns] = whole[shard.start : shard.start + shard.columns]

    def sums(self) -> Tensor:
        self.settle()
        return super().sums()

    def settle(self) -> None:
        """Wait for the rows on their way, and add them to the state."""
        while self._underway:
            self._arrive(self._underway.popleft())

    def take_transit(self) -> Transit:
        """Room for the next row. On a CPU there is room for two: collecting goes on during the pass."""
        if self._free:
            return self._free.popleft()
        if len(self._underway) < (2 if self.early else 1):
            whole = ops.allocate(self.layout.row_numel, dtype=self.layout.wide, device=self.device, zero=True)
            return Transit(whole, whole.new_empty(self._row_numel()))
        self._arrive(self._underway.popleft())
        return self._free.popleft()

    def give_back(self, transit: Transit) -> None:
        """A row that will not travel."""
        self._free.append(transit)

    def send(
        self,
        transit: Transit,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None,
        again: bool,
        nonzero: Tensor | None,
    ) -> None:
        """Reduce-scatter a collected row, without waiting for it.

        Args:
            transit: has it.
            task: whose it is.
            coefficients: see `collector`.
            loss_scale: see `collector`.
            again: see `collector`.
            nonzero: (1,) float, 1 if anything here is not zero, else 0; None if the row counts anyhow.
        """
        works = []
        for g, shard in zip(self.layout.groups, self.shards, strict=True):
            mine = transit.mine[shard.local : shard.local + shard.columns]
            whole = transit.whole[g.start : g.stop]
            with naming(f"reduce-scatter of the gradient of task {task}"):
                works.append(reduce_scatter(mine, whole, group=self.group, async_op=True))
        if nonzero is not None:
            with naming(f"all-reduce of whether task {task} has a gradient"):
                works.append(dist.all_reduce(nonzero, group=self.group, async_op=True))
        self._underway.append(Underway(transit, task, works, coefficients, loss_scale, again, nonzero))

    def _arrive(self, row: Underway) -> None:
        with naming(f"reduce-scatter of the gradient of task {row.task}"):
            for work in row.works:
                work.wait()
        task = row.task
        if task is not None:
            sumsq = self.stats.sumsq[task : task + 1]
            coefficients = self._coefficients_of(row, task, sumsq)
            if coefficients is not None:
                self._count(row, task, sumsq, coefficients)
        self._free.append(row.transit)

    def _count(self, row: Underway, task: int, sumsq: Tensor, coefficients: Coefficients) -> None:
        """Add a row that has come to the state."""
        segments = self._measured_segments()
        mine: list[Tensor | None] = [row.transit.mine]
        ops.accumulate_(self.rows[task], sumsq, mine, segments, coefficients, row.loss_scale, self.backend)

    def _coefficients_of(self, row: Underway, task: int, like: Tensor) -> Coefficients | None:
        """How a row counts, now that it has come; None if all ranks had zeros."""
        if row.nonzero is None:
            return continued(row.coefficients) if row.again else row.coefficients
        fed, nonzero = self.fed[task : task + 1], row.nonzero > 0
        if self.deferred:
            return deferred_coefficients(row.coefficients, nonzero, row.again, fed, like)
        before, counts = row.again and bool(fed), bool(nonzero)
        fed.fill_(before or counts)
        (self.empty_tasks.discard if before or counts else self.empty_tasks.add)(task)
        if not counts:
            return None
        return continued(row.coefficients) if before else row.coefficients

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        self.settle()
        super().reindex_tasks(tasks)

    def _row_numel(self) -> int:
        return sum(shard.columns for shard in self.shards)

    def _outs(self, flats: Flats) -> list[Tensor]:
        return [
            flats[g.dtype][shard.start - g.start :][: shard.columns]
            for g, shard in zip(self.layout.groups, self.shards, strict=True)
        ]

    def _complete(self, flats: Flats) -> None:
        for g, mine in zip(self.layout.groups, self._outs(flats), strict=True):
            with naming("all-gather of the balanced gradient"):
                all_gather(flats[g.dtype], mine, group=self.group)

    def _mesh_of_rows(self) -> Any:
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = DeviceMesh.from_group(self.group, self.device.type)
        return self._mesh

    def _saved_rows(self) -> dict[str, Tensor]:
        out = {}
        for index, (g, shard) in enumerate(zip(self.layout.groups, self.shards, strict=True)):
            real = min(max(g.columns - self.rank * shard.columns, 0), shard.columns)
            rows = self.rows[:, shard.local : shard.local + real].unflatten(1, (-1, g.unit))
            out[str(index)] = dtensors.sharded_columns(rows, self._mesh_of_rows(), g.columns // g.unit)
        return out

    def _measured_segments(self) -> Tensor:
        return torch.tensor([[0, self._row_numel()]], dtype=torch.int64, device="cpu")


class ShardedCollector(RowCollector):
    """Collects the mean's share of this rank into a row in transit, and sends it."""

    def __init__(
        self,
        buffer: ShardedTaskGradientBuffer,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None,
        again: bool,
        skip_zeros: bool | Zeros,
    ) -> None:
        self._buffer = buffer
        self._sent = task, coefficients, loss_scale, again
        self._transit: Transit | None = None  # taken when the first gradients go into it: a row may be on its way
        self._asks = skip_zeros is True  # the other ranks, when the row is sent
        self._nonzero: Tensor | None = None
        scratch = torch.empty(1, dtype=torch.float64, device=buffer.device)
        share = (0.0, 1.0 / buffer.spread.size)
        # That of a split buffer, where all have to agree first.
        zeros = None if isinstance(skip_zeros, bool) else skip_zeros
        super().__init__(buffer.layout, scratch, scratch, share, None, buffer.backend, buffer.early, zeros=zeros)

    def finish(self, indices: list[int], grads: list[Tensor | None]) -> None:
        """Returns while the row is still on its way; `ShardedTaskGradientBuffer.settle` waits."""
        super().finish(indices, grads)
        if self.empty:
            return
        assert self._transit is not None
        if self._asks:
            self._defer(self._is_nonzero())
        self._buffer.send(self._transit, *self._sent, self._nonzero)
        self._transit = None

    def abandon(self) -> bool:
        """The pass failed: the state has nothing of it yet."""
        if self._transit is not None:
            self._buffer.give_back(self._transit)
            self._transit = None
        return False

    def _defer(self, counts: Tensor) -> None:
        self.empty = None
        self._nonzero = counts.to(self._buffer.device, torch.float32)

    def _is_nonzero(self) -> Tensor:
        """(1,) bool, of the row as it was collected. On a CPU it is read only if its sum of squares is zero."""
        some = self._sumsq != 0
        return some if not self._buffer.deferred and bool(some) else some | self._row.any()

    def _accumulate(self, indices: list[int], grads: list[Tensor | None], sumsq: Tensor, decayed: bool = False) -> None:
        if self._transit is None:
            self._transit = self._buffer.take_transit()
            self._row = self._transit.whole
        super()._accumulate(indices, grads, sumsq, decayed)
