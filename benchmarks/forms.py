"""What DB-MTL costs in each of its forms: whole training steps and their memory, against the plain sum of the losses.

``python benchmarks/forms.py --resume`` measures trunks of 8 M parameters (an MLP), 11 M (ResNet-18) and 7 M (a
transformer of 4 layers), and a small one, with K = 2, 3, 11 and 40 tasks, one thread; it takes half an hour. Each case
is a process of its own, in which contenders take turns step by step. Rows are added to benchmarks/results/forms.csv
when a case is done; ``--resume`` leaves out the cases that this commit has there, on this device. ``--quick`` takes a
few minutes, and writes to out/benchmarks. ``--report`` prints a table of what is there, and rows of Markdown.

Columns: p20, p50 and p80 are milliseconds, of "memory" bytes. ``ratio`` is that of medians, ``over`` the contender
below it. "step" and "backward" are those without a measurement; "mean from step N" is the mean, over blocks of ten
interleaved steps, of the ratio of the blocks' times, measurements included. "memory" is the peak over a step.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dbmtl_kernels as dbk
import forms_cases
import timing
import torch
from forms_cases import AMORTISED, BARE, CONTENDERS, DENSE, EW, MANY, ONE, TRUNKS, A, Row
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
FIELDS = [
    "benchmark", "trunk", "parameters", "K", "batch", "contender", "what", "p20", "p50", "p80", "ratio", "over",
    "steps", "device", "torch", "dbmtl_kernels", "commit", "date", "command",
]  # fmt: skip
PARTS = {"one backward": ONE, "K backwards": MANY, "memory": CONTENDERS}
KEY = ("trunk", "K", "batch", "contender", "what", "device", "commit")


class Case(NamedTuple):
    """What one process measures; ``steps`` of one backward each, ``rounds`` of K."""

    part: str
    trunk: str
    num_tasks: int
    contenders: Sequence[str]
    steps: int
    rounds: int
    threads: int

    def rows(self) -> list[Row]:
        """What is measured, in this process."""
        if self.part == "one backward":
            return list(forms_cases.one_backward(self.trunk, self.num_tasks, self.contenders, self.steps))
        if self.part == "K backwards":
            return list(forms_cases.many_backwards(self.trunk, self.num_tasks, self.contenders, self.rounds))
        return list(forms_cases.memory(self.trunk, self.num_tasks, self.contenders))

    def keys(self, common: Row) -> set[tuple[str, ...]]:
        """Of the rows that tell that it was measured."""
        what = "memory" if self.part == "memory" else "step"
        own = {"trunk": self.trunk, "K": self.num_tasks, "batch": TRUNKS[self.trunk].batch, "what": what}
        return {key({**common, **own, "contender": name}) for name in self.contenders}


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for trunk in options.trunks:
        for num_tasks in options.tasks:
            rounds = options.rounds or max(5, min(15, 300 // num_tasks))
            for part, able in PARTS.items():
                names = [name for name in able if name in options.contenders]
                if names:
                    found.append(Case(part, trunk, num_tasks, names, options.steps, rounds, options.threads))
    return found


def measure(case: Case) -> list[Row]:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--work", json.dumps(case)], capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise SystemExit(f"{case} ended with {done.returncode} (negative: a signal; -9: out of memory?)\n{last}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def common(threads: int) -> Row:
    """What every row of a run says."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    machine = timing.machine()
    return {
        "benchmark": "forms",
        "device": f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}",
        "torch": torch.__version__,
        "dbmtl_kernels": dbk.__version__,
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/forms.py", *sys.argv[1:]]),
    }


