"""The picture of the MultiMNIST demo: losses, task gradient norms, weights and cosine similarities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dbmtl_kernels as dbk
import matplotlib  # noqa: F401, what it cannot do without is said at its start
from multi_mnist_report import Result
from multi_mnist_training import DB_MTL, EQUAL_WEIGHTING, MAX_NORM_ONLY, TASKS


def save_figure(results: Mapping[str, Result], path: Path) -> None:
    """Draw the first seed's histories at each method's chosen learning rate.

    Args:
        results: of every method.
        path: of the PNG; its folder is made.
    """
    balanced, equal, raw = (results[method] for method in (DB_MTL, EQUAL_WEIGHTING, MAX_NORM_ONLY))
    losses = [
        {"step": step, **{f"loss/{task}": loss for task, loss in zip(TASKS, row, strict=True)}}
        for step, row in enumerate(equal.histories[0].losses.tolist(), 1)
    ]
    norms = [{tag: row[tag] for tag in ("step", *(f"norm/{task}" for task in TASKS))} for row in raw.histories[0].rows]
    figure = dbk.plot({_named(balanced): balanced.histories[0].rows, _named(equal): losses, _named(raw): norms})
    figure.suptitle("MultiMNIST, three tasks, first seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def _named(result: Result) -> str:
    return f"{result.method}, rate {result.rates[0]:g}"
