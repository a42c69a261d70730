"""Hugging Face Accelerate, in a training loop of one's own: a balancer for what ``accelerator.prepare`` has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..balancer import GradientBalancer
from ..checkpoint import gathered
from ..dbmtl import DBMTL
from .wrappers import Shared, balancing, make_balancer

__all__ = ["SavedBalancer", "balancing", "prepare_balancer"]


def prepare_balancer(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shared: Shared,
    num_tasks: int,
    *,
    method: Callable[..., GradientBalancer] = DBMTL,
    **options: Any,
) -> GradientBalancer:
    """A balancer for a prepared model, attached to its optimizer, and part of ``accelerator.save_state``.

    Then, with any precision and with ``accelerator.accumulate(model)`` around it:

        with balancing(model):
            accelerator.backward(balancer(losses_of(model, batch)))
        optimizer.step()
        optimizer.zero_grad()

    `balancing` is for several ranks (DistributedDataParallel, FSDP2), and does nothing otherwise.

    Args:
        accelerator: whose.
        model: what ``accelerator.prepare`` gave.
        optimizer: what it gave.
        shared: a function from the unwrapped model to its shared parameters, or the name of a submodule that has them
            all; those of it that are frozen are left out.
        num_tasks: K.
        method: the class of the balancer: `DBMTL`, or `GradientBalancer` with a ``weighting`` among the options.
        options: its other arguments.

    Raises:
        RuntimeError: a model whose gradients cannot be balanced (DeepSpeed, say).
        ValueError: the optimizer holds none of the shared parameters; whatever ``method`` raises.
    """
    balancer = make_balancer(accelerator.unwrap_model(model), model, shared, num_tasks, method, options)
    balancer.attach(optimizer)
    accelerator.register_for_checkpointing(SavedBalancer(balancer, accelerator.is_local_main_process))
    return balancer


class SavedBalancer:
    """A balancer whose state_dict is whole, for trainers in which one rank saves and all load.

    Args:
        balancer: whose state.
        keep: whether this rank may be one that saves.
    """

    def __init__(self, balancer: GradientBalancer, keep: bool) -> None:
        self._balancer, self._keep = balancer, keep

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, on the host where they had to be gathered; of several ranks all must call it."""
        return gathered(self._balancer.state_dict(), self._keep)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._balancer.load_state_dict(state)
