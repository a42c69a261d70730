"""The engine: lists of .grad to the balanced .grad, whole training steps, and the memory that is held."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import clock
import contenders
import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.buffer import TaskGradientBuffer
from dbmtl_kernels.layout import ParameterLayout
from dense import BACKEND, CUDA, close, compare_backends, has_cuda
from report import OURS, Report, Row
from torch import Tensor, nn

BETA, EPS = contenders.BETA, contenders.EPS


def vit_shapes(width: int = 768, depth: int = 12, patch: int = 16) -> list[tuple[int, ...]]:
    """Of the parameters of ViT-B/16: 152 tensors, 86.6 M elements."""
    block = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    stem: list[tuple[int, ...]] = [(1, 1, width), (1, 197, width), (width, 3, patch, patch), (width,)]
    return [*stem, *block * depth, (width,), (width,), (1000, width), (1000,)]


class Gathering:
    """K lists of gradients, a random state to begin with, and ways to balance them.

    Each way is a function without arguments that updates its own state and returns a ``.grad`` for each parameter.
    """

    def __init__(self, K: int, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self.parameters = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
        self.numel = sum(p.numel() for p in self.parameters)
        self.sizes = [p.numel() for p in self.parameters]
        self.grads = [[torch.randn_like(p) * (1 + task) for p in self.parameters] for task in range(K)]
        self.start = torch.randn(K, self.numel, device=device)
        self.K = K

    def ours(self, backend: str = BACKEND) -> Callable[[], list[Tensor]]:
        """`TaskGradientBuffer`: each list gathered into its row, then all rows combined."""
        layout = ParameterLayout(self.parameters)
        buffer = TaskGradientBuffer(layout, self.K, backend)
        for task, row in enumerate(self.start):
            buffer.accumulate(task, list(row.split(self.sizes)), 0.0, 1.0)
        flats = buffer.new_flats()
        views = layout.views(flats)

        def step() -> list[Tensor]:
            for task, grads in enumerate(self.grads):
                buffer.accumulate(task, grads, BETA, 1.0 - BETA)
            buffer.balance(flats, EPS, "max")
            return views

        return step

    def eager(self, change: Callable[..., Callable[..., object]] = lambda f: f) -> Callable[[], list[Tensor]]:
        """Flattened by cat, then lerp_, vector_norm, matmul: (7 K P + P); ``change`` may compile the parts."""
        state = self.start.clone()

        def update(row: Tensor, grads: list[Tensor]) -> Tensor:
            row.lerp_(torch.cat([grad.reshape(-1) for grad in grads]), 1.0 - BETA)
            return torch.linalg.vector_norm(row)

        def combine(norms: list[Tensor], state: Tensor) -> Tensor:
            stacked = torch.stack(norms)
            return (stacked.max() / (stacked + EPS)) @ state

        update_, combine_ = change(update), change(combine)

        def step() -> list[Tensor]:
            norms = [update_(row, grads) for row, grads in zip(state.unbind(), self.grads, strict=True)]
            return self.split(combine_(norms, state))

        return step

    def foreach(self) -> Callable[[], list[Tensor]]:
        """Without flattening, on views of the state: (5 K P + P)."""
        state = self.start.clone()
        views = [self.split(row) for row in state]

        def step() -> list[Tensor]:
            for row, grads in zip(views, self.grads, strict=True):
                torch._foreach_lerp_(row, grads, 1.0 - BETA)
            norms = torch.linalg.vector_norm(state, dim=1)
            return self.split((norms.max() / (norms + EPS)) @ state)

        return step

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as one tensor for each parameter."""
        return [part.view(p.shape) for part, p in zip(flat.split(self.sizes), self.parameters, strict=True)]

    def check(self, step: Callable[[], list[Tensor]]) -> None:
        """Raise WrongResultError unless the first step agrees with the reference."""
        flat = torch.stack([torch.cat([grad.reshape(-1) for grad in grads]) for grads in self.grads])
        expected, _, _ = dbk.reference.balance(flat, self.start, BETA, EPS)
        actual = torch.cat([grad.reshape(-1) for grad in step()])
        close(actual, expected, 2e-5, "the balanced .grad")

    def timed(self, step: Callable[[], list[Tensor]]) -> clock.Call:
        """``step``, and what it returns handed to the parameters."""

        def call(_: int) -> None:
            for p, grad in zip(self.parameters, step(), strict=True):
                p.grad = grad

        return call


def gathering(
    report: Report, timer: clock.Clock, tiny: bool, compiled: Callable[..., Callable[..., object]] | None
) -> None:
    """From K lists of ``.grad`` to the balanced ``.grad``; against eager code, or that by torch.compile."""
    problem = Gathering(4, vit_shapes(4, 1, 2) if tiny else vit_shapes(), timer.device)
    case = f"engine K=4 P={problem.numel}" + (", compiled" if compiled else "")
    if compiled:
        named = {OURS: problem.ours(), "torch.compile (cat, lerp_)": problem.eager(compiled)}
        targets: dict[str, float | None] = {"torch.compile": 1.3}
    else:
        named = {OURS: problem.ours(), "eager (cat, lerp_)": problem.eager(), "foreach (lerp_)": problem.foreach()}
        targets = {"eager": 1.6, "foreach": None}
        if has_cuda(timer.device):
            named[CUDA] = problem.ours(CUDA)
    right = report.agree(case, named, problem.check)
    calls = {name: problem.timed(step) for name, step in right.items()}
    base = Row("engine", case, "", problem.K, problem.numel, "float32", "float32")
    moved = {"": 4.0 * problem.numel * (4 * problem.K + 1)}
    for kind, times in (("device", timer.on_device(calls)), ("call", timer.of_calls(calls, 1 if tiny else 10))):
        base.clock = kind
        report.add_times(base, times, moved, targets)
        compare_backends(report, base, times)


