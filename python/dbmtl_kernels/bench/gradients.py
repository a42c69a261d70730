"""From the .grad of K tasks to the balanced .grad: K lists of tensors are given, and one list comes out.

A contender is a maker: given the lists it returns a call with a state of its own, which gives the balanced gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .dense import BETA, EPS, close, combine, eager_lerp, exact, poison
from .steps import cat_lerp, flat, gathered

Grads = list[Tensor]
Maker = Callable[["Lists"], Callable[[], Grads]]
UNIT = 32  # elements; a parameter begins at a multiple in a row of ours


class Lists(NamedTuple):
    """Gradients of each parameter, for each task."""

    grads: list[Grads]

    @classmethod
    def random(cls, num_tasks: int, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Lists:
        """Normal numbers, a thousand times as large for the last task as for the first."""
        scales = torch.logspace(0, 3, num_tasks, dtype=torch.float64, device="cpu").tolist()

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, dtype=torch.float32, device=device)

        return cls([[normal(shape).mul_(scale) for shape in shapes] for scale in scales])

    @property
    def sizes(self) -> list[int]:
        """Numbers in each parameter."""
        return [grad.numel() for grad in self.grads[0]]

    def zeros(self) -> Tensor:
        """A state."""
        first = self.grads[0][0]
        return torch.zeros(len(self.grads), sum(self.sizes), dtype=torch.float32, device=first.device)

    def shaped(self, out: Tensor) -> Grads:
        """Parts of the flat vector, in the shapes of the parameters."""
        return [part.view_as(grad) for part, grad in zip(out.split(self.sizes), self.grads[0], strict=True)]


def ours(lists: Lists) -> Callable[[], Grads]:
    """What the engine calls at the end of a step: `accumulate_` for each task, `balance_rows_`."""
    *starts, end = itertools.accumulate(lists.sizes, lambda at, size: at + -(-size // UNIT) * UNIT, initial=0)
    K, device = len(lists.grads), lists.grads[0][0].device
    rows = torch.zeros(K, end, dtype=torch.float32, device=device)
    wide = [torch.zeros(K, dtype=torch.float64, device=device) for _ in range(3)]
    counts = [torch.zeros(K, dtype=kind, device=device) for kind in (torch.bool, torch.int64)]
    segments = torch.tensor([*zip(starts, lists.sizes, strict=True)], dtype=torch.int64, device="cpu")
    out = torch.zeros(end, dtype=torch.float32, device=device)
    rest = (ops.Stats(*wide, *counts), [out], [0], None, None, 1.0, EPS, "max", 0.0, True, False)
    balance = ops.BalanceRows(rows, *rest)
    spans = [*zip(starts, lists.sizes, lists.grads[0], strict=True)]

    def call() -> Grads:
        for task, grads in enumerate(lists.grads):
            ops.accumulate_(rows[task], wide[0][task : task + 1], [*grads], segments, (BETA, 1.0 - BETA))
        ops.balance_rows_(balance)
        return [out[start : start + size].view_as(grad) for start, size, grad in spans]

    return call


def eager(kind: str, change: Callable[[Any], Any] = lambda call: call) -> Maker:
    """Into rows by "cat" and lerp_, or by "foreach" lerp_; or by "stack" into a matrix, and then `eager_lerp`."""
    cat, end, matrix = change(cat_lerp), change(combine), change(eager_lerp)

    def make(lists: Lists) -> Callable[[], Grads]:
        state = lists.zeros()
        views = [lists.shaped(row) for row in state]

        def call() -> Grads:
            if kind == "stack":
                return lists.shaped(matrix(torch.stack([flat(grads) for grads in lists.grads]), state))
            for task, grads in enumerate(lists.grads):
                if kind == "foreach":
                    torch._foreach_lerp_(views[task], grads, 1.0 - BETA)
                else:
                    cat(state[task], grads)
            return lists.shaped(end(state))

        return call

    return make


def authors(lists: Lists, shipped: bool) -> Callable[[], Grads]:
    """The authors' arithmetic, and how they gather: see `steps.gathered`."""
    state = lists.zeros()

    def call() -> Grads:
        nonlocal state
        grads = torch.stack([gathered(task, shipped) for task in lists.grads])
        state = grads + BETA * (state - grads)
        norms = state.norm(dim=-1)
        alpha = norms.max() / (norms + EPS)
        out = sum((alpha[i] * state[i] for i in range(len(state))), torch.zeros_like(state[0]))
        return [part.clone() for part in lists.shaped(out)]

    return call


def equal_weighting(lists: Lists) -> Callable[[], Grads]:
    """The sum over the tasks."""
    return lambda: [sum(grads[1:], grads[0]) for grads in zip(*lists.grads, strict=True)]


def expected(lists: Lists, plain: bool = False) -> list[Tensor]:
    """What float64 makes of the gradients in a first and a second step; ``plain``: their sum, twice."""
    grads = torch.stack([flat(task) for task in lists.grads])
    if plain:
        return [grads.sum(0, dtype=torch.float64)] * 2
    first, state = exact(grads, torch.zeros_like(grads))
    return [first, exact(grads, state)[0]]


def check(lists: Lists, make: Maker, wanted: Sequence[Tensor]) -> None:
    """Raise unless two steps give what is `expected`."""
    poison(wanted[0], torch.float32)
    call = make(lists)
    for balanced in wanted:
        close(flat(call()), balanced, 1e-4, "the balanced gradient")
