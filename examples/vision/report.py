"""The rows that the examples write, and the table they print of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

import torch
from dbmtl_kernels.bench.results import Row, machine
from rich.console import Console
from rich.table import Table

from .methods import STL
from .metrics import Metrics, Task, delta_m, delta_p
from .training import Outcome, Run, mean_of, setting
from .work import Work

BENCHMARK = "data_sets"
MOST_METRICS = 9  # shown one by one
DELTAS = ("Δm, published stl", "Δm, own stl", "Δp, own stl")


def model_of(work: Work) -> str:
    """What a row says of data set, network and protocol."""
    return f"{work.name}, {work.model}, {work.protocol.name} protocol"


def told(metrics: Metrics) -> str:
    """The metrics, or their mean where there are many."""
    values = [(f"{task} {name}", value) for task, of_task in metrics.items() for name, value in of_task.items()]
    if len(values) > MOST_METRICS:
        return f"mean of {len(values)} metrics {fmean(value for _, value in values):.4g}"
    return ", ".join(f"{name} {value:.4g}" for name, value in values)


def own_stl(rows: Sequence[Row], of: dict[str, Any], num_tasks: int) -> Metrics | None:
    """Metrics of the single-task networks among the rows, trained as ``of`` says; None unless each task has one."""
    several: dict[str, list[Metrics]] = {}
    for row in rows:
        if row.contender == STL and row.detail["setting"] == of:
            for task, metrics in row.detail["metrics"].items():
                several.setdefault(task, []).append({task: metrics})
    if len(several) < num_tasks:
        return None
    return {task: mean_of(found)[task] for task, found in several.items()}


def changes(tasks: Sequence[Task], metrics: Metrics, base: Metrics | None) -> dict[str, float] | None:
    """Delta_m and Delta_p."""
    if base is None:
        return None
    return {"delta_m": delta_m(tasks, metrics, base), "delta_p": delta_p(tasks, metrics, base)}


def row_of(run: Run, work: Work, outcome: Outcome, rows: Sequence[Row], device: torch.device) -> Row:
    """A row of the one schema; p50 is Delta_m against the published single-task networks, else against those here."""
    of = setting(work, run.weights)
    against: dict[str, Any] = {}
    if run.method != STL:
        base = own_stl(rows, of, len(work.tasks))
        against["published"] = None if work.smoke else changes(work.tasks, outcome.metrics, work.protocol.stl)
        against["own"] = changes(work.tasks, outcome.metrics, base)
    found = against.get("published") or against.get("own")
    detail = {
        "run": run.identity(work), "setting": of, "metrics": outcome.metrics, "selected": outcome.selected,
        "seconds_per_epoch": median(outcome.seconds) if outcome.seconds else None,
        "higher_is_better": [[task.name, *metric] for task in work.tasks for metric in task.metrics.items()], **against,
    }  # fmt: skip
    return Row(
        BENCHMARK, "test metrics", run.method, model_of(work), len(run.tasks), outcome.shared,
        p50=found["delta_m"] if found else None, unit="%", bytes=outcome.memory, rounds=1, detail=detail,
        machine=machine(device),
    )  # fmt: skip


def print_table(rows: Sequence[Row], others: Mapping[str, float] | None = None) -> None:
    """Means over seeds, a column for each method and a table for each setting; then what others publish.

    Changes against the single-task networks here are computed anew: these may have been trained after the method.
    """
    for of in {json.dumps(of, sort_keys=True): of for of in (row.detail["setting"] for row in rows)}.values():
        mine = [row for row in rows if row.detail["setting"] == of]
        some = f"{of['epochs']} epochs, batch {of['batch']}, rate {of['rate']:g}, augmented: {of['augment']}"
        table = Table(title=f"{mine[0].model}: {some}{', generated data' if of['smoke'] else ''}")
        table.add_column("")
        columns = []
        for name, column in _columns(mine, of).items():
            table.add_column(name, justify="right")
            columns.append(column)
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
        Console(width=max(100, 24 + 18 * len(columns))).print(table)
    if others:
        told = ", ".join(f"{name} {value:+.2f}" for name, value in others.items())
        print(f"Δm that others publish under this protocol (lower is better): {told}")


def _columns(rows: Sequence[Row], setting: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of each method, what to show by name."""
    metrics: dict[str, dict[str, bool]] = {}
    for task, name, higher in rows[0].detail["higher_is_better"]:
        metrics.setdefault(task, {})[name] = higher
    tasks = [Task(name, of_task) for name, of_task in metrics.items()]
    base = own_stl(rows, setting, len(tasks))
    found = {"stl": {"seeds": "", **_cells(tasks, [base]), **dict.fromkeys((*DELTAS, "s/epoch"), "")}} if base else {}
    for name, group in _grouped(rows).items():
        every = [row.detail["metrics"] for row in group]
        own = [change for one in every if (change := changes(tasks, one, base))]
        deltas = (
            [row.detail["published"]["delta_m"] for row in group if row.detail["published"]],
            [change["delta_m"] for change in own],
            [change["delta_p"] for change in own],
        )
        seconds = [row.detail["seconds_per_epoch"] for row in group if row.detail["seconds_per_epoch"]]
        found[name] = {
            "seeds": str(len(group)), **_cells(tasks, every), **dict(zip(DELTAS, map(_spread, deltas), strict=True)),
            "s/epoch": f"{median(seconds):.1f}" if seconds else "",
        }  # fmt: skip
    if not found:  # some single-task networks, and nothing else yet
        known = {
            (task, name): x for row in rows for task, of in row.detail["metrics"].items() for name, x in of.items()
        }
        found["stl"] = {f"{task} {name}": f"{value:.4g}" for (task, name), value in known.items()}
    return found


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By method, and beta where it has one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.contender != STL:
            run = row.detail["run"]
            beta = f" {run['beta']:g}/k^{run['beta_sigma']:g}" if "beta" in run else ""
            found.setdefault(row.contender + beta, []).append(row)
    return found


def _cells(tasks: Sequence[Task], every: Sequence[Metrics]) -> dict[str, str]:
    mean = mean_of(every)
    values = {f"{task.name} {name}": mean[task.name][name] for task in tasks for name in task.metrics}
    if len(values) > MOST_METRICS:
        values = {f"mean of {len(values)} metrics": fmean(values.values())}
    return {name: f"{value:.4g}" for name, value in values.items()}


def _spread(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    error = f" ± {stdev(known) / len(known) ** 0.5:.2f}" if len(known) > 1 else ""
    return f"{fmean(known):+.2f}{error}"
