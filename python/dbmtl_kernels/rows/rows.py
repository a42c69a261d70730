"""TaskGradientBuffer: the K x P state, one padded row per task, and what is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import Coefficients, Stats
from . import dtensors
from .collect import RowCollector
from .layout import ParameterLayout, describe
from .ranks import Ranks
from .zeros import Zeros

# Room for a balanced gradient: one flat tensor per parameter dtype.
Flats = dict[Any, Tensor]


class TaskGradientBuffer:
    """The task gradients (their EMA) of K tasks, as one (K, row_numel) tensor.

    Args:
        layout: where each parameter lies in a row.
        num_tasks: K.
        backend: "auto" or a backend by name.
        spread: the ranks over which the elements of the parameters are spread, each with the part that ``layout``
            lays out (FSDP2); by default this process has all of them.

    Attributes:
        names: of the parameters, or None.
        stats: K numbers of each kind; ``sumsq`` of the rows held here, the rest of the last `balance`.
        narrow: the dtype of `gramian`, float64 of float64 rows, else float32.
        early: whether gradients are best collected while a backward pass runs (on a CPU), or at its end in one call.
        starts: of each parameter dtype, its first column in the rows held here.
        local: whether nothing that is done here needs another rank.
        deferred: whether what gradients are must not be known on the host, as looking would take a sync; not ``early``.
        fed: (K,) bool, where ``deferred``: whether the task was fed in this step, all its passes having
            ``skip_zeros``.
        empty_tasks: of replicas on a CPU, after `settle`: the tasks whose passes of this step, all with ``skip_zeros``,
            were zeros alone. Elsewhere nobody is in it, as `RowCollector.empty` tells.
    """

    def __init__(
        self, layout: ParameterLayout, num_tasks: int, backend: str = "auto", spread: Ranks | None = None
    ) -> None:
        self.layout = layout
        self.backend = backend
        self.device = layout.device
        self.parameters, self.names = layout.parameters, layout.names
        self.narrow = torch.float64 if layout.state_dtype == torch.float64 else torch.float32
        self.spread = spread or Ranks()
        self._replicas = Ranks(dtensors.replicated_groups(layout.parameters[0]))
        # FSDP runs hooks while a gradient may still be on its way to a CPU.
        self.early = ops.gathers_early(backend, self.device, num_tasks) and not layout.distributed
        self._dtypes = [group.dtype for group in layout.groups]
        self.starts = [group.start for group in layout.groups]
        self.local = self.spread.size == 1 and self._replicas.size == 1
        self.deferred = self.device.type != "cpu"
        self._reset(num_tasks)

    @cached_property
    def rows(self) -> Tensor:
        """(K, row_numel) in ``layout.state_dtype``, zeros at first; padding is zero. Allocated when first asked for.

        Raises:
            RuntimeError: that is while a CUDA graph is captured, each replay of which would set them to zero.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the task gradients have no memory yet: run a step before a CUDA graph is captured")
        with torch.inference_mode(False):  # first asked for there, it could not be updated elsewhere
            shape = len(self.stats.sumsq), self._row_numel()
            return ops.allocate(*shape, dtype=self.layout.state_dtype, device=self.device, zero=True)

    @property
    def allocated(self) -> bool:
        """Whether `rows` take memory yet."""
        return "rows" in self.__dict__

    def _reset(self, num_tasks: int) -> None:
        device = self.device
        self.__dict__.pop("rows", None)
        wide = torch.float32 if device.type == "mps" else torch.float64
        dtypes = Stats(wide, wide, wide, torch.bool, torch.int64)  # type: ignore[arg-type]
        self.stats = Stats(*(torch.zeros(num_tasks, dtype=dtype, device=device) for dtype in dtypes))  # type: ignore
        self.fed = torch.zeros(num_tasks, dtype=torch.bool, device=device)
        self.empty_tasks: set[int] = set()

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a parameter is not what it was; see `ParameterLayout.check_unchanged`."""
        self.layout.check_unchanged()

    def describe(self, index: int) -> str:
        """What a message calls a parameter."""
        return describe(index, self.parameters[index], self.names[index])

    def signature(self) -> list[list[Any]]:
        """What must agree for a state to fit; see `ParameterLayout.signature`."""
        return self.layout.signature()

    def collector(
        self,
        task: int,
        coefficients: Coefficients,
        loss_scale: Tensor | None = None,
        again: bool = False,
        skip_zeros: bool | Zeros = False,
    ) -> RowCollector:
        """What takes the gradients of one backward pass into ``rows[task]``; see `ops.accumulate_`.

        Args:
            task: whose.
            coefficients: decay and gain of the first gradient in a step; two numbers, or (2,) on the device.
            loss_scale: one number that the gradients carry and the row must not.
            again: whether the task had a pass in this step before: the row is not decayed again. On a CPU one
                that counted; where that is not known on the host (see `RowCollector.empty`), any.
            skip_zeros: a pass whose gradients are all exactly zero does not count: row and sum of squares stay
                as they are. (A split buffer gives what its parts share.)
        """
        sumsq = self.stats.sumsq[task : task + 1]
        zeros = (
            Zeros([self.spread] if self.spread.size > 1 else [], self.device, self.deferred, self.backend)
            if skip_zeros is True
            else skip_zeros or None
        )
        return RowCollector(
            self.layout, self.rows[task], sumsq, coefficients, loss_scale, self.backend, self.early, again, zeros,
            None if zeros is None else self.fed[task : task + 1],
        )  # fmt: skip

    def of_one_task(self) -> TaskGradientBuffer:
        """Room for a gradient that goes into none of the rows: another buffer of one task, P and not K x P."""
        return TaskGradientBuffer(self.layout, 1, self.backend, self.spread)

    def settle(self) -> None:
        """Finish updates that are still under way."""

    def sit_out(self, task: int, count: int) -> None:
        """A task whose loss is not finite, so that its pass was not run: its row begins anew. Twice is as once.

        Args:
            task: which.
            count: what its ``nonfinite_steps`` are now.
        """
        self.drop(task)
        self.stats.norms[task] = 0.0
        self.stats.nonfinite[task] = True
        self.stats.nonfinite_steps[task] = count

    @ops.one_thread_if_forked()
    def drop(self, task: int) -> None:
        """Set the row to zero. One that is on its way does not arrive; nobody waits for it."""
        if self.allocated:
            self.rows[task].zero_()
        self.stats.sumsq[task] = 0.0

    def copy_stats(self) -> list[Stats]:
        """Of all parts, for `put_stats`."""
        return [Stats(*map(torch.clone, self.stats))]

    def put_stats(self, stats: Sequence[Stats]) -> None:
        """Set the stats to what `copy_stats` gave."""
        for numbers, before in zip(self.stats, stats[0], strict=True):
            numbers.copy_(before)

    def row_of(self, task: int) -> list[Tensor]:
        """The numbers of one row for each parameter (its local shard), in its shape; a collective with replicas."""
        self.settle()
        return self.layout.parts(self.rows[task])

    def set_row(self, task: int, numbers: Sequence[Tensor | None]) -> None:
        """Set the row to what `row_of` gave; None, or what is of another shape, counts as zeros."""
        self.layout.fill(self.rows[task], numbers)

    def take_over(self, old: Any) -> None:
        """Go on with the rows and stats of another buffer, whatever its kind, for other parameters.

        A parameter that is in both, and of the same shape, keeps its part of every row; others begin with zeros. Sums
        of squares are measured anew. A collective if any of the two is.

        Args:
            old: a buffer of the same number of tasks; left as it is, but for `settle`.
        """
        old.settle()
        index = {id(p): i for i, p in enumerate(old.parameters)}
        places = [index.get(id(p)) for p in self.parameters]
        for name, numbers in old.stats._asdict().items():
            getattr(self.stats, name).copy_(numbers)
        self.fed.copy_(old.fed)
        self.empty_tasks = set(old.empty_tasks)
        if old.allocated:
            for task in range(len(self.stats.sumsq)):
                row = old.row_of(task)
                self.set_row(task, [None if place is None else row[place] for place in places])
            self._measure()

    def sums(self) -> Tensor:
        """(K,) sums of squares of the whole rows; the same bits in all replicas, whatever order they were added in."""
        if self.local:
            return self.stats.sumsq
        total = self.spread.sum(self.stats.sumsq, "the sum of squares of the task gradients")
        return self._replicas.of_first(total, "the sum of squares of the task gradients")

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
        """Weights, stats and the balanced gradient in one call; see `ops.balance_rows_`.

        Args:
            flats: see `new_flats`; overwritten, or added to if ``accumulate``.
            eps: added to the norms.
            scale: alpha: a name or a number.
            active: which tasks have a say, on the host or as (K,) bool on the device; None for all.
            loss_scale: one number that the balanced gradient shall carry.
            propagate_above: the loss scale above which a nonfinite task makes the balanced gradient NaN.
            fresh: whether this is the first call of a step.
            accumulate: add to ``flats``.
            sums: (K,) what takes the place of `sums`, where rows go on in another buffer; overwritten.
        """
        name, constant = (scale, 0.0) if isinstance(scale, str) else ("constant", scale)
        own = self.stats.sumsq
        total = self.sums() if sums is None else sums
        stats = self.stats if total is own else self.stats._replace(sumsq=total)
        outs, starts = self._outs(flats), self.starts
        if active is None or isinstance(active, Tensor):
            mask = active
        else:
            mask = None if all(active) else ops.upload(active, torch.bool, self.device)
        step = ops.BalanceRows(
            self.rows,
            stats,
            outs,
            starts,
            mask,
            loss_scale,
            propagate_above,
            eps,
            name,
            constant,
            fresh,
            accumulate,
        )
        ops.balance_rows_(step, self.backend)
        if total is not own:
            own.masked_fill_(self.stats.nonfinite, 0.0)
        self._complete(flats)

    @ops.one_thread_if_forked()
    def record(self, sums: Tensor, weights: Tensor, nonfinite: Tensor, now: Tensor, bad: Sequence[int]) -> None:
        """The stats of a balance whose weights were computed elsewhere; rows of nonfinite tasks are set to zero.

        Args:
            sums: (K,) sums of squares of the whole rows.
            weights: (K,) weights.
            nonfinite: (K,) bool, tasks that are not finite in this step.
            now: (K,) bool, those of them found just now.
            bad: the indices of those that are not finite, so that nobody has to ask the device again.
        """
        self.stats.norms.copy_(sums.sqrt())
        self.stats.weights.copy_(weights)
        self.stats.nonfinite.copy_(nonfinite)
        self.stats.nonfinite_steps.add_(now.to(self.device))
        self.stats.sumsq.masked_fill_(self.stats.nonfinite, 0.0)
        for task in bad:
            self.rows[task].zero_()

    def combine(self, weights: Tensor, flats: Flats, accumulate: bool = False) -> None:
        """``sum_t weights[t] * rows[t]`` into one flat tensor per parameter dtype (see `new_flats`), in place."""
        for out, start in zip(self._outs(flats), self.starts, strict=True):
            ops.combine_out(self.rows[:, start : start + out.numel()], weights, out, accumulate, self.backend)
        self._complete(flats)

    def gramian(self) -> Tensor:
        """(K, K) inner products of the rows, float32 (float64 of float64 rows)."""
        self.settle()
        return self.spread.sum(ops.gramian(self.rows, self.backend), "the Gramian of the task gradients")

    def new_flats(self) -> Flats:
        """Room for a balanced gradient: one tensor of bytes, seen as one flat tensor per parameter dtype."""
        groups = self.layout.groups
        sizes = [(g.stop - g.start) * g.flat.itemsize for g in groups]
        if len(groups) == 1:
            only = groups[0]
            return {only.dtype: ops.allocate(only.stop - only.start, dtype=only.flat, device=self.device)}
        storage = ops.allocate(sum(sizes), dtype=torch.uint8, device=self.device)
        return {g.dtype: part.view(g.flat) for g, part in zip(groups, storage.split(sizes), strict=True)}

    def views(self, flats: Flats) -> list[Tensor]:
        """Each parameter's part of ``flats``, of its shape, strides and placements."""
        return self.layout.views(flats)

    @ops.one_thread_if_forked()
    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """Make the state anew and copy the rows that stay: of ``tasks``, None being a new one of zeros."""
        stats, rows = self.stats, self.rows if self.allocated else None
        self._reset(len(tasks))
        pairs = list(zip(self.stats, stats, strict=True))
        if rows is not None:
            pairs.append((self.rows, rows))
        for new, old in pairs:
            for index, task in enumerate(tasks):
                if task is not None:
                    new[index].copy_(old[task])

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint, sharing memory with this buffer where they are not scalars."""
        stats = self.stats
        return {
            "rows": self._saved_rows(),
            "sumsq": stats.sumsq if self._whole() else stats.norms.square(),
            "norms": stats.norms,
            "weights": stats.weights,
            "broken": stats.nonfinite,  # the name that version 3 of the format has
            "nonfinite_steps": stats.nonfinite_steps,
            "whole": self._whole(),
            "owner": dtensors.owner(self._mesh_of_rows()),
        }

    @ops.one_thread_if_forked()
    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, here or where the rows were cut otherwise; nothing is checked."""
        mine = self.state()
        for name, rows in mine["rows"].items():
            dtensors.copy_(rows, state["rows"][name])
        self.stats.sumsq.copy_(state["sumsq"])
        for name in ("norms", "weights", "broken", "nonfinite_steps"):
            mine[name].copy_(state[name])
        if not (self._whole() and state["whole"]):
            self._measure()
        self.fed.fill_(True)  # asked only if the step is open and the task had a pass, which then counted
        self.empty_tasks.clear()

    def _row_numel(self) -> int:
        return self.layout.row_numel

    def _outs(self, flats: Flats) -> list[Tensor]:
        """The parts of ``flats`` that the columns held here make; `starts` has the first column of each."""
        return list(map(flats.__getitem__, self._dtypes))

    def _complete(self, flats: Flats) -> None:
        """Fill in what others hold."""

    def _mesh_of_rows(self) -> Any:
        """The mesh over which `_saved_rows` are spread, if any."""
        first = self.layout.parameters[0]
        return first.device_mesh if dtensors.is_dtensor(first) else None

    def _whole(self) -> bool:
        """Whether all elements of a row are here."""
        return self.spread.size == 1

    def _saved_rows(self) -> dict[str, Tensor]:
        """The rows without the padding that depends on the number of ranks."""
        if self.layout.distributed:
            return {str(index): rows for index, rows in enumerate(self._rows_of_parameters())}
        return {
            str(index): self.rows[:, g.start : g.start + g.columns].unflatten(1, (-1, g.unit))
            for index, g in enumerate(self.layout.groups)
        }

    def _rows_of_parameters(self) -> list[Tensor]:
        """(K, *shape) of each parameter, as DTensors placed like it."""
        out = []
        for p, (offset, numel) in zip(self.layout.parameters, self.layout.segments.tolist(), strict=True):
            rows = self.rows[:, offset : offset + numel].view(self.rows.shape[0], *dtensors.local(p).shape)
            out.append(dtensors.stacked(p, rows))
        return out

    def _measure(self) -> None:
        """``sumsq`` from the rows."""
        segments = self._measured_segments()
        for row, sumsq in zip(self.rows, self.stats.sumsq.split(1), strict=True):
            ops.accumulate_(row, sumsq, [None] * len(segments), segments, (1.0, 0.0), None, self.backend)

    def _measured_segments(self) -> Tensor:
        return self.layout.segments
