"""A whole training step (forward, backward passes, optimizer): what it may do with K losses, and whether that is right.

A contender is a maker: given a `Problem` it returns ``backward(losses)`` with a state of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dbmtl_kernels as dbk

from .dense import BETA, EPS, close, combine, exact, poison

Backward = Callable[[Sequence[Tensor]], object]
Maker = Callable[["Problem"], Backward]
WIDTHS = (1000, 2000, 2000, 1000)  # an MLP of 8 M parameters
CLASSES = 10


class Problem:
    """A model, one batch and an optimizer. Contenders that leave no hooks behind may share one.

    Attributes:
        losses: a forward pass; gives the K losses.
        shared: the shared parameters.
        own: the other parameters that the losses reach.
        optimizer: ends a step, if there is one.
        num_tasks: K.
    """

    def __init__(
        self,
        losses: Callable[[], Sequence[Tensor]],
        shared: Sequence[Tensor],
        own: Sequence[Tensor],
        num_tasks: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.losses, self.num_tasks, self.optimizer = losses, num_tasks, optimizer
        self.shared, self.own = list(shared), list(own)

    @property
    def num_params(self) -> int:
        """P: numbers in the shared parameters."""
        return sum(p.numel() for p in self.shared)

    def zero_grad(self) -> None:
        """Let all gradients go."""
        for p in (*self.shared, *self.own):
            p.grad = None

    def step(self, backward: Backward) -> float:
        """Forward, ``backward``, optimizer; seconds of the second."""
        self.zero_grad()
        losses = self.losses()
        began = time.perf_counter()
        backward(losses)
        elapsed = time.perf_counter() - began
        if self.optimizer is not None:
            self.optimizer.step()
        return elapsed


def mlp(
    num_tasks: int = 3, widths: Sequence[int] = WIDTHS, batch: int = 32, device: torch.device | str = "cpu"
) -> Problem:
    """An MLP trunk, a head of ten classes for each task, and AdamW."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    trunk = nn.Sequential(*layers).to(device)
    heads = nn.ModuleList(nn.Linear(widths[-1], CLASSES) for _ in range(num_tasks)).to(device)
    x = torch.randn(batch, widths[0], device=device)
    y = torch.randint(0, CLASSES, (num_tasks, batch), device=device)

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [functional.cross_entropy(head(z), target) for head, target in zip(heads, y, strict=True)]

    shared, own = list(trunk.parameters()), list(heads.parameters())
    return Problem(losses, shared, own, num_tasks, torch.optim.AdamW([*shared, *own], lr=1e-5, fused=True))


# --- what a step may do with the losses ------------------------------------------------------------------------------


def bare(problem: Problem) -> Backward:
    """K backward passes; .grad adds up, as autograd does when nothing is done to the gradients."""

    def backward(losses: Sequence[Tensor]) -> None:
        for loss in losses:
            loss.backward(retain_graph=loss is not losses[-1])

    return backward


def bare_let_go(problem: Problem) -> Backward:
    """K backward passes, each .grad thrown away before the next."""

    def backward(losses: Sequence[Tensor]) -> None:
        for loss in losses:
            problem.zero_grad()
            loss.backward(retain_graph=loss is not losses[-1])

    return backward


def equal_weighting(problem: Problem) -> Backward:
    """One backward pass of the sum."""
    return lambda losses: sum(losses, torch.zeros_like(losses[0])).backward()


def ours(problem: Problem, **options: Any) -> Backward:
    """`dbmtl_kernels.DBMTL`, with the constant beta that the others have too."""
    return dbk.DBMTL(problem.shared, problem.num_tasks, **{"beta": BETA, "beta_sigma": 0.0, **options}).backward


def one_pass(problem: Problem) -> Backward:
    """`dbmtl_kernels.OnePassDBMTL`."""
    return dbk.OnePassDBMTL(problem.shared, problem.num_tasks).backward


