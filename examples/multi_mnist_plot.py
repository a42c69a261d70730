"""The picture of the MultiMNIST demo: losses, task gradient norms, weights and cosine similarities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: a machine without a display must do

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from multi_mnist_report import Result
from multi_mnist_training import DB_MTL, EQUAL_WEIGHTING, MAX_NORM_ONLY, TASKS
from torch import Tensor

# Okabe and Ito's palette, told apart with any colour vision
TASK_COLOURS = ("#0072B2", "#E69F00", "#009E73")
PAIR_COLOURS = {(0, 1): "#CC79A7", (0, 2): "#56B4E9", (1, 2): "#D55E00"}


def smooth(values: Tensor, window: int) -> Tensor:
    """(N, C) running mean over the last ``window`` rows, fewer at the start."""
    sums = torch.cat([torch.zeros(1, values.shape[1], dtype=torch.float64), values.double().cumsum(0)])
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp_min(0)
    return (sums[ends] - sums[starts]) / (ends - starts)[:, None]


def _draw(axes: Axes, values: Tensor, line: str) -> None:
    """One line a task, over the steps."""
    steps = range(1, len(values) + 1)
    for column, colour in zip(smooth(values, max(1, len(values) // 20)).T, TASK_COLOURS, strict=True):
        axes.plot(steps, column, line, color=colour, linewidth=1.6 if line == "-" else 1.2)


def _legend(axes: Axes, lines: Mapping[str, str]) -> None:
    """Colours are tasks, line styles are ``lines``: name to style."""
    handles = [Line2D([], [], color=c, label=task) for task, c in zip(TASKS, TASK_COLOURS, strict=True)]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in lines.items()]
    axes.legend(handles=handles, fontsize=8, framealpha=0.9)


def _named(result: Result) -> str:
    return f"{result.method}, rate {result.rates[0]:g}"


def save_figure(results: Mapping[str, Result], path: Path) -> None:
    """Draw the first seed's histories at each method's chosen learning rate.

    Args:
        results: of every method.
        path: of the PNG; its folder is made.
    """
    balanced, equal, raw = results[DB_MTL], results[EQUAL_WEIGHTING], results[MAX_NORM_ONLY]
    history = balanced.histories[0]
    figure, ((losses, norms), (weights, cosines)) = plt.subplots(
        2, 2, figsize=(11, 7.6), sharex=True, layout="constrained"
    )
    figure.suptitle("MultiMNIST, three tasks, first seed")

    _draw(losses, equal.histories[0].losses, "--")
    _draw(losses, history.losses, "-")
    losses.set(title="Training loss of each task", ylabel="loss", yscale="log")
    _legend(losses, {_named(balanced): "-", _named(equal): "--"})

    _draw(norms, raw.histories[0].norms, "--")
    _draw(norms, history.norms, "-")
    norms.set(title="Norm of each task gradient, shared parameters", ylabel="norm", yscale="log")
    _legend(norms, {f"log-losses, EMA ({DB_MTL})": "-", f"losses ({MAX_NORM_ONLY})": "--"})

    _draw(weights, history.weights, "-")
    weights.set(title=f"Weight of each task gradient, {DB_MTL}", ylabel="largest norm / own norm", yscale="log")
    _legend(weights, {})

    cosines.axhline(0, color="0.6", linewidth=0.8)
    window = max(1, len(history.cosines) // 12)
    for (i, j), colour in PAIR_COLOURS.items():
        values = history.cosines[:, i, j]
        cosines.plot(history.cosine_steps, values, color=colour, linewidth=0.6, alpha=0.4)
        mean = smooth(values[:, None], window)[:, 0]
        cosines.plot(history.cosine_steps, mean, color=colour, label=f"{TASKS[i]}, {TASKS[j]}")
    cosines.set(title=f"Cosine similarity of task gradients, {DB_MTL}", ylabel="cosine similarity")
    cosines.legend(fontsize=8, framealpha=0.9)

    for axes in (weights, cosines):
        axes.set_xlabel("step")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)
