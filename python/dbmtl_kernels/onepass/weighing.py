"""Weighing: hooks on a graph, that multiply each task's gradient by its weight in one backward pass."""

from __future__ import annotations

import cmath
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.losses import NARROW
from ..ops import Stats
from .frontier import Frontier

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHERS = (
    "something besides the losses given was backpropagated through a part of the graph that only one task has (a "
    "regulariser of its head's output, or one of the losses once more?), and its share in the shared gradients was "
    "weighted as the task's is: add it to the loss of that task, or give it a backward of its own"
)
WIDE = (torch.float64, torch.complex128)
# The backward passes in which weights were applied last. Their numbers are never used again.
_weighed: deque[int] = deque(maxlen=64)


def may_look(device: torch.device) -> bool:
    """Whether numbers there may be looked at without a sync."""
    return device.type == "cpu"


class Weighing:
    """What the hooks of one graph share. They weigh in one backward pass, and leave others through the graph alone.

    Args:
        frontier: where to weigh.
        stats: (K,) ``weights``, what the gradient of each task is multiplied with when it comes; ``nonfinite`` and
            ``nonfinite_steps``, updated where a gradient is not finite.
        propagate_above: gradients that are not finite pass under factors above this; otherwise zeros do.
        clears: whether any loss may turn out not to be finite.
        others: () bool, set where something besides the losses given went through the part of the graph that is a
            task's own, and was weighted with it. Seen of tasks that were measured in the same backward.

    Attributes:
        on_host: whether numbers may be looked at without a sync.
        stats: see above.

    Warns:
        RuntimeWarning: once, where ``others`` is set, and on the host.
    """

    def __init__(self, frontier: Frontier, stats: Stats, propagate_above: float, clears: bool, others: Tensor) -> None:
        self.stats, self._above, self._others = stats, propagate_above, others
        self.on_host = may_look(stats.weights.device)
        self._weights: Sequence[Any] = ()  # numbers on the host; tensors elsewhere
        self._wide: Sequence[Any] = ()  # the same for gradients of 64 bits a number
        self._finite: Sequence[Any] | None = None
        self._passes: Any = False
        self._pass: int | None = None
        self._measured: int | None = None  # the task whose pass is run to measure
        self._lengths: dict[tuple[int, int], Tensor] = {}  # of what passed here when its task was measured
        for index, entry in enumerate(frontier.entries):
            entry.node.register_hook(partial(self._pass_on, self._weigh, entry.task, entry.places, index))
        for entry in frontier.heads if clears else ():
            entry.node.register_hook(partial(self._pass_on, self._clear, entry.task, entry.places, -1))

    @contextmanager
    def measuring(self, task: int) -> Iterator[None]:
        """Inside, a pass of a single task is run, whose gradients are looked at and not changed."""
        self._measured = task
        try:
            yield
        finally:
            self._measured = None

    def claim(self) -> None:
        """The backward pass that runs now is the one to weigh in.

        Raises:
            RuntimeError: it is another's already.
        """
        number = torch._C._current_graph_task_id()
        if number in _weighed:
            raise RuntimeError(
                "two balanced losses of OnePassDBMTL in one backward pass, whose weights would be multiplied: call "
                "backward() on one after the other"
            )
        _weighed.append(number)
        self._pass, self._weights = number, ()

    def arm(self, factor: Tensor, finite: Tensor | None) -> None:
        """Weigh from here on, by the weights as they are now.

        Args:
            factor: of the balanced loss.
            finite: (K,) bool, whose loss is; None for all.
        """
        weights, self._passes = self.stats.weights, self.passes(factor)
        if self.on_host:
            self._weights = self._wide = weights.tolist()
            self._finite = None if finite is None else finite.tolist()
        else:  # here, as hooks may run on other streams than this
            self._weights, self._wide = weights.float().unbind(), weights.unbind()
            self._finite = None if finite is None else finite.unbind()

    def passes(self, factor: Tensor) -> Any:
        """Whether gradients that are not finite are passed on under this factor of the loss; a tensor off the host."""
        return abs(factor.item()) > self._above if self.on_host else factor.abs() > self._above

    def weight(self, task: int, like: Tensor) -> Tensor:
        """Of a task, where its loss itself is what several share."""
        return self.stats.weights[task].to(like)

    @property
    def acts(self) -> bool:
        """Whether the pass that runs now is the one to weigh, or one to look at."""
        return self._measured is not None or self._pass == torch._C._current_graph_task_id()

    # Hooks hold no node: that would keep the graph alive.
    def _pass_on(
        self,
        change: Callable[[Tensor, int, tuple[int, int]], Tensor],
        task: int,
        places: Sequence[int],
        number: int,
        grad_inputs: Sequence[Tensor | None],
        _: Any,
    ) -> tuple[Tensor | None, ...] | None:
        """Replace gradients on their way from a node to those below it."""
        if not self.acts:
            return None
        out = list(grad_inputs)
        for place in places:
            grad = out[place]
            if grad is not None:
                out[place] = change(grad, task, (number, place))
        return tuple(out)

    def _weigh(self, grad: Tensor, task: int, key: tuple[int, int]) -> Tensor:
        """The gradient of a task times its weight; zeros where it is not finite, unless that must be passed on."""
        if self._measured is not None:
            if self._measured != task:  # losses of one stack; 0 times NaN is NaN
                return torch.zeros_like(grad)
            self._lengths[key] = _length(grad)
            return grad
        if key in self._lengths:
            self._compare(self._lengths.pop(key), _length(grad))
        out = _times(grad, (self._wide if grad.dtype in WIDE else self._weights)[task])
        counts = None if self._finite is None else self._finite[task]  # whether the loss is finite
        if self.on_host:
            if counts is False:
                return torch.zeros_like(grad)
            if _is_finite(out):
                return out
            self._count(task, torch.ones_like(self.stats.nonfinite[task]))
            return out if self._passes else torch.zeros_like(grad)
        fine = _all_finite(out)
        keep = fine | self._passes.to(fine.device)
        if counts is None:
            self._count(task, ~fine)
            return torch.where(keep, out, 0.0)
        counts = counts.to(fine.device)
        self._count(task, counts > fine)
        return torch.where(keep & counts, out, 0.0)

    def _count(self, task: int, flag: Tensor) -> None:
        """If so, a task is not finite in this step; counted once."""
        bad, steps = self.stats.nonfinite[task], self.stats.nonfinite_steps[task]
        flag = flag.to(bad.device)
        steps.add_(flag > bad)
        bad.logical_or_(flag)

    def _compare(self, alone: Tensor, now: Tensor) -> None:
        """The gradient that a task's own part passes on, in the pass that measured it and in this one."""
        differs = (now - alone).abs() > 1e-3 * torch.maximum(now, alone)  # false where one is NaN
        if self.on_host and bool(differs) and not bool(self._others):
            warnings.warn(OTHERS, RuntimeWarning, stacklevel=2)
        self._others |= differs.to(self._others.device)

    def _clear(self, grad: Tensor, task: int, _: tuple[int, int]) -> Tensor:
        """The gradient of a head; zeros if the loss of its task is not finite."""
        if self._finite is None or self._measured is not None:
            return grad
        finite = self._finite[task]
        if self.on_host:
            return grad if finite else torch.zeros_like(grad)
        return torch.where(finite.to(grad.device), grad, 0.0)


