"""Readings: what a balancer tells of its last step."""

from __future__ import annotations

import torch
from torch import Tensor

from .monitor import Monitor
from .placement import Buffer
from .steps import Steps
from .weightings import Weighting


class Readings:
    """The base of a balancer. What it gives are copies: later steps do not change what was read."""

    num_tasks: int
    buffer: Buffer
    _steps: Steps
    _weighting: Weighting
    _reported: torch.dtype

    @property
    def weighting(self) -> Weighting:
        """What weighs the task gradients; another takes another balancer."""
        return self._weighting

    @property
    def step(self) -> int:
        """Number of EMA updates begun; reading it is a sync if ``capturable``."""
        return self._steps.count

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the task gradients (their EMA) at the last balance, on the device, without a sync.

        float32, or float64 with a float64 state. Not finite where the gradient was not.
        """
        return self.buffer.norms.to(self._reported, copy=True)

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients at the last balance, on the device, without a sync."""
        return self.buffer.weights.to(self._reported, copy=True)

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's gradient was not finite."""
        return self.buffer.nonfinite_steps.clone()

    def monitor(self) -> Monitor:
        """Norms, weights, cosines and conflicts of the tasks, for a logger; see `Monitor`."""
        return Monitor(self)
