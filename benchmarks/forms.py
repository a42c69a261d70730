"""What DB-MTL costs in each of its forms: whole training steps and their memory, against the plain sum of the losses.

``python benchmarks/forms.py --resume`` measures trunks of 8 M parameters (an MLP), 11 M (ResNet-18) and 7 M (a
transformer of 4 layers), and a small one, with K = 2, 3, 11 and 40 tasks, one thread; it takes half an hour. Each case
is a process of its own, in which contenders take turns step by step. Rows are added to benchmarks/results/forms.csv
when a case is done; ``--resume`` leaves out the cases that this commit has there, on this device. ``--quick`` takes a
few minutes, and writes to out/benchmarks. ``--report`` prints a table of what is there, and rows of Markdown.

Rows have the schema of `dbmtl_kernels.bench.results`; ``rounds`` are steps. "step" and "backward" are those without a
measurement; "mean from step N" is the mean, over blocks of ten interleaved steps, of the ratio of the blocks' times,
measurements included. "memory" is the peak over a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import forms_cases
import torch
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import Row
from forms_cases import AMORTISED, BARE, CONTENDERS, DENSE, EW, MANY, ONE, TRUNKS, A
from report import grid
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"one backward": ONE, "K backwards": MANY, "memory": CONTENDERS}
Key = tuple[object, ...]


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

    def keys(self, machine: dict[str, str]) -> set[Key]:
        """Of the rows that tell that it was measured."""
        what = "memory" if self.part == "memory" else "step"
        rows = [Row("forms", what, name, self.trunk, self.num_tasks) for name in self.contenders]
        return {key(completed(row, machine)) for row in rows}


def completed(row: Row, machine: dict[str, str]) -> Row:
    """With what all rows of a case have."""
    trunk = TRUNKS[row.model]
    params = sum(p.numel() for p in trunk.make().parameters())
    return replace(row, P=params, detail={"batch": trunk.batch}, machine=machine)


def key(row: Row) -> Key:
    of = row.machine
    return row.what, row.contender, row.model, row.K, row.detail["batch"], of["device"], of["threads"], of["commit"]


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
    return [Row(**values) for values in json.loads(done.stdout.splitlines()[-1])]


def known_rows(path: Path) -> list[Row]:
    """The rows there."""
    return results.read(path) if path.exists() else []


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    machine = results.machine()
    there = {key(row) for row in known_rows(options.results)}
    todo = [case for case in cases(options) if not (options.resume and case.keys(machine) <= there)]
    with tqdm(todo, unit="case") as progress:
        for case in progress:
            progress.set_description(f"{case.trunk}, K={case.num_tasks}: {case.part}")
            results.append(options.results, [completed(row, machine) for row in measure(case)])


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


Cells = dict[tuple[str, str], Row]  # by contender and what


def by_case(rows: Iterable[Row]) -> dict[tuple[str, int], Cells]:
    """By trunk and K; of rows of the same kind the last."""
    found: dict[tuple[str, int], Cells] = {}
    for row in rows:
        found.setdefault((row.model, row.K), {})[row.contender, row.what] = row
    return {at: found[at] for at in sorted(found, key=lambda at: (list(TRUNKS).index(at[0]), at[1]))}


def beyond(row: Row) -> float:
    """Bytes above the peak of the plain sum."""
    return row.p50 - row.p50 / row.ratio


def table(rows: Iterable[Row]) -> list[list[str]]:
    """Lines of cells; memory is that above the peak of the plain sum."""

    def cell(of: Cells, contender: str, what: str, shown: str) -> str:
        row = of.get((contender, what))
        if row is None:
            return "-"
        return (
            f"{beyond(row) / 1e6:.1f}"
            if shown == "above"
            else f"{getattr(row, shown):.{3 if shown == 'ratio' else 1}f}"
        )

    return [
        [f"{trunk}, {next(iter(of.values())).P / 1e6:.2g} M", str(K), *(cell(of, *how) for how in COLUMNS.values())]
        for (trunk, K), of in by_case(rows).items()
    ]


PAGE = [
    "trunk", "K", "plain sum, ms", "one pass: a step", "a step that measures", "mean from step 65", "mean from step 1",
    "K bare passes", "one row, over those", "rows, over those", "memory: one pass, and measuring", "one row", "rows",
]  # fmt: skip
TITLES = {"mlp": "MLP", "resnet18": "ResNet-18", "transformer": "transformer"}


def markdown(rows: Iterable[Row]) -> str:
    """The table of docs/forms.md; memory is in units of P float32 numbers."""
    lines = []
    for (trunk, K), of in by_case(rows).items():
        first = next(iter(of.values()))
        name = f"{TITLES.get(trunk, trunk)}, {first.P / 1e6:.1f} M, batch {first.detail['batch']}"
        held = lambda *at, of=of, unit=4 * first.P: f"{max(0.0, beyond(of[at]) / unit):.2f}"  # noqa: E731
        ratios = [of[contender, what].ratio for contender, what, shown in COLUMNS.values() if shown == "ratio"]
        _, *ratios = ratios  # the sum of logs
        memory = [f"{held(A, 'memory')}, {held(A, 'memory, one measured')}"]
        memory += [held(contender, "memory") for contender in ("DBMTL(beta=0)", "DBMTL")]
        single = [*ratios[:1], ratios[3], ratios[1], ratios[2], *ratios[4:]]
        lines.append([name, K, f"{of[EW, 'step'].p50:.0f}", *(f"{ratio:.2f}" for ratio in single), *memory])
    return grid(PAGE, lines)


def report(path: Path) -> None:
    rows = known_rows(path)
    if not rows:
        raise SystemExit(f"no rows in {path}: measure first")
    head, lines = ["trunk", "K", *COLUMNS], table(rows)
    shown = Table(*head, box=SIMPLE_HEAD)
    for line in lines:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    print(grid(head, lines))


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
        print(json.dumps([asdict(row) for row in case.rows()]))
    elif options.report:
        report(options.results)
    else:
        run(options)
        report(options.results)


if __name__ == "__main__":
    try:
        main()
    except results.BenchError as error:
        raise SystemExit(str(error)) from None
