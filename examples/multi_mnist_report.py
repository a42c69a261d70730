"""Choosing learning rates, Delta_p, and the two tables of the MultiMNIST demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from multi_mnist_timing import AUTHORS
from multi_mnist_training import (
    DB_MTL,
    EQUAL_WEIGHTING,
    HIGHER_IS_BETTER,
    NUM_TASKS,
    SINGLE_TASK,
    History,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

Runs = Mapping[tuple[str, float], Sequence[History]]  # method and learning rate -> a history a seed


@dataclass(frozen=True)
class Result:
    """A method at the learning rate that its validation metrics chose.

    Attributes:
        method: its name.
        rates: (K,) the learning rate of each task; all equal but for single-task learning.
        histories: one a seed.
        test: (seeds, K) metrics on the test pairs.
        delta_p: (seeds,) against single-task learning with the same seed, in %.
    """

    method: str
    rates: tuple[float, ...]
    histories: Sequence[History]
    test: Tensor
    delta_p: Tensor


def delta_p(metrics: Tensor, baseline: Tensor) -> Tensor:
    """Mean over the tasks of the relative change against ``baseline``, in %; higher is better.

    Args:
        metrics: (..., K).
        baseline: (..., K).
    """
    sign = torch.tensor([1.0 if higher else -1.0 for higher in HIGHER_IS_BETTER])
    return 100 * (sign * (metrics - baseline) / baseline).mean(-1)


def choose(runs: Runs, rates: Sequence[float]) -> dict[str, Result]:
    """Pick learning rates on the validation pairs and evaluate on the test pairs.

    Single-task learning gets the best rate for each of its networks, a multi-task method the one rate with
    the best Delta_p. Neither looks at the test pairs.

    Args:
        runs: all histories, those of `SINGLE_TASK` among them.
        rates: the learning rates tried.
    """

    def validation(method: str, rate: float) -> Tensor:
        return torch.stack([history.validation for history in runs[method, rate]]).mean(0)

    def test(method: str, rate: float) -> Tensor:
        return torch.stack([history.test for history in runs[method, rate]])

    single = []
    for task, higher in enumerate(HIGHER_IS_BETTER):
        order = max if higher else min
        single.append(order(rates, key=lambda rate, task=task: validation(SINGLE_TASK, rate)[task].item()))
    columns = range(NUM_TASKS)
    baseline_validation = torch.stack([validation(SINGLE_TASK, single[task])[task] for task in columns])
    baseline = torch.stack([test(SINGLE_TASK, single[task])[:, task] for task in columns], dim=1)

    histories = [
        replace(networks[0], losses=torch.stack([networks[task].losses[:, task] for task in columns], dim=1))
        for networks in zip(*(runs[SINGLE_TASK, rate] for rate in single), strict=True)
    ]
    results = {SINGLE_TASK: Result(SINGLE_TASK, tuple(single), histories, baseline, delta_p(baseline, baseline))}
    for method in dict.fromkeys(name for name, _ in runs if name != SINGLE_TASK):
        best = max(rates, key=lambda rate, m=method: delta_p(validation(m, rate), baseline_validation).item())
        metrics = test(method, best)
        results[method] = Result(method, (best,) * NUM_TASKS, runs[method, best], metrics, delta_p(metrics, baseline))
    return results


def print_results(console: Console, results: Mapping[str, Result], rates: Sequence[float]) -> None:
    """The table of metrics."""
    seeds = len(results[SINGLE_TASK].delta_p)
    table = Table(
        title="Test metrics, mean over seeds" if seeds > 1 else "Test metrics, one seed",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in ("left digit\naccuracy %", "right digit\naccuracy %", "reconstr.\nerror", "Delta_p\n%"):
        table.add_column(name, justify="right", no_wrap=name.startswith("Delta_p"))
    table.add_column("learning\nrate", justify="right")
    for result in results.values():
        left, right, error = result.test.mean(0).tolist()
        delta = f"{result.delta_p.mean():+.1f}"
        if seeds > 1:
            delta += f" ±{result.delta_p.std():.1f}"
        table.add_row(
            result.method,
            f"{left:.1f}",
            f"{right:.1f}",
            f"{error:.2f}",
            "0" if result.method == SINGLE_TASK else delta,
            f"{result.rates[0]:g}" if len(set(result.rates)) == 1 else "per task",
            style="bold" if result.method == DB_MTL else None,
        )
    console.print(table)
    console.print(
        "Reconstruction error: squared error summed over an image. Delta_p: mean relative change of the "
        "three metrics against single-task learning, higher is better. Learning rates tried with every method: "
        f"{_listed(rates)}; chosen on validation pairs (single-task: {_listed(results[SINGLE_TASK].rates)})."
        + (" One seed: a difference of a point or two may be noise, see --seeds." if seeds == 1 else "")
        + (" ±: standard deviation over the seeds." if seeds > 1 else ""),
        highlight=False,
    )


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def print_times(console: Console, times: Mapping[str, float]) -> None:
    """The table of times."""
    table = Table(title="Time of a training step, median", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for name in ("ms", "against equal\nweighting", "against the\nauthors' arithmetic"):
        table.add_column(name, justify="right")
    for method, value in times.items():
        table.add_row(
            method,
            f"{value:.1f}",
            f"{value / times[EQUAL_WEIGHTING]:.2f} x",
            f"{value / times[AUTHORS]:.2f} x",
            style="bold" if method == DB_MTL else None,
        )
    console.print(table)
