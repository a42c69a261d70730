"""The losses of a step: what they must be, and where each backward pass starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arguments import check_tasks
from ..rows.ranks import Ranks

# What PyTorch says of several backward passes over one graph, and what helps.
ADVICE = {
    "donated buffer": "the model was compiled for a single backward pass over each graph, and several tasks need one "
    "each: set torch._functorch.config.donated_buffer = False before the first call of the compiled model",
    "mark a variable ready only once": "DistributedDataParallel was about to reduce the gradients of a single pass: "
    "run its forward pass (and the backward) inside `with model.no_sync():`, DBMTL averages the gradients itself",
    "gloo": "one of FSDP's collectives failed; has another rank stopped?",
    "NCCL": "one of FSDP's collectives failed; has another rank stopped?",
}

NARROW = (torch.float16, torch.bfloat16)

Given = Sequence[Tensor | None] | Tensor


class TaskLosses:
    """The losses of the tasks present in a step.

    Args:
        losses: K scalars, as a sequence or a (K,) tensor; None where a task is absent. With ``tasks`` as many as those.
        tasks: the tasks they are of; by default all.
        num_tasks: K.
        log_eps: the eps of the log transformation, None without it.

    Attributes:
        tasks: indices of those present.
        losses: their losses.
        log_eps: see above.
        values: their values, float32 at least, without a graph: those that the logarithm is taken of.

    Raises:
        TypeError: not a sequence or a tensor; a loss is not a floating-point tensor; a task is not an int.
        ValueError: the number of losses is wrong; one is not a scalar; none is present; a task is out of range or
            there twice.
    """

    def __init__(self, losses: Given, tasks: Sequence[int] | None, num_tasks: int, log_eps: float | None) -> None:
        self.log_eps, self._num_tasks = log_eps, num_tasks
        if isinstance(losses, Tensor):
            if losses.dim() != 1:
                raise ValueError(f"losses given as a tensor must have shape ({num_tasks},), got {tuple(losses.shape)}")
            given: list[Tensor | None] = list(losses.unbind())
        elif isinstance(losses, Sequence):
            given = list(losses)
        else:
            raise TypeError(f"losses must be a sequence of scalars or a 1-D tensor, got {type(losses).__name__}")
        indices = check_tasks(tasks, len(given), num_tasks)
        self.tasks: list[int] = []
        self.losses: list[Tensor] = []
        self.values: list[Tensor] = []
        for task, loss in zip(indices, given, strict=True):
            if loss is None:
                continue
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss of task {task} must be a tensor, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"the loss of task {task} must be a scalar, got shape {tuple(loss.shape)}")
            if not loss.is_floating_point():
                raise TypeError(f"the loss of task {task} must be floating point, got {loss.dtype}")
            self.tasks.append(task)
            self.losses.append(loss)
            value = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
            self.values.append(value.float() if value.dtype in NARROW else value)
        if not self.tasks:
            raise ValueError("every loss is None: a step needs at least one task")

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Make ``values`` the means over the ranks; one all-reduce on ``device``, no sync."""
        self.values = ranks.mean_losses(self.values, self.tasks, self._num_tasks, device)

    def check_logarithms(self) -> None:
        """Raise ValueError naming the first task whose loss has no logarithm (seen on a CPU only)."""
        eps = self.log_eps
        for task, value in zip(self.tasks, self.values, strict=True):
            if eps is not None and value.device.type == "cpu" and float(value) + eps <= 0.0:
                raise ValueError(
                    f"the loss of task {task} is {float(value)}: a loss must be positive to have a logarithm "
                    "(log_transform=False takes losses as they are)"
                )

    def check_graphs(self) -> None:
        """Raise RuntimeError naming the first loss that nothing can be backpropagated from."""
        for task, loss in zip(self.tasks, self.losses, strict=True):
            if not loss.requires_grad:
                raise RuntimeError(f"the loss of task {task} has no graph: it does not require grad")

    @torch.no_grad()
    def total(self) -> Tensor:
        """The sum of the losses, or of their logs, as a scalar without a graph; float32 at least."""
        eps, device = self.log_eps, self.values[0].device
        values = torch.stack([value.to(device) for value in self.values])
        return values.sum() if eps is None else torch.log(values + eps).sum()

    def finite(self) -> list[bool | None]:
        """Whether each loss is finite; None off a CPU, where it would take a sync to know."""
        return [math.isfinite(float(x)) if x.device.type == "cpu" else None for x in self.values]

    def backward(
        self, index: int, loss_scale: Tensor | None, retain_graph: bool, inputs: Sequence[Tensor] | None = None
    ) -> None:
        """Backpropagate ``loss * slope``, with slope = loss_scale / (loss + eps), or loss_scale without the log.

        Into all leaves, or into ``inputs`` alone.

        ``backward(gradient=slope)`` would make torch import sympy: 40 MB and 0.4 s. What PyTorch says of a compiled
        graph that was run through once already is explained.
        """
        loss = self.losses[index]
        with torch.no_grad():
            if self.log_eps is None:
                slope = torch.ones_like(loss)
            else:
                slope = (self.values[index] + self.log_eps).reciprocal().view_as(loss)
            if loss_scale is not None:
                slope = slope * loss_scale.to(slope.device)
            slope = slope.to(loss.dtype)
        with torch.enable_grad():
            root = (loss * slope).reshape(())
        try:
            root.backward(retain_graph=retain_graph, inputs=inputs)
        except RuntimeError as error:
            advice = next((advice for words, advice in ADVICE.items() if words in str(error)), None)
            if advice is None or "DBMTL" in str(error):  # collecting early, one of our own collectives may have failed
                raise
            raise RuntimeError(f"backward pass of task {self.tasks[index]}: {advice}") from error


def loss_scale_or_none(scale: Tensor) -> Tensor | None:
    """The factor by which a loss was scaled; one of exactly 1 is none (off a CPU it would take a sync to know)."""
    return None if scale.device.type == "cpu" and float(scale) == 1.0 else scale.detach().clone()


def loss_scale_on(device: torch.device, scale: float | Tensor) -> Tensor:
    """The factor as a tensor on the device; a number gets there without a wait."""
    return scale.to(device) if isinstance(scale, Tensor) else torch.full((), float(scale), device=device)


class SharedLog(NamedTuple):
    """What `functional.log_transform` does with a widened loss and eps; ``several``: the ranks must all do it."""

    call: Callable[[Tensor, float], Tensor]
    several: bool


# Inside the context of a `task`. A plain variable, as torch.compile cannot read a ContextVar.
shared_log: SharedLog | None = None


class LogOfMean(torch.autograd.Function):
    """log(mean + eps), where mean is that of ``loss`` over the ranks; its gradient is that of this rank's share.

    The average of those gradients over the ranks is the gradient of the log of the mean.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, mean: Tensor, eps: float) -> Tensor:
        """The same on every rank."""
        ctx.save_for_backward(mean + eps)
        return torch.log(mean + eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """1 / (mean + eps)."""
        (denominator,) = ctx.saved_tensors
        return grads[0] / denominator, None, None
