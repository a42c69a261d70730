"""A whole training step (forward, backward passes, optimizer): what it may do with K losses, and whether that is right.

A contender is a maker: given a `Problem` it returns ``backward(losses)`` with a state of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dbmtl_kernels as dbk

from .dense import BETA, EPS, close, combine, eager_lerp, error_of, exact, poison

Backward = Callable[[Sequence[Tensor]], object]
Maker = Callable[["Problem"], Backward]
TOLERANCE, COARSEST = 1e-4, 0.05  # allowed errors of gradients, over the largest element


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
    state: Tensor | None = None

    def backward(losses: Sequence[Tensor]) -> None:
        nonlocal state
        grads = torch.stack([gathered(found, shipped) for found in task_grads(problem, losses)])
        heads_backward(problem, losses)
        state = grads + BETA * ((torch.zeros_like(grads) if state is None else state) - grads)
        norms = state.norm(dim=-1)
        alpha = norms.max() / (norms + EPS)
        put(shared, sum((alpha[i] * state[i] for i in range(K)), torch.zeros_like(state[0])))

    return backward


def task_grads(problem: Problem, losses: Sequence[Tensor], log: bool = True) -> Iterator[Sequence[Tensor]]:
    """Of each task in turn the gradients of the shared parameters; the graph is kept."""
    for loss in losses:
        loss = torch.log(loss + EPS) if log else loss
        yield torch.autograd.grad(loss, problem.shared, retain_graph=True, allow_unused=True, materialize_grads=True)


def heads_backward(problem: Problem, losses: Sequence[Tensor]) -> None:
    """The plain gradients of the heads, of the sum of the logs."""
    if problem.own:
        sum_of_logs(losses).backward(inputs=problem.own)


def sum_of_logs(losses: Sequence[Tensor]) -> Tensor:
    """A scalar."""
    return torch.log(torch.stack(list(losses)) + EPS).sum()


def gathered(grads: Sequence[Tensor], shipped: bool) -> Tensor:
    """One vector on the device of the gradients; filled on the CPU, and then moved, if that is asked for."""
    where = torch.device("cpu") if shipped else grads[0].device
    vector = torch.zeros(sum(grad.numel() for grad in grads), dtype=grads[0].dtype, device=where)
    offset = 0
    for grad in grads:
        vector[offset : offset + grad.numel()] = grad.reshape(-1)
        offset += grad.numel()
    return vector.to(grads[0].device)


def cat_lerp(row: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """One copy of the gradients, then lerp_."""
    return row.lerp_(flat(grads).to(row.dtype), 1.0 - BETA)


def eager(kind: str, change: Callable[[Any], Any] = lambda call: call) -> Maker:
    """K backward passes gathered by "cat" and lerp_ (7 K P + P elements), or by "foreach" lerp_ (5 K P + P).

    By "stack" into a matrix first, on which `dense.eager_lerp` works (7 K P + P, and K P more are held).
    """
    cat, end, matrix = change(cat_lerp), change(combine), change(eager_lerp)

    def make(problem: Problem) -> Backward:
        shared = problem.shared
        sizes = [p.numel() for p in shared]
        state = torch.zeros(problem.num_tasks, sum(sizes), dtype=shared[0].dtype, device=shared[0].device)
        views = [[part.view_as(p) for p, part in zip(shared, row.split(sizes), strict=True)] for row in state.unbind()]

        def backward(losses: Sequence[Tensor]) -> None:
            rows = []
            for task, loss in enumerate(losses):
                torch.log(loss + EPS).backward(retain_graph=task < len(losses) - 1)
                if kind == "stack":
                    rows.append(flat(taken(shared)))
                elif kind == "foreach":
                    torch._foreach_lerp_(views[task], taken(shared), 1.0 - BETA)
                else:
                    cat(state[task], taken(shared))
            put(shared, matrix(torch.stack(rows), state) if kind == "stack" else end(state))

        return backward

    return make


KINDS = ("cat", "foreach", "stack")


def rivals(compiled: bool, **options: Any) -> dict[str, Maker]:
    """What our step is measured against, by name; compiling, with ``options``, happens at the first call."""
    found = {f"eager ({kind})": eager(kind) for kind in KINDS}
    compiler = partial(torch.compile, **options)
    return found | {f"torch.compile ({kind})": eager(kind, compiler) for kind in KINDS if compiled}


def torchjd(problem: Problem) -> Backward:
    """DB-MTL as an Aggregator of TorchJD, which gathers the K x P matrix itself."""
    from torchjd.aggregation import Aggregator
    from torchjd.autojac import backward as jac_backward
    from torchjd.autojac import jac_to_grad

    class DualBalancing(Aggregator):
        def __init__(self) -> None:
            super().__init__()
            self.state: Tensor | None = None

        def forward(self, matrix: Tensor) -> Tensor:
            if self.state is None:
                self.state = torch.zeros_like(matrix)
            return eager_lerp(matrix, self.state)

    aggregator = DualBalancing()

    def backward(losses: Sequence[Tensor]) -> None:
        jac_backward([torch.log(loss + EPS) for loss in losses], inputs=problem.shared, retain_graph=True)
        heads_backward(problem, losses)
        jac_to_grad(problem.shared, aggregator)

    return backward


def flat(grads: Sequence[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([grad.reshape(-1) for grad in grads])


# --- whether it is right ---------------------------------------------------------------------------------------------


def check(problem: Problem, make: Maker, expects: str = "balanced") -> None:
    """Raise unless two steps leave the right .grad, of the shared parameters and of the heads.

    Allowed is 1e-4 of the largest element, or four times what backward of the sum is from the sum of K backwards: with
    autocast or TF32 these are some 1e-3 apart.

    Args:
        problem: its weights stay as they are.
        make: the contender.
        expects: "balanced": what float64 makes of the tasks' gradients with beta = 0.9; "balanced, beta=0"; "sum" of
            the plain gradients; "last": that of the last task.
    """
    losses, plain = problem.losses(), expects in ("sum", "last")
    grads = torch.stack([flat(found).clone() for found in task_grads(problem, losses, log=not plain)])
    total = torch.stack(list(losses)).sum() if plain else sum_of_logs(losses)
    every = [*problem.shared, *problem.own]
    found = torch.autograd.grad(total, every, retain_graph=True, allow_unused=True, materialize_grads=True)
    shared, heads = found[: len(problem.shared)], found[len(problem.shared) :]
    allowed = max(TOLERANCE, 4 * error_of(flat(shared), grads.sum(0, dtype=torch.float64)))
    if allowed > COARSEST:
        raise ValueError(f"not to be verified: autograd's gradient of the sum is off by {allowed / 4:.1e} itself")
    if expects == "last" and problem.own:
        heads = torch.autograd.grad(losses[-1], problem.own, allow_unused=True, materialize_grads=True)
    del losses, total, found, shared
    if plain:
        wanted = [grads[-1].double() if expects == "last" else grads.sum(0, dtype=torch.float64)] * 2
    else:
        beta = 0.0 if expects.endswith("beta=0") else BETA
        first, state = exact(grads, torch.zeros_like(grads), beta)
        wanted = [first, exact(grads, state, beta)[0]]
        del state
    del grads
    problem.zero_grad()
    poison(wanted[0], torch.float32)
    backward = make(problem)
    for expected in wanted:
        problem.zero_grad()
        backward(problem.losses())
        close(flat(taken(problem.shared)), expected, allowed, "the balanced .grad" if not plain else "the .grad")
        if problem.own:
            close(flat(taken(problem.own)), flat(heads).double(), allowed, "the .grad of the heads")
