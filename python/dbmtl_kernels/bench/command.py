"""``python -m dbmtl_kernels bench``: what balancing costs here, against what one would write oneself.

Three levels: "op", from a K x P matrix to the balanced gradient; "grads", from the .grad of K tasks to the balanced
.grad; "step", a whole training step. Whoever takes part is first compared with float64. Rows are added to a CSV file
case by case, so an interrupt loses one case at most and ``--resume`` goes on; beside it lies a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import cases, memory, models, results, show, steps, timing
from .cases import Say
from .results import BenchError, Row
from .timing import Budget, Case

DEFAULT_OP, DEFAULT_GRADS, DEFAULT_STEP = ("1000", "20M"), ("resnet50",), ("8M",)
IDENTITY = ("device", "threads", "torch", "dbmtl_kernels", "commit")
INTERRUPTED = 130
PARAMS = (
    f"1000, 20e6, 300M, or one of {', '.join(models.NAMED)}: a matrix of so many columns, gradients of these shapes, "
    f"steps of an MLP of about so many parameters; default: {' '.join(DEFAULT_OP)} for op, {' '.join(DEFAULT_GRADS)} "
    f"for grads, {' '.join(DEFAULT_STEP)} for step"
)
MODEL = (
    "your own: factory() returns losses, or (losses, shared), or (losses, shared, optimizer); losses() runs a forward "
    "pass of one and the same batch and gives the K losses; shared are the shared parameters, or None to find them"
)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m dbmtl_kernels bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--levels", nargs="+", choices=list(show.LEVELS), help="default: all; with --model grads and step")
    add("--tasks", nargs="+", type=int, default=[3], metavar="K", help="default: 3")
    add("--params", nargs="+", metavar="P", help=PARAMS)
    add("--model", metavar="MODULE:FACTORY", help=MODEL)
    add("--batch", type=int, default=32, help="of the MLP; default: 32")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices of the op level")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    add("--only", nargs="+", metavar="WHO", help=f"contenders, or families: {', '.join(cases.FAMILIES)}")
    add("--seconds", type=float, default=40.0, help="for all, about; at most 0.4 of it compile; default: 40")
    add("--threads", type=int, help=f"default: {torch.get_num_threads()}")
    add("--out", type=Path, default=Path("dbmtl_bench.csv"), help="CSV file to add rows to; default: dbmtl_bench.csv")
    add("--png", type=Path, help="the picture; default: beside the CSV file")
    add("--resume", action="store_true", help="leave out the cases that the file has of this machine and version")
    return found


def plan(options: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """The cases and who takes part in each; whatever the user can set right is said here.

    Raises:
        BenchError: see there.
    """
    device = _device(options.device)
    if min(options.tasks) < 1 or options.seconds <= 0 or options.batch < 1 or (options.threads or 1) < 1:
        raise BenchError("--tasks, --seconds, --batch and --threads must be positive")
    levels = options.levels or (["grads", "step"] if options.model else list(show.LEVELS))
    _check_only(options.only)
    found: list[Case] = []
    if options.model:
        make = models.load(options.model)
        problem = make()
        at = problem.shared[0].device
        if at.type != device.type:
            raise BenchError(f"--model {options.model}: its parameters are on {at}, not {device}: --device {at.type}")
        shape = models.Size(options.model, [tuple(p.shape) for p in problem.shared], True)
        makers = {
            "op": lambda: cases.op(problem.num_tasks, shape, _dtype(options), device),
            "grads": lambda: cases.grads(problem.num_tasks, shape, device),
            "step": lambda: cases.step(options.model, make, device),
        }
        found = [makers[level]() for level in levels]
    else:
        for level in levels:
            default = {"op": DEFAULT_OP, "grads": DEFAULT_GRADS, "step": DEFAULT_STEP}[level]
            for K in options.tasks:
                for size in map(models.size, options.params or default):
                    _check_memory(level, K, size.num_params, device)
                    if level == "op":
                        found.append(cases.op(K, size, _dtype(options), device))
                    elif level == "grads":
                        found.append(cases.grads(K, size, device))
                    else:
                        found.append(cases.mlp_step(K, size, options.batch, device))
    chosen = [(case, [name for name in case.names if _wanted(name, options.only)]) for case in found]
    if not any(names for _, names in chosen):
        raise BenchError(f"--only {' '.join(options.only)}: nobody of these takes part in {', '.join(levels)}")
    return [(case, names) for case, names in chosen if names]


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device {name}: there is no such device") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {name}: cpu or cuda is measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


def _check_only(words: Sequence[str] | None) -> None:
    for word in words or ():
        names = [*cases.FAMILIES, cases.OP, cases.LISTS, cases.ROWS, cases.ONE_ROW, cases.ONE_PASS, cases.BARE]
        names += [cases.LET_GO, cases.SHIPPED, cases.ON_DEVICE, cases.JD]
        names += [f"{family} ({kind})" for family in ("eager", "torch.compile")
                  for kind in (*steps.KINDS, "lerp_", "mul_, add_", "foreach")]  # fmt: skip
        if word not in names:
            raise BenchError(f"--only {word}: no such contender; families are {', '.join(cases.FAMILIES)}")


def _wanted(name: str, words: Sequence[str] | None) -> bool:
    return words is None or any(name == word or name.startswith(f"{word} (") for word in words)


def _check_memory(level: str, K: int, P: int, device: torch.device) -> None:
    """What inputs and states of ours take, before anything is allocated."""
    need, free = {"op": 3 * K + 1, "grads": 2 * K + 3, "step": 2 * K + 12}[level] * P * 4, memory.free(device)
    if free is not None and need > free:
        raise BenchError(
            f"{level} with K={K} and P={P:,} takes {need / 1e9:.1f} GB and more, and {free / 1e9:.1f} are free: fewer "
            "--tasks or --params, or other --levels"
        )


@contextlib.contextmanager
def progress(count: int) -> Iterator[tuple[Say, Say]]:
    """Says which case begins, and what is being done in it."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield (lambda title: print(f"... {title}", file=sys.stderr, flush=True)), lambda what: None
        return
    from rich.console import Console

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=count)
        begun, now = [-1], [""]

        def begin(title: str) -> None:
            begun[0] += 1
            now[0] = title
            bar.update(task, description=title, completed=begun[0])

        yield begin, lambda what: bar.update(task, description=f"{now[0]}: {what}")


