"""Rows of benchmarks: one CSV schema for all of them. A file is only appended to."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = "2"  # 1 were those of the GPU suite alone


class BenchError(Exception):
    """What a user can set right; the command prints it without a traceback."""


@dataclass(frozen=True)
class Row:
    """One figure of one contender.

    Attributes:
        benchmark: which command it is of: "bench", "price_list", "claims", ...
        what: the quantity: "op", "step", "peak memory", "test metrics", ...
        contender: whose.
        model: network, data set, or "" for an op.
        K: tasks.
        P: shared parameters.
        dtype: of gradients and state.
        p20: 20th percentile over ``rounds``.
        p50: median, or the one value there is.
        p80: 80th percentile.
        unit: of these: "ms", "bytes", "%", ...
        ratio: p50 over that of ``over``, contenders taking turns in one run.
        over: the contender that ``ratio`` is over.
        bytes: what must be moved, or is held.
        of_copy: fraction of the bandwidth of a copy, measured in the same run.
        rounds: how many values the percentiles are of.
        detail: whatever else, as JSON: seed, learning rate, batch, verdict, ...
        machine: `machine`.
    """

    benchmark: str
    what: str
    contender: str
    model: str = ""
    K: int | None = None
    P: int | None = None
    dtype: str = "float32"
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    unit: str = "ms"
    ratio: float | None = None
    over: str = ""
    bytes: int | None = None
    of_copy: float | None = None
    rounds: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)


MACHINE = ("device", "threads", "python", "torch", "triton", "dbmtl_kernels", "commit", "command", "date")
NUMBERS = {"K": int, "P": int, "bytes": int, "rounds": int} | dict.fromkeys(
    ("p20", "p50", "p80", "ratio", "of_copy"), float
)
COLUMNS = ("schema", *(f.name for f in fields(Row) if f.name != "machine"), *MACHINE)


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a figure needs beside it: the device, versions, commit, command and time (UTC)."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dbmtl_kernels": _version("dbmtl_kernels"),
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add the rows to the file, which is made if need be. A last line that was cut off goes.

    Raises:
        BenchError: the file is one of another schema; it is left as it is.
    """
    new = not path.exists()
    if not new:
        _check_header(path)
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            with path.open("r+b") as file:
                file.truncate(len(whole[0]) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            given = {**asdict(row), **row.machine, "schema": SCHEMA}
            given["detail"] = json.dumps(row.detail, sort_keys=True) if row.detail else ""
            writer.writerow({name: _text(given.get(name)) for name in COLUMNS})


def read(path: Path) -> list[Row]:
    """The rows of the file. A last line that was cut off, as by an interrupt, is left out.

    Raises:
        BenchError: there is no such file, or it is one of another schema, or a row is damaged.
    """
    _check_header(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(_row(line))
        except (KeyError, TypeError, ValueError) as error:
            if number == len(lines) + 1 and not path.read_bytes().endswith(b"\n"):
                break
            raise BenchError(f"{path}: row {number} is damaged ({error})") from error
    return rows


def _row(line: dict[str, Any]) -> Row:
    if line["schema"] != SCHEMA or None in line.values():
        raise ValueError(f"schema {line['schema']!r}, {len(COLUMNS) - list(line.values()).count(None)} columns")
    values: dict[str, Any] = {name: line[name] for name in COLUMNS if name not in ("schema", "detail", *MACHINE)}
    for name, kind in NUMBERS.items():
        values[name] = kind(values[name]) if values[name] else None
    detail = json.loads(line["detail"]) if line["detail"] else {}
    return Row(**values, detail=detail, machine={name: line[name] for name in MACHINE})


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise BenchError(f"no results file {path}")
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise BenchError(
            f"{path} is a results file of another schema: its columns are {', '.join(header[:6]) or 'none'}, ... and "
            f"those of schema {SCHEMA} are {', '.join(COLUMNS[:6])}, ...: give another file"
        )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the working copy that this file is in, "-dirty" if more than results has changed; "" where it is installed.

    The environment's COMMIT goes before, for a copy of the files that git knows nothing of.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if "site-packages" in __file__:
        return ""
    here, found = Path(__file__).parent, []
    for words in ("rev-parse --short=10 HEAD", "status --porcelain -uno -- :/ :!/benchmarks/results"):
        try:
            done = subprocess.run(["git", *words.split()], cwd=here, capture_output=True, text=True)
        except OSError:
            return ""
        found.append(done.stdout.strip() if done.returncode == 0 else "")
    return found[0] + "-dirty" * bool(found[1])


def typed(*words: str) -> str:
    """A command as a row has it: of a file or folder its name, and not where on this machine it lies."""
    split = (word.rpartition("=") for word in words)
    return " ".join(before + sign + (Path(x).name if Path(x).is_absolute() else x) for before, sign, x in split)


def _command() -> str:
    first = Path(sys.argv[0])
    name = f"python -m {first.parent.name}" if first.name == "__main__.py" else first.name
    return typed(name, *sys.argv[1:])
