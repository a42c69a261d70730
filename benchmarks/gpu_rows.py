"""Rows of the GPU suite, and the page drawn from them. Needs no torch.

``python benchmarks/gpu_rows.py note OUT STAGE VERDICT [SECONDS]`` adds a row to OUT/gpu_CARD.csv; ``ended OUT`` prints
which stages ended on this card at this commit, as "STAGE=EXIT CODE" lines; ``page [FILE...]`` prints the page. A file
of another schema is refused.
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
    short = any(None in (*row, *row.values()) for row in rows)
    if found != {str(SCHEMA)} or reader.fieldnames != FIELDS or short:
        found = f"{'a row with missing cells, ' if short else ''}rows of schema {', '.join(sorted(found))}"
        raise SystemExit(f"{path}: {found}; needed: schema {SCHEMA}, with its columns")
    return rows


def card() -> Row:
    """Which is here, and its clocks now."""
    found = getoutput("nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader,nounits")
    lines = re.findall(r"^(.+), ([\d.]+), (.+), (.+)$", found, re.MULTILINE)  # there may be warnings too
    lines = [("no card: a dry run", "", "", "")] if "TRITON_INTERPRET" in os.environ else lines
    return dict(zip(CARD, [*lines, ("unknown card", "", "", "")][0], strict=True))


class Rows:
    """The file of the card that is here, in ``folder``; it only grows."""

    def __init__(self, folder: Path) -> None:
        version = runpy.run_path(str(Path(util.find_spec("torch").origin).with_name("version.py")))
        self.common = {
            "schema": SCHEMA, **card(), "torch": version["__version__"], "cuda": version["cuda"],
            "triton": re.findall(r"__version__ = '(.*)'", Path(util.find_spec("triton").origin).read_text())[0],
            "nvcc": "".join(re.findall(r"release ([\d.]+)", getoutput("nvcc --version"))) or "none",
            "commit": os.environ.get("COMMIT") or "unknown",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),  # it began
        }  # fmt: skip
        self.path = folder / f"gpu_{re.sub('[^a-z0-9]+', '_', self.common['card'].lower())}.csv"
        self.before = read(self.path) if self.path.exists() else []

    def add(self, what: str, contender: str, **values: Any) -> None:
        """A row: written, flushed and said."""
        values = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in values.items()}
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({**self.common, "what": what, "contender": contender, **values})
        print(what, contender, *(f"{key}={value}" for key, value in values.items()), flush=True)

    def ended(self) -> str:
        """Which stages ended here at this commit, with their last exit codes; a build is made anew."""
        known = [row for row in self.before if row["what"] == "stage" and row["seconds"]]
        known = [row for row in known if row["commit"] == self.common["commit"] != "unknown"]
        codes = {row["contender"]: re.match(r"done|FAULT: exit code (\d+)", row["verdict"]) for row in known}
        return "".join(f"{name}={code[1] or 0}\n" for name, code in codes.items() if code and name != "build")


def stays(rows: Iterable[Row], what: str) -> str:
    """Which backend's kernel of an op stays, by the rule of docs/backends.md."""
    sizes: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["what"] == what and row["clock"] == "device" and row["p50_ms"]:
            same_run = tuple(row[name] for name in (*SIZE, "commit", "date"))
            sizes.setdefault(same_run, {})[row["contender"]] = float(row["p50_ms"])
    sizes = {run: times for run, times in sizes.items() if {"triton", "triton, again", "cuda"} <= times.keys()}
    if not sizes:
        return "not yet measured"
    times = list(sizes.values())
    ratio, same = (geometric_mean(t["triton"] / t[other] for t in times) for other in ("cuda", "triton, again"))
    spread, commits = abs(same - 1.0), " and ".join(sorted({run[-2] for run in sizes}))
    kept = "cuda stays" if ratio > 1.0 + spread else "triton stays" if ratio < 1.0 - spread else "a tie: triton stays"
    return f"{kept} (cuda is {ratio:.3f} times as fast over {len(sizes)} sizes, A/A spread {spread:.1%}, at {commits})"


def page(paths: Iterable[Path]) -> str:
    """Markdown. Of a contender at a size, a check, a stage the last run counts; one that has no times hides none."""
    cards: dict[str, dict[Any, list[Row]]] = {}
    for row in (row for path in paths for row in read(path)):
        runs = cards.setdefault(row["card"], {})
        last = runs.setdefault(tuple(row[name] for name in (*SIZE, "contender")), [])
        last[:] = [old for old in last if (row["P"] and not row["p50_ms"]) or old["date"] == row["date"]] + [row]
    text = "# GPU results\n\nDrawn by `python benchmarks/gpu_rows.py page benchmarks/results/gpu_*.csv`; not by hand.\n"
    for name, runs in cards.items() or [("No card", {})]:
        rows, who = [row for last in runs.values() for row in last], (*SIZE, "contender")
        for title, head, lines in (
            ("times", (*who, "clock", *TIMES, *CARD[1:], "commit"), [row for row in rows if row["p50_ms"]]),
            ("verdicts", (*who, *VERDICT, *VERSIONS), [row for row in rows if not row["p50_ms"]]),
            ("which kernel stays", ("op", "verdict"), [{"op": op, "verdict": stays(rows, OPS[op])} for op in OPS]),
        ):
            cells = [head, ["---"] * len(head), *([line[key] for key in head] for line in lines)]
            table = "\n".join(f"| {' | '.join(line)} |" for line in cells) if lines else "Not yet measured."
            text += f"\n## {name}: {title}\n\n{table}\n"
    return text


if __name__ == "__main__":
    act, *given = sys.argv[1:]
    if act == "page":
        print(page(map(Path, given)), end="")
    elif act == "ended":
        print(Rows(Path(given[0])).ended(), end="")
    else:
        folder, name, verdict, seconds, *_ = [*given, ""]
        Rows(Path(folder)).add("stage", name, verdict=verdict, seconds=seconds)
