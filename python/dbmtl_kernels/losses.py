"""The K losses of a step: what they must be, where each backward pass starts, the scalar a user calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check(losses: Sequence[Tensor] | Tensor, num_tasks: int, log_eps: float | None) -> list[Tensor]:
    """K floating-point scalars as a list; ``log_eps`` is the eps of the log transformation, None without it.

    Raises:
        TypeError: not a sequence or a tensor; a loss is not a floating-point tensor.
        ValueError: the number of losses is not K; one is not a scalar, or has no log (seen on a CPU only).
    """
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(f"losses given as a tensor must have shape ({num_tasks},), got {tuple(losses.shape)}")
        scalars = list(losses.unbind())
    elif isinstance(losses, Sequence):
        scalars = list(losses)
    else:
        raise TypeError(f"losses must be a sequence of scalars or a 1-D tensor, got {type(losses).__name__}")
    if len(scalars) != num_tasks:
        raise ValueError(f"expected {num_tasks} losses (num_tasks), got {len(scalars)}")
    for task, loss in enumerate(scalars):
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss of task {task} must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"the loss of task {task} must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.is_floating_point():
            raise TypeError(f"the loss of task {task} must be floating point, got {loss.dtype}")
        if log_eps is not None and loss.device.type == "cpu" and float(loss.detach()) + log_eps <= 0.0:
            raise ValueError(
                f"the loss of task {task} is {float(loss.detach())}: a loss must be positive to have a logarithm "
                "(log_transform=False takes losses as they are)"
            )
    return scalars


def check_graphs(losses: list[Tensor]) -> None:
    """Raise RuntimeError naming the first loss that nothing can be backpropagated from."""
    for task, loss in enumerate(losses):
        if not loss.requires_grad:
            raise RuntimeError(f"the loss of task {task} has no graph: it does not require grad")


@torch.no_grad()
def total(losses: list[Tensor], log_eps: float | None) -> Tensor:
    """The sum of the losses, or of their logs, as a scalar without a graph; float32 at least."""
    values = [_wide(loss) for loss in losses]
    if log_eps is not None:
        values = [torch.log(v + log_eps) for v in values]
    return torch.stack([v.to(values[0].device) for v in values]).sum()


def scaled(loss: Tensor, log_eps: float | None, factor: Tensor | None) -> Tensor:
    """A scalar whose gradient is that of factor * log(loss + eps), to call backward on without arguments.

    The factor multiplies the loss, for a ``grad_tensors`` would make torch import sympy: 40 MB and 0.4 s.
    """
    with torch.no_grad():
        start = torch.ones_like(loss) if log_eps is None else (_wide(loss) + log_eps).reciprocal().view_as(loss)
        if factor is not None:
            start = start * factor.to(start.device)
        start = start.to(loss.dtype)
    with torch.enable_grad():
        return (loss * start).reshape(())


def factor_or_none(factor: Tensor) -> Tensor | None:
    """The factor by which a loss was scaled; one of exactly 1 is none (off a CPU it would take a sync to know)."""
    return None if factor.device.type == "cpu" and float(factor) == 1.0 else factor.detach().clone()


def factor_on(device: torch.device, factor: float | Tensor) -> Tensor:
    """The factor as a tensor on the device; a number gets there without a wait."""
    return factor.to(device) if isinstance(factor, Tensor) else torch.full((), float(factor), device=device)


def is_zero(factor: Tensor) -> bool:
    """Whether the factor is 0 (off a CPU it would take a sync to know)."""
    return factor.device.type == "cpu" and float(factor) == 0.0


def _wide(loss: Tensor) -> Tensor:
    return loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))


class BalancedLoss(torch.autograd.Function):
    """Hands the incoming gradient to ``run``; the losses' graphs are not part of the outer graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, run: Callable[[Tensor], None], retain_graph: bool) -> Tensor:
        """The value, cut off from the losses."""
        ctx.run = run
        ctx.retain_graph = retain_graph
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        """Run the backward passes once (more often with retain_graph)."""
        run = ctx.run
        if run is None:
            raise RuntimeError(
                "backward() through this balanced loss a second time: its graphs are freed; pass retain_graph=True to "
                "balancer(losses)"
            )
        if not ctx.retain_graph:
            ctx.run = None
        run(grads[0])
        return None, None, None, None
