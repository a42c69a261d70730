"""One run, and all of them."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import results
from .errors import TrialError
from .methods import EVERY_METHOD, FAMO
from .results import Row, Run
from .settings import SETTINGS, Network, Part, Setting, Splits, smoke
from .tasks import KINDS, Task


def choose_setting(name: str, small: bool) -> Setting:
    """By name; ``small`` with generated data."""
    return smoke(SETTINGS[name]) if small else SETTINGS[name]


@lru_cache(maxsize=1)
def load(name: str, folder: Path, seed: int, small: bool) -> Splits:
    """The three parts; those of the last call are kept."""
    return choose_setting(name, small).load(folder, seed)


def losses_of(network: Network, part: Part, tasks: Sequence[Task]) -> list[Tensor]:
    """One forward pass; K losses."""
    outputs = network(part.inputs)
    return [KINDS[task.kind].loss(*pair) for task, *pair in zip(tasks, outputs, part.targets, strict=True)]


@torch.no_grad()
def measure(network: Network, part: Part, tasks: Sequence[Task]) -> dict[str, float]:
    """Metric of each task; NaN where outputs are not finite, so that a network that diverged is never chosen."""
    network.eval()
    pieces = [network(inputs) for inputs in part.inputs.split(1000)]
    outputs = [torch.cat(of_task) for of_task in zip(*pieces, strict=True)]
    return {
        task.name: KINDS[task.kind].metric(out, target).item() if out.isfinite().all() else float("nan")
        for task, out, target in zip(tasks, outputs, part.targets, strict=True)
    }


def constant(train: Part, test: Part, tasks: Sequence[Task]) -> dict[str, float]:
    """Metric on ``test`` of the best constant prediction on ``train``."""
    kinds = [KINDS[task.kind] for task in tasks]
    return {
        task.name: kind.metric(kind.constant(known, len(test)), asked).item()
        for task, kind, known, asked in zip(tasks, kinds, train.targets, test.targets, strict=True)
    }


def train(setting: Setting, method: str, lr: float, seed: int, data: Part) -> Network:
    """Initial weights, batches and dropout are the seed's, and so the same for all methods."""
    torch.manual_seed(seed)
    network = setting.network(data.inputs, setting.tasks)
    objective = EVERY_METHOD[method](list(network.trunk.parameters()), len(setting.tasks))
    if setting.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    for indices in batches(len(data), setting.batch, setting.steps, seed):
        batch = data.batch(indices)
        losses = losses_of(network, batch, setting.tasks)
        if not all(loss.isfinite() for loss in losses):
            break  # it diverged: its metrics say so
        optimizer.zero_grad()
        objective(losses).backward()
        optimizer.step()
        scheduler.step()
        if isinstance(objective, FAMO):
            with torch.no_grad():
                after = losses_of(network, batch, setting.tasks)
            objective.update(after)
    return network


def batches(samples: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's batch: every sample once an epoch, whole batches alone."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(samples, generator=generator) for _ in itertools.count())
    whole = (indices for order in epochs for indices in order.split(size)[: samples // size])
    return itertools.islice(whole, steps)


def run_one(run: Run, folder: Path, small: bool, commit: str) -> Row:
    """Train and measure; takes a process of one thread."""
    torch.set_num_threads(1)
    name, method, lr, seed = run
    setting = choose_setting(name, small)
    training, validation, test = load(name, folder, seed, small)
    begin = time.perf_counter()
    network = train(setting, method, lr, seed, training)
    seconds = time.perf_counter() - begin
    return Row(
        *run, measure(network, validation, setting.tasks), measure(network, test, setting.tasks),
        constant(training, test, setting.tasks), setting.steps, round(seconds, 2), commit, torch.__version__,
        datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )  # fmt: skip


def package_commit() -> str:
    """Of the working copy this file is in; "unknown" outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def plan(settings: Iterable[str], methods: Iterable[str], seeds: int, small: bool) -> list[Run]:
    """All runs, a setting after the other, so that those begun first are complete first."""
    methods = list(methods)
    return [
        (name, method, lr, seed)
        for name in settings
        for seed in range(1 if small else seeds)
        for lr in choose_setting(name, small).rates
        for method in methods
    ]


def run_all(
    out: Path,
    folder: Path,
    settings: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    *,
    resume: bool,
    small: bool,
    jobs: int,
) -> None:
    """Run what ``out`` lacks, and append it there.

    Raises:
        TrialError: before anything is trained, where data or ``out`` are not as they should be.
    """
    todo = plan(settings, methods, seeds, small)
    if out.exists():
        if not resume:
            raise TrialError(f"{out} exists: give --resume to go on with it, or another --out")
        rows = results.read(out)
        for row in rows:
            if row.setting in SETTINGS and row.steps != choose_setting(row.setting, small).steps:
                raise TrialError(f"{out} has runs of {row.setting} with {row.steps} steps: of another trial")
        done = {row.run for row in rows}
        todo = [run for run in todo if run not in done]
    for name in dict.fromkeys(run[0] for run in todo):
        load(name, folder, 0, small)
    commit = package_commit()
    with tqdm(total=len(todo), unit="run") as progress:
        for row in _rows(todo, folder, small, commit, jobs):
            results.append(out, row)
            progress.set_postfix_str(f"{row.setting}, {row.method}, {row.seconds} s", refresh=False)
            progress.update()


def _rows(todo: list[Run], folder: Path, small: bool, commit: str, jobs: int) -> Iterator[Row]:
    if jobs == 1:
        for run in todo:
            yield run_one(run, folder, small, commit)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_one, run, folder, small, commit) for run in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
