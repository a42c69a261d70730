"""Tables of the pages, drawn from the rows of results: ``python -m benchmarks report``, or ``make report``.

A table stands between ``<!-- rows: NAME -->`` and ``<!-- /rows -->``; nothing there is written by hand. A new one is a
line in `TABLES`, the markers in a page, and a function of the rows that gives Markdown. ``--check`` only says which
pages disagree with their rows, as tests/test_report.py does.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results"
MARKED = re.compile(r"(<!-- rows: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- /rows -->)", re.S)


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        results: the files in benchmarks/results whose rows it is drawn from, one after another.
        draw: "module:function", imported when the table is drawn; gets the rows, gives Markdown.
    """

    results: tuple[str, ...]
    draw: str

    def markdown(self) -> str:
        """The table as it should be."""
        rows = [row for name in self.results for row in results.read(RESULTS / name)]
        return function(self.draw)(rows).strip("\n")


PRICES = ("price_list.csv",)
PRICE_TABLES = ("published", "exact", "by-tasks", "by-parameters")
# By the name in the marker.
TABLES: dict[str, Table] = {
    **{
        f"claims-{name}": Table(("claims.csv",), f"claims.pages:{name}")
        for name in ("verdicts", "deltas", "rates", "watched", "seconds", "levels", "forms", "same_rates", "goals")
    },
    "bench": Table(("bench.csv",), "tables:readme"),
    "bench_steps": Table(("bench.csv",), "tables:steps"),
    "felt": Table(("bench.csv",), "tables:felt"),
    "bench_gpu": Table(("bench_h100.csv",), "tables:readme"),
    "bench_gpu_steps": Table(("bench_h100.csv",), "tables:steps"),
    "learning_rate": Table(("learning_rate.csv",), "learning_rate:table"),
    "forms": Table(PRICES, "benchmarks.price_list.tables:forms"),
    "which": Table(PRICES, "benchmarks.price_list.tables:which"),
    **{f"price-{n}": Table(PRICES, f"benchmarks.price_list.tables:{n.replace('-', '_')}") for n in PRICE_TABLES},
    **{f"scale-{n}": Table((), f"benchmarks.scale.command:{n}") for n in ("time", "holds", "sends", "moves")},
}
# Pages that are drawn as a whole, from files of a schema of their own.
WHOLE: dict[str, tuple[str, str]] = {"docs/gpu.md": ("gpu_*.csv", "gpu_rows:page")}


def function(name: str) -> Callable[..., str]:
    """By "module:function"; a module of this folder, or of a package in it."""
    module, _, attribute = name.partition(":")
    for folder in (HERE, ROOT):  # as scripts find one another, and as ``python -m benchmarks`` does
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    found: Callable[..., str] = getattr(importlib.import_module(module), attribute)
    return found


def grid(head: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells."""
    top = [str(cell) for cell in head]
    cells = [top, ["---"] * len(top), *([str(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that tell of the same thing the last one, in the order in which they first came."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        found[row.benchmark, row.what, row.contender, row.model, row.K, row.P, row.dtype] = row
    return list(found.values())


def pages(root: Path = ROOT) -> list[Path]:
    """Where tables may be."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def redrawn(page: Path) -> str:
    """The page with its tables as they should be.

    Raises:
        BenchError: a marker names no table or is not closed, or the results cannot be read.
    """
    text = page.read_text()

    def table(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise BenchError(f"{page.name}: no table {found['name']!r}: there are {', '.join(sorted(TABLES))}")
        return f"{found[1]}{TABLES[found['name']].markdown()}\n{found[4]}"

    drawn = MARKED.sub(table, text)
    begun, whole = len(re.findall(r"^<!-- rows:", text, re.M)), len(MARKED.findall(text))
    if begun != whole or any("<!-- rows:" in found["table"] for found in MARKED.finditer(text)):
        raise BenchError(f"{page.name}: {begun} tables begin and {whole} end: <!-- /rows --> is missing")
    return drawn


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """By page, what it should say."""
    found = {page: redrawn(page) for page in pages(root)}
    for name, (files, draw) in WHOLE.items():
        found[root / name] = function(draw)(sorted(RESULTS.glob(files)))
    return found


def main(words: list[str] | None = None) -> int:
    """Draw the tables anew, or tell which are not as they should be; 1 if there are such and nothing was drawn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(words)
    changed = {page: text for page, text in wanted().items() if not page.exists() or page.read_text() != text}
    for page, text in changed.items():
        print(f"{page.relative_to(ROOT)}: {'disagrees with its rows' if options.check else 'drawn anew'}")
        if not options.check:
            page.write_text(text)
    return int(options.check and bool(changed))
