"""The command line that the examples share."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dbmtl_kernels.bench.results import BenchError, append, read

from . import methods
from .methods import METHODS, STL
from .report import BENCHMARK, model_of, print_table, row_of, told
from .training import Run, train
from .work import Loading, Work

Make = Callable[[argparse.Namespace, Path], Work]


def parse(description: str, argv: Sequence[str] | None, add: Callable[[argparse.ArgumentParser], None]) -> Any:
    """The arguments; ``add`` adds those of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data set, as in docs/datasets.md")
    add(parser)
    known = ", ".join(METHODS)
    parser.add_argument("--method", nargs="+", default=["db-mtl"], metavar="NAME", help=f"{known} (default: db-mtl)")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="of stl, a network a task: only these")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--beta", type=float, default=0.9, help="of db-mtl: forgetting rate (default: %(default)s)")
    parser.add_argument(
        "--beta-sigma", type=float, default=0.5, help="of db-mtl: beta / step ** SIGMA (default: %(default)s)"
    )
    for name, kind, what in (
        ("epochs", int, "passes over the training data"),
        ("batch", int, "inputs of a step"),
        ("rate", float, "learning rate of Adam"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{what} (default: the protocol's)")
    parser.add_argument("--out", type=Path, default=Path("out/data_sets.csv"), help="rows (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, help="folder for them (default: beside the rows)")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoints; skip runs that have their row")
    parser.add_argument("--report", action="store_true", help="train nothing: print the table of the rows")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read (default: %(default)s)")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="two steps on small generated files of the same format, written to --data if that is given and not there",
    )
    return parser.parse_args(argv)


def run_example(
    description: str,
    make: Make,
    write_sample: Callable[[argparse.Namespace, Path], None],
    add: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str] | None = None,
) -> int:
    """An example's main function.

    Args:
        description: for ``--help``.
        make: the data set of a folder; raises BenchError where it is not as it should be.
        write_sample: writes a small data set of the same format to a folder, for ``--smoke``.
        add: adds the example's own arguments.
        argv: the arguments.

    Returns:
        the exit status: 0, 2 where it cannot be run, 130 where it was interrupted.
    """
    args = parse(description, argv, add)
    try:
        if not args.smoke:
            _run(args, make)
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            args.data = args.data or Path(scratch) / "data"
            if not args.data.exists():
                write_sample(args, args.data)
            args.workers = 0
            args.checkpoints = args.checkpoints or Path(scratch) / "checkpoints"
            _run(args, make)
        return 0
    except BenchError as error:
        # what a process that reads raised comes with that process's traceback before it
        told = str(error).rpartition("BenchError: ")[2].strip()
        print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: with --resume it goes on after the last whole epoch", file=sys.stderr)
        return 130


def choose_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        BenchError: there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each kind of device has its own
        raise BenchError(f"no device {name!r} here ({type(error).__name__}: {error})") from error
    return device


def _run(args: argparse.Namespace, make: Make) -> None:
    methods.check(args.method)
    for name, lowest in (("beta", 0.0), ("beta_sigma", 0.0), ("epochs", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, name)
        if (value is not None and not value >= lowest) or (name == "beta" and not value < 1):
            raise BenchError(f"--{name.replace('_', '-')} {value} is out of range")
    if args.rate is not None and not 0 < args.rate < math.inf:
        raise BenchError(f"--rate {args.rate} is out of range")
    rows = read(args.out) if args.out.exists() else []
    if args.report:
        if not rows:
            read(args.out)
        for model in dict.fromkeys(row.model for row in rows if row.benchmark == BENCHMARK):
            print_table([row for row in rows if row.benchmark == BENCHMARK and row.model == model])
        return
    if args.data is None:
        raise BenchError("give --data FOLDER, the data set as in docs/datasets.md; or --smoke")
    device = choose_device(args.device)
    work = make(args, args.data)
    changes = {name: getattr(args, name) for name in ("epochs", "batch", "rate") if getattr(args, name) is not None}
    if args.smoke:
        work.smoke = True
        changes = {"epochs": 1, "batch": 2, **changes}
    work.protocol = replace(work.protocol, **changes)
    loading = Loading(work.protocol.batch, work.protocol.drop_last, args.workers, device)
    loading.check(work)
    for run in plan(args, work):
        found = [row for row in rows if row.detail.get("run") == run.identity(work)]
        if args.resume and found:
            continue
        folder = args.checkpoints or args.out.with_suffix("")
        outcome = train(run, work, loading, folder / f"{run.label(work)}.pt", resume=args.resume)
        rows.append(row_of(run, work, outcome, rows, device))
        append(args.out, rows[-1:])
        print(f"{run.label(work)}: {told(outcome.metrics)}")
    mine = [row for row in rows if row.benchmark == BENCHMARK and row.model == model_of(work)]
    print_table(mine, work.protocol.others)


def plan(args: argparse.Namespace, work: Work) -> list[Run]:
    """All runs, single-task networks first, as the others are compared with them.

    Raises:
        BenchError: a task is unknown.
    """
    names = [task.name for task in work.tasks]
    for name in args.task or ():
        if name not in names:
            raise BenchError(f"no task {name!r}: it is one of {', '.join(names)}")
    every = tuple(range(len(names)))
    asked = sorted(dict.fromkeys(args.method), key=lambda method: method != STL)
    return [
        Run(
            method, tasks, seed, args.beta, args.beta_sigma, getattr(args, "one_call", False),
            getattr(args, "weights", ""),
        )
        for seed in dict.fromkeys(args.seed)
        for method in asked
        for tasks in ([(names.index(name),) for name in args.task or names] if method == STL else [every])
    ]  # fmt: skip
