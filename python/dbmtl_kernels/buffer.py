"""TaskGradientBuffer: the K x P state, one padded row per task, and the four things done to it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .backends import native
from .layout import ParameterLayout


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

    Attributes:
        rows: (K, row_numel) in ``layout.state_dtype``; padding is zero.
        sumsq: (K,) sums of squares of the rows, float64 where the device has it.
    """

    def __init__(self, layout: ParameterLayout, num_tasks: int, backend: str = "auto") -> None:
        self.layout = layout
        self.backend = backend
        device = layout.device
        self.rows = allocate(num_tasks, layout.row_numel, dtype=layout.state_dtype, device=device, zero=True)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sumsq = torch.zeros(num_tasks, dtype=wide, device=device)

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the rows, in the dtype of `sumsq`. No sync."""
        return self.sumsq.sqrt()

    def accumulate(
        self, task: int, grads: list[Tensor | None], decay: float, gain: float, loss_scale: Tensor | None = None
    ) -> None:
        """``rows[task] <- decay * rows[task] + gain / loss_scale * grads`` in one pass; see `ops.accumulate_`.

        Args:
            task: which row.
            grads: a gradient or None for each parameter of the layout, in its order.
            decay: factor of the row.
            gain: factor of the gradients.
            loss_scale: one number that the gradients carry and the state must not.
        """
        ordered = [None if g is None else self.layout.in_row_order(i, g) for i, g in enumerate(grads)]
        ops.accumulate_(
            self.rows[task],
            self.sumsq[task : task + 1],
            ordered,
            self.layout.segments,
            decay,
            gain,
            loss_scale,
            self.backend,
        )

    def combine(self, weights: Tensor, flats: dict[torch.dtype, Tensor], accumulate: bool = False) -> None:
        """``sum_t weights[t] * rows[t]`` into one flat tensor per parameter dtype (see `new_flats`), in place."""
        for group in self.layout.groups:
            rows = self.rows[:, group.start : group.stop]
            ops.combine_out(rows, weights, flats[group.dtype], accumulate, self.backend)

    def new_flats(self) -> dict[torch.dtype, Tensor]:
        """Room for a balanced gradient: one tensor of bytes, seen as one flat tensor per parameter dtype."""
        groups = self.layout.groups
        sizes = [(g.stop - g.start) * g.dtype.itemsize for g in groups]
        if len(groups) == 1:
            only = groups[0]
            return {only.dtype: allocate(only.stop - only.start, dtype=only.dtype, device=self.layout.device)}
        storage = allocate(sum(sizes), dtype=torch.uint8, device=self.layout.device)
        parts = storage.split(sizes)
        return {group.dtype: part.view(group.dtype) for group, part in zip(groups, parts, strict=True)}

    def gramian(self) -> Tensor:
        """(K, K) inner products of the rows, float32 (float64 of float64 rows)."""
        return torch.as_tensor(ops.gramian(self.rows, self.backend))

    def forget(self, tasks: Tensor) -> None:
        """Set the rows of the tasks that ``tasks`` (K, bool) marks to zero."""
        if self.rows.device.type == "cpu":  # no need to touch the others
            for task in tasks.nonzero().flatten().tolist():
                self.rows[task].zero_()
        else:
            self.rows.masked_fill_(tasks[:, None], 0.0)
        self.sumsq.masked_fill_(tasks, 0.0)
