"""``python -m benchmarks compare BASE``: is this tree slower than BASE, a git revision or a checkout that is built?

The op and a training step of both, in processes of their own, in turn within one run; and this tree a second time,
whose difference to itself is the A/A band. The processes are begun anew several times: where the memory of one comes to
lie can make it slower by a third for as long as it lives. Exit code 1 where the tree is slower by more than the band.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

from .compare_cases import CASES

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "benchmarks" / "compare_cases.py"
HEAD, AGAIN, BASE = "head", "head, again", "base"
LEAST = 1.02  # of the band
RESAMPLED = 1000
Times = dict[str, dict[str, list[float]]]  # by tree and call: seconds in each round, or medians of each restart


def measure(case: str, trees: dict[str, Path], rounds: int, warmup: int = 2) -> Times:
    """Each round begins with another tree."""
    workers: dict[str, subprocess.Popen[str]] = {}
    times: Times = {name: {} for name in trees}
    try:
        for name, tree in trees.items():
            workers[name] = subprocess.Popen(
                [sys.executable, str(WORK), case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(tree / "python")},
            )  # fmt: skip
            found = workers[name].stdout.readline().strip()
            if not found or not Path(found).is_relative_to(tree):
                raise BenchError(f"the package of {name} is not of {tree}: {found or 'it cannot be imported'}")
        names = list(trees)
        for round_ in range(warmup + rounds):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                print(file=workers[name].stdin, flush=True)
                line = workers[name].stdout.readline()
                if not line:
                    raise BenchError(f"{name} ended while {case} was measured; see above")
                for what, seconds in json.loads(line).items():
                    times[name].setdefault(what, []).extend([seconds] if round_ >= warmup else [])
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
            worker.stdout.close()
    return times


def repeated(case: str, trees: dict[str, Path], restarts: int, rounds: int) -> Times:
    """Medians over the rounds of each restart."""
    from tqdm import trange

    times: Times = {name: {} for name in trees}
    for _ in trange(restarts, desc=case, unit="restart", leave=False):
        for name, calls in measure(case, trees, rounds).items():
            for what, seconds in calls.items():
                times[name].setdefault(what, []).append(statistics.median(seconds))
    return times


def band(first: Sequence[float], again: Sequence[float]) -> float:
    """How far the median ratio of one tree to itself may be from 1: in 99 of 100 resamplings of the restarts.

    Which of the two came first means nothing, so each ratio drawn is turned over at random.
    """
    draw, found = random.Random(0), []
    ratios = [math.log(a / b) for a, b in zip(first, again, strict=True)]
    for _ in range(RESAMPLED):
        drawn = statistics.median(draw.choice((-1, 1)) * ratio for ratio in draw.choices(ratios, k=len(ratios)))
        found.append(math.exp(abs(drawn)))
    return max(LEAST, sorted(found)[int(0.99 * RESAMPLED)])


def judge(times: Times) -> list[Row]:
    """A row for each call; its ratio is that of this tree to the base, its verdict in the detail."""
    rows = []
    for what, base in times[BASE].items():
        first, again = times[HEAD][what], times[AGAIN][what]
        allowed = band(first, again)
        ratio = statistics.median(math.sqrt(a * b) / c for a, b, c in zip(first, again, base, strict=True))
        verdict = "slower" if ratio > allowed else "faster" if ratio < 1 / allowed else "within the band"
        detail = {"band": round(allowed, 4), "verdict": verdict, "base_ms": 1e3 * statistics.median(base)}
        pooled = statistics.median([*first, *again])
        row = Row("compare", what, HEAD, p50=1e3 * pooled, ratio=ratio, over=BASE, rounds=len(base), detail=detail)
        rows.append(row)
    return rows


def tree_of(base: str) -> Path:
    """A checkout of a revision, made and built if need be; or the folder given.

    Raises:
        BenchError: it is neither, or does not build.
    """
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "python" / "dbmtl_kernels").is_dir():
            raise BenchError(f"{base} is no checkout: it has no python/dbmtl_kernels")
        return folder.resolve()
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--verify", "-q", f"{base}^{{commit}}"], capture_output=True, text=True)
    if found.returncode != 0:
        raise BenchError(f"{base} is neither a folder nor a git revision")
    commit = found.stdout.strip()
    tree = ROOT / "out" / "compare" / commit[:12]
    if not (tree / "built").exists():
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run([*git, "archive", commit], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchError(f"{base} does not build: {done.stderr.strip().splitlines()[-1:]}")
        (tree / "built").touch()
    return tree


def main(words: list[str] | None = None) -> int:
    """Measure and judge; 1 if a call is slower than in the base, beyond the band."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a git revision, or the folder of a checkout that is built")
    parser.add_argument("--restarts", type=int, default=7, help="of the processes; default: 7")
    parser.add_argument("--rounds", type=int, default=5, help="of each restart; default: 5")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["op", "small", "step"])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks" / "compare.csv")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.restarts < 3:
        raise BenchError("--rounds must be 1 or more, and --restarts 3: the band is taken from them")
    if options.out.exists():
        results.read(options.out)
    base = tree_of(options.base)
    trees, slower = {HEAD: ROOT, BASE: base, AGAIN: ROOT}, False
    for case in options.case:
        machine = results.machine()
        judged = judge(repeated(case, trees, options.restarts, options.rounds))
        rows = [Row(**{**vars(row), "machine": machine}) for row in judged]
        results.append(options.out, rows)
        for row in rows:
            detail = row.detail
            print(
                f"{row.what:32s} {row.p50:9.4f} ms, base {detail['base_ms']:9.4f} ms: {row.ratio:6.3f}, "
                f"A/A band {detail['band']:.3f}: {detail['verdict']}",
                flush=True,
            )
            slower = slower or detail["verdict"] == "slower"
    return int(slower)
