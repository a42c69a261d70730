"""All runs of some settings and methods: what the results file lacks is trained and appended to it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from dbmtl_kernels.bench.results import BenchError, Row, append, machine, read
from tqdm import tqdm

from . import graphs, methods, settings
from .measured import IDENTITY, ROUNDS, SECONDS, identity, seconds
from .scores import run_of, sweep, training, wanted
from .settings import GRAPH
from .trial import BENCHMARK, Run, load, run_one


def kept(out: Path, small: bool) -> dict[Run, Row]:
    """The runs that the file has.

    Raises:
        BenchError: the file is one of another schema, or of another trial.
    """
    if not out.exists():
        return {}
    found = training(read(out))
    for name, *_ in found:
        if name not in settings.SETTINGS:
            raise BenchError(f"{out} has runs of a setting {name!r}, which is none of this trial: give another --out")
    for (name, *_), row in found.items():
        setting = settings.choose(name, small)
        if row.detail["steps"] != setting.steps:
            raise BenchError(
                f"{out} has runs of {name} with {row.detail['steps']} steps, this trial's have {setting.steps}: "
                "give another --out"
            )
    return found


def check(out: Path, folder: Path, names: Sequence[str], chosen: Sequence[str], *, resume: bool, small: bool) -> None:
    """All that a run needs, before anything is trained.

    Raises:
        BenchError: data, a library, a GPU or ``out`` is not as it should be.
    """
    methods.check(chosen)
    if out.exists() and not resume:
        raise BenchError(f"{out} exists: give --resume to go on with it, or another --out")
    kept(out, small)
    for name in names:
        if name == GRAPH.name:
            graphs.library()
        if settings.choose(name, small).device == "cuda" and not torch.cuda.is_available():
            raise BenchError(f"{name} is for a GPU, and there is none: leave it out")
    for name in names:
        load(name, folder, 0, small)


def run_all(
    out: Path, folder: Path, names: Sequence[str], chosen: Sequence[str], seeds: int,
    *, resume: bool, small: bool, jobs: int, command: str,
) -> None:  # fmt: skip
    """Run what ``out`` lacks, and append it there; an interrupt loses the runs in progress alone.

    Raises:
        BenchError: as `check`.
    """
    check(out, folder, names, chosen, resume=resume, small=small)
    found = kept(out, small)
    seeds = 1 if small else seeds
    here = {**machine(), "threads": "1", "command": command}
    tried = {name: settings.choose(name, small) for name in names}
    least = sum(len(sweep(s, m, seeds)) + max(0, seeds - s.sweep_seeds) for s in tried.values() for m in chosen)
    with tqdm(total=least, unit="run") as progress:
        for setting in tried.values():
            for _ in range(2):  # the sweep, then what it chose
                runs = [run for method in chosen for run in wanted(setting, method, found, seeds)]
                todo = [run for run in runs if run not in found]
                progress.n = max(progress.n, sum(run[0] in tried and run[1] in chosen for run in found))
                for row in _rows(todo, folder, small, here, jobs):
                    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    row = replace(row, machine={**row.machine, "date": now})
                    append(out, [row])
                    found[run_of(row)] = row
                    progress.set_postfix_str(f"{row.model}, {row.contender}, {row.p50:.1f} s", refresh=False)
                    progress.total = max(progress.total, progress.n + 1)
                    progress.update()


def measure_all(
    out: Path, folder: Path, names: Sequence[str], chosen: Sequence[str], *, small: bool, command: str
) -> None:
    """Measure what ``out`` lacks: seconds of all methods in turn, and the identity; nothing else should run.

    Raises:
        BenchError: as `check`.
    """
    check(out, folder, names, chosen, resume=True, small=small)
    rows = read(out) if out.exists() else []
    done = {(row.what, row.model) for row in rows if row.benchmark == BENCHMARK}
    for name in names:
        here = {**machine(settings.choose(name, small).device), "command": command}
        if (SECONDS, name) not in done:
            append(out, seconds(name, chosen, folder, small, here, rounds=1 if small else ROUNDS))
        if (IDENTITY, name) not in done and name != GRAPH.name:
            append(out, [identity(name, folder, small, here)])


def _rows(todo: list[Run], folder: Path, small: bool, here: dict[str, str], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        for run in todo:
            yield run_one(run, folder, small, here)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_one, run, folder, small, here) for run in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
