"""Pictures of a run, drawn with matplotlib from what its monitor told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Rows = Iterable[Mapping[str, Any]]
Lines = dict[tuple[str, str], tuple[Array, Array]]  # kind and name -> steps, values

# Kind of a tag, as in "norm/NAME"; title of its panel, and what is beside its axis
PANELS = {
    "loss": ("Loss of each task", "loss"),
    "norm": ("Norm of each task gradient, shared parameters", "norm"),
    "weight": ("Weight of each task gradient", "weight"),
    "cosine": ("Cosine of each pair of task gradients", "cosine"),
    "cosine_mean": ("Mean cosine with the other tasks", "cosine"),
    "cosine_min": ("Least cosine with another task", "cosine"),
}
STYLES = ("-", "--", ":", "-.")
# Okabe and Ito's palette, told apart with any colour vision. Pairs begin at its fourth, so as not to look like tasks.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MOST_NAMED = 16  # lines; a legend of more would hide them
HOW = "collect balancer.monitor().as_dict() in a list, one a step, and give the list"


def plot(rows: Rows | Mapping[str, Rows], *, prefix: str = "", smooth: int | None = None) -> Figure:
    """Draw the losses, norms, weights and cosines of a run over its steps.

    There is a panel for each of these that the rows have. The y-axis is logarithmic where the values span more than a
    factor of ten. Values that are not finite are gaps. Where there are many rows a running mean is drawn over them.

    Args:
        rows: what `Monitor.as_dict` or `Monitor.scalars` gave, one a step, or a file of a logger as `csv.DictReader`
            reads it: mappings from tags to numbers. What is absent, None or "" is left out. Tags that a monitor does
            not give are passed over, and rows that have none. Or up to four runs by name, for lines of several styles.
        prefix: of the tags, as it was given to `Monitor.as_dict`: "balancer/" of the adapters for trainers.
        smooth: how many values a running mean is of; 1 for none. None: a twentieth of the line.

    Returns:
        A figure that pyplot does not know: ``figure.savefig("run.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``rows`` are something else; a value is not a number.
        ValueError: no row has such a tag; a row has no step; more than four runs; ``smooth`` < 1.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("dbk.plot needs matplotlib: pip install 'dbmtl-kernels[plot]'") from error
    if smooth is not None and not (isinstance(smooth, Integral) and smooth >= 1):
        raise ValueError(f"smooth must be an integer >= 1, got {smooth!r}")
    runs = {name: _lines(own, prefix, name) for name, own in _runs(rows).items()}
    kinds = [kind for kind in PANELS if any(kind == own for lines in runs.values() for own, _ in lines)]
    columns = min(2, len(kinds))
    height = -(-len(kinds) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for kind, axes in zip(kinds, panels, strict=False):
        _panel(axes, kind, runs, smooth)
    for axes in list(panels):
        axes.remove()
    return figure


def _runs(rows: Any) -> dict[str, Rows]:
    """By name; a single one has none."""
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes)):
        raise TypeError(f"rows must be a list of dicts, got {type(rows).__name__}: {HOW}")
    if not isinstance(rows, Mapping):
        return {"": rows}
    for name, own in rows.items():
        if not isinstance(own, Iterable) or isinstance(own, (str, bytes, Mapping)) or getattr(own, "ndim", 1) == 0:
            raise TypeError(f"rows is one dict, whose {name!r} is not a list of dicts: {HOW}")
    if not 1 <= len(rows) <= len(STYLES):
        raise ValueError(f"1 to {len(STYLES)} runs can be drawn, got {len(rows)}")
    return {str(name): own for name, own in rows.items()}


def _lines(rows: Rows, prefix: str, run: str) -> Lines:
    """The points of each line."""
    tags = re.compile(re.escape(prefix) + rf"({'|'.join(PANELS)})/(.+)", re.S)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    others: dict[str, None] = {}
    of = f"of run {run!r} " if run else ""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} {of}is no dict of numbers, but {type(row).__name__}: {HOW}")
        points = []
        for tag, value in row.items():
            if (match := tags.fullmatch(str(tag))) is None:
                others[str(tag)] = None
            elif value is not None and not (isinstance(value, str) and not value):
                points.append((match.groups(), _number(value, tag, number, of)))
        if not points:
            continue
        step = next((row[tag] for tag in (f"{prefix}step", "step") if row.get(tag) not in (None, "")), None)
        if step is None:
            raise ValueError(f"row {number} {of}has no {prefix + 'step'!r}")
        at = _number(step, "step", number, of)
        for (kind, name), value in points:
            found.setdefault((kind, name), []).append((at, value))
    if not found:
        raise ValueError(_nothing(of, others, prefix))
    return {key: (np.array(points)[:, 0], np.array(points)[:, 1]) for key, points in found.items()}