def read(path: Path) -> list[Row]:
    """The rows there.

    Raises:
        SystemExit: it has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != FIELDS:
            raise SystemExit(
                f"{path} has the columns {reader.fieldnames}, and rows of this version have {FIELDS}: move it away, or "
                "name another file with --results"
            )
        return list(reader)


def append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def run(options: argparse.Namespace) -> None:
    shared = common(options.threads)
    there = {key(row) for row in read(options.results)}
    todo = [case for case in cases(options) if not (options.resume and case.keys(shared) <= there)]
    with tqdm(todo, unit="case") as progress:
        for case in progress:
            progress.set_description(f"{case.trunk}, K={case.num_tasks}: {case.part}")
            own = {
                "trunk": case.trunk, "K": case.num_tasks, "batch": TRUNKS[case.trunk].batch,
                "parameters": sum(p.numel() for p in TRUNKS[case.trunk].make().parameters()),
            }  # fmt: skip
            append(options.results, [{**shared, **own, **row} for row in measure(case)])


# --- what is there ---------------------------------------------------------------------------------------------------

LATE = f"mean from step {DENSE + 1}"
COLUMNS: dict[str, tuple[str, str, str]] = {  # contender, what, and what is shown of the row
    "plain sum, ms": (EW, "step", "p50"),
    "logs / sum": ("sum of logs", "step", "ratio"),
    "A / sum": (A, "step", "ratio"),
    "A, mean": (A, LATE, "ratio"),
    "A, mean from 1": (A, "mean from step 1", "ratio"),
    "A, measuring": (A, "measuring step", "ratio"),
    "K passes / sum": (BARE, "step", "ratio"),
    "B / K passes": ("DBMTL(beta=0)", "step", "ratio"),
    "exact / K passes": ("DBMTL", "step", "ratio"),
    "A, MB": (A, "memory", "above"),
    "A measuring, MB": (A, "memory, one measured", "above"),
    "B, MB": ("DBMTL(beta=0)", "memory", "above"),
    "exact, MB": ("DBMTL", "memory", "above"),
}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of cells, of the last row of each kind; memory is that above the peak of the plain sum."""
    found: dict[tuple[str, int], dict[tuple[str, str], Row]] = {}
    for row in rows:
        found.setdefault((row["trunk"], int(row["K"])), {})[row["contender"], row["what"]] = row

    def cell(of: dict[tuple[str, str], Row], contender: str, what: str, shown: str) -> str:
        row = of.get((contender, what))
        if row is None:
            return "-"
        if shown == "above":
            return f"{(float(row['p50']) - float(row['p50']) / float(row['ratio'])) / 1e6:.1f}"
        return f"{float(row[shown]):.{3 if shown == 'ratio' else 1}f}"

    lines = []
    for trunk, num_tasks in sorted(found, key=lambda at: (list(TRUNKS).index(at[0]), at[1])):
        of = found[trunk, num_tasks]
        parameters = float(next(iter(of.values()))["parameters"]) / 1e6
        lines.append([f"{trunk}, {parameters:.2g} M", str(num_tasks), *(cell(of, *how) for how in COLUMNS.values())])
    return lines


def report(path: Path) -> None:
    rows = read(path)
    if not rows:
        raise SystemExit(f"no rows in {path}: measure first")
    head, lines = ["trunk", "K", *COLUMNS], table(rows)
    shown = Table(*head, box=SIMPLE_HEAD)
    for line in lines:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    for line in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(line)} |")


def known(kind: str, names: Sequence[str], all_: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in all_:
            raise SystemExit(f"no {kind} {name!r}: there are {', '.join(map(repr, all_))}")
    return names


def parse(words: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has in the results")
    parser.add_argument("--quick", action="store_true", help="fewer cases and steps")
    parser.add_argument("--report", action="store_true", help="print what is in the results")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/forms.csv; quick: out/benchmarks/")
    parser.add_argument("--trunks", nargs="+", help=f"of {', '.join(TRUNKS)}")
    parser.add_argument("--tasks", nargs="+", type=int, help="K; default: 2 3 11 40")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="what they are over comes besides")
    parser.add_argument("--steps", type=int, help=f"of one backward each; default: {DENSE + AMORTISED}")
    parser.add_argument("--rounds", type=int, help="of steps of K backwards; default: 15, fewer at many tasks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    quick = options.quick
    options.trunks = known("trunk", options.trunks or (["mlp", "small"] if quick else list(TRUNKS)[:-1]), list(TRUNKS))
    known("contender", options.contenders, list(CONTENDERS))
    options.tasks = options.tasks or ([3, 11] if quick else [2, 3, 11, 40])
    options.steps = options.steps or DENSE + (20 if quick else AMORTISED)
    options.rounds = options.rounds or (5 if quick else None)
    options.results = options.results or ROOT / ("out/benchmarks" if quick else "benchmarks/results") / "forms.csv"
    return options


def main() -> None:
    options = parse()
    if options.work:
        case = Case(*json.loads(options.work))
        torch.set_num_threads(case.threads)
        print(json.dumps(case.rows()))
    elif options.report:
        report(options.results)
    else:
        run(options)
        report(options.results)


if __name__ == "__main__":
    main()
