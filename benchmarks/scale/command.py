"""What DB-MTL takes past this machine, on paper: ``python -m benchmarks scale``.

Prints, of models of 0.1 to 70 billion parameters on 1 to 1,024 GPUs (DDP, FSDP2, HSDP) with K = 2 to 40 tasks, what
each form holds, moves through memory and sends in a step, and the time of a step over that of the plain sum. This is
arithmetic from the bandwidths given, not a measurement: benchmarks/scale/formulas.py says where each term comes from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from dbmtl_kernels.bench.results import BenchError

from ..report import grid
from . import formulas
from .formulas import FORMS, HSDP, ONE_PASS, ONE_ROW, PLAIN, ROWS, WRAPPERS, Job, Machine

PARAMETERS, TASKS, GPUS = (0.1, 1.0, 7.0, 70.0), (2, 3, 11, 40), (1, 8, 64, 1024)
OURS = (ONE_PASS, ONE_ROW, ROWS)
GB = 1e9


def jobs(
    parameters: Sequence[float] = PARAMETERS,
    tasks: Sequence[int] = TASKS,
    gpus: Sequence[int] = GPUS,
    wrappers: Sequence[str] = WRAPPERS,
    **more: Any,
) -> Iterator[Job]:
    """All of them. One GPU needs no wrapper, and HSDP more than one node."""
    for billions in parameters:
        for count in gpus:
            for wrapper in wrappers if count > 1 else wrappers[:1]:
                for k in tasks:
                    job = Job(billions * 1e9, k, wrapper, count, **more)
                    if wrapper != HSDP or job.replicas > 1:
                        yield job


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def figures(job: Job, form: str, machine: Machine) -> tuple[str, str, str, str]:
    """GB held (with a * where it does not fit), moved and sent, and time over the plain sum."""
    star = "" if formulas.fits(job, form, machine) else "*"
    over = formulas.seconds(job, form, machine) / formulas.seconds(job, PLAIN, machine)
    return (
        short(formulas.held(job, form) / GB) + star,
        short(formulas.moved(job, form) / GB),
        short(formulas.sent(job, form) / GB),
        f"{over:.2f}",
    )


def where(job: Job) -> list[str]:
    return [f"{job.parameters / 1e9:g}", str(job.gpus), job.wrapper if job.gpus > 1 else "-"]


def markdown(kind: str, machine: Machine = Machine()) -> str:  # noqa: B008
    """A table of docs/scale.md: "holds", "moves", "sends" or "time"; each K has a column of each form."""
    index = ("holds", "moves", "sends", "time").index(kind)
    forms = OURS if kind in ("time", "moves") else FORMS
    alike = [form for form in forms if form in (PLAIN, ONE_PASS)]  # whatever K is, but for the last digits
    lines: dict[tuple[str, ...], list[str]] = {}
    for job in jobs(tasks=(TASKS[1], TASKS[-1])):
        line = lines.setdefault(tuple(where(job)), [])
        line += [figures(job, form, machine)[index] for form in forms if job.tasks == TASKS[1] or form not in alike]
    head = [*forms, *(form for form in forms if form not in alike)]
    ks = [TASKS[1]] * len(forms) + [TASKS[-1]] * (len(head) - len(forms))
    names = [form if form in alike else f"{form}, K={k}" for form, k in zip(head, ks, strict=True)]
    return grid(["P, billions", "GPUs", "wrapper", *names], ([*key, *line] for key, line in lines.items()))


def holds(rows: object) -> str:
    return markdown("holds")


def moves(rows: object) -> str:
    return markdown("moves")


def sends(rows: object) -> str:
    return markdown("sends")


def time(rows: object) -> str:
    return markdown("time")


def show(options: argparse.Namespace, given: dict[str, Any], machine: Machine) -> None:
    """Print a table for each number of parameters."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=options.width)
    what = ("holds", "moves", "sends", "time")
    for billions in options.parameters:
        table = Table(
            "GPUs", "wrapper", "K", "plain: holds", "sends", "ms", *(f"{form}: {w}" for form in OURS for w in what),
            title=f"{billions:g} billion parameters: GB held, moved, sent a step and GPU; time over the plain sum",
            box=SIMPLE_HEAD,
        )  # fmt: skip
        for job in jobs([billions], options.tasks, options.gpus, options.wrappers, **given):
            plain = figures(job, PLAIN, machine)
            ms = f"{formulas.seconds(job, PLAIN, machine) * 1e3:.0f}"
            cells = [cell for form in OURS for cell in figures(job, form, machine)]
            table.add_row(*where(job)[1:], str(job.tasks), plain[0], plain[2], ms, *cells)
        console.print(table)
    console.print(f"Arithmetic, not measured. *: with the parameters and AdamW more than {machine.memory / GB:g} GB.")
    speeds = f"{machine.flops:g} operations, {machine.hbm:g} bytes of memory, {machine.nvlink:g} over NVLink"
    console.print(f"A GPU: {speeds} and {machine.network:g} to other nodes a second; {given['tokens']} tokens a step.")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("--parameters", nargs="+", type=positive, default=list(PARAMETERS), help="billions")
    parser.add_argument("--tasks", nargs="+", type=whole, default=list(TASKS), help="K")
    parser.add_argument("--gpus", nargs="+", type=whole, default=list(GPUS))
    parser.add_argument("--wrappers", nargs="+", choices=WRAPPERS, default=list(WRAPPERS))
    parser.add_argument("--width", type=whole, help="columns of the terminal to print for")
    for kind, cls in ((positive, Machine), (whole, Job)):
        names = [f for f in fields(cls) if isinstance(f.default, (int, float)) and f.name not in ("heads", "gpus")]
        for field in names:
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=kind, default=field.default, help="default: %(default)s")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = parse(words)
    own = ("per_node", "state", "reduced", "gathered", "transits", "measure_every", "tokens")
    given: dict[str, Any] = {name: getattr(options, name) for name in own}
    bad = [count for count in options.gpus if count > options.per_node and count % options.per_node]
    if bad:
        raise BenchError(f"{bad[0]} GPUs are not whole nodes of {options.per_node}: give other --gpus or --per-node")
    machine = Machine(**{f.name: getattr(options, f.name) for f in fields(Machine)})
    show(options, given, machine)
    return 0