def main(words: Sequence[str] | None = None) -> int:
    """Measure; 0, 2 after a mistake that the user can set right, 130 after an interrupt."""
    options = parser().parse_args(words)
    before = torch.get_num_threads()
    try:
        return _main(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)


def _main(options: argparse.Namespace) -> int:
    there = results.read(options.out) if options.out.exists() else []
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    planned = plan(options)
    machine = results.machine(planned[0][0].device)
    own = {name: machine[name] for name in IDENTITY}
    mine = [row for row in there if {name: row.machine[name] for name in IDENTITY} == own]
    done = {timing.key_of(row) for row in mine} if options.resume else set()
    todo = [(case, names) for case, names in planned if not {case.key(name) for name in names} <= done]
    budget = Budget(options.seconds, len(todo))
    asked = {case.key(name) for case, names in planned for name in (*names, cases.COPY)}
    rows = [row for row in mine if options.resume and _belongs(row, asked)]
    ended = _measure(todo, budget, machine, options.out, rows)
    shown = show.found(rows)
    for case in shown:
        show.table(case)
    print(f"rows: {options.out}")
    print(show.picture(shown, options.png or options.out.with_suffix(".png")))
    if ended < len(todo):
        print(f"interrupted: {ended} of {len(todo)} cases are done and kept; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def _belongs(row: Row, asked: set[tuple[object, ...]]) -> bool:
    level = row.what.partition(" ")[0]
    return (level, *timing.key_of(row)[1:]) in asked


def _measure(
    todo: Sequence[tuple[Case, list[str]]], budget: Budget, machine: dict[str, str], out: Path, rows: list[Row]
) -> int:
    """Run the cases, and add rows to the list and the file; how many came to their end."""
    ended = 0
    with progress(len(todo)) as (begin, say), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and profilers
        try:
            for case, names in todo:
                begin(case.title())
                found = cases.run(case, names, budget, len(todo) - ended, say)
                found = [dataclasses.replace(row, machine=machine) for row in found]
                results.append(out, found)
                rows += found
                ended += 1
        except KeyboardInterrupt:
            pass
    return ended
