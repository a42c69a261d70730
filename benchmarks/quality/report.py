"""The tables: each method's test metrics against exact DB-MTL's, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from . import results
from .errors import TrialError
from .methods import EVERY_METHOD, EXACT
from .results import Row
from .settings import SETTINGS, Setting
from .tasks import KINDS
from .trial import choose_setting, plan

ONE_PASS = "one pass"
POOLED_GOAL, WORST_GOAL = 0.5, 2.0
WITHOUT = "rf1-rescaled"  # where a method may lose without bound
Sweep = dict[float, list[Row]]  # learning rate -> a run a seed
Sweeps = dict[tuple[str, str], Sweep]  # of a setting and a method


def signs(setting: Setting) -> dict[str, int]:
    """Of each task: 1 where a higher metric is better, else -1."""
    return {task.name: 1 if KINDS[task.kind].higher_is_better else -1 for task in setting.tasks}


def score(setting: Setting, metrics: dict[str, float]) -> float:
    """Mean over the tasks of the metric's logarithm, signed: its differences are relative changes to no reference."""
    logs = [sign * math.log(max(metrics[name], 1e-12)) for name, sign in signs(setting).items()]
    mean = sum(logs) / len(logs)
    return mean if math.isfinite(mean) else -math.inf


def change(setting: Setting, metrics: dict[str, float], reference: dict[str, float]) -> float:
    """Mean over the tasks of the relative change of the metric, in %; positive is better."""
    changes = [sign * (metrics[name] - reference[name]) / reference[name] for name, sign in signs(setting).items()]
    return 100 * sum(changes) / len(changes)


def complete(rows: Sequence[Row], seeds: int, small: bool) -> tuple[Sweeps, list[str]]:
    """The sweeps of which all runs are there, and of those begun what is there."""
    found = {row.run: row for row in rows}
    sweeps: Sweeps = {}
    lacking = []
    for name in SETTINGS:
        for method in EVERY_METHOD:
            runs = plan([name], [method], seeds, small)
            there = [found[run] for run in runs if run in found]
            if len(there) == len(runs):
                rates = choose_setting(name, small).rates
                sweeps[name, method] = {lr: [row for row in there if row.lr == lr] for lr in rates}
            elif there:
                lacking.append(f"{name}, {method}: {len(there)} of {len(runs)} runs")
    return sweeps, lacking


def choose(setting: Setting, sweep: Sweep) -> float:
    """The rate whose validation score, mean over the seeds, is highest."""
    return max(sweep, key=lambda lr: sum(score(setting, row.validation) for row in sweep[lr]))


def differences(
    sweeps: Sweeps, method: str, rate: Callable[[str], float], reference: str = EXACT
) -> dict[str, list[float]]:
    """Of each setting, a change a seed, to the reference at its own rate.

    Args:
        sweeps: of all methods.
        method: which.
        rate: of a setting.
        reference: a method.
    """
    found = {}
    for name, setting in SETTINGS.items():
        if (name, method) in sweeps and (name, reference) in sweeps:
            other = sweeps[name, reference]
            pairs = zip(sweeps[name, method][rate(name)], other[choose(setting, other)], strict=True)
            found[name] = [change(setting, row.test, to.test) for row, to in pairs]
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: NaN of one value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def pool(by_setting: dict[str, list[float]], without: str | None = None) -> list[float]:
    """The pairs of all settings."""
    return [x for name, values in by_setting.items() if name != without for x in values]


