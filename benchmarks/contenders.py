"""What the dense op and the engine are measured against.

Of the dense op each is (grads, ema) -> balanced gradient, with ema updated in place; of the engine, see `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dbmtl_kernels as dbk
import torch
from torch import Tensor

BETA, EPS = 0.9, 1e-8
Contender = Callable[[Tensor, Tensor], Tensor]


def ours(grads: Tensor, ema: Tensor) -> Tensor:
    """dbmtl_kernels: one call, (4 K P + P) elements moved."""
    return dbk.balance_(grads, ema, beta=BETA, eps=EPS)[0]


def eager_lerp(grads: Tensor, ema: Tensor) -> Tensor:
    """lerp_, vector_norm, vector-matrix product: (5 K P + P)."""
    ema.lerp_(grads, 1.0 - BETA)
    norms = torch.linalg.vector_norm(ema, dim=1)
    return (norms.max() / (norms + EPS)) @ ema


def eager_addmul(grads: Tensor, ema: Tensor) -> Tensor:
    """The same with mul_ and add_, row by row norms, and mv on the transpose."""
    ema.mul_(BETA).add_(grads, alpha=1.0 - BETA)
    norms = torch.stack([torch.linalg.vector_norm(row) for row in ema])
    return torch.mv(ema.T, norms.max() / (norms + EPS))


def authors(grads: Tensor, ema: Tensor) -> Tensor:
    """The arithmetic of the authors' implementation, tensors already on the device."""
    new = grads + BETA * (ema - grads)
    norms = new.norm(dim=-1)
    alpha = norms.max() / (norms + EPS)
    out = sum(alpha[i] * new[i] for i in range(len(new)))
    ema.copy_(new)
    return out


def all_contenders() -> dict[str, Contender]:
    """By name; compiling happens at the first call."""
    torch.compiler.reset()
    return {
        "dbmtl_kernels": ours,
        "eager (lerp_)": eager_lerp,
        "eager (mul_, add_)": eager_addmul,
        "torch.compile (lerp_)": torch.compile(eager_lerp),
        "torch.compile (mul_, add_)": torch.compile(eager_addmul),
        "authors' arithmetic": authors,
    }


class Given(torch.autograd.Function):
    """A loss of 1 whose backward pass hands out copies of the gradients given."""

    @staticmethod
    def forward(ctx, grads, *parameters):
        ctx.grads = grads
        return torch.ones((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, grad):
        return (None, *(given.clone() for given in ctx.grads))


class Engine:
    """Parameters of given shapes, K lists of gradients, and ways from those to a balanced ``.grad``."""

    def __init__(self, K: int, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self.parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        self.sizes = [p.numel() for p in self.parameters]
        self.grads = [[torch.randn_like(p) * (1 + task) for p in self.parameters] for task in range(K)]

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def passes(self, each: Callable[..., Any] = lambda task: None, let_go: bool = True) -> None:
        """K backward passes; ``each`` follows every one."""
        for task, grads in enumerate(self.grads):
            if let_go or task == 0:
                self.clear()
            Given.apply(grads, *self.parameters).backward()
            each(task)

    def ours(self, backend: str) -> Callable[..., Any]:
        balancer = dbk.DBMTL(self.parameters, len(self.grads), beta=BETA, beta_sigma=0.0, backend=backend)

        def call() -> None:
            self.clear()
            balancer.backward([Given.apply(grads, *self.parameters) for grads in self.grads])

        return call

    def eager(self, change: Callable[..., Any] = lambda f: f, foreach: bool = False) -> Callable[..., Any]:
        """`torch.cat` and lerp_ (7 K P + P elements), or `torch._foreach_lerp_` on views of the state (5 K P + P)."""
        state = torch.zeros(len(self.grads), sum(self.sizes), device=self.parameters[0].device)
        views = [self.split(row) for row in state]
        cat = change(lambda row, grads: row.lerp_(torch.cat([grad.reshape(-1) for grad in grads]), 1.0 - BETA))

        def gather(task: int) -> None:
            grads = [p.grad for p in self.parameters]
            torch._foreach_lerp_(views[task], grads, 1.0 - BETA) if foreach else cat(state[task], grads)

        @change
        def combine() -> Tensor:
            norms = torch.linalg.vector_norm(state, dim=1)
            return (norms.max() / (norms + EPS)) @ state

        def call() -> None:
            self.passes(gather)
            for p, grad in zip(self.parameters, self.split(combine()), strict=True):
                p.grad = grad

        return call

    def split(self, flat: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(flat.split(self.sizes), self.parameters, strict=True)]

    def expected(self) -> Tensor:
        """The balanced gradient of the first step, flat."""
        rows = torch.stack([torch.cat([grad.reshape(-1) for grad in grads]) for grads in self.grads])
        return dbk.reference.balance(rows, torch.zeros_like(rows), BETA, EPS)[0]