def _times(grad: Tensor, weight: Any) -> Tensor:
    """In float32 where the gradient is narrower, whose largest number a weight may exceed."""
    out: Tensor = (grad.float() if grad.dtype in NARROW else grad) * weight
    return out.to(grad.dtype)


def _values(grad: Tensor) -> Tensor:
    """All numbers of a gradient, also of a sparse or a nested one."""
    if grad.layout == torch.sparse_coo:
        grad = grad._values()
    return grad.values() if grad.is_nested else grad


def _is_finite(grad: Tensor) -> bool:
    """Of a tensor on the host: the sum tells, unless it overflows by itself."""
    values = _values(grad)
    total = values.sum(dtype=torch.float32 if values.dtype in NARROW else None)
    return cmath.isfinite(total.item()) or bool(values.isfinite().all())


def _all_finite(grad: Tensor) -> Tensor:
    """() bool, without a sync: two launches in place of five, where the largest magnitude can tell."""
    values = _values(grad)
    if values.is_complex() or not values.numel():  # a finite number's magnitude may overflow
        return values.isfinite().all()
    largest: Tensor = torch.linalg.vector_norm(values, torch.inf)  # NaN if any is
    return largest < torch.inf


def _length(grad: Tensor) -> Tensor:
    """In float32 at least."""
    values = _values(grad)
    length: Tensor = torch.linalg.vector_norm(values.float() if values.dtype in NARROW else values)
    return length
