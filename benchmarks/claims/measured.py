"""What is measured beside training: seconds of a step over equal weighting's, taken in turns; and an identity.

log(x) is the minimum over s of e^s x - s - 1: IMTL-L with its scales at their best is the logarithm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import dbmtl_kernels as dbk
import numpy as np
import torch
from dbmtl_kernels.bench.results import Row
from torch import Tensor, nn
from tqdm import tqdm

from . import settings
from .methods import EW, FAMO, MAKE, ONE_PASS, STL
from .settings import Part, Setting
from .trial import BENCHMARK, load, losses_of, rounded

SECONDS, IDENTITY = "step", "identity"
ROUNDS, EACH = 9, 10
WARM_UP = {ONE_PASS: 65}  # measures all norms seven times in its first 64 steps
Step = Callable[[Part], None]


def stepper(setting: Setting, method: str, samples: Part) -> Step:
    """A step of training: forward, backward and Adam. Single-task learning does so with a network a task."""
    if method == STL:
        tasks = range(len(setting.tasks))
        alone = [stepper(replace(setting, tasks=(setting.tasks[t],)), EW, samples.only(t)) for t in tasks]

        def all_of_them(batch: Part) -> None:
            for t, one in enumerate(alone):
                one(batch.only(t))

        return all_of_them
    torch.manual_seed(0)
    network = setting.network(samples.inputs, setting.tasks).to(setting.device)
    objective = MAKE[method](list(network.trunk.parameters()), len(setting.tasks))
    learnt = [*network.parameters(), *(objective.parameters() if isinstance(objective, nn.Module) else ())]
    optimizer = torch.optim.Adam(learnt, lr=1e-4)

    def step(batch: Part) -> None:
        losses = losses_of(network, batch, setting.tasks)
        optimizer.zero_grad()
        objective(losses).backward()
        optimizer.step()
        if isinstance(objective, FAMO):
            with torch.no_grad():
                after = losses_of(network, batch, setting.tasks)
            objective.update(after)

    return step


def seconds(
    name: str, methods: Sequence[str], folder: Path, small: bool, machine: dict[str, str], rounds: int = ROUNDS
) -> list[Row]:
    """A row a method: milliseconds of a step, and the ratio over equal weighting, median over the rounds.

    In a round every method takes ten steps, in an order that rotates: one pass measures a norm in one of ten.
    """
    setting = settings.choose(name, small)
    samples = load(name, folder, 0, small)[0]
    device = torch.device(setting.device)
    batch = samples.batch(torch.arange(setting.batch)).to(device)
    methods = list(dict.fromkeys((EW, *methods)))
    steps = {method: stepper(setting, method, samples) for method in methods}

    def timed(step: Step, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / times

    for method, step in steps.items():
        timed(step, WARM_UP.get(method, 3))
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for turn in tqdm(range(rounds), f"seconds, {name}", unit="round"):
        first = turn * len(methods) // rounds
        for method in methods[first:] + methods[:first]:
            taken[method].append(timed(steps[method], EACH))
    batches = len(samples) // setting.batch
    rows = []
    for method, values in taken.items():
        low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
        ratio = median(mine / base for mine, base in zip(values, taken[EW], strict=True))
        detail = rounded({"epoch_s": middle * batches / 1e3, "batch": setting.batch, "samples": len(samples)})
        rows.append(
            Row(
                BENCHMARK, SECONDS, method, name, len(setting.tasks), p20=low, p50=middle, p80=high,
                ratio=ratio, over=EW, rounds=rounds, detail=detail, machine=machine,
            )
        )  # fmt: skip
    return rows


def identity(name: str, folder: Path, small: bool, machine: dict[str, str]) -> Row:
    """How far IMTL-L at its minimiser is from the logarithm, on a network and a batch of data, in float64.

    The minimiser is searched for by Newton's method, not taken from the formula. The row's figure is the larger of two:
    the difference of the values, and that of the trunk's gradients over their norm.
    """
    setting = settings.choose(name, small)
    samples = load(name, folder, 0, small)[0]
    torch.manual_seed(0)
    network = setting.network(samples.inputs, setting.tasks).double()
    trunk = list(network.trunk.parameters())
    batch = samples.batch(torch.arange(setting.batch))
    targets = tuple(x.double() if x.is_floating_point() else x for x in batch.targets)
    losses = losses_of(network, Part(batch.inputs.double(), targets), setting.tasks)
    scaled = dbk.weightings.IMTLLoss(len(losses)).double()
    with torch.no_grad():
        scaled.scales.copy_(minimiser(torch.stack(losses)))
    at_best = [x for x in scaled(losses) if x is not None]
    logs = [dbk.log_transform(loss) for loss in losses]
    values = (torch.stack(at_best) - torch.stack(logs)).abs().max().item()
    ours, theirs = (_gradient(torch.stack(of).sum(), trunk) for of in (logs, at_best))
    gradients = ((ours - theirs).norm() / ours.norm()).item()
    detail = rounded({"values": values, "gradients": gradients, "losses": [x.item() for x in losses]})
    return Row(
        BENCHMARK, IDENTITY, "IMTL-L", name, len(losses), ours.numel(), "float64", p50=max(values, gradients), unit="1",
        rounds=1, detail=detail, machine=machine,
    )  # fmt: skip


def minimiser(losses: Tensor) -> Tensor:
    """(K,) positive x to the (K,) s where e^s x - s is least."""
    s = torch.zeros_like(losses)
    for _ in range(200):  # a step of at most 1: from far below, Newton's own would be far too long
        slope = s.exp() * losses - 1.0
        s = s - (slope / (slope + 1.0)).clamp(-1.0, 1.0)
    return s


def _gradient(loss: Tensor, trunk: list[nn.Parameter]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trunk, retain_graph=True)])
