"""BalancedGradient: the rows of the open step to a balanced gradient that carries the caller's factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .buffer import Flats
from .placement import Buffer
from .steps import Steps
from .weightings import MaxNorm, SeesTasks, UsesLosses, Weighting
from .world import World


class BalancedGradient:
    """Computes the balanced gradient of the step now open.

    Args:
        buffer: the rows.
        steps: which tasks have a say, and the factor.
        weighting: `MaxNorm` is computed by the kernels, without a Gramian and without a sync; any other is called with
            the Gramian of the tasks that have a finite gradient, which takes a sync to know.
        world: the ranks whose weights must agree.
    """

    def __init__(self, buffer: Buffer, steps: Steps, weighting: Weighting, world: World) -> None:
        self._buffer, self._steps, self._weighting, self._world = buffer, steps, weighting, world

    def into(self, flats: Flats, accumulate: bool) -> None:
        """Norms, weights, books, and the balanced gradient into ``flats``, added to what is there if ``accumulate``."""
        steps, weighting = self._steps, self._weighting
        if type(weighting) is MaxNorm:
            self._buffer.balance(
                flats, weighting.eps, weighting.scale, active=steps.seen, loss_scale=steps.loss_scale,
                fresh=steps.fresh, accumulate=accumulate,
            )  # fmt: skip
        else:
            self._weigh()
            self._buffer.combine(self._carried(), flats, accumulate)
        steps.fresh = False

    def again(self, flats: Flats) -> None:
        """Once more what `into` gave last."""
        self._buffer.combine(self._carried(), flats)

    def spoiled(self) -> bool:
        """Whether `into` gave NaN, for a GradScaler to see; a sync."""
        return bool(self._overflow().any())

    def _carried(self) -> Tensor:
        """(K,) weights times the factor."""
        weights, scale = self._buffer.weights, self._steps.loss_scale
        if scale is None:
            return weights
        return torch.where(self._overflow(), torch.nan, weights * scale.to(weights.device, weights.dtype))

    def _overflow(self) -> Tensor:
        """(K,) bool: tasks whose overflow a GradScaler must see.

        Factors up to 1 are those of accumulation, where nobody looks for it.
        """
        broken, scale = self._buffer.broken, self._steps.loss_scale
        return torch.zeros_like(broken) if scale is None else broken & (scale.to(broken.device) > 1)

    @torch.no_grad()
    def _weigh(self) -> None:
        """Weights by the Gramian, and the books, as the kernels do for `MaxNorm`."""
        buffer, steps = self._buffer, self._steps
        sums = buffer.sums()
        # The Gramian may be narrower than the sums; what does not fit is not given to a solver.
        now = ~(sums < 0.999 * torch.finfo(buffer.narrow).max)
        before = torch.zeros_like(now) if steps.fresh else buffer.broken.clone()
        broken = before | now
        bad = [task for task, is_bad in enumerate(broken.tolist()) if is_bad]
        used = [task for task, is_seen in enumerate(steps.seen) if is_seen and task not in bad]
        weights = torch.zeros_like(buffer.weights)
        try:
            if used:
                index = torch.tensor(used, device=weights.device)
                gramian = buffer.gramian()
                if isinstance(self._weighting, SeesTasks):
                    self._weighting.see(used)
                if isinstance(self._weighting, UsesLosses):
                    self._weighting.observe(self._losses(used), used, not steps.fresh)
                ours = self._weighting(gramian if len(used) == len(steps.seen) else gramian[index][:, index])
                ours = _checked(ours, len(used), gramian, self._weighting).to(weights.dtype)
                weights[index] = self._world.of_first(ours, "the weights")
        finally:  # also where the weighting raises: no NaN stays in a row
            buffer.record(sums, weights, broken, now & ~before, bad)

    def _losses(self, tasks: list[int]) -> Tensor:
        missing = [t for t in tasks if t not in self._steps.losses]
        if missing:
            raise RuntimeError(
                f"the weighting {type(self._weighting).__name__} needs the losses, and those of task(s) {missing} are "
                "not known: use balancer(losses) instead of task()"
            )
        device = self._buffer.device
        return torch.stack([self._steps.losses[t].to(device, torch.float64) for t in tasks])


def _checked(weights: Any, count: int, like: Tensor, weighting: Weighting) -> Tensor:
    """Weights in the dtype of ``like``, if they are what a weighting must give."""
    name = type(weighting).__name__
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"the weighting {name} must return a tensor of floats, got {kind}")
    if weights.shape != (count,):
        raise ValueError(
            f"the weighting {name} must return weights of shape ({count},) for {count} tasks, got "
            f"{tuple(weights.shape)}"
        )
    if weights.device != like.device:
        raise ValueError(f"the weighting {name} must return weights on {like.device}, got {weights.device}")
    out = weights.detach().to(like.dtype)
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"the weighting {name} gave weights that are not finite: {out.tolist()}")
    return out
