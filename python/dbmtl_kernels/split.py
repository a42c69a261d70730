"""SplitTaskGradientBuffer: shared parameters on several devices, or spread over ranks in several ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .buffer import Flats, TaskGradientBuffer
from .updates import Coefficients, Update


class SplitTaskGradientBuffer:
    """Rows in several parts, each a buffer of its own; only sums of squares and weights cross between them.

    It does what `TaskGradientBuffer` does, method by method; norms, weights and books are those of the first part
    (each part has the same).

    Args:
        parts: the buffers.
        places: for each parameter, in the order given by the user, its part and its index there.
    """

    def __init__(self, parts: Sequence[TaskGradientBuffer], places: Sequence[tuple[int, int]]) -> None:
        self.parts = list(parts)
        self.places = list(places)
        self.device = self.parts[0].device
        self.narrow = self.parts[0].narrow
        self.early = all(part.early for part in self.parts)

    @property
    def local(self) -> bool:
        """See `TaskGradientBuffer.local`."""
        return all(part.local for part in self.parts)

    @property
    def parameters(self) -> list[Tensor]:
        """The shared parameters, as given."""
        return [self.parts[part].parameters[index] for part, index in self.places]

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the last `balance`."""
        return self.parts[0].norms

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the last `balance`."""
        return self.parts[0].weights

    @property
    def broken(self) -> Tensor:
        """(K,) bool, tasks whose gradient was not finite in the step of the last `balance`."""
        return self.parts[0].broken

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64, in how many steps that was so."""
        return self.parts[0].nonfinite_steps

    def check_unchanged(self) -> None:
        """See `ParameterLayout.check_unchanged`."""
        for part in self.parts:
            part.check_unchanged()

    def update(self, task: int, begin: Callable[[], Coefficients]) -> Update:
        """See `TaskGradientBuffer.update`."""
        return SplitUpdate(self, task, begin)

    def settle(self) -> None:
        """See `TaskGradientBuffer.settle`."""
        for part in self.parts:
            part.settle()

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
        active: Sequence[bool] | None = None,
        loss_scale: Tensor | None = None,
        fresh: bool = True,
        accumulate: bool = False,
    ) -> None:
        """See `TaskGradientBuffer.balance`."""
        total = self.sums()
        for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True):
            part.balance(
                own, eps, scale, active=active, loss_scale=None if loss_scale is None else loss_scale.to(part.device),
                fresh=fresh, accumulate=accumulate, sums=total.to(part.device, copy=True),
            )  # fmt: skip

    def record(self, sums: Tensor, weights: Tensor, broken: Tensor, now: Tensor, bad: Sequence[int]) -> None:
        """See `TaskGradientBuffer.record`."""
        for part in self.parts:
            part.record(sums, weights, broken, now, bad)

    def combine(self, weights: Tensor, flats: Flats, accumulate: bool = False) -> None:
        """See `TaskGradientBuffer.combine`."""
        for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True):
            part.combine(weights.to(part.device), own, accumulate)

    def new_flats(self) -> Flats:
        """See `TaskGradientBuffer.new_flats`; the keys are (part, dtype)."""
        return {(i, dtype): flat for i, part in enumerate(self.parts) for dtype, flat in part.new_flats().items()}

    def views(self, flats: Flats) -> list[Tensor]:
        """See `TaskGradientBuffer.views`."""
        views = [part.views(own) for part, own in zip(self.parts, self._flats_of_parts(flats), strict=True)]
        return [views[part][index] for part, index in self.places]

    def gramian(self) -> Tensor:
        """See `TaskGradientBuffer.gramian`."""
        first, *others = [part.gramian() for part in self.parts]
        return sum((other.to(self.device) for other in others), first)

    def keep(self, tasks: Sequence[int | None]) -> None:
        """See `TaskGradientBuffer.keep`."""
        for part in self.parts:
            part.keep(tasks)

    def state(self) -> dict[str, Any]:
        """See `TaskGradientBuffer.state`."""
        return {f"part{i}": part.state() for i, part in enumerate(self.parts)}

    def load(self, state: dict[str, Any]) -> None:
        """See `TaskGradientBuffer.load`."""
        for i, part in enumerate(self.parts):
            part.load(state[f"part{i}"])

    def signature(self) -> list[list[Any]]:
        """See `ParameterLayout.signature`."""
        signatures = [part.layout.signature() for part in self.parts]
        return [signatures[part][index] for part, index in self.places]

    def _flats_of_parts(self, flats: Flats) -> list[Flats]:
        return [{dtype: flat for (p, dtype), flat in flats.items() if p == i} for i in range(len(self.parts))]


class SplitUpdate:
    """An `Update` of a row in several parts."""

    def __init__(self, buffer: SplitTaskGradientBuffer, task: int, begin: Callable[[], Coefficients]) -> None:
        self._buffer = buffer
        self._begin = begin
        self._coefficients: Coefficients | None = None
        self._updates = [part.update(task, self._coefficients_on(part.device)) for part in buffer.parts]

    def add(self, index: int, grad: Tensor) -> None:
        """See `Update`."""
        part, own = self._buffer.places[index]
        self._updates[part].add(own, grad)

    def finish(self, grads: list[Tensor | None]) -> None:
        """See `Update`."""
        lists: list[list[Tensor | None]] = [[None] * len(part.parameters) for part in self._buffer.parts]
        for (part, own), grad in zip(self._buffer.places, grads, strict=True):
            lists[part][own] = grad
        for update, own_grads in zip(self._updates, lists, strict=True):
            update.finish(own_grads)

    def abandon(self) -> None:
        """See `Update`."""
        for update in self._updates:
            update.abandon()

    def _coefficients_on(self, device: torch.device) -> Callable[[], Coefficients]:
        def begin() -> Coefficients:
            if self._coefficients is None:
                self._coefficients = self._begin()
            scale, numbers = self._coefficients.loss_scale, self._coefficients.device
            return self._coefficients._replace(
                loss_scale=None if scale is None else scale.to(device),
                device=None if numbers is None else numbers.to(device),
            )

        return begin
