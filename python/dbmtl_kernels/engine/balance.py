"""BalancedGradient: the rows of the open step to a balanced gradient that carries the caller's loss scale."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import ops, reference
from ..rows.placement import Buffer, OneRow
from ..rows.ranks import Ranks
from ..rows.rows import Flats
from ..weightings import Weighting, is_max_norm
from .bookkeeping import Steps


class BalancedGradient:
    """Computes the balanced gradient of the step now open.

    Args:
        rows: the task gradients.
        steps: which tasks have a say, and the loss scale.
        weighting: `MaxNorm` is computed by the kernels, without a Gramian and without a sync; any other is called with
            the Gramian of the tasks that have a finite gradient, which takes a sync to know.
        ranks: those whose weights must agree.
        propagate_above: the factor above which a nonfinite task makes the balanced gradient NaN.
        skip_zeros: a task whose gradient is zero everywhere has no say; `TaskGradientBuffer.fed` tells where the host
            does not know.

    Attributes:
        one: ``rows``, if they are one for all tasks, else None.
        writes: how often that one was written to.
    """

    def __init__(
        self,
        rows: Buffer,
        steps: Steps,
        weighting: Weighting,
        ranks: Ranks,
        propagate_above: float = 1.0,
        skip_zeros: bool = False,
    ) -> None:
        self._rows, self._steps, self._weighting, self._ranks = rows, steps, weighting, ranks
        self._max_norm = weighting if is_max_norm(weighting) else None
        self.propagate_above = propagate_above
        self._asks_rows = skip_zeros and rows.deferred
        # Not by its class: a reload makes another of each.
        self.one = cast(OneRow, rows) if hasattr(rows, "in_flats") else None
        self.writes = 0

    def compute(self, flats: Flats, accumulate: bool, sums: Tensor | None = None) -> None:
        """Norms, weights, stats, and the balanced gradient into ``flats``, added to what is there if ``accumulate``.

        ``sums``: (K,) what `TaskGradientBuffer.sums` gives, where it is known.
        """
        steps, max_norm = self._steps, self._max_norm
        self.writes += 1
        factors = None if steps.settings.task_weights is None else steps.factors()
        if max_norm is not None and (factors is None or self.one is not None):
            self._rows.balance(
                flats, max_norm.eps, max_norm.scale, active=self._active(), loss_scale=steps.loss_scale,
                propagate_above=self.propagate_above, fresh=steps.fresh, accumulate=accumulate, sums=sums,
            )  # fmt: skip
            if factors is not None:  # the row has them already
                stats = self._rows.stats
                stats.weights.mul_(ops.upload(factors, stats.weights.dtype, stats.weights.device))
        else:
            self._weigh(sums, factors)
            self._rows.combine(self._scaled_weights(), flats, accumulate)
        steps.fresh = False

    def add(self, task: int, flats: Flats | None) -> None:
        """The gradient just collected into the one row; see `OneRowBuffer.add`."""
        assert self.one is not None
        assert self._max_norm is not None
        finite, factors = self._steps.finite, self._steps.factors()
        self.writes += 1
        self.one.add(
            task, self._max_norm.eps, flats, None if finite is None else finite[task : task + 1],
            factor=1.0 if factors is None else factors[task],
        )  # fmt: skip

    def recompute(self) -> list[Tensor]:
        """Once more what `compute` gave last, as a new tensor for each parameter."""
        flats = self._rows.new_flats()
        self._rows.combine(self._scaled_weights(), flats)
        return self._rows.views(flats)

    def overflow(self) -> Tensor:
        """(K,) bool: the tasks whose overflow must be seen, as NaN in the balanced gradient.

        Those with a gradient in this step, where the factor is above `propagate_above`. By default that is for a
        GradScaler: factors up to 1 are those of accumulation, where nobody looks for it.
        """
        bad, active = self._rows.stats.nonfinite, self._active()
        if not isinstance(active, Tensor):
            active = ops.upload(active, torch.bool, bad.device)
        return bad & active & (self._factor() > self.propagate_above)

    def _active(self) -> list[bool] | Tensor:
        """Which tasks have a say; on the device where only it knows."""
        active, finite = self._steps.active(), self._steps.finite
        if finite is None and not self._asks_rows:
            return active
        flags = ops.upload(active, torch.bool, self._rows.device)
        flags = flags if finite is None else flags & finite.to(flags.device)
        return flags & self._rows.fed if self._asks_rows else flags

    def _factor(self) -> Tensor:
        """The loss scale, 1 where there is none."""
        weights, scale = self._rows.stats.weights, self._steps.loss_scale
        return weights.new_ones(()) if scale is None else scale.to(weights.device, weights.dtype)

    def _scaled_weights(self) -> Tensor:
        """(K,) weights times the factor."""
        return torch.where(self.overflow(), torch.nan, self._rows.stats.weights * self._factor())

    @torch.no_grad()
    def _weigh(self, sums: Tensor | None, factors: list[float] | None) -> None:
        """Weights by the Gramian, times ``factors``, and the stats, as the kernels do for `MaxNorm`."""
        rows, steps, weighting = self._rows, self._steps, self._weighting
        sums = rows.sums() if sums is None else sums
        by_norms = self._max_norm is not None  # all it asks of the Gramian are these sums
        # The Gramian may be narrower than the sums; what does not fit is not given to a solver.
        largest = None if by_norms else 0.999 * torch.finfo(rows.narrow).max
        nonfinite, now = reference.nonfinite(sums, rows.stats.nonfinite, steps.fresh, largest)
        bad = [task for task, is_bad in enumerate(nonfinite.tolist()) if is_bad]
        active = self._active()
        active = active.tolist() if isinstance(active, Tensor) else active
        used = [task for task, is_active in enumerate(active) if is_active and task not in bad]
        weights = torch.zeros_like(rows.stats.weights)
        try:
            if used:
                index = torch.tensor(used, dtype=torch.int64, device=weights.device)
                gramian = sums.diag() if by_norms else rows.gramian()
                begin = getattr(weighting, "begin", None)
                if begin is not None:
                    begin(used, steps.losses, not steps.fresh)
                ours = weighting(gramian if len(used) == len(steps.seen) else gramian[index][:, index])
                ours = _checked(ours, len(used), gramian, weighting).to(weights.dtype)
                if factors is not None:
                    ours = ours * ours.new_tensor([factors[task] for task in used])
                weights[index] = self._ranks.of_first(ours, "the weights")
        finally:  # also where the weighting raises: no NaN stays in a row
            rows.record(sums, weights, nonfinite, now, bad)


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
