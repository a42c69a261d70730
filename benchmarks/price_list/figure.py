"""The figure of the price list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dbmtl_kernels.bench.results import BenchError, Row

from .methods import AUTHORS, BARE, ONE_ROW, ROWS, A
from .tables import BEYOND, FLOOR, TIMES, found_in, methods_in, price, shown, tasks_of, trunks_in

COLOURS = {
    ROWS: "tab:red",
    ONE_ROW: "tab:orange",
    A: "tab:green",
    BARE: "black",
    AUTHORS: "tab:blue",
    "TorchJD mtl_backward, UPGrad": "tab:purple",
    "Nash-MTL": "tab:brown",
}


def draw(rows: Iterable[Row], path: Path) -> None:
    """Time over equal weighting and memory beyond it, against K, of each trunk; all methods, those named in colour.

    Raises:
        BenchError: matplotlib is not installed, or there are no rows.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("the figure needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    found = found_in(rows)
    trunks = trunks_in(found, growing=False)
    if not trunks:
        raise BenchError("no rows of several K: measure first")
    figure, axes = plt.subplots(2, len(trunks), figsize=(4.2 * len(trunks), 7.6), sharey="row", squeeze=False)
    for column, trunk in zip(axes.T, trunks, strict=True):
        ks = tasks_of(found, trunk)
        for axis, kind in zip(column, (TIMES, BEYOND), strict=True):
            for method in sorted(
                methods_in(found), key=lambda name: -([*COLOURS].index(name) if name in COLOURS else 99)
            ):
                values = [price(found, trunk, k, method, kind) for k in ks]
                points = [
                    (k, v) for k, v in zip(ks, values, strict=True) if v is not None and (kind == TIMES or v >= FLOOR)
                ]
                if not points:
                    continue
                colour = COLOURS.get(method)
                name = shown(method).replace("`", "")
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=4 if colour else 2,
                    color=colour or "0.78", linewidth=1.8 if colour else 0.8, label=name if colour else None,
                    zorder=3 if colour else 1,
                )  # fmt: skip
            if kind == TIMES:
                axis.plot(ks, [(1 + 2 * k) / 3 for k in ks], "k:", linewidth=1.2, label="(1 + 2K) / 3")
                axis.set_title(trunk)
            axis.set(xscale="log", yscale="log", xlabel="K")
            axis.xaxis.set_major_locator(FixedLocator(ks))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.grid(True, which="major", color="0.92")
    axes[0, 0].set_ylabel("time of a step over equal weighting")
    axes[1, 0].set_ylabel("peak memory beyond it, in P numbers")
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    grey = plt.Line2D([], [], color="0.78", marker="o", markersize=2)
    lines["all other methods"] = grey
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
