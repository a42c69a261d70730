"""The price list: time of a training step and peak memory over equal weighting, of every method, for K tasks.

``python -m benchmarks price_list --resume`` measures an MLP of 2 M parameters, a ResNet-18 (11 M) and a transformer
(2 M) with K = 2, 3, 11 and 40, and MLPs of 0.1 to 8 M with K = 3. Each case is a process of its own, and its rows are
added to benchmarks/results/price_list.csv when it is done: interrupted, what is done stays, and ``--resume`` leaves it
out (of the same commit, device and clock). ``--smoke`` tries all on a tiny trunk, and writes to out/benchmarks.
``--figure`` draws docs/images/price_list.png from the rows; `python -m benchmarks report` the tables.

A method is timed only once its first step has left the gradients that autograd and its formula give.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

from .cases import DENSE, PARTS, PEAK, STEP, Case
from .methods import METHODS
from .models import BY_P, CLOCKS, TRUNKS

ROOT = Path(__file__).resolve().parents[2]
FIGURE = ROOT / "docs" / "images" / "price_list.png"
MAIN = ("MLP", "transformer", "ResNet-18")
TASKS, TASKS_BY_P = (2, 3, 11, 40), 3
Key = tuple[object, ...]


def key(row: Row) -> Key:
    of = row.machine
    return (
        row.what, row.contender, row.model, row.K, row.detail.get("batch"), row.detail.get("clock"),
        of["device"], of["threads"], of["commit"],
    )  # fmt: skip


def keys(case: Case, machine: dict[str, str]) -> set[Key]:
    """Of the rows that tell that a case was measured."""
    detail: dict[str, Any] = {"batch": TRUNKS[case.trunk].batch}
    what = PEAK if case.part == "memory" else STEP
    if case.part != "memory":
        detail["clock"] = case.clock
    rows = [Row("price_list", what, name, case.trunk, case.num_tasks) for name in case.methods]
    return {key(replace(row, detail=detail, machine=machine)) for row in rows}


def cases(options: argparse.Namespace) -> list[Case]:
    """All cases asked for, those of few tasks first."""
    pairs = [(trunk, k) for k in options.tasks for trunk in options.trunks]
    if not options.own_trunks:
        pairs[-len(options.trunks) : 0] = [(trunk, TASKS_BY_P) for trunk in BY_P]
    found = []
    for trunk, k in pairs:
        able = [name for name in options.methods if METHODS[name].least <= k]
        visits = options.visits or (2 if k < 10 else 1)
        rest = options.steps, visits, options.pairs or (2 if k < 10 or k > 20 else 3), options.threads, options.clock
        for part in PARTS:
            names = able if part == "memory" else [n for n in able if METHODS[n].passes == {"o": "1"}.get(part[0], "K")]
            if names:
                found.append(Case(part, trunk, k, names, *rest))
    return found


def measure(case: Case) -> list[Row]:
    """In a process of its own.

    Raises:
        BenchError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks", "price_list", "--work", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise BenchError(f"{case} ended with {done.returncode} (negative: a signal; -9: out of memory?)\n{last}")
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for; 130 if interrupted."""
    from tqdm import tqdm

    torch.set_num_threads(options.threads)
    machine = results.machine()
    there = {key(row) for row in results.read(options.results)} if options.results.exists() else set()
    todo = [case for case in cases(options) if not (options.resume and keys(case, machine) <= there)]
    try:
        with tqdm(todo, unit="case") as progress:
            for case in progress:
                progress.set_description(f"{case.trunk}, K={case.num_tasks}: {case.part}")
                results.append(options.results, [replace(row, machine=machine) for row in measure(case)])
    except KeyboardInterrupt:
        print(f"interrupted: finished cases are in {options.results}, and --resume goes on from there")
        return 130
    print(f"{len(todo)} cases measured; rows in {options.results}")
    return 0


def known(kind: str, names: Sequence[str], all_: Sequence[str]) -> list[str]:
    """The names.

    Raises:
        BenchError: one is not there.
    """
    for name in names:
        if name not in all_:
            raise BenchError(f"no {kind} {name!r}: there are {', '.join(map(repr, all_))}")
    return list(names)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        BenchError: one is no good.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks price_list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is in the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny trunk, two steps, K = 3")
    parser.add_argument("--figure", nargs="?", type=Path, const=FIGURE, help="draw the figure from the results")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/price_list.csv")
    parser.add_argument("--trunks", nargs="+", help=f"of {', '.join(TRUNKS)}")
    parser.add_argument("--tasks", nargs="+", type=int, help="K; default: 2 3 11 40")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, help=f"of methods of one backward, after the first {DENSE}; default: 60")
    parser.add_argument("--visits", type=int, help="of methods of K backwards; default: 2, of many tasks 1")
    parser.add_argument("--pairs", type=int, help="steps in a visit; default: 2 or 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where others use the machine")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.methods = known("method", options.methods, list(METHODS))
    options.own_trunks = options.smoke or options.trunks is not None
    options.trunks = known("trunk", options.trunks or (["tiny"] if options.smoke else MAIN), list(TRUNKS))
    options.tasks = options.tasks or ([3] if options.smoke else list(TASKS))
    for name in ("steps", "visits", "pairs", "threads"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise BenchError(f"--{name} must be at least 1, got {given}")
    if min(options.tasks) < 2:
        raise BenchError(f"--tasks must be at least 2, got {min(options.tasks)}")
    options.steps = options.steps or (2 if options.smoke else 60)
    options.pairs = options.pairs or (1 if options.smoke else None)
    folder = ROOT / ("out/benchmarks" if options.smoke else "benchmarks/results")
    options.results = options.results or folder / "price_list.csv"
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = parse(words)
    if options.work:
        print(json.dumps([asdict(row) for row in Case(*json.loads(options.work)).rows()]))
        return 0
    if options.figure:
        from .figure import draw

        draw(results.read(options.results), options.figure)
        print(f"drawn: {options.figure}")
        return 0
    return run(options)
