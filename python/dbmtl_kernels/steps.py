"""Steps: which step is open, which tasks have a gradient in it, and how the next gradient of a task counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import losses as loss_values
from .rounding import update_seed
from .updates import Coefficients


class Steps:
    """The books of a balancer. A step is one update of the EMA, of one backward pass a task or of several.

    Args:
        num_tasks: K.
        beta: forgetting rate.
        beta_sigma: decay exponent; in step k, beta_k = beta / k ** beta_sigma.
        seed: of the stochastic rounding, or None.
        device: None keeps count on the host. A device keeps it there, with the coefficients, so that a step captured
            in a CUDA graph counts on when it is replayed.

    Attributes:
        open: a step has begun and not ended.
        fresh: nothing was balanced yet in this step.
        seen: for each task, whether it has a gradient in this step.
        pending: the tasks entered with `DBMTL.task` since the last balance.
        inside: the task whose context is open.
        loss_scale: the factor that this step's gradients carry.
        losses: the last loss of each task in this step, where it is known.
        changes: how often any row was changed, as far as this host knows: a replayed CUDA graph does not count.
    """

    def __init__(
        self, num_tasks: int, beta: float, beta_sigma: float, seed: int | None, device: torch.device | None
    ) -> None:
        self._beta, self._sigma, self._seed = beta, beta_sigma, seed
        self._host = [0, 0]  # steps begun; updates of any row, each with random numbers of its own
        self._counts = None if device is None else torch.zeros(2, dtype=torch.int64, device=device)
        self._beta_k = beta  # of the step now open
        self._betas: Tensor | None = None  # on the device: beta_k and 1 - beta_k of the step now open
        self.open = False
        self.fresh = True
        self.seen = [False] * num_tasks
        self.pending: set[int] = set()
        self.inside: int | None = None
        self.loss_scale: Tensor | None = None
        self.losses: dict[int, Tensor] = {}
        self.changes = 0

    @property
    def capturable(self) -> bool:
        """Whether the count is kept on a device."""
        return self._counts is not None

    def count_on(self, device: torch.device) -> Tensor:
        """`count` as one number on the device, without a sync."""
        return torch.full((), self._host[0], device=device) if self._counts is None else self._counts[0]

    @property
    def count(self) -> int:
        """Number of steps begun; a sync if it is kept on a device."""
        return self._host[0] if self._counts is None else int(self._counts[0])

    def begin(self, factor: Tensor | None) -> None:
        """A new step, whose gradients carry ``factor``."""
        self.open = self.fresh = True
        self.seen = [False] * len(self.seen)
        self.losses = {}
        self.loss_scale = factor
        if self._counts is None:
            self._host[0] += 1
        else:
            self._counts[0] += 1
        self._set_betas()

    def balanced(self) -> None:
        """The balanced gradient has been written."""
        self.changes += 1
        self.pending.clear()

    def end(self) -> None:
        """The step is over, whether anything came of it or not."""
        self.open = False
        self.pending.clear()

    def coefficients(self, task: int, factor: Tensor | None) -> Coefficients:
        """How a gradient of ``task`` counts that carries ``factor``; begins a step if none is open."""
        self.changes += 1
        if not self.open:
            self.begin(factor)
        elif self.loss_scale is not None and loss_values.is_zero(self.loss_scale):
            self.loss_scale = factor  # nothing counted so far
        if self._counts is not None:
            return self._device_coefficients(task)
        beta = self._beta_k
        self._host[1] += 1
        seed = None if self._seed is None else update_seed(self._seed, self._host[1])
        return Coefficients(1.0 if self.seen[task] else beta, 1.0 - beta, self.loss_scale, seed)

    def set_beta(self, beta: float, beta_sigma: float) -> None:
        """Change them from the next step on."""
        self._beta, self._sigma = beta, beta_sigma

    def _set_betas(self) -> None:
        if self._counts is None:
            self._beta_k = self._beta / self._host[0] ** self._sigma
        else:
            beta = self._beta / self._counts[0].to(torch.float64) ** self._sigma
            self._betas = torch.stack([beta, 1.0 - beta])

    def _device_coefficients(self, task: int) -> Coefficients:
        assert self._counts is not None
        if self._betas is None:  # a step resumed in the middle
            self._set_betas()
        assert self._betas is not None
        self._counts[1] += 1
        # The same seeds as on the host: `update_seed` adds the count to a constant, modulo 2**63.
        first = 0 if self._seed is None else update_seed(self._seed, 0)
        seed = ((self._counts[1:] + first) & (2**63 - 1)).view(torch.float64)
        betas = self._betas
        if self.seen[task]:
            betas = torch.cat([torch.ones_like(betas[:1]), betas[1:]])
        return Coefficients(
            1.0, 1.0, self.loss_scale, None if self._seed is None else 0, device=torch.cat([betas, seed])
        )

    def keep(self, tasks: Sequence[int | None]) -> None:
        """Let the tasks be these, None being a new one."""
        self.changes += 1
        self.seen = [task is not None and self.seen[task] for task in tasks]

    def refuse_inside(self, what: str) -> None:
        """Raise RuntimeError if the context of a task is open."""
        if self.inside is not None:
            raise RuntimeError(f"{what} inside the context of task({self.inside}); leave it first")

    def refuse_entered(self, task: int) -> None:
        """Raise RuntimeError if the task waits for a balance already."""
        if task in self.pending:
            raise RuntimeError(f"task {task} was entered already in this step; call balance() (or optimizer.step())")

    def refuse_pending(self) -> None:
        """Raise RuntimeError if any task waits for a balance."""
        if self.pending:
            raise RuntimeError(f"backward() while task(s) {sorted(self.pending)} wait for balance(); call it first")

    def refuse_scaled(self) -> None:
        """Raise RuntimeError if the optimizer would see the loss scale."""
        if self.loss_scale is not None:
            raise RuntimeError(
                "optimizer.step() would see gradients that carry the loss scale: with a GradScaler, call "
                "balancer.balance() before scaler.unscale_() and scaler.step()"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, and of the losses a (K,) float64 tensor."""
        known = self.losses if self.open else {}
        losses = torch.zeros(len(self.seen), dtype=torch.float64)
        for task, loss in known.items():
            losses[task] = loss
        return {
            "step": self.count,
            "updates": self._host[1] if self._counts is None else int(self._counts[1]),
            "open": self.open,
            "fresh": self.fresh,
            "seen": [int(x) for x in self.seen],
            "pending": sorted(self.pending),
            "known": sorted(known),
            "losses": losses,
            "loss_scale": None if self.loss_scale is None else float(self.loss_scale),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what `state` gave."""
        self.changes += 1
        self._host = [int(state["step"]), int(state["updates"])]
        if self._counts is not None:
            self._counts.copy_(torch.tensor(self._host))
            self._betas = None
        self.open, self.fresh = bool(state["open"]), bool(state["fresh"])
        if self.open and self._counts is None:
            self._set_betas()
        self.seen = [bool(x) for x in state["seen"]]
        self.pending = {int(x) for x in state["pending"]}
        scale = state["loss_scale"]
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.losses = {int(t): state["losses"][int(t)].to(device, wide) for t in state["known"]}
        self.loss_scale = None if scale is None else torch.full((), float(scale), dtype=wide, device=device)