def taken(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, taken out of the parameters; zeros where there is none."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def put(parameters: Sequence[Tensor], flat: Tensor) -> None:
    """A part of the flat vector to each parameter's .grad."""
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def authors(problem: Problem, shipped: bool = False) -> Backward:
    """The authors' arithmetic. Gradients are gathered parameter by parameter into a vector: as shipped, on the CPU."""
    shared, K = problem.shared, problem.num_tasks
    states: list[Tensor] = []

    def backward(losses: Sequence[Tensor]) -> None:
        rows = []
        for loss in losses:
            grads = torch.autograd.grad(
                torch.log(loss + EPS), shared, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(gathered(grads, shipped))
        if problem.own:
            total = torch.log(torch.stack(list(losses)) + EPS).sum()
            total.backward(inputs=problem.own)
        grads_matrix = torch.stack(rows)
        state = states.pop() if states else torch.zeros_like(grads_matrix)
        new = grads_matrix + BETA * (state - grads_matrix)
        states.append(new)
        norms = new.norm(dim=-1)
        alpha = norms.max() / (norms + EPS)
        put(shared, sum((alpha[i] * new[i] for i in range(K)), torch.zeros_like(new[0])))

    return backward


def gathered(grads: Sequence[Tensor], shipped: bool) -> Tensor:
    """One vector on the device of the gradients; filled on the CPU, and then moved, if that is asked for."""
    where = "cpu" if shipped else grads[0].device
    flat = torch.zeros(sum(grad.numel() for grad in grads), dtype=grads[0].dtype, device=where)
    offset = 0
    for grad in grads:
        flat[offset : offset + grad.numel()] = grad.reshape(-1)
        offset += grad.numel()
    return flat.to(grads[0].device)


def cat_lerp(row: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """One copy of the gradients, then lerp_."""
    return row.lerp_(torch.cat([grad.reshape(-1) for grad in grads]).to(row.dtype), 1.0 - BETA)


def eager(kind: str, change: Callable[[Any], Any] = lambda call: call) -> Maker:
    """K backward passes gathered by "cat" and lerp_ (7 K P + P elements), or by "foreach" lerp_ (5 K P + P)."""
    cat, end = change(cat_lerp), change(combine)

    def make(problem: Problem) -> Backward:
        shared = problem.shared
        sizes = [p.numel() for p in shared]
        state = torch.zeros(problem.num_tasks, sum(sizes), device=shared[0].device)
        views = [[part.view_as(p) for p, part in zip(shared, row.split(sizes), strict=True)] for row in state.unbind()]

        def backward(losses: Sequence[Tensor]) -> None:
            for task, loss in enumerate(losses):
                torch.log(loss + EPS).backward(retain_graph=task < len(losses) - 1)
                if kind == "foreach":
                    torch._foreach_lerp_(views[task], taken(shared), 1.0 - BETA)
                else:
                    cat(state[task], taken(shared))
            put(shared, end(state))

        return backward

    return make


KINDS = ("cat", "foreach")


def rivals(compiled: bool, **options: Any) -> dict[str, Maker]:
    """What our step is measured against, by name; compiling, with ``options``, happens at the first call."""
    found = {f"eager ({kind})": eager(kind) for kind in KINDS}
    compiler = partial(torch.compile, **options)
    return found | {f"torch.compile ({kind})": eager(kind, compiler) for kind in KINDS if compiled}


def check(problem: Problem, make: Maker) -> None:
    """Raise unless a first step leaves in the shared .grad what float64 makes of the tasks' gradients."""
    logs = [torch.log(loss + EPS) for loss in problem.losses()]
    grads = torch.stack([flat(torch.autograd.grad(log, problem.shared, retain_graph=True)) for log in logs])
    expected, _ = exact(grads, torch.zeros_like(grads))
    problem.zero_grad()
    poison(expected, torch.float32)
    make(problem)(problem.losses())
    close(flat(taken(problem.shared)), expected, 1e-4, "the balanced .grad")


def flat(grads: Sequence[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([grad.reshape(-1) for grad in grads])
