"""A multi-task CNN, and its training with the oracle and autograd: nothing of ours in here."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    """A CNN trunk with batch norm and three unequal heads (class, regression, reconstruction)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 33),
            nn.Tanh(),
        )
        self.heads = nn.ModuleList(
            [
                nn.Linear(33, 7),
                nn.Sequential(nn.Linear(33, 11), nn.ReLU(), nn.Linear(11, 1)),
                nn.Linear(33, 121),
            ]
        )
        self.to(dtype)

    def losses(self, x: Tensor, targets: tuple[Tensor, Tensor]) -> list[Tensor]:
        z = self.trunk(x)
        return [
            functional.cross_entropy(self.heads[0](z), targets[0]),
            (self.heads[1](z).squeeze(1) - targets[1]).square().mean() * 30,
            (self.heads[2](z) - x.flatten(1)).square().sum(1).mean(),
        ]


def batches(steps: int, dtype: torch.dtype, seed: int = 7) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        x = torch.randn(16, 1, 11, 11, generator=generator, dtype=torch.float64)
        classes = torch.randint(0, 7, (16,), generator=generator)
        out.append((x.to(dtype), (classes, (x.mean((1, 2, 3)) * 5).to(dtype))))
    return out


def train_by_the_paper(
    net: Net,
    steps: int,
    dtype: torch.dtype,
    accumulate: int = 1,
    beta: float = 0.9,
    sigma: float = 0.5,
    eps: float = 1e-8,
) -> list[Tensor]:
    """SGD with momentum; gradients of ``accumulate`` micro-batches are averaged."""
    shared, heads = list(net.trunk.parameters()), list(net.heads.parameters())
    sizes = [p.numel() for p in shared]
    method = oracle.Training(3, sum(sizes), beta, sigma, eps)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    data = batches(steps * accumulate, dtype)
    for step in range(steps):
        optimizer.zero_grad()
        total = np.zeros_like(method.rows)
        for x, targets in data[step * accumulate : (step + 1) * accumulate]:
            values = [torch.log(loss + eps) for loss in net.losses(x, targets)]
            for row, value in zip(total, values, strict=True):
                grads = torch.autograd.grad(value, shared, retain_graph=True)
                row += np.concatenate([g.double().reshape(-1).numpy() for g in grads]) / accumulate
            (sum(values) / accumulate).backward(inputs=heads)
        balanced = torch.from_numpy(method.update(total)).to(dtype).split(sizes)
        for p, grad in zip(shared, balanced, strict=True):
            p.grad = grad.view_as(p).clone()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]
