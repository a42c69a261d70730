"""What benchmarks/forms.py measures: trunks, contenders, and the rows that one case gives.

Every contender has a model of its own, of the same seed, so that the hooks of one are no load for another. Learning
rates are 0: weights stay, and the work of each step is the same.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.bench import timing
from dbmtl_kernels.bench.results import Row
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

DENSE = 64  # steps, at the first of which OnePassDBMTL measures all tasks again and again
AMORTISED = 200  # steps that a mean is taken over
BLOCK = 10  # steps of an interleaved block: each has one measurement once the dense ones are over
Backward = Callable[[Sequence[Tensor]], object]


class Block(nn.Module):
    """Two convolutions of 3 x 3 with batch norm, and what they are added to."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        same = stride == 1 and inside == outside
        self.beside: nn.Module = nn.Identity()
        if not same:
            self.beside = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.beside(x))


def resnet18() -> nn.Module:
    """18 layers, on images of 3 x 32 x 32."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    for inside, outside in pairwise((64, 64, 128, 256, 512)):
        layers += [Block(inside, outside, 1 if outside == 64 else 2), Block(outside, outside, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(*widths: int) -> nn.Module:
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))


class Transformer(nn.Module):
    """Encoder layers; the mean over the sequence."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class Trunk(NamedTuple):
    """A trunk, what it takes, and how it is trained.

    Attributes:
        make: makes it.
        inputs: the shape of one input.
        width: of its output.
        batch: chosen so that a step of the plain sum takes 50 ms or more on one core, but for the small ones.
        optimizer: makes an optimizer of parameters.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    width: int
    batch: int
    optimizer: Callable[..., torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)


TRUNKS = {
    "mlp": Trunk(lambda: mlp(1000, 2000, 2000, 1000), (1000,), 1000, 128, adamw),
    "resnet18": Trunk(resnet18, (3, 32, 32), 512, 16, sgd),
    "transformer": Trunk(lambda: Transformer(384, 4), (32, 384), 384, 4, adamw),
    "small": Trunk(lambda: mlp(256, 512, 512, 256), (256,), 256, 64, adamw),
    "tiny": Trunk(lambda: mlp(8, 8), (8,), 8, 4, sgd),  # for tests
}


class Model:
    """A trunk and K heads of 10 classes, one batch, and the optimizer."""

    def __init__(self, trunk: str, num_tasks: int) -> None:
        torch.manual_seed(0)
        made = TRUNKS[trunk]
        self.trunk, self.num_tasks = made.make(), num_tasks
        self.heads = nn.ModuleList(nn.Linear(made.width, 10) for _ in range(num_tasks))
        self.x = torch.randn(made.batch, *made.inputs)
        self.y = torch.randint(0, 10, (num_tasks, made.batch))
        self.optimizer = made.optimizer([*self.trunk.parameters(), *self.heads.parameters()])
        for _ in range(2):  # the optimizer makes its state, and oneDNN its kernels
            self.step(plain_sum)
        self.optimizer.zero_grad()

    def step(self, backward: Backward) -> float:
        """Forward, ``backward``, optimizer; seconds of the second."""
        self.optimizer.zero_grad()
        z = self.trunk(self.x)
        losses = [functional.cross_entropy(head(z), y) for head, y in zip(self.heads, self.y, strict=True)]
        began = time.perf_counter()
        backward(losses)
        elapsed = time.perf_counter() - began
        self.optimizer.step()
        return elapsed


def plain_sum(losses: Sequence[Tensor]) -> None:
    sum(losses).backward()


def sum_of_logs(losses: Sequence[Tensor]) -> None:
    sum(torch.log(loss + 1e-8) for loss in losses).backward()


def passes(let_go: Callable[[], None], losses: Sequence[Tensor]) -> None:
    for task, loss in enumerate(losses):
        let_go()
        loss.backward(retain_graph=task < len(losses) - 1)


def bare(model: Model) -> Backward:
    return lambda losses: passes(model.optimizer.zero_grad, losses)


def one_pass(model: Model, **options: Any) -> Backward:
    return dbk.OnePassDBMTL(model.trunk.parameters(), model.num_tasks, **options).backward


def exact(model: Model, **options: Any) -> Backward:
    return dbk.DBMTL(model.trunk.parameters(), model.num_tasks, **options).backward


EW, A, BARE = "plain sum", "OnePassDBMTL", "K passes"
# Which steps make one of them; those that run one backward a step, and those that run K.
ONE: dict[str, Callable[..., Backward]] = {
    EW: lambda model: plain_sum,
    "sum of logs": lambda model: sum_of_logs,
    A: one_pass,
}
MANY: dict[str, Callable[..., Backward]] = {
    BARE: bare,
    "K passes, added up": lambda model: lambda losses: passes(lambda: None, losses),
    "DBMTL(beta=0)": lambda model: exact(model, beta=0.0),
    "DBMTL": exact,
}
CONTENDERS = {**ONE, **MANY}


def interleaved(
    makers: dict[str, Callable[..., Backward]], trunk: str, num_tasks: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[int]]:
    """Seconds of whole steps and of their backward, by contender; and the norms that `OnePassDBMTL` measured in each.

    All take turns, and each round begins with another.
    """
    models = {name: Model(trunk, num_tasks) for name in makers}
    backwards = {name: make(models[name]) for name, make in makers.items()}
    whole: dict[str, list[float]] = {name: [] for name in makers}
    backward: dict[str, list[float]] = {name: [] for name in makers}
    balancer = getattr(backwards.get(A), "__self__", None)
    measured = [0]
    names = list(makers)
    for round_ in range(steps):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            backward[name].append(models[name].step(backwards[name]))
            whole[name].append(time.perf_counter() - began)
        measured.append(balancer.audit.measured if balancer is not None else 0)
    return whole, backward, [b - a for a, b in pairwise(measured)]


def row(
    trunk: str, num_tasks: int, contender: str, what: str, times: Sequence[float], ratio: float, over: str, steps: int
) -> Row:
    return Row(
        "forms", what, contender, trunk, num_tasks, **timing.summary(list(times)), ratio=ratio, over=over, rounds=steps
    )


def one_backward(trunk: str, num_tasks: int, names: Sequence[str], steps: int) -> Iterator[Row]:
    """Rows of the contenders that run one backward a step, over the plain sum.

    A mean over steps is the mean of the ratios of blocks: what disturbs the machine disturbs both in a block.
    """
    whole, backward, measured = interleaved({n: ONE[n] for n in ONE if n in (*names, EW)}, trunk, num_tasks, steps)
    late = range(DENSE if steps > DENSE else 0, steps)
    plain = [i for i in late if measured[i] == 0] or list(late)
    median = statistics.median
    for name in whole:
        for what, times in (("step", whole), ("backward", backward)):
            mine, base = ([times[n][i] for i in plain] for n in (name, EW))
            yield row(trunk, num_tasks, name, what, mine, median(mine) / median(base), EW, len(plain))
    if A not in whole:
        return
    found = [i for i in late if measured[i]]
    if found:
        mine = [whole[A][i] for i in found]
        yield row(
            trunk,
            num_tasks,
            A,
            "measuring step",
            mine,
            median(mine) / median(whole[EW][i] for i in late),
            EW,
            len(found),
        )
    spans = {"mean from step 1": range(min(steps, AMORTISED))}
    if steps > DENSE:
        spans[f"mean from step {DENSE + 1}"] = late
    for what, span in spans.items():
        blocks = [span[i : i + BLOCK] for i in range(0, len(span), BLOCK)]
        mine, base = ([statistics.mean(whole[n][i] for i in block) for block in blocks] for n in (A, EW))
        ratio = statistics.mean(a / b for a, b in zip(mine, base, strict=True))
        yield row(trunk, num_tasks, A, what, mine, ratio, EW, len(span))


def many_backwards(trunk: str, num_tasks: int, names: Sequence[str], rounds: int) -> Iterator[Row]:
    """Rows of the contenders that run K: over the bare passes, each ``.grad`` thrown away; those over the plain sum."""
    makers = {EW: ONE[EW], **{n: MANY[n] for n in MANY if n in (*names, BARE)}}
    whole, backward, _ = interleaved(makers, trunk, num_tasks, 2 + rounds)
    for name in [name for name in makers if name != EW]:
        over = EW if name == BARE else BARE
        for what, times in (("step", whole), ("backward", backward)):
            mine, base = times[name][2:], times[over][2:]
            yield row(
                trunk, num_tasks, name, what, mine, statistics.median(mine) / statistics.median(base), over, rounds
            )


def memory(trunk: str, num_tasks: int, names: Sequence[str]) -> Iterator[Row]:
    """Peak bytes of tensors over a step; parameters and the optimizer's state left out, the balancer's counted."""
    base = peaks(trunk, num_tasks, ONE[EW], 2)[1]
    for name in [name for name in CONTENDERS if name in (*names, EW)]:
        if name == A:  # all tasks are measured in steps 1, 2 and 4, then one in every third
            found = peaks(trunk, num_tasks, lambda model: one_pass(model, measure_every=3), 5)
            cases = {"memory": found[4], "memory, one measured": found[2], "memory, all measured": found[3]}
        else:
            cases = {"memory": base if name == EW else peaks(trunk, num_tasks, CONTENDERS[name], 2)[1]}
        for what, peak in cases.items():
            ratio = peak / base
            yield Row("forms", what, name, trunk, num_tasks, p50=peak, unit="bytes", ratio=ratio, over=EW, rounds=1)


def peaks(trunk: str, num_tasks: int, make: Callable[..., Backward], steps: int) -> list[int]:
    """The most bytes alive in each step, counted by PyTorch's allocator since before the balancer was made."""
    gc.collect()  # what others left is not to be freed, and counted, in between
    model = Model(trunk, num_tasks)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        backward = make(model)
        for index in range(steps):
            with record_function(f"step {index}"):
                model.step(backward)
    # Not public: what is has sums by operator, and no peak.
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("step ")}
    live, out = 0, [0] * steps
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if live < 0:
                raise RuntimeError("memory was freed that had been taken before: the peak would be too low")
            for index in range(steps):
                began, ended = spans[f"step {index}"]
                if began <= event.start_ns() <= ended:
                    out[index] = max(out[index], live)
    return out
