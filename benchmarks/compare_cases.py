"""What `compare` times in a process of either tree: ``python benchmarks/compare_cases.py CASE``.

It calls nothing but the public interface, which either tree must know.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

Call = Callable[[], object]


def op(num_tasks: int, num_params: int) -> dict[str, Call]:
    """``balance_``."""
    import dbmtl_kernels as dbk
    import torch

    grads, ema = torch.randn(2, num_tasks, num_params)
    return {f"balance_ K={num_tasks} P={num_params}": lambda: dbk.balance_(grads, ema)}


def step(widths: Sequence[int], batch: int = 32, num_tasks: int = 3) -> dict[str, Call]:
    """A step of an MLP, with nothing but the public interface: either tree must know what is called here."""
    import dbmtl_kernels as dbk
    import torch
    from torch import nn

    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    trunk = nn.Sequential(*layers)
    heads = nn.ModuleList(nn.Linear(widths[-1], 10) for _ in range(num_tasks))
    optimizer = torch.optim.AdamW([*trunk.parameters(), *heads.parameters()], lr=1e-5, fused=True)
    balancer = dbk.DBMTL(trunk.parameters(), num_tasks)
    x, y = torch.randn(batch, widths[0]), torch.randint(0, 10, (num_tasks, batch))

    def call() -> None:
        optimizer.zero_grad()
        z = trunk(x)
        balancer([nn.functional.cross_entropy(head(z), t) for head, t in zip(heads, y, strict=True)]).backward()
        optimizer.step()

    return {f"step of {sum(p.numel() for p in trunk.parameters()):,} parameters": call}


CASES: dict[str, tuple[Callable[[], dict[str, Call]], int]] = {  # and calls in a round
    "op": (lambda: {**op(3, 20_000_000), **op(11, 10_000_000)}, 1),
    "small": (lambda: {**op(3, 1000), **step((256, 512, 512, 256))}, 50),
    "step": (lambda: step((1000, 2000, 2000, 1000)), 1),
    "tiny": (lambda: {**op(2, 10), **step((4, 4))}, 1),  # for tests
}


def work(case: str) -> None:
    """Where the package is from; then seconds of every call of a case, a line of JSON for each line read."""
    import dbmtl_kernels

    print(dbmtl_kernels.__file__, flush=True)
    make, repeat = CASES[case]
    calls = make()
    for _ in sys.stdin:
        seconds = {}
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeat):
                call()
            seconds[name] = (time.perf_counter() - began) / repeat
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
