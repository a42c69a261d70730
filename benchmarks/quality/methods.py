"""The methods: each makes, of the trunk's parameters and K, what turns K losses into a scalar to call backward() on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import dbmtl_kernels as dbk
import torch
from torch import Tensor, nn

Objective = Callable[[Sequence[Tensor]], Tensor]


class FAMO:
    """Fast adaptive multitask optimization: weights of the log-losses that follow how much a step lowered each.

    Call `update` after the optimizer's step, with the losses of the same batch.

    Source: Liu et al., arXiv 2306.03792, Algorithm 1; rate and decay of the weights as its authors set them.
    """

    def __init__(self, num_tasks: int, rate: float = 0.025, decay: float = 0.01, eps: float = 1e-8) -> None:
        self.logits, self.eps = torch.zeros(num_tasks, requires_grad=True), eps
        self.optimizer = torch.optim.Adam([self.logits], lr=rate, weight_decay=decay)
        self.before = torch.zeros(num_tasks)

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(losses)) + self.eps
        weights = self.logits.detach().softmax(0)
        self.before = stacked.detach().log()
        return (weights * stacked.log()).sum() / (weights / stacked.detach()).sum()

    def update(self, losses: Sequence[Tensor]) -> None:
        """Move the weights."""
        fallen = self.before - (torch.stack(list(losses)) + self.eps).log()
        self.optimizer.zero_grad()
        self.logits.softmax(0).backward(fallen)
        self.optimizer.step()


def _equal(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return lambda losses: torch.stack(list(losses)).sum()


def _log_only(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return lambda losses: torch.stack([dbk.log_transform(loss) for loss in losses]).sum()


def _famo(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return FAMO(num_tasks)


def _one_pass(trunk: list[nn.Parameter], num_tasks: int, measure_every: int = 10) -> Objective:
    # strict: the exact form may not take its place
    return dbk.OnePassDBMTL(trunk, num_tasks, measure_every=measure_every, strict=True)


def _one_row(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return dbk.DBMTL(trunk, num_tasks, beta=0.0)


def _exact(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return dbk.DBMTL(trunk, num_tasks)  # beta = 0.9 / sqrt(k)


EXACT = "exact"
METHODS: dict[str, Callable[[list[nn.Parameter], int], Objective]] = {
    EXACT: _exact,
    "one pass": _one_pass,
    "one row": _one_row,
    "equal weighting": _equal,
    "log only": _log_only,
    "FAMO": _famo,
}
# not run unless named
EXTRA_METHODS: dict[str, Callable[[list[nn.Parameter], int], Objective]] = {
    "one pass, every step": partial(_one_pass, measure_every=1),
    "one pass, every 50 steps": partial(_one_pass, measure_every=50),
}
EVERY_METHOD = METHODS | EXTRA_METHODS
