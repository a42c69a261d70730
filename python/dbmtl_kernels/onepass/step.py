"""The balanced loss of one pass: a node at the top of the graph that measures, sets weights, and starts the tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.losses import TaskLosses
from ..rows.ranks import Ranks
from .frontier import Weighing

HIDDEN = (
    "a re-entrant checkpoint hides parameters, so that the norms of task gradients cannot be measured: use "
    "checkpoint(..., use_reentrant=False), or DBMTL"
)


class Measurement:
    """Passes of single tasks through the graph, for the norms of their gradients. They leave ``.grad`` alone.

    Args:
        losses: of the tasks present.
        slopes: by task, the gradient that its loss gets; without those whose loss is known not to be finite.
        factor: of the balanced loss, which the slopes carry and norms must not.
    """

    def __init__(self, losses: TaskLosses, slopes: Mapping[int, Tensor], factor: Tensor) -> None:
        self.tasks = list(slopes)
        self._losses = dict(zip(losses.tasks, losses.losses, strict=True))
        self._slopes, self._factor = slopes, factor

    def gradients(self, task: int, shared: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
        """Of the shared parameters, averaged over the ranks; a collective of all that is there.

        Raises:
            RuntimeError: a re-entrant checkpoint hides parameters; a graph that was compiled for a single pass.
        """
        wanted = [p for p in shared if p.requires_grad]
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in wanted]
        try:
            found = torch.autograd.grad(
                self._losses[task], wanted, self._slopes[task], retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(
                    "the model was compiled for a single backward pass, and measuring takes another: set "
                    "torch._functorch.config.donated_buffer = False before the first call of the compiled model"
                ) from error
            raise
        for p, (grad, version) in zip(wanted, before, strict=True):
            if p.grad is not grad or (grad is not None and grad._version != version):
                raise RuntimeError(HIDDEN)
        dense = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        if ranks.size == 1:
            return dense
        wide = torch.promote_types(dense[0].dtype, torch.float32)
        flat = torch.cat([g.reshape(-1).to(dense[0].device, wide) for g in dense])
        total = ranks.sum(flat, f"the gradient of task {task}, to measure it") / ranks.size
        return [part.view_as(g) for g, part in zip(dense, total.split([g.numel() for g in dense]), strict=True)]

    def norm(self, grads: Sequence[Tensor], like: Tensor) -> Tensor:
        """Of a task's gradient, without the factor; one number in the dtype and on the device of ``like``."""
        squares = [torch.linalg.vector_norm(g, dtype=like.dtype).square().to(like.device) for g in grads]
        return torch.stack(squares).sum().sqrt() / self._factor.abs().to(like)


def balanced_loss(owner: Any, losses: TaskLosses, weighing: Weighing, at_root: Collection[int]) -> Tensor:
    """A scalar in the graph of the losses, whose backward is one pass."""
    out: Tensor = _OnePass.apply(owner, losses, weighing, at_root, losses.total(), *losses.losses)  # type: ignore[no-untyped-call]
    return out


class _OnePass(torch.autograd.Function):
    """The sum of the (log-)losses."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: Any,
        losses: TaskLosses,
        weighing: Weighing,
        at_root: Collection[int],
        value: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """The value; of several ranks the sum of the logs of the mean losses."""
        ctx.work = owner, losses, weighing, at_root
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each loss gets factor / (mean loss + eps); one that is not finite gets nothing."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not supported by a balanced loss: norms and weights are not part of any graph. "
                "For second derivatives use the sum of the losses"
            )
        owner, losses, weighing, at_root = ctx.work
        factor = grads[0]
        slopes: dict[int, Tensor] = {}
        finite = None if weighing.on_host else torch.ones_like(weighing.weights, dtype=torch.bool)
        for task, loss, value in zip(losses.tasks, losses.losses, losses.values, strict=True):
            if value.device.type == "cpu" and not math.isfinite(float(value)):
                weighing.flags[task] = True
                continue
            wide = factor.to(value.device, value.dtype)
            slope = wide / (value + owner.eps) if owner.log_transform else wide
            if finite is not None:
                finite[task] = value.isfinite()
                slope = torch.where(value.isfinite(), slope, 0.0)
                weighing.flags[task] |= ~finite[task]
            slopes[task] = slope.to(loss.dtype).view_as(loss)
        owner.set_weights(Measurement(losses, slopes, factor), finite)
        weighing.arm(factor, finite)
        for task in slopes.keys() & at_root:
            slopes[task] = slopes[task] * weighing.weights[task].to(slopes[task])
        return None, None, None, None, None, *(slopes.get(task) for task in losses.tasks)
