"""From rows to figures: the rate that validation chooses, and changes of the test metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from dbmtl_kernels.bench.results import Row

from .methods import STL
from .settings import SEEDS, Setting, choose
from .trial import BENCHMARK, WHAT, Run

Metrics = Mapping[str, float | None]


def signs(setting: Setting) -> dict[str, int]:
    """Of each metric: 1 where higher is better, else -1."""
    return {name: metric.sign for task in setting.tasks for name, metric in task.metrics.items()}


def number(value: float | None) -> float:
    """NaN for None, which a row has where a run diverged."""
    return math.nan if value is None else value


def changes(setting: Setting, metrics: Metrics, reference: Metrics) -> dict[str, float]:
    """Relative change of each metric in %; positive is better."""
    return {
        name: 100 * sign * (number(metrics[name]) - number(reference[name])) / number(reference[name])
        for name, sign in signs(setting).items()
    }


def delta_p(setting: Setting, metrics: Metrics, reference: Metrics) -> float:
    """Mean over the tasks of the mean over a task's metrics of the relative change in %; higher is better."""
    change = changes(setting, metrics, reference)
    by_task = [[change[name] for name in task.metrics] for task in setting.tasks]
    return sum(sum(of_task) / len(of_task) for of_task in by_task) / len(by_task)


def delta_m(setting: Setting, metrics: Metrics, reference: Metrics) -> float:
    """Mean over all metrics of the relative change in %, the other way round: lower is better."""
    change = changes(setting, metrics, reference)
    return -sum(change.values()) / len(change)


def score(setting: Setting, metrics: Metrics) -> float:
    """As `delta_p` of logarithms, without a reference: differences are relative changes. -inf where a run diverged."""
    by_task = [
        np.mean([m.sign * math.log(max(number(metrics[name]), 1e-12)) for name, m in task.metrics.items()])
        for task in setting.tasks
    ]
    mean = float(np.mean(by_task))
    return mean if math.isfinite(mean) else -math.inf


def best_rate(setting: Setting, rows: Iterable[Row], names: Sequence[str] | None = None) -> float:
    """Whose validation score, mean over the seeds that try all rates, is highest; of some tasks only, if named."""
    by_rate: dict[float, list[float]] = {lr: [] for lr in setting.rates}
    part = setting if names is None else _part(setting, names)
    for row in rows:
        if row.detail["seed"] < setting.sweep_seeds and row.detail["lr"] in by_rate:
            by_rate[row.detail["lr"]].append(score(part, row.detail["validation"]))
    return max(by_rate, key=lambda lr: float(np.mean(by_rate[lr])) if by_rate[lr] else -math.inf)


def _part(setting: Setting, names: Sequence[str]) -> Setting:
    return replace(setting, tasks=tuple(task for task in setting.tasks if task.name in names))


def best_rates(setting: Setting, method: str, rows: Sequence[Row]) -> dict[str, float]:
    """Of each task: one for all, but single-task networks have a rate each."""
    if method == STL:
        return {task.name: best_rate(setting, rows, [task.name]) for task in setting.tasks}
    return dict.fromkeys((task.name for task in setting.tasks), best_rate(setting, rows))


def run_of(row: Row) -> Run:
    """What was run."""
    return row.model, row.contender, row.detail["lr"], row.detail["seed"]


def training(rows: Iterable[Row]) -> dict[Run, Row]:
    """The rows of training, by what was run."""
    return {run_of(row): row for row in rows if row.benchmark == BENCHMARK and row.what == WHAT}


def sweep(setting: Setting, method: str, seeds: int) -> list[Run]:
    """The runs of the seeds that try all rates."""
    return [(setting.name, method, lr, seed) for seed in range(min(seeds, setting.sweep_seeds)) for lr in setting.rates]


def wanted(setting: Setting, method: str, found: Mapping[Run, Row], seeds: int) -> list[Run]:
    """All runs: those of the sweep, and once these are found, those of the other seeds at the chosen rates."""
    runs = sweep(setting, method, seeds)
    if not all(run in found for run in runs):
        return runs
    rates = sorted(set(best_rates(setting, method, [found[run] for run in runs]).values()))
    return runs + [(setting.name, method, lr, seed) for seed in range(setting.sweep_seeds, seeds) for lr in rates]


@dataclass(frozen=True)
class Outcome:
    """What a method came to in a setting.

    Attributes:
        rates: chosen, of each task.
        test, validation: metrics of each seed.
        rows: of each seed at the chosen rate; of single-task learning one of several.
    """

    rates: dict[str, float]
    test: list[dict[str, float | None]]
    validation: list[dict[str, float | None]]
    rows: list[Row]

    def watched(self, name: str) -> list[Any]:
        """What each seed's row tells under a name."""
        return [row.detail[name] for row in self.rows]


def outcome(
    setting: Setting, method: str, found: Mapping[Run, Row], seeds: int, rate: float | None = None
) -> Outcome | None:
    """At the rates that validation chose, or at one rate for all; None where a run lacks."""
    if not all(run in found for run in wanted(setting, method, found, seeds)):
        return None
    if rate is None:
        rates = best_rates(setting, method, [found[run] for run in sweep(setting, method, seeds)])
    else:
        rates = dict.fromkeys((task.name for task in setting.tasks), rate)
    try:
        by_seed = [{task: found[setting.name, method, lr, seed] for task, lr in rates.items()} for seed in range(seeds)]
    except KeyError:
        return None
    of_task = {task.name: list(task.metrics) for task in setting.tasks}

    def taken(part: str) -> list[dict[str, float | None]]:
        return [{m: row.detail[part][m] for task, row in of.items() for m in of_task[task]} for of in by_seed]

    return Outcome(rates, taken("test"), taken("validation"), [next(iter(of.values())) for of in by_seed])


def outcomes(
    rows: Iterable[Row], names: Iterable[str], methods: Iterable[str], seeds: int = SEEDS, small: bool = False
) -> dict[tuple[str, str], Outcome]:
    """Of each setting and method of which all runs are there."""
    found = training(rows)
    methods = list(methods)
    results = {}
    for setting in (choose(name, small) for name in names):
        for method in methods:
            if (result := outcome(setting, method, found, seeds)) is not None:
                results[setting.name, method] = result
    return results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: NaN of one value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)