def shown(values: Sequence[float]) -> str:
    """Mean +- standard error."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:+.1f}" if math.isnan(error) else f"{mean:+.1f} ± {error:.1f}"


def verdict(by_setting: dict[str, list[float]]) -> list[str]:
    """Whether one pass meets the goals."""
    pooled, error = mean_and_error(pool(by_setting))
    means = {name: mean_and_error(values)[0] for name, values in by_setting.items()}
    worst = min(means, key=lambda name: means[name])
    met = {True: "met", False: "NOT met"}
    low = [name for name in means if not means[name] >= -WORST_GOAL]
    unsure = f", though the error is wider than {POOLED_GOAL}" if error > POOLED_GOAL else ""
    near = abs(pooled) <= POOLED_GOAL
    return [
        f"Goal, pooled within {POOLED_GOAL} points of exact: {pooled:+.2f} ± {error:.2f}, {met[near]}{unsure}.",
        f"Goal, no setting worse by more than {WORST_GOAL:g}: lowest is {worst}, {means[worst]:+.2f}, {met[not low]}"
        + (f" in {', '.join(low)}." if low else "."),
    ]


def print_tables(path: Path, seeds: int, small: bool, reference: str = EXACT) -> None:
    """Print what the results file holds, the changes to those of the method ``reference``.

    Raises:
        TrialError: no such file, another schema, or no setting of which all runs of the reference are there.
    """
    if not path.exists():
        raise TrialError(f"{path} does not exist: python -m benchmarks.quality run --out {path}")
    sweeps, lacking = complete(results.read(path), seeds, small)
    names = [name for name in SETTINGS if (name, reference) in sweeps]
    methods = [method for method in EVERY_METHOD if any((name, method) in sweeps for name in names)]
    if not names:
        raise TrialError(
            f"{path} has no setting of which all runs of {reference!r} are there: {'; '.join(lacking) or 'no runs'}"
        )
    chosen = {key: choose(SETTINGS[key[0]], sweep) for key, sweep in sweeps.items()}
    others = [method for method in methods if method != reference]
    own = {m: differences(sweeps, m, lambda name, m=m: chosen[name, m], reference) for m in others}
    same = {m: differences(sweeps, m, lambda name: chosen[name, reference], reference) for m in others}

    console = Console(width=400, highlight=False)
    _print_differences(console, f"Test, relative to {reference}, %: each at the rate of its own choice", names, own)
    _print_differences(console, f"The same, all at the rate that {reference} chose", names, same)
    _print_rates(console, names, methods, chosen, sweeps)
    _print_levels(console, names, sweeps, chosen, reference)
    if reference == EXACT and ONE_PASS in own:
        console.print(*verdict(own[ONE_PASS]), sep="\n")
    for line in lacking:
        console.print(f"Left out, not complete: {line}.")


def _print(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=MARKDOWN)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, table)


def _print_differences(
    console: Console, title: str, names: list[str], by_method: dict[str, dict[str, list[float]]]
) -> None:
    """A row a setting, a column a method, and at the end the pairs of all settings, of methods that have them all."""
    rows = [[name, *(shown(found.get(name, [])) for found in by_method.values())] for name in names]
    whole = [found if len(found) == len(names) else {} for found in by_method.values()]
    rows.append(["pooled", *(shown(pool(found)) for found in whole)])
    if WITHOUT in names:
        rows.append([f"without {WITHOUT}", *(shown(pool(found, WITHOUT)) for found in whole)])
    _print(console, title, ["setting", *by_method], rows)


def _print_rates(
    console: Console, names: list[str], methods: list[str], chosen: dict[tuple[str, str], float], sweeps: Sweeps
) -> None:
    def cell(name: str, method: str) -> str:
        if (name, method) not in chosen:
            return "-"
        rate, rates = chosen[name, method], sorted(sweeps[name, method])
        return f"{rate:g}" + ("*" if rate in (rates[0], rates[-1]) else "")

    rows = [
        [name, ", ".join(f"{lr:g}" for lr in SETTINGS[name].rates), *(cell(name, method) for method in methods)]
        for name in names
    ]
    _print(console, "Learning rates chosen; * at an end of the sweep", ["setting", "sweep", *methods], rows)


def _print_levels(
    console: Console, names: list[str], sweeps: Sweeps, chosen: dict[tuple[str, str], float], method: str
) -> None:
    """That networks learn: what a method reaches beside a constant prediction."""
    rows = []
    for name in names:
        runs = sweeps[name, method][chosen[name, method]]
        for task, sign in signs(SETTINGS[name]).items():
            reached, idle = (float(np.mean([getattr(r, x)[task] for r in runs])) for x in ("test", "constant"))
            unit = "accuracy, %" if sign > 0 else "error"
            rows.append([f"{name}, {task}", unit, f"{reached:.3g}", f"{idle:.3g}"])
    _print(console, "Test metrics, mean over the seeds", ["task", "metric", method, "constant"], rows)
