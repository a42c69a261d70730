"""What `ops.balance_rows_` hands to a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EngineStep(NamedTuple):
    """The arguments of `ops.balance_rows_`, which says what each is."""

    rows: Tensor
    sumsq: Tensor
    broken: Tensor
    nonfinite_steps: Tensor
    norms: Tensor
    weights: Tensor
    outs: list[Tensor]
    starts: list[int]
    active: Tensor | None
    loss_scale: Tensor | None
    eps: float
    scale: str
    constant: float
    fresh: bool
    accumulate: bool
