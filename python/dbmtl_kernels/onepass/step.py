"""The balanced loss of one pass: a node at the top of the graph that sets weights, and starts the tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine.losses import ADVICE, TaskLosses
from ..rows.ranks import Ranks
from .weighing import Weighing

HIDDEN = (
    "a re-entrant checkpoint hides parameters, so that the norms of task gradients cannot be measured: use "
    "checkpoint(..., use_reentrant=False), or DBMTL"
)


class Measurement:
    """Passes of single tasks through the graph, for the norms of their gradients. They leave ``.grad`` alone.

    Args:
        losses: of the tasks present.
        slopes: by task, the gradient that its loss gets.
        factor: of the balanced loss, which the slopes carry and norms must not.
        weighing: its hooks look on.
    """

    def __init__(self, losses: TaskLosses, slopes: Mapping[int, Tensor], factor: Tensor, weighing: Weighing) -> None:
        self.tasks = list(slopes)
        self.values = dict(zip(losses.tasks, losses.values, strict=True))
        self._losses = dict(zip(losses.tasks, losses.losses, strict=True))
        self._slopes, self._factor, self._weighing = slopes, factor, weighing

    def measure(
        self, due: Sequence[int], shared: Sequence[Tensor], ranks: Ranks, like: Tensor, keep: bool
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Norms of tasks' gradients, without the factor; a collective of all that is there.

        Args:
            due: the tasks.
            shared: the parameters that require grad.
            ranks: over which gradients are averaged.
            like: for dtype and device of the norms.
            keep: whether to give the gradients too, each as one vector.

        Raises:
            RuntimeError: a re-entrant checkpoint hides parameters; a graph that was compiled for a single pass.
        """
        norms: dict[int, Tensor] = {}
        flat: dict[int, Tensor] = {}
        for task in due:
            grads = self._gradients(task, shared, ranks)
            norms[task] = self._norm(grads, like)
            if keep:
                dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(shared, grads, strict=True)]
                flat[task] = torch.cat([grad.reshape(-1).to(like.device) for grad in dense])
            del grads  # or there would be those of two tasks
        return norms, flat

    def _gradients(self, task: int, shared: Sequence[Tensor], ranks: Ranks) -> list[Tensor | None]:
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in shared]
        try:
            with self._weighing.measuring(task):
                found = torch.autograd.grad(
                    self._losses[task], shared, self._slopes[task], retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(f"the norm of task {task} cannot be measured: {ADVICE['donated buffer']}") from error
            raise
        for p, (grad, version) in zip(shared, before, strict=True):
            if p.grad is not grad or (grad is not None and grad._version != version):
                raise RuntimeError(HIDDEN)
        if ranks.size == 1:
            return list(found)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(shared, found, strict=True)]
        wide = torch.promote_types(dense[0].dtype, torch.float32)
        flat = torch.cat([g.reshape(-1).to(dense[0].device, wide) for g in dense])
        total = ranks.sum(flat, f"the gradient of task {task}, to measure it") / ranks.size
        return [part.view_as(g) for g, part in zip(dense, total.split([g.numel() for g in dense]), strict=True)]

    def _norm(self, grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
        by_device: dict[torch.device, list[Tensor | None]] = {}
        for grad in grads:
            if grad is not None:
                values = grad.coalesce().values() if grad.is_sparse else grad
                by_device.setdefault(grad.device, []).append(_in_memory_order(values))
        total = like.new_zeros(())
        for device, some in by_device.items():
            sumsq = torch.empty(1, dtype=like.dtype, device=device)
            numels = [[0, grad.numel()] for grad in some if grad is not None]
            sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
            ops.accumulate_(None, sumsq, some, sizes, (0.0, 1.0))
            total = total + sumsq[0].to(like.device)
        return total.sqrt() / self._factor.abs().to(like)


def _in_memory_order(grad: Tensor) -> Tensor:
    """A view that needs no copy to be read: the order of a sum of squares is nobody's business."""
    channels_last = (
        grad.dim() == 4 and not grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last)
    )
    return grad.permute(0, 2, 3, 1) if channels_last else grad


