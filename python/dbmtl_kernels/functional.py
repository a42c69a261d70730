"""Stateless entry points: the dense op, and the log transformation of a loss."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from . import ops as ops  # registers what is called below
from .engine import losses as loss_values
from .engine.losses import Given
from .ops.arguments import check_scale
from .ops.tasks import TaskNames


def balance_(
    grads: Tensor,
    ema: Tensor,
    beta: float = 0.9,
    eps: float = 1e-8,
    scale: str | float = "max",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Balance a K x P matrix of task gradients; ``ema`` is updated in place.

    ``ema <- beta * ema + (1 - beta) * grads``, then
    ``grad = sum_t alpha / (||ema_t|| + eps) * ema_t``. Not differentiable; works under ``torch.compile``.

    Args:
        grads: (K, P), float64 with a float64 ema, else float32, bfloat16 or float16. Copied if its rows are not
            contiguous.
        ema: (K, P), contiguous, float32 or bfloat16 (float64 with float64 grads); zeros before the first step.
            Updated in place.
        beta: forgetting rate in [0, 1).
        eps: added to the norms, > 0.
        scale: alpha: "max", "mean", "median", "min", or a number.
        backend: "auto", or a backend by name ("native", "triton", "eager"): works or raises.

    Returns:
        ``grad`` (P,) in the dtype of grads and ``norms`` (K,), the norms of the new ema, in float32 (float64 with
        float64). A task whose norm is not finite has weight 0, and its row of ema is set to zero so that it starts
        afresh; its entry in ``norms`` shows what happened. A finite norm beyond float32 is told as its largest number.

    Raises:
        ValueError: a shape, a non-contiguous ema, beta, eps, scale or an unknown backend.
        TypeError: a dtype.
        RuntimeError: different devices, or a backend that cannot serve here.

    Source: arXiv 2308.12029, Algorithm 1, lines for the task-gradient balancing.
    """
    scale = check_scale(scale)
    name, constant = (scale, 0.0) if isinstance(scale, str) else ("constant", scale)
    if ops.unseen(grads, ema):
        return ops.balance_(grads, ema, beta, eps, name, constant, backend)
    with torch.no_grad():
        grad, norms = torch.ops.dbmtl_kernels.balance_(grads, ema, beta, eps, name, constant, backend)
    return grad, norms


def sum_of_losses(losses: Given, num_tasks: int | Collection[str]) -> Tensor:
    """The plain sum of K losses for an evaluation, float32 at least, without a graph. Checked as a balancer's are."""
    return loss_values.TaskLosses(losses, None, TaskNames(num_tasks), None).total()


def log_transform(loss: Tensor, eps: float = 1e-8) -> Tensor:
    """``log(loss + eps)``, in float32 at least: the loss-scale balancing of DB-MTL, differentiable.

    Inside ``balancer.task(...)`` of a balancer of several ranks it is the log of the mean of ``loss`` over the ranks,
    which all of them must call. There, on a CPU, a loss that is not finite is cut off from its graph: nothing of it
    reaches any parameter.

    Args:
        loss: any shape, positive; half precision is widened first (1e-8 is 0 in float16).
        eps: added to the loss.

    Returns:
        The shape of ``loss``, in float32 or float64. A loss below ``-eps`` gives NaN, as log does.

    Warns:
        RuntimeWarning: a float16 loss below 2^-15 on a CPU, whose slope is beyond what float16 holds.

    Source: arXiv 2308.12029, equation of the logarithm transformation.
    """
    narrow = loss.dtype == torch.float16 and loss.device.type == "cpu" and not torch.compiler.is_compiling()
    if narrow and bool((loss.detach().float() + eps < 2.0**-15).any()):
        warnings.warn(
            "1 / loss does not fit into float16, and the gradient of its log will be inf: compute the loss in float32, "
            "as autocast does",
            RuntimeWarning,
            stacklevel=2,
        )
    wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
    shared = loss_values.shared_log
    if shared is None or (torch.compiler.is_compiling() and not shared.several):
        return torch.log(wide + eps)
    return shared.call(wide, eps)