def _number(value: Any, tag: Any, row: int, of: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"row {row} {of}has no number under {tag!r}, but {value!r}") from error
    return number if np.isfinite(number) else np.nan


def _nothing(of: str, tags: Iterable[str], prefix: str) -> str:
    """What to say where there is nothing to draw."""
    said = f"no row {of}has {', '.join(f'{prefix}{kind}/NAME' for kind in PANELS)}: {HOW}"
    with_prefix = (re.fullmatch(rf"(.*?)({'|'.join(PANELS)})/.+", tag, re.S) for tag in tags)
    own = next((match[1] for match in with_prefix if match is not None and match[1] != prefix), None)
    return said if own is None else f"{said}; there are such tags with prefix={own!r}"


def _panel(axes: Axes, kind: str, runs: Mapping[str, Lines], smooth: int | None) -> None:
    """Colours are tasks, or pairs of them; line styles are runs."""
    from matplotlib.lines import Line2D

    own = {run: {name: line for (of, name), line in lines.items() if of == kind} for run, lines in runs.items()}
    names = list(dict.fromkeys(name for lines in own.values() for name in lines))
    colours = dict(zip(names, _colours(len(names), kind == "cosine"), strict=True))
    for style, lines in zip(STYLES, own.values(), strict=False):
        for name, (x, y) in lines.items():
            window = min(len(y), smooth or max(1, len(y) // 20))
            if window > 1:
                axes.plot(x, y, color=colours[name], linewidth=0.6, alpha=0.25)
            look: dict[str, Any] = {"linestyle": style, "linewidth": 1.6 if style == "-" else 1.2}
            axes.plot(x, _mean(y, window), color=colours[name], marker="." if len(y) == 1 else None, **look)
    if kind.startswith("cosine"):
        axes.axhline(0, color="0.6", linewidth=0.8)
    elif _spans_decades(np.concatenate([y for lines in own.values() for _, y in lines.values()])):
        axes.set_yscale("log", nonpositive="mask")
    title, label = PANELS[kind]
    named = len(names) <= MOST_NAMED
    axes.set(title=title if named else f"{title}: {len(names)} lines", xlabel="step", ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colours[name], label=_shown(name)) for name in names if named]
    for style, (run, lines) in zip(STYLES, own.items(), strict=False):
        if run and lines:
            look = {"linestyle": style}
            handles.append(Line2D([], [], color="0.3", label=_shown(run), **look))
    if handles:
        axes.legend(handles=handles, fontsize=8, framealpha=0.9, ncols=1 + (len(handles) > 8))


def _spans_decades(values: Array) -> bool:
    """Whether there is none below 0, and those above it span more than a factor of ten."""
    known = values[np.isfinite(values)]
    positive = known[known > 0]
    return bool(positive.size and known.min() >= 0 and positive.max() / 10 > positive.min())


def _shown(name: str) -> str:
    """Without what matplotlib would take for a formula, or for a line to leave out."""
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def _colours(count: int, pairs: bool) -> Iterator[Any]:
    if count <= len(COLOURS):
        return iter((COLOURS[3:] + COLOURS[:3] if pairs else COLOURS)[:count])
    from matplotlib import colormaps

    return iter(colormaps["viridis"](np.linspace(0, 0.95, count)))


def _mean(values: Array, window: int) -> Array:
    """Running mean over the last ``window`` values, fewer at the start. What is NaN is left out, and stays NaN."""
    if window == 1:
        return values
    # Not by differences of a running sum: one huge loss would leave nothing of the small ones after it.
    known = np.isfinite(values)
    sums, counts = (np.convolve(x, np.ones(window))[: len(values)] for x in (np.where(known, values, 0.0), known))
    return np.where(known, sums / np.maximum(counts, 1), np.nan)