def balanced_loss(weigher: Any, losses: TaskLosses, weighing: Weighing, at_root: Collection[int]) -> Tensor:
    """A scalar in the graph of the losses, whose backward is one pass."""
    out: Tensor = _OnePass.apply(weigher, losses, weighing, at_root, losses.total(), *losses.losses)  # type: ignore[no-untyped-call]
    return out


class _OnePass(torch.autograd.Function):
    """The sum of the (log-)losses."""

    @staticmethod
    def forward(
        ctx: Any,
        weigher: Any,
        losses: TaskLosses,
        weighing: Weighing,
        at_root: Collection[int],
        value: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """The value; of several ranks the sum of the logs of the mean losses."""
        ctx.work = weigher, losses, weighing, at_root
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each loss gets factor / (mean loss + eps); one that is not finite gets nothing, nor one whose dtype cannot
        hold that.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not supported by a balanced loss: norms and weights are not part of any graph. "
                "For second derivatives use the sum of the losses"
            )
        weigher, losses, weighing, at_root = ctx.work
        factor = grads[0]
        passes = weighing.passes(factor)
        finite: Mapping[int, bool | Tensor]
        if weighing.on_host:
            slopes, finite = _slopes_on_host(losses, factor.item(), passes)
        else:
            slopes, finite = _slopes(losses, factor, passes)
        given: dict[int, Tensor | None] = {**slopes}
        losses.claim(weigher.rows)
        weigher.begin_pass(Measurement(losses, slopes, factor, weighing), weighing, factor, finite)
        lost = weighing.on_host and not all(finite.get(task, True) for task in at_root)
        for task in at_root:  # there is no part of its own where NaN could be kept back: then none of them has any
            given[task] = None if lost else slopes[task] * weighing.weight(task, slopes[task])
        return None, None, None, None, None, *(given[task] for task in losses.tasks)


def _slopes_on_host(losses: TaskLosses, factor: float, passes: bool) -> tuple[dict[int, Tensor], dict[int, bool]]:
    """By task the gradient of the loss, and whether the loss is finite and holds it."""
    slopes: dict[int, Tensor] = {}
    finite: dict[int, bool] = {}
    for task, loss, value in zip(losses.tasks, losses.losses, losses.values, strict=True):
        number = value.item()
        slope, fine = factor / (1.0 if losses.log_eps is None else number + losses.log_eps), math.isfinite(number)
        if abs(slope) > torch.finfo(loss.dtype).max:
            slope, fine = math.copysign(math.inf, slope), fine and passes
        slopes[task], finite[task] = torch.full_like(loss, slope if fine else 0.0), fine
    return slopes, finite


def _slopes(losses: TaskLosses, factor: Tensor, passes: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """As `_slopes_on_host`, without a sync; those of a device and dtype together, in a handful of launches."""
    slopes: dict[int, Tensor] = {}
    finite: dict[int, Tensor] = {}
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, loss in enumerate(losses.losses):
        kinds.setdefault((loss.device, loss.dtype), []).append(index)
    for (device, dtype), members in kinds.items():
        values = torch.stack([losses.values[index].to(device) for index in members])
        wide = factor.to(values)
        slope = (wide.expand_as(values) if losses.log_eps is None else wide / (values + losses.log_eps)).to(dtype)
        fine = (values.abs() < torch.inf) & ((slope.abs() < torch.inf) | passes.to(device))
        kept = torch.where(fine, slope, 0.0)
        for index, each, flag in zip(members, kept.unbind(), fine.unbind(), strict=True):
            task = losses.tasks[index]
            slopes[task], finite[task] = each.view_as(losses.losses[index]), flag
    return slopes, finite
