"""What was measured, for people: a table of each case, what it comes to in a line, and one picture of all."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import BARE, COPY, EW, FAMILIES, JD, LET_GO, LISTS, ON_DEVICE, ONE_PASS, ONE_ROW, OP, OURS, ROWS, SHIPPED
from .results import Row

LEVELS = {
    "op": "from a K x P matrix to the balanced gradient",
    "grads": "from .grad of K tasks to balanced .grad",
    "step": "a whole training step",
}
COLUMNS = ("contender", "ms", "p20 to p80", "ratio", "of copy", "held, MB", "peak, MB", "")
COLOURS = ("#1b7837", "#4393c3", "#2166ac", "#b2182b", "#d6604d", "#878787", "#bababa")


class Found(NamedTuple):
    """The rows of one case: those with times, or a verdict, by contender; and bytes, by contender and what."""

    level: str
    model: str
    K: int | None
    P: int | None
    times: dict[str, Row]
    bytes: dict[tuple[str, str], float]

    @property
    def title(self) -> str:
        """For people."""
        model = f" of {self.model}" if self.model else ""
        return f"{LEVELS[self.level]}{model}, K={self.K}, P={self.P:,}"

    def p50(self, name: str) -> float | None:
        """Milliseconds."""
        return self.times[name].p50 if name in self.times else None

    def best(self, family: str) -> str | None:
        """The fastest of a family."""
        names = [name for name in self.times if name.startswith(family) and self.p50(name) is not None]
        return min(names, key=lambda name: self.p50(name) or math.inf, default=None)


def found(rows: Iterable[Row]) -> list[Found]:
    """By case; of rows of one kind the last."""
    cases: dict[tuple[Any, ...], Found] = {}
    for row in rows:
        level, _, what = row.what.partition(" ")
        if row.benchmark != "bench" or level not in LEVELS:
            continue
        at = level, row.model, row.K, row.P, row.dtype, row.machine.get("device"), row.machine.get("threads")
        case = cases.setdefault(at, Found(level, row.model, row.K, row.P, {}, {}))
        if what:
            case.bytes[row.contender, what] = row.p50 or 0.0
        else:
            case.times[row.contender] = row
    return list(cases.values())


def cells(case: Found) -> list[list[str]]:
    """Lines of a table, of those with times; the fastest first within the order of the level."""
    lines = []
    for name, row in case.times.items():
        if row.p50 is None or row.p20 is None or row.p80 is None:
            lines.append([name, *[""] * 6, str(row.detail.get("verdict", ""))])
            continue
        held, peak = (case.bytes.get((name, what)) for what in ("held", "peak"))
        lines.append([
            name, f"{row.p50:.3g}", f"{row.p20:.3g} to {row.p80:.3g}", "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.of_copy is None else f"{row.of_copy:.2f}",
            *("" if count is None else f"{count / 1e6:,.1f}" for count in (held, peak)), "",
        ])  # fmt: skip
    return lines


def over(case: Found) -> str:
    """What the ratios are over."""
    return next((row.over for row in case.times.values() if row.over), "")


def times_as_fast(case: Found, ours: str, rival: str) -> str:
    """How many times as long the best of the rivals takes."""
    best, mine = case.best(rival), case.p50(ours)
    theirs = case.p50(best) if best else None
    return f"{theirs / mine:.2f}" if theirs is not None and mine else "-"


def summary(case: Found) -> str:
    """What it comes to."""
    ours = {"op": OP, "grads": LISTS, "step": ROWS}[case.level]
    row = case.times.get(ours)
    if row is None or row.p50 is None:
        return ""
    rivals = {"the best eager code": "eager", "the best torch.compile": "torch.compile", SHIPPED: SHIPPED}
    rivals |= {ON_DEVICE: ON_DEVICE, "TorchJD": JD}
    than = ", ".join(
        f"{ratio} times as fast as {name}"
        for name, family in rivals.items()
        if (ratio := times_as_fast(case, ours, family)) != "-"
    )
    text = f"{ours.split('(')[1][:-1]} takes {row.p50:.3g} ms: {than or 'there is nobody to compare it with'}"
    if row.of_copy is not None:
        text += f"; it moves what it must at {row.of_copy:.0%} of the speed of a copy"
    if case.level == "step" and case.p50(BARE) is not None:
        text += f"; {row.ratio:.2f} of the bare passes with .grad added up (floor by bytes: "
        text += f"{row.detail.get('floor_by_bytes', math.nan):.2f})"
        if "over_let_go" in row.detail:
            text += f", {row.detail['over_let_go']:.2f} with .grad let go"
    one, plain = case.times.get(ONE_PASS), case.times.get(EW)
    if one is not None and plain is not None and one.p50 is not None and plain.p50:
        text += f"; OnePassDBMTL takes {one.detail['ms_amortised'] / plain.p50:.2f} of equal weighting"
    return text


def table(case: Found) -> None:
    """Print it, with rich where that is installed."""
    head = [f"ratio to {over(case)}" if name == "ratio" else name for name in COLUMNS]
    lines, best = cells(case), {case.best("eager"), case.best("torch.compile")}
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head) - 1)]
        print(case.title)
        for line in [head, *lines]:
            print("  ".join([*(cell.ljust(w) for cell, w in zip(line, width, strict=False)), line[-1]]).rstrip())
        print(summary(case), end="\n\n")
        return
    shown = Table(title=case.title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index in (0, len(head) - 1) else "right")
    for line in lines:
        style = "bold green" if line[0].startswith(OURS) else "bold" if line[0] in best else "dim" if line[-1] else ""
        shown.add_row(*line, style=style)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(shown)
    console.print(summary(case), end="\n\n", highlight=False)


def colour(name: str) -> str:
    """One for each family."""
    return next((c for family, c in zip(FAMILIES, COLOURS, strict=True) if name.startswith(family)), "#000000")


def picture(cases: Sequence[Found], path: Path) -> str:
    """Draw bars for each case into a PNG; what to say of it."""
    drawn = [case for case in cases if any(row.p50 is not None for row in case.times.values())]
    if not drawn:
        return "no picture: nothing was timed"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: it needs matplotlib (pip install 'dbmtl-kernels[bench]')"
    heights = [0.32 * sum(row.p50 is not None for row in case.times.values()) + 1.1 for case in drawn]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, case in zip(axes, drawn, strict=True):
        _bars(axis, case)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return f"picture: {path}"


def _bars(axis: Any, case: Found) -> None:
    rows = [row for row in case.times.values() if row.p50 is not None and row.contender != COPY]
    rows.sort(key=lambda row: row.p50 or 0.0, reverse=True)
    values = [row.p50 or 0.0 for row in rows]
    bars = axis.barh([row.contender for row in rows], values, color=[colour(row.contender) for row in rows])
    spread = [[v - (row.p20 or v) for v, row in zip(values, rows, strict=True)]]
    spread.append([(row.p80 or v) - v for v, row in zip(values, rows, strict=True)])
    axis.errorbar(values, range(len(rows)), xerr=spread, fmt="none", ecolor="#333333", elinewidth=0.8)
    wide = max(values) > 20 * min(values)
    axis.set_xscale("log" if wide else "linear")
    top = max(row.p80 or 0.0 for row in rows)
    axis.set_xlim(min(values) / 2 if wide else 0, top * (3 if wide else 1.2))
    labels = [f"{v:.3g} ms, {row.ratio:.2f}" for v, row in zip(values, rows, strict=True)]
    for y, (label, row) in enumerate(zip(labels, rows, strict=True)):
        axis.text((row.p80 or 0.0) * 1.02, y, f"  {label}", va="center", fontsize=8)
    ours = next((row for row in rows if row.contender in (OP, LISTS) and row.of_copy), None)
    if ours is not None and ours.p50 is not None and ours.of_copy is not None:
        axis.axvline(ours.p50 * ours.of_copy, color="#333333", linestyle="--", linewidth=1)
        axis.set_xlabel("ms (dashed: the bytes it must move, at the speed of a copy)", fontsize=8)
    else:
        axis.set_xlabel("ms", fontsize=8)
    for bar in bars:
        bar.set_height(0.7)
    axis.set_title(f"{case.title}\nratio to {over(case)}", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


__all__ = ["LET_GO", "ONE_ROW", "Found", "cells", "found", "over", "picture", "summary", "table", "times_as_fast"]
