"""One run: a network trained by one method under a protocol, from checkpoint to checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.bench.results import BenchError
from tqdm import tqdm

from .methods import FAMO, METHODS, STL, WEIGHTS_RATE, Method, Uncertainty
from .metrics import Metrics
from .networks import Network
from .work import BEST_EPOCH, Batch, Loading, Protocol, Work

LAST = 10  # epochs
SMOKE_STEPS = 2


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        method: one of `methods.METHODS`.
        tasks: by index; one, where each has a network to itself.
        seed: of initial weights, batches, dropout and augmentation.
        beta: forgetting rate of DB-MTL.
        beta_sigma: its decay.
        one_call: give DB-MTL all losses in a call, where it could have the tasks one by one.
        weights: where the trunk begins, "imagenet" for instance; "" where there is no choice.
    """

    method: str
    tasks: tuple[int, ...]
    seed: int
    beta: float
    beta_sigma: float
    one_call: bool
    weights: str

    def identity(self, work: Work) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run: how it was trained, and on what."""
        of_balancer = {"beta": self.beta, "beta_sigma": self.beta_sigma} if self.method == "db-mtl" else {}
        return {
            "method": self.method,
            "tasks": [work.tasks[task].name for task in self.tasks],
            "seed": self.seed,
            **of_balancer,
            **setting(work, self.weights),
        }

    def label(self, work: Work) -> str:
        """For files and progress bars."""
        what = f"{self.method}-{work.tasks[self.tasks[0]].name}" if self.method == STL else self.method
        beta = f"-beta{self.beta:g}-sigma{self.beta_sigma:g}" if self.method == "db-mtl" else ""
        return f"{work.name}-{work.model}-{work.protocol.name}-{what}{beta}-seed{self.seed}".replace(" ", "_")


def setting(work: Work, weights: str) -> dict[str, Any]:
    """What runs must have in common to be compared."""
    known = asdict(work.protocol)
    asked = ("name", "batch", "epochs", "rate", "weight_decay", "halve_at", "augment", "select")
    return {
        "data": work.name, "model": work.model, "weights": weights, "smoke": work.smoke,
        **{("protocol" if name == "name" else name): known[name] for name in asked},
    }  # fmt: skip


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        metrics: on the test data.
        selected: of which epochs.
        seconds: of the training part of each epoch of the last call.
        shared: number of shared parameters.
        memory: most bytes allocated on a GPU; None elsewhere.
    """

    metrics: Metrics
    selected: str
    seconds: list[float]
    shared: int
    memory: int | None


def mean_of(several: Sequence[Metrics]) -> dict[str, dict[str, float]]:
    """Mean of each metric."""
    return {
        task: {name: fmean(found[task][name] for found in several) for name in metrics}
        for task, metrics in several[0].items()
    }


def step(
    run: Run, work: Work, network: Network, method: Method, optimizer: torch.optim.Optimizer, batch: Batch
) -> None:
    """One step of the optimizer."""
    optimizer.zero_grad()
    if work.own_inputs and isinstance(method, dbk.DBMTL) and run.method == "db-mtl" and not run.one_call:
        for task in run.tasks:  # each task's graph is freed before the next forward pass
            with method.task(task):
                dbk.log_transform(work.losses(network, batch, [task])[0]).backward()
    else:
        method(work.losses(network, batch, run.tasks)).backward()
    optimizer.step()
    if isinstance(method, FAMO):
        with torch.no_grad():
            method.update(work.losses(network, batch, run.tasks))


