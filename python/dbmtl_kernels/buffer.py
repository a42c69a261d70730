"""TaskGradientBuffer: the K x P state, one padded row per task, and what is done to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, dtensors, ops
from .backends import native
from .layout import ParameterLayout
from .updates import Coefficients, RowUpdate, Update
from .world import World

# Room for a balanced gradient: one flat tensor per parameter dtype.
Flats = dict[Any, Tensor]


def allocate(*shape: int, dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """An empty (or zeroed) tensor; on a CPU with huge pages under it where that helps."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    native.advise_huge_pages(out)
    return out.zero_() if zero else out


class TaskGradientBuffer:
    """The task gradients (their EMA) of K tasks, as one (K, row_numel) tensor.

    Args:
        layout: where each parameter lies in a row.
        num_tasks: K.
        backend: "auto" or a backend by name.
        spread: the ranks over which the elements of the parameters are spread, each with the part that ``layout``
            lays out (FSDP2); by default this process has all of them.

    Attributes:
        rows: (K, row_numel) in ``layout.state_dtype``; padding is zero.
        sumsq: (K,) sums of squares of the rows held here, float64 where the device has it.
        norms, weights: (K,) of the last `balance`, in the dtype of ``sumsq``.
        broken: (K,) bool, tasks whose gradient was not finite in the step of the last `balance`.
        nonfinite_steps: (K,) int64, in how many steps that was so.
        narrow: the dtype of `gramian`, float64 of float64 rows, else float32.
        early: whether gradients are gathered while a backward pass runs (on a CPU), or at its end in one call.
    """

    def __init__(
        self, layout: ParameterLayout, num_tasks: int, backend: str = "auto", spread: World | None = None
    ) -> None:
        self.layout = layout
        self.backend = backend
        self.device = layout.device
        self.narrow = torch.float64 if layout.state_dtype == torch.float64 else torch.float32
        self.spread = spread or World()
        self._distributed = any(dtensors.is_dtensor(p) for p in layout.parameters)
        self._replicas = World(dtensors.replicated_groups(layout.parameters[0]))
        # FSDP runs hooks while a gradient may still be on its way to a CPU.
        self.early = not self._distributed and backends.resolve(backend, self.device, num_tasks).gathers_early(
            self.device
        )
        self._allocate(num_tasks)

    def _allocate(self, num_tasks: int) -> None:
        device = self.device
        self.rows = allocate(num_tasks, self._row_numel(), dtype=self.layout.state_dtype, device=device, zero=True)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sumsq = torch.zeros(num_tasks, dtype=wide, device=device)
        self.norms = torch.zeros_like(self.sumsq)
        self.weights = torch.zeros_like(self.sumsq)
        self.broken = torch.zeros(num_tasks, dtype=torch.bool, device=device)
        self.nonfinite_steps = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    @property
    def local(self) -> bool:
        """Whether nothing that is done here needs another rank."""
        return self.spread.size == 1 and self._replicas.size == 1

    @property
    def parameters(self) -> list[Tensor]:
        """The shared parameters, as given."""
        return self.layout.parameters

    def check_unchanged(self) -> None:
        """See `ParameterLayout.check_unchanged`."""
        self.layout.check_unchanged()

    def update(self, task: int, begin: Callable[[], Coefficients]) -> Update:
        """An update of ``rows[task]``; ``begin`` gives its coefficients when the first gradient has come."""
        sumsq = self.sumsq[task : task + 1]
        return RowUpdate(self.layout, self.rows[task], sumsq, begin, self.backend, self.early)

    def accumulate(
        self,
        task: int,
        grads: list[Tensor | None],
        decay: float,
        gain: float,
        loss_scale: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        """``rows[task] <- decay * rows[task] + gain / loss_scale * grads`` in one pass; see `ops.accumulate_`.

        Args:
            task: which row.
            grads: a gradient or None for each parameter of the layout, in its order.
            decay: factor of the row.
            gain: factor of the gradients.
            loss_scale: one number that the gradients carry and the state must not.
            seed: of the stochastic rounding of bfloat16 rows; None rounds to nearest.
        """
        self.update(task, lambda: Coefficients(decay, gain, loss_scale, seed)).finish(grads)
        self.settle()

    def settle(self) -> None:
        """Finish updates that are still under way."""

    def sums(self) -> Tensor:
        """(K,) sums of squares of the whole rows; the same bits in all replicas, whatever order they were added in."""
        total = self.spread.sum(self.sumsq, "the sum of squares of the task gradients")
        return self._replicas.of_first(total, "the sum of squares of the task gradients")

    def balance(
        self,
        flats: Flats,
        eps: float,
        scale: str | float,
        *,
        active: Sequence[bool] | None = None,
        loss_scale: Tensor | None = None,
        fresh: bool = True,
        accumulate: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        """Weights, books and the balanced gradient in one call; see `ops.balance_rows_`.

        Args:
            flats: see `new_flats`; overwritten, or added to if ``accumulate``.
            eps: added to the norms.
            scale: alpha: a name or a number.
            active: which tasks have a say; None for all.
            loss_scale: one number that the balanced gradient shall carry.
            fresh: whether this is the first call of a step.
            accumulate: add to ``flats``.
            sums: (K,) what takes the place of `sums`, where rows go on in another buffer; overwritten.
        """
        name, constant = (scale, 0.0) if isinstance(scale, str) else ("constant", scale)
        total = self.sums() if sums is None else sums
        ops.balance_rows_(
            self.rows, total, self.broken, self.nonfinite_steps, self.norms, self.weights, self._outs(flats),
            self._starts(), self._mask(active), loss_scale, eps, name, constant, fresh, accumulate, self.backend,
        )  # fmt: skip
        if total is not self.sumsq:
            self.sumsq.masked_fill_(self.broken, 0.0)
        self._complete(flats)

    def record(self, sums: Tensor, weights: Tensor, broken: Tensor, now: Tensor, bad: Sequence[int]) -> None:
        """The books of a balance whose weights were computed elsewhere; rows of broken tasks are set to zero.

        Args:
            sums: (K,) sums of squares of the whole rows.
            weights: (K,) weights.
            broken: (K,) bool, tasks broken in this step.
            now: (K,) bool, those of them found just now.
            bad: the broken ones' indices, so that nobody has to ask the device again.
        """
        self.norms.copy_(sums.sqrt())
        self.weights.copy_(weights)
        self.broken.copy_(broken)
        self.nonfinite_steps += now.to(self.device)
        self.sumsq.masked_fill_(self.broken, 0.0)
        for task in bad:
            self.rows[task].zero_()

    def combine(self, weights: Tensor, flats: Flats, accumulate: bool = False) -> None:
        """``sum_t weights[t] * rows[t]`` into one flat tensor per parameter dtype (see `new_flats`), in place."""
        for out, start in zip(self._outs(flats), self._starts(), strict=True):
            rows = self.rows[:, start : start + out.numel()]
            ops.combine_out(rows, weights, out, accumulate, self.backend)
        self._complete(flats)

    def new_flats(self) -> Flats:
        """Room for a balanced gradient: one tensor of bytes, seen as one flat tensor per parameter dtype."""
        groups = self.layout.groups
        sizes = [(g.stop - g.start) * g.dtype.itemsize for g in groups]
        if len(groups) == 1:
            only = groups[0]
            return {only.dtype: allocate(only.stop - only.start, dtype=only.dtype, device=self.layout.device)}
        storage = allocate(sum(sizes), dtype=torch.uint8, device=self.layout.device)
        parts = storage.split(sizes)
        return {group.dtype: part.view(group.dtype) for group, part in zip(groups, parts, strict=True)}

    def views(self, flats: Flats) -> list[Tensor]:
        """Each parameter's part of ``flats``, of its shape, strides and placements."""
        return self.layout.views(flats)

    def gramian(self) -> Tensor:
        """(K, K) inner products of the rows, float32 (float64 of float64 rows)."""
        self.settle()
        return self.spread.sum(ops.gramian(self.rows, self.backend), "the Gramian of the task gradients")

    def _row_numel(self) -> int:
        return self.layout.row_numel

    def _outs(self, flats: Flats) -> list[Tensor]:
        """The parts of ``flats`` that the columns held here make."""
        return [flats[group.dtype] for group in self.layout.groups]

    def _starts(self) -> list[int]:
        """The first column of each of `_outs`."""
        return [group.start for group in self.layout.groups]

    def _complete(self, flats: Flats) -> None:
        """Fill in what others hold."""

    def _mask(self, active: Sequence[bool] | None) -> Tensor | None:
        """On the device; remembered, as steps repeat them."""
        if active is None or all(active):
            return None
        key = tuple(active)
        if key not in self._masks:
            if len(self._masks) >= 256:
                self._masks.clear()
            mask = torch.tensor(key)
            pinned = mask.pin_memory() if self.rows.device.type == "cuda" else mask
            self._masks[key] = pinned.to(self.rows.device, non_blocking=True)
        return self._masks[key]

    def keep(self, tasks: Sequence[int | None]) -> None:
        """Let the rows be those of ``tasks``, None being a new one of zeros; needs room for both while it copies."""
        names = ("rows", "sumsq", "norms", "weights", "broken", "nonfinite_steps")
        before = {name: getattr(self, name) for name in names}
        self._allocate(len(tasks))
        for name, old in before.items():
            new = getattr(self, name)
            for index, task in enumerate(tasks):
                if task is not None:
                    new[index].copy_(old[task])

    def signature(self) -> list[list[Any]]:
        """See `ParameterLayout.signature`."""
        return self.layout.signature()

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint, sharing memory with this buffer where they are not scalars."""
        return {
            "rows": self._saved_rows(),
            "sumsq": self.sumsq if self._whole() else self.norms.square(),
            "norms": self.norms,
            "weights": self.weights,
            "broken": self.broken,
            "nonfinite_steps": self.nonfinite_steps,
            "whole": self._whole(),
            "owner": dtensors.owner(self._mesh_of_rows()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, here or where the rows were cut otherwise.

        Raises:
            ValueError: they are those of another rank; nothing else is checked.
        """
        dtensors.check_owner(dtensors.owner(self._mesh_of_rows()), state["owner"])
        for name, mine in self._saved_rows().items():
            dtensors.copy_(mine, state["rows"][name])
        for name in ("sumsq", "norms", "weights", "broken", "nonfinite_steps"):
            getattr(self, name).copy_(state[name])
        if not (self._whole() and state["whole"]):
            self._measure()

    def _mesh_of_rows(self) -> Any:
        """The mesh over which `_saved_rows` are spread, if any."""
        first = self.layout.parameters[0]
        return first.device_mesh if dtensors.is_dtensor(first) else None

    def _whole(self) -> bool:
        """Whether all elements of a row are here."""
        return self.spread.size == 1

    def _saved_rows(self) -> dict[str, Tensor]:
        """The rows without the padding that depends on the number of ranks."""
        if self._distributed:
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
        for row, sumsq in zip(self.rows, self.sumsq.split(1), strict=True):
            ops.accumulate_(row, sumsq, [None] * len(segments), segments, 1.0, 0.0, None, None, self.backend)

    def _measured_segments(self) -> Tensor:
        return self.layout.segments
