"""A multi-task CNN, and DB-MTL written straight from Algorithm 1 with autograd: nothing of ours in here."""

from __future__ import annotations

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


class Algorithm1:
    """The state and the update of the paper: K flat vectors, torch.autograd.grad, a loop over tasks."""

    def __init__(
        self,
        shared: list[Tensor],
        num_tasks: int,
        beta: float,
        sigma: float,
        eps: float = 1e-8,
        log: bool = True,
    ) -> None:
        self.shared, self.beta, self.sigma, self.eps, self.log = shared, beta, sigma, eps, log
        self.m = [torch.zeros(sum(p.numel() for p in shared), dtype=shared[0].dtype) for _ in range(num_tasks)]
        self.k = 0

    def gradients(self, losses: list[Tensor], heads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Flat task gradients of the shared parameters, and the plain gradients of the others."""
        values = [torch.log(loss + self.eps) if self.log else loss for loss in losses]
        flat = []
        for value in values:
            grads = torch.autograd.grad(value, self.shared, retain_graph=True, allow_unused=True)
            flat.append(
                torch.cat(
                    [
                        torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
                        for g, p in zip(grads, self.shared, strict=True)
                    ]
                )
            )
        rest = torch.autograd.grad(sum(values), heads, allow_unused=True)
        return flat, [torch.zeros_like(p) if g is None else g for g, p in zip(rest, heads, strict=True)]

    def balance(self, flat: list[Tensor]) -> Tensor:
        self.k += 1
        beta = self.beta / self.k**self.sigma
        self.m = [beta * m + (1 - beta) * g for m, g in zip(self.m, flat, strict=True)]
        norms = [m.norm() for m in self.m]
        alpha = max(norms)
        return sum(alpha * m / (norm + self.eps) for m, norm in zip(self.m, norms, strict=True))

    def scatter(self, out: Tensor) -> None:
        offset = 0
        for p in self.shared:
            part = out[offset : offset + p.numel()].view_as(p)
            p.grad = part.clone() if p.grad is None else p.grad + part
            offset += p.numel()


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
    method = Algorithm1(shared, 3, beta, sigma, eps)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    data = batches(steps * accumulate, dtype)
    for step in range(steps):
        optimizer.zero_grad()
        total: list[Tensor] | None = None
        for x, targets in data[step * accumulate : (step + 1) * accumulate]:
            flat, rest = method.gradients(net.losses(x, targets), heads)
            flat, rest = [g / accumulate for g in flat], [g / accumulate for g in rest]
            total = flat if total is None else [a + b for a, b in zip(total, flat, strict=True)]
            for p, g in zip(heads, rest, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        assert total is not None
        method.scatter(method.balance(total))
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]