@dataclass
class _State:
    """Everything that a checkpoint has."""

    network: Network
    method: Method
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int
    tested: list[dict[str, dict[str, float]]]
    best: dict[str, Any]

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """As a whole: a file that was cut off is never seen."""
        parts = ("network", "method", "optimizer", "scheduler")
        state = {name: getattr(self, name).state_dict() for name in parts}
        state |= {"epoch": self.epoch, "tested": self.tested, "best": self.best, "identity": identity}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            BenchError: it is damaged, or of another run.
        """
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            theirs = state["identity"]
        except Exception as error:  # whatever a damaged file raises
            raise BenchError(f"{path} is no checkpoint, or damaged ({type(error).__name__}: {error})") from error
        if theirs != identity:
            names = sorted({*theirs, *identity})
            told = [f"{n} {theirs.get(n)!r} for {identity.get(n)!r}" for n in names if theirs.get(n) != identity.get(n)]
            raise BenchError(f"{path} is of another run: {', '.join(told)}. Give another --checkpoints")
        for name in ("network", "method", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.tested, self.best = state["epoch"], state["tested"], state["best"]


def begin(run: Run, work: Work, device: torch.device) -> _State:
    """A new network, method, optimizer and schedule."""
    protocol: Protocol = work.protocol
    torch.manual_seed(run.seed)
    network = work.network().to(device)
    shared = [p for p in network.shared.parameters() if p.requires_grad]
    names = [work.tasks[task].name for task in run.tasks]
    method = METHODS[run.method](shared, names, run.beta, run.beta_sigma, device)
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "weight_decay": protocol.weight_decay}]
    if isinstance(method, Uncertainty):
        groups.append({"params": list(method.parameters()), "lr": WEIGHTS_RATE})
    optimizer = torch.optim.Adam(groups, lr=protocol.rate)
    halving = protocol.halve_at or protocol.epochs + 1
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, halving, 0.5)
    return _State(network, method, optimizer, scheduler, 0, [], {})


def train(
    run: Run,
    work: Work,
    loading: Loading,
    checkpoint: Path,
    *,
    resume: bool,
    ended: Callable[[int], None] = lambda epoch: None,
) -> Outcome:
    """Train and measure; what was reached is saved after each epoch.

    An epoch's batches, dropout and augmentation are the seed's and the epoch's: a run that goes on does what it would
    have done.

    Args:
        run: what is run.
        work: on what.
        loading: how.
        checkpoint: where the state is kept.
        resume: go on from there if it exists.
        ended: called after each epoch with how many there were.

    Raises:
        BenchError: the checkpoint exists and ``resume`` is not given, or is not one of this run; a batch is more than a
            task has.
    """
    if checkpoint.exists() and not resume:
        raise BenchError(f"{checkpoint} exists: --resume goes on from there; or give another --checkpoints")
    state, epochs, identity = begin(run, work, loading.device), work.protocol.epochs, run.identity(work)
    if checkpoint.exists():
        state.load(checkpoint, identity)
    if loading.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loading.device)
    seconds = []
    for epoch in range(state.epoch, epochs):
        torch.manual_seed(run.seed * 100_003 + epoch + 1)
        seconds.append(_epoch(run, work, loading, state, f"{run.label(work)} {epoch + 1}/{epochs}"))
        state.scheduler.step()
        state.epoch = epoch + 1
        _measure(run, work, loading, state)
        state.save(checkpoint, identity)
        ended(state.epoch)
    shared = sum(p.numel() for p in state.network.shared.parameters())
    memory = torch.cuda.max_memory_allocated(loading.device) if loading.device.type == "cuda" else None
    if work.protocol.select == BEST_EPOCH:
        return Outcome(state.best["metrics"], f"epoch {state.best['epoch']}", seconds, shared, memory)
    first = epochs - len(state.tested) + 1
    return Outcome(mean_of(state.tested), f"mean of epochs {first} to {epochs}", seconds, shared, memory)


def _epoch(run: Run, work: Work, loading: Loading, state: _State, what: str) -> float:
    state.network.train()
    begin = time.perf_counter()
    length, batches = loading.training(work, run.tasks)
    steps = min(length, SMOKE_STEPS) if work.smoke else length
    for batch in tqdm(islice(batches, steps), what, steps, unit="step", leave=False):
        step(run, work, state.network, state.method, state.optimizer, batch)
    if loading.device.type == "cuda":
        torch.cuda.synchronize(loading.device)
    return time.perf_counter() - begin


def _measure(run: Run, work: Work, loading: Loading, state: _State) -> None:
    """The test metrics where they may count: in the last epochs, or when validation is better than before."""
    if work.protocol.select != BEST_EPOCH:
        if state.epoch > work.protocol.epochs - LAST:
            state.tested.append(loading.measure(work, state.network, "test", run.tasks))
        return
    validation = loading.measure(work, state.network, "val", run.tasks)
    mean = fmean(value for metrics in validation.values() for value in metrics.values())
    if not state.best or mean > state.best["validation"]:
        metrics = loading.measure(work, state.network, "test", run.tasks)
        state.best = {"epoch": state.epoch, "validation": mean, "metrics": metrics}
