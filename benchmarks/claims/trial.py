"""One run: a network trained by a method at a rate, what was seen on the way, and its row."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from dbmtl_kernels.bench.results import Row
from torch import Tensor, nn

from . import settings
from .methods import FAMO, MAKE, STL
from .networks import Network
from .settings import Part, Setting, Splits
from .tasks import KINDS, Task

BENCHMARK, WHAT = "claims", "training"
Run = tuple[str, str, float, int]  # setting, method, learning rate, seed
PROBES, WINDOWS = 12, 20


@lru_cache(maxsize=1)
def load(name: str, folder: Path, seed: int, small: bool) -> Splits:
    """The three parts; those of the last call are kept."""
    return settings.choose(name, small).load(folder, seed)


def losses_of(network: Network, part: Part, tasks: Sequence[Task]) -> list[Tensor]:
    """One forward pass; K losses."""
    outputs = network(part.inputs)
    return [KINDS[task.kind].loss(*pair) for task, *pair in zip(tasks, outputs, part.targets, strict=True)]


@torch.no_grad()
def measure(network: Network, part: Part, tasks: Sequence[Task]) -> dict[str, float]:
    """Metrics of each task; NaN where outputs are not finite, so that a network that diverged is never chosen."""
    network.eval()
    device = next(network.parameters()).device
    pieces = [[x.cpu() for x in network(inputs.to(device))] for inputs in part.inputs.split(1000)]
    outputs = [torch.cat(of_task) for of_task in zip(*pieces, strict=True)]
    return {
        name: metric.of(out, target).item() if out.isfinite().all() else float("nan")
        for task, out, target in zip(tasks, outputs, part.targets, strict=True)
        for name, metric in task.metrics.items()
    }


def constant(train: Part, test: Part, tasks: Sequence[Task]) -> dict[str, float]:
    """Metrics on ``test`` of the best constant prediction on ``train``."""
    return {
        name: metric.of(KINDS[task.kind].constant(known, len(test)), asked).item()
        for task, known, asked in zip(tasks, train.targets, test.targets, strict=True)
        for name, metric in task.metrics.items()
    }


class Watch:
    """What is seen of a run of so many steps: losses in every step, the gradients of the trunk in a dozen of them.

    Norms and cosines are those of the losses as they are, whatever the method makes of them.
    """

    def __init__(self, steps: int, trunk: list[nn.Parameter]) -> None:
        self.trunk, self.losses = trunk, list[Tensor]()
        self.probes = {round(i * (steps - 1) / (PROBES - 1)) for i in range(PROBES)}
        self.norms, self.cosines, self.lowest = list[float](), list[float](), list[float]()

    def see(self, losses: Sequence[Tensor]) -> None:
        """Before the method does. Graphs stay."""
        if len(self.losses) in self.probes:
            rows = []
            for loss in losses:
                found = torch.autograd.grad(loss, self.trunk, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([g.flatten() for g in found]))
            matrix = torch.stack(rows)
            lengths = matrix.norm(dim=1).clamp(min=1e-30)
            self.norms.append(lengths.log().mean().exp().item())
            unit = matrix / lengths[:, None]
            first, second = torch.triu_indices(len(rows), len(rows), 1)
            pairs = (unit @ unit.T)[first, second]
            self.cosines.append(pairs.mean().item())
            self.lowest.append(pairs.min().item())
        self.losses.append(torch.stack(list(losses)).detach())

    def told(self) -> dict[str, Any]:
        """Norms (geometric means over the tasks), cosines (means over the pairs, and the lowest), roughness.

        Roughness: the logarithm of each loss, mean over twentieths of the run, goes up and down; how far up in all,
        over how far down; mean over the tasks. 0 is a loss that never rises. ``fell``: each ended lower than it began.
        """
        told: dict[str, Any] = {"norms": self.norms, "cosines": self.cosines, "lowest": self.lowest}
        if len(self.losses) >= WINDOWS:
            each = len(self.losses) // WINDOWS
            means = torch.stack(self.losses)[: each * WINDOWS].view(WINDOWS, each, -1).mean(1).log()
            moves = means.diff(dim=0).double()
            rough = moves.clamp(min=0).sum(0) / (-moves).clamp(min=1e-9).sum(0)
            told |= {"roughness": rough.mean().item(), "fell": bool((means[-1] < means[0]).all())}
        return told


def train(
    setting: Setting, method: str, lr: float, seed: int, samples: Part, watched: bool = False
) -> tuple[Network, Watch | None]:
    """Initial weights, batches and dropout are the seed's, and so the same for all methods."""
    torch.manual_seed(seed)
    device = torch.device(setting.device)
    network = setting.network(samples.inputs, setting.tasks).to(device)
    trunk = list(network.trunk.parameters())
    objective = MAKE[method](trunk, len(setting.tasks))
    learnt = [*network.parameters(), *(objective.parameters() if isinstance(objective, nn.Module) else ())]
    if setting.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(learnt, lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    watch = Watch(setting.steps, trunk) if watched else None
    for indices in batches(len(samples), setting.batch, setting.steps, seed):
        batch = samples.batch(indices).to(device)
        losses = losses_of(network, batch, setting.tasks)
        if not all(loss.isfinite() for loss in losses):
            break  # it diverged: its metrics say so
        if watch is not None:
            watch.see(losses)
        optimizer.zero_grad()
        objective(losses).backward()
        optimizer.step()
        scheduler.step()
        if isinstance(objective, FAMO):
            with torch.no_grad():
                after = losses_of(network, batch, setting.tasks)
            objective.update(after)
    return network, watch


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's batch: every sample once an epoch, whole batches alone."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(samples, generator=generator) for _ in itertools.count())
    whole = (indices for order in epochs for indices in order.split(size)[: samples // size])
    return itertools.islice(whole, steps)


def fit(setting: Setting, method: str, lr: float, seed: int, parts: Splits) -> dict[str, Any]:
    """Train, and tell what came of it: single-task learning is a network a task, each trained as one of a task is."""
    training, validation, test = parts
    told: dict[str, Any] = {"validation": {}, "test": {}}
    if method == STL:
        for t, task in enumerate(setting.tasks):
            alone = replace(setting, tasks=(task,))
            network, _ = train(alone, "EW", lr, seed, training.only(t))
            told["validation"] |= measure(network, validation.only(t), alone.tasks)
            told["test"] |= measure(network, test.only(t), alone.tasks)
        return told
    network, watch = train(setting, method, lr, seed, training, watched=True)
    assert watch is not None
    told["validation"] = measure(network, validation, setting.tasks)
    told["test"] = measure(network, test, setting.tasks)
    told["P"] = sum(p.numel() for p in network.trunk.parameters())
    return told | watch.told()


def run_one(run: Run, folder: Path, small: bool, machine: dict[str, str]) -> Row:
    """Train and measure; takes a process of one thread. Its seconds are those of the processor."""
    torch.set_num_threads(1)
    name, method, lr, seed = run
    setting = settings.choose(name, small)
    parts = load(name, folder, seed, small)
    begin = time.process_time()
    told = fit(setting, method, lr, seed, parts)
    seconds = time.process_time() - begin
    detail = {
        "lr": lr, "seed": seed, "steps": setting.steps, "batch": setting.batch, "samples": len(parts[0]),
        "constant": constant(parts[0], parts[2], setting.tasks), **told,
    }  # fmt: skip
    size = detail.pop("P", None)
    return Row(
        BENCHMARK, WHAT, method, name, len(setting.tasks), size, p50=seconds, unit="s", rounds=1,
        detail=rounded(detail), machine=machine,
    )  # fmt: skip


def rounded(value: Any) -> Any:
    """Six significant digits, and None for what is not finite, which JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value
