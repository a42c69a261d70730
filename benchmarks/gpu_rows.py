"""Rows of the GPU suite, and the page drawn from them. Needs no torch.

``python benchmarks/gpu_rows.py note OUT WHAT CONTENDER VERDICT [SECONDS]`` adds a row to OUT/gpu_CARD.csv;
``python benchmarks/gpu_rows.py page [FILE...]`` prints the page. A file of another schema is refused.
"""

import csv
import datetime
import os
import re
import runpy
import sys
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from statistics import geometric_mean
from subprocess import getoutput
from typing import Any

SCHEMA = 1
SIZE = ("what", "K", "P", "dtype")
TIMES = ("p20_ms", "p50_ms", "p80_ms", "bytes", "of_copy")
VERDICT = ("against", "ratio", "target", "verdict", "seconds")
CARD = ("card", "driver", "sm_mhz", "mem_mhz")
VERSIONS = ("torch", "triton", "cuda", "nvcc", "commit", "date")
FIELDS = ["schema", *SIZE, "contender", "clock", *TIMES, *VERDICT, *CARD, *VERSIONS]
OPS = {"balance_": "dense", **{name: name for name in ("accumulate_", "balance_rows_", "combine_out", "gramian")}}
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows there; raises SystemExit if they are of another schema."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    found = {row.get("schema") or "none" for row in rows} or {"none"}
    if found != {str(SCHEMA)} or reader.fieldnames != FIELDS:
        raise SystemExit(
            f"{path}: rows of schema {', '.join(sorted(found))}; needed: schema {SCHEMA}, with its columns"
        )
    return rows


def card() -> Row:
    """Which is here, and its clocks now."""
    found = getoutput("nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader,nounits")
    here = "TRITON_INTERPRET" not in os.environ and found.count(",") >= 3
    return dict(
        zip(CARD, found.split("\n")[0].split(", ") if here else ("no card: a dry run", "", "", ""), strict=True)
    )


class Rows:
    """The file of the card that is here, in ``folder``; it only grows."""

    def __init__(self, folder: Path) -> None:
        torch, triton = (str(Path(util.find_spec(name).origin).parent) for name in ("torch", "triton"))
        version = runpy.run_path(f"{torch}/version.py")
        self.common = {
            "schema": SCHEMA, **card(), "torch": version["__version__"], "cuda": version["cuda"],
            "triton": re.findall(r"__version__ = '(.*)'", Path(triton, "__init__.py").read_text())[0],
            "nvcc": "".join(re.findall(r"release ([\d.]+)", getoutput("nvcc --version"))) or "none",
            "commit": os.environ.get("COMMIT") or getoutput("git describe --always --dirty 2> /dev/null") or "unknown",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),  # it began
        }  # fmt: skip
        self.path = folder / f"gpu_{re.sub('[^a-z0-9]+', '_', self.common['card'].lower())}.csv"
        if self.path.exists():
            read(self.path)

    def add(self, what: str, contender: str, **values: Any) -> None:
        """A row: written, flushed and said."""
        values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in values.items()}
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({**self.common, "what": what, "contender": contender, **values})
        print(what, contender, *(f"{key}={value}" for key, value in values.items()), flush=True)


def stays(rows: Iterable[Row], what: str) -> str:
    """Which backend's kernel of an op stays, by the rule of docs/backends.md."""
    sizes: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["what"] == what and row["clock"] == "device" and row["p50_ms"]:
            sizes.setdefault(tuple(row[name] for name in SIZE), {})[row["contender"]] = float(row["p50_ms"])
    both = [times for times in sizes.values() if {"triton", "triton, again", "cuda"} <= times.keys()]
    if not both:
        return "not yet measured"
    ratio = geometric_mean(times["triton"] / times["cuda"] for times in both)
    spread = max(abs(times["triton, again"] / times["triton"] - 1.0) for times in both)
    kept = "cuda stays" if ratio > 1.0 + spread else "triton stays" if ratio < 1.0 - spread else "a tie: triton stays"
    return f"{kept} (cuda is {ratio:.3f} times as fast over {len(both)} sizes, A/A spread {spread:.1%})"


def page(paths: Iterable[Path]) -> str:
    """Markdown; of each size, check and stage the last run counts."""
    cards: dict[str, dict[Any, list[Row]]] = {}
    for row in (row for path in paths for row in read(path)):
        runs = cards.setdefault(row["card"], {})
        last = runs.setdefault(tuple(row[name] for name in SIZE) + (() if row["P"] else (row["contender"],)), [])
        last[:] = [earlier for earlier in last if earlier["date"] == row["date"]] + [row]
    text = "# GPU results\n\nDrawn by `python benchmarks/gpu_rows.py page benchmarks/results/gpu_*.csv`; not by hand.\n"
    for name, runs in cards.items() or [("No card", {})]:
        rows = [row for last in runs.values() for row in last]
        for title, head, lines in (
            ("times", (*SIZE, "contender", "clock", *TIMES, *CARD[1:]), [row for row in rows if row["p50_ms"]]),
            ("verdicts", (*SIZE, "contender", *VERDICT, *VERSIONS), [row for row in rows if not row["p50_ms"]]),
            ("which kernel stays", ("op", "verdict"), [{"op": op, "verdict": stays(rows, OPS[op])} for op in OPS]),
        ):
            cells = [head, ["---"] * len(head), *([line[key] for key in head] for line in lines)]
            table = "\n".join(f"| {' | '.join(line)} |" for line in cells) if lines else "Not yet measured."
            text += f"\n## {name}: {title}\n\n{table}\n"
    return text


if __name__ == "__main__":
    if sys.argv[1] == "page":
        print(page(map(Path, sys.argv[2:])), end="")
    else:
        folder, what, contender, verdict, seconds, *_ = [*sys.argv[2:], ""]
        Rows(Path(folder)).add(what, contender, verdict=verdict, seconds=seconds)
