"""A whole training step: an MLP trunk of 8 M parameters, K=3, batch 32, against the bare K backward passes."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import dbmtl_kernels as dbk
import timing
import torch
from contenders import BETA, EPS, Call, close, exact, poison
from torch import nn
from torch.nn import functional

K, BATCH = 3, 32
WIDTHS = (1000, 2000, 2000, 1000)


class Problem:
    """The model, one batch, its optimizer, and a balancer for each state's dtype or backend; contenders share them."""

    def __init__(
        self,
        kinds: Sequence[torch.dtype | str],
        widths: Sequence[int] = WIDTHS,
        batch: int = BATCH,
        device: str = "cpu",
    ) -> None:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.trunk = nn.Sequential(*layers).to(device)
        self.heads = nn.ModuleList(nn.Linear(widths[-1], 10) for _ in range(K)).to(device)
        self.parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self.x = torch.randn(batch, widths[0], device=device)
        self.y = torch.randint(0, 10, (K, batch), device=device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.balancers = {}
        for kind in kinds:
            options = {"backend": kind} if isinstance(kind, str) else {"state_dtype": kind}
            self.balancers[kind] = dbk.DBMTL(self.trunk.parameters(), K, **options)
        self.at_first = copy.deepcopy({kind: balancer.state_dict() for kind, balancer in self.balancers.items()})
        self.states: dict[Call, torch.Tensor] = {}  # of those who keep none of their own

    def begin(self) -> None:
        """Forget all steps."""
        self.optimizer.zero_grad()
        self.states.clear()
        for kind, state in self.at_first.items():
            self.balancers[kind].load_state_dict(state)

    def losses(self) -> list[torch.Tensor]:
        z = self.trunk(self.x)
        return [functional.cross_entropy(head(z), y) for head, y in zip(self.heads, self.y, strict=True)]

    def step(self, backward: Callable[..., None]) -> float:
        """Forward, ``backward``, optimizer; seconds of the second."""
        self.optimizer.zero_grad()
        losses = self.losses()
        began = time.perf_counter()
        backward(self, losses)
        elapsed = time.perf_counter() - began
        self.optimizer.step()
        return elapsed


def bare(problem, losses):
    """K backward passes; .grad accumulates, as autograd does when nothing is done to the gradients."""
    for t, loss in enumerate(losses):
        loss.backward(retain_graph=t < K - 1)


def bare_let_go(problem, losses):
    """K backward passes, each .grad thrown away before the next."""
    for t, loss in enumerate(losses):
        loss.backward(retain_graph=t < K - 1)
        if t < K - 1:
            problem.optimizer.zero_grad()


def equal_weighting(problem, losses):
    sum(losses).backward()


def ours(kind, problem, losses):
    problem.balancers[kind](losses).backward()


def authors(problem, losses):
    """The authors' arithmetic, gradients gathered parameter by parameter into a vector (on the device)."""
    shared = list(problem.trunk.parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(torch.log(loss + 1e-8), shared, retain_graph=True)
        flat = torch.zeros(sum(p.numel() for p in shared))
        offset = 0
        for g in grads:
            flat[offset : offset + g.numel()] = g.reshape(-1)
            offset += g.numel()
        rows.append(flat)
    sum(torch.log(loss + 1e-8) for loss in losses).backward(inputs=list(problem.heads.parameters()))
    grads = torch.stack(rows)
    state = problem.states.get(authors, torch.zeros_like(grads))
    problem.states[authors] = new = grads + 0.9 * (state - grads)
    norms = new.norm(dim=-1)
    alpha = norms.max() / (norms + 1e-8)
    out = sum(alpha[i] * new[i] for i in range(K))
    offset = 0
    for p in shared:
        p.grad = out[offset : offset + p.numel()].view_as(p).clone()
        offset += p.numel()


def eager(kind: str, change: Call = lambda call: call) -> Call:
    """K backward passes gathered by "cat" and lerp_ (7 K P + P elements), or by "foreach" lerp_ (5 K P + P)."""
    cat = change(lambda row, grads: row.lerp_(torch.cat([grad.reshape(-1) for grad in grads]), 1.0 - BETA))

    @change
    def combine(state):
        norms = torch.linalg.vector_norm(state, dim=1)
        return (norms.max() / (norms + EPS)) @ state

    def backward(problem, losses):
        shared = list(problem.trunk.parameters())
        sizes = [p.numel() for p in shared]
        if backward not in problem.states:
            problem.states[backward] = torch.zeros(K, sum(sizes), device=shared[0].device)
        state = problem.states[backward]
        for t, loss in enumerate(losses):
            torch.log(loss).backward(retain_graph=t < K - 1)
            grads = [p.grad for p in shared]
            views = [part.view_as(p) for part, p in zip(state[t].split(sizes), shared, strict=True)]
            torch._foreach_lerp_(views, grads, 1.0 - BETA) if kind == "foreach" else cat(state[t], grads)
            for p in shared:
                p.grad = None
        for p, grad in zip(shared, combine(state).split(sizes), strict=True):
            p.grad = grad.view_as(p)

    return backward


def rivals(compiled: bool, **options) -> dict[str, Call]:
    """What our step is measured against, by name; compiling, with ``options``, happens at the first call."""
    found = {f"eager ({kind})": eager(kind) for kind in ("cat", "foreach")}
    compiler = partial(torch.compile, **options)
    return found | {f"torch.compile ({k})": eager(k, compiler) for k in ("cat", "foreach") if compiled}


def check(problem: Problem, backward: Call) -> None:
    """Raise unless a first step of ``backward`` leaves in ``.grad`` what float64 makes of the tasks' gradients."""
    shared = list(problem.trunk.parameters())
    flat = lambda grads: torch.cat([grad.reshape(-1) for grad in grads])  # noqa: E731
    logs = [torch.log(loss) for loss in problem.losses()]
    grads = torch.stack([flat(torch.autograd.grad(log, shared, retain_graph=True)) for log in logs])
    expected, _ = exact(grads, torch.zeros_like(grads))
    problem.begin()
    poison(expected, torch.float32)
    backward(problem, problem.losses())
    close(flat([p.grad for p in shared]), expected, 1e-4, "the balanced .grad")


LIGHT = {
    "bare K backward passes": bare,
    "bare, each .grad let go": bare_let_go,
    "equal weighting": equal_weighting,
    "dbmtl_kernels": partial(ours, torch.float32),
    "dbmtl_kernels, bf16 state": partial(ours, torch.bfloat16),
}
# A run of its own: the memory it allocates and frees slows down whoever comes after.
HEAVY = {
    "bare K backward passes": bare,
    "dbmtl_kernels": partial(ours, torch.float32),
    "eager (cat)": eager("cat"),
    "eager (foreach)": eager("foreach"),
    "authors' arithmetic": authors,
}


def measure(contenders, rounds, warmup=3):
    """Whole steps (forward, backward passes, optimizer) in turn; rows of figures, by contender."""
    problem = Problem((torch.float32, torch.bfloat16))
    assert sum(p.numel() for p in problem.trunk.parameters()) >= 8_000_000
    backward: dict[str, list[float]] = {name: [] for name in contenders}

    def step(name):
        backward[name].append(problem.step(contenders[name]))

    whole = timing.interleaved({n: partial(step, n) for n in contenders}, rounds, warmup)
    backward = {name: times[warmup:] for name, times in backward.items()}
    rows = {}
    for name in contenders:
        row = {"contender": name}
        for what, times in (("step", whole), ("backward", backward)):
            row |= {f"{what}_{k}": v for k, v in timing.summary(times[name]).items()}
            row[f"{what}_ratio"] = timing.ratio(times, name, "bare K backward passes")
        rows[name] = row
        print(
            f"{name:28s} step {row['step_p50_ms']:7.1f} ms {row['step_ratio']:5.2f}   "
            f"backward {row['backward_p50_ms']:7.1f} ms {row['backward_ratio']:5.2f}"
        )
    return rows


def test_whole_step(save, rounds):
    rows = measure(LIGHT, rounds=3 * rounds)
    timing.record("step", list(rows.values()), save)
    assert rows["dbmtl_kernels"]["step_ratio"] <= 1.15


def test_whole_step_of_the_authors(save, rounds):
    rows = measure(HEAVY, rounds)
    timing.record("step_authors", list(rows.values()), save)
    assert rows["authors' arithmetic"]["step_ratio"] >= 2.0 * rows["dbmtl_kernels"]["step_ratio"]
