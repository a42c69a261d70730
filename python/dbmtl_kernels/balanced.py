"""BalancedGradient: the rows of the open step to a balanced gradient that carries the caller's factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .buffer import Flats
from .placement import Buffer
from .steps import Steps


class BalancedGradient:
    """Computes the balanced gradient of the step now open.

    Args:
        buffer: the rows.
        steps: which tasks have a say, and the factor.
        eps: added to the norms.
        scale: alpha: a name or a number.
    """

    def __init__(self, buffer: Buffer, steps: Steps, eps: float, scale: str | float) -> None:
        self._buffer, self._steps, self._eps, self._scale = buffer, steps, eps, scale

    def into(self, flats: Flats, accumulate: bool) -> None:
        """Norms, weights, books, and the balanced gradient into ``flats``, added to what is there if ``accumulate``."""
        steps = self._steps
        self._buffer.balance(
            flats, self._eps, self._scale, active=steps.seen, loss_scale=steps.loss_scale, fresh=steps.fresh,
            accumulate=accumulate,
        )  # fmt: skip
        steps.fresh = False

    def again(self, flats: Flats) -> None:
        """Once more what `into` gave last."""
        weights = self._buffer.weights
        scale = self._steps.loss_scale
        if scale is not None:
            weights = torch.where(self._overflow(), torch.nan, weights * scale.to(weights.device, weights.dtype))
        self._buffer.combine(weights, flats)

    def spoiled(self) -> bool:
        """Whether `into` gave NaN, for a GradScaler to see; a sync."""
        return bool(self._overflow().any())

    def _overflow(self) -> Tensor:
        """(K,) bool: tasks whose overflow a GradScaler must see.

        Factors up to 1 are those of accumulation, where nobody looks for it.
        """
        broken, scale = self._buffer.broken, self._steps.loss_scale
        return torch.zeros_like(broken) if scale is None else broken & (scale.to(broken.device) > 1)
