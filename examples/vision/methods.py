"""The methods: each is called with K losses and gives a scalar to call ``backward()`` on; each has a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor, nn

STL = "stl"
WEIGHTS_RATE = 0.025  # of uncertainty weighting's and FAMO's weights, as in FAMO's experiments


class Method(Protocol):
    """What the loop needs."""

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        """The scalar."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """From one."""


class Sum(nn.Module):
    """Equal weighting."""

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        """The sum."""
        return torch.stack(list(losses)).sum()


class LogSum(nn.Module):
    """The sum of the logarithms: DB-MTL without its second half."""

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        """The sum."""
        return torch.stack([dbk.log_transform(loss) for loss in losses]).sum()


class Uncertainty(nn.Module):
    """Uncertainty weighting: sum_t (exp(-s_t) loss_t + s_t) / 2, with s_t trained along.

    Source: Kendall, Gal, Cipolla, arXiv 1705.07115, as in FAMO's experiments.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted sum."""
        s = self.log_variances
        return 0.5 * (torch.exp(-s) * torch.stack(list(losses)) + s).sum()


class FAMO:
    """Fast adaptive multitask optimization: weights of the log-losses that follow how much a step lowered each.

    Source: Liu et al., arXiv 2306.03792, Algorithm 1; rate and decay of the weights as its authors set them.
    """

    def __init__(self, num_tasks: int, device: torch.device, eps: float = 1e-8) -> None:
        self.logits, self.eps = torch.zeros(num_tasks, device=device, requires_grad=True), eps
        self.optimizer = torch.optim.Adam([self.logits], lr=WEIGHTS_RATE, weight_decay=0.01)
        self.before = torch.zeros(num_tasks, device=device)

    def __call__(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted sum of logarithms."""
        stacked = torch.stack(list(losses)) + self.eps
        weights = self.logits.detach().softmax(0)
        self.before = stacked.detach().log()
        return (weights * stacked.log()).sum() / (weights / stacked.detach()).sum()

    def update(self, losses: Sequence[Tensor]) -> None:
        """Move the weights, by the losses of the same batch after the step."""
        fallen = self.before - (torch.stack(list(losses)) + self.eps).log()
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self.logits.softmax(0).backward(fallen)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Weights and their optimizer."""
        return {"logits": self.logits.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])


Maker = Callable[[list[nn.Parameter], Sequence[str], float, float, torch.device], Method]
METHODS: dict[str, Maker] = {
    STL: lambda shared, names, beta, sigma, device: Sum(),
    "ew": lambda shared, names, beta, sigma, device: Sum(),
    "log": lambda shared, names, beta, sigma, device: LogSum(),
    "uw": lambda shared, names, beta, sigma, device: Uncertainty(len(names)).to(device),
    "famo": lambda shared, names, beta, sigma, device: FAMO(len(names), device),
    "db-mtl": lambda shared, names, beta, sigma, device: dbk.DBMTL(shared, names, beta=beta, beta_sigma=sigma),
    "one-pass": lambda shared, names, beta, sigma, device: dbk.OnePassDBMTL(shared, names, strict=True),
}


def check(names: Sequence[str]) -> None:
    """Raises BenchError: a method is unknown."""
    for name in names:
        if name not in METHODS:
            raise BenchError(f"no method {name!r}: it is one of {', '.join(METHODS)}")