class Training:
    """An MLP trunk, three heads, one batch and an optimizer."""

    K = 3

    def __init__(self, widths: tuple[int, ...], batch: int, device: torch.device) -> None:
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.trunk = nn.Sequential(*layers).to(device)
        self.heads = nn.ModuleList(nn.Linear(widths[-1], 10) for _ in range(self.K)).to(device)
        self.numel = sum(p.numel() for p in self.trunk.parameters())
        self.x = torch.randn(batch, widths[0], device=device)
        self.y = torch.randint(0, 10, (self.K, batch), device=device)
        parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [nn.functional.cross_entropy(head(z), y) for head, y in zip(self.heads, self.y, strict=True)]

    def check(self, tolerance: float, backend: str) -> None:
        """Raise WrongResultError unless a first engine step agrees with the reference."""
        shared = list(self.trunk.parameters())
        losses = self.losses()
        rows = [torch.autograd.grad(torch.log(loss + EPS), shared, retain_graph=True) for loss in losses]
        grads = torch.stack([torch.cat([grad.reshape(-1) for grad in row]) for row in rows])
        expected, _, _ = dbk.reference.balance(grads, torch.zeros_like(grads), BETA, EPS)
        self.optimizer.zero_grad()
        dbk.DBMTL(shared, self.K, beta_sigma=0.0, backend=backend).backward(losses)
        close(torch.cat([p.grad.reshape(-1) for p in shared]), expected, tolerance, "the balanced .grad")
        self.optimizer.zero_grad()


def whole_step(report: Report, timer: clock.Clock, tiny: bool, tf32: bool) -> None:
    """Forward, K backward passes, optimizer: the engine against nothing done to the gradients."""
    widths, batch = ((16, 32, 16), 8) if tiny else ((1024, 4096, 4096, 1024), 4096)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        problem = Training(widths, batch, timer.device)
        backends = {OURS: BACKEND, **({CUDA: CUDA} if has_cuda(timer.device) else {})}
        balancers = {}
        for name, backend in backends.items():
            problem.check(1e-2 if tf32 else 1e-4, backend)
            balancers[name] = dbk.DBMTL(problem.trunk.parameters(), problem.K, backend=backend)

        def bare(losses: list[Tensor]) -> None:
            for task, loss in enumerate(losses):
                loss.backward(retain_graph=task < problem.K - 1)

        def step(backward: Callable[[list[Tensor]], None]) -> clock.Call:
            def call(_: int) -> None:
                problem.optimizer.zero_grad()
                backward(problem.losses())
                problem.optimizer.step()

            return call

        calls = {name: step(balancer.backward) for name, balancer in balancers.items()}
        calls["bare K backward passes"] = step(bare)
        times = timer.of_calls(calls, 1 if tiny else 3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    case = f"step P={problem.numel}" + (" tf32" if tf32 else "")
    base = Row("step", case, "", problem.K, problem.numel, "float32", "float32", "call")
    report.add_times(base, times, {"": 4.0 * problem.numel * (4 * problem.K + 1)}, {}, ("bare K backward passes",))
    bare_row = report.row_of(base, "bare K backward passes")
    # A real trunk multiplies matrices at full precision or at half; what TF32 leaves to hide behind is only reported.
    for name in backends:
        ours = report.row_of(base, name)
        report.compare(ours, bare_row.name, ours.p50_ms / bare_row.p50_ms, "<=", None if tf32 else 1.05)


class Gradients(torch.autograd.Function):
    """A scalar whose backward gives every parameter a fresh gradient, and holds nothing besides."""

    @staticmethod
    def forward(ctx, *parameters):
        """One."""
        ctx.parameters = parameters
        return torch.ones((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, grad):
        """Ones, scaled."""
        return tuple(torch.ones_like(p).mul_(grad) for p in ctx.parameters)


def memory(report: Report, device: torch.device, tiny: bool) -> None:
    """What the engine holds beyond the model and one task's ``.grad``, against (K + 1) P elements."""
    K = 4
    parameters = [nn.Parameter(torch.zeros(s, device=device)) for s in (vit_shapes(4, 1, 2) if tiny else vit_shapes())]
    numel = sum(p.numel() for p in parameters)

    def clear() -> None:
        for p in parameters:
            p.grad = None

    def peak(run: Callable[[], None]) -> int:
        clear()
        if device.type != "cuda":
            run()
            return 0
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def bare() -> None:
        for _ in range(K):
            Gradients.apply(*parameters).backward()
            clear()

    before = peak(bare)
    balancer = dbk.DBMTL(parameters, K, backend=BACKEND)

    def steps() -> None:
        for _ in range(3):
            clear()
            balancer.backward([Gradients.apply(*parameters) for _ in range(K)])

    grown, budget = peak(steps) - before, 4 * numel * (K + 1)
    # All tasks have the same gradient, so all weights are 1.
    wanted = torch.full_like(parameters[-1], K * float(balancer.buffer.rows[0, 0]))
    close(parameters[-1].grad, wanted, 1e-6, "the balanced .grad")
    row = Row("memory", f"memory K={K} P={numel}", OURS, K, numel, "float32", "float32", agreed=True)
    row.note = f"{grown / 1e6:.1f} MB held besides; (K + 1) P elements are {budget / 1e6:.1f} MB"
    print(row.note)
    if device.type == "cuda":
        report.compare(row, "(K + 1) P elements", grown / budget, "<=", 1.05)
    else:
        report.rows.append(row)
