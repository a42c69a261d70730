"""What was measured: rows of figures, which of them reach their targets, and what went wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch

OURS = "dbmtl_kernels"


class WrongResultError(Exception):
    """A contender does not agree with the reference."""


@dataclasses.dataclass
class Row:
    """One contender of one case; ours once for each thing it is compared with. ``wanted`` is ">=" or "<="."""

    section: str
    case: str
    name: str
    K: int
    P: int
    grads: str = ""
    state: str = ""
    clock: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    agreed: bool | None = None
    against: str = ""
    ratio: float | None = None
    wanted: str = ""
    target: float | None = None
    reached: bool | None = None
    note: str = ""


def plain(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


class Report:
    """Collects rows, and saves them whenever a section is done.

    Args:
        folder: where results.json and results.csv go.
        judge: whether targets are judged; off where times mean nothing.
        seconds: after so many no section begins any more.
    """

    def __init__(self, folder: Path, judge: bool, seconds: float) -> None:
        self.folder = folder
        self.judge = judge
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self._end = time.monotonic() + seconds

    def section(self, name: str, run: Callable[[], None]) -> None:
        """Run a section. Its failure is kept for the end and stops no other."""
        began = time.monotonic()
        if began > self._end:
            self.failures.append(f"{name}: not begun, no time was left")
        else:
            try:
                run()
            except Exception as error:
                traceback.print_exc()
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        print(f"-- {name}: {time.monotonic() - began:.1f} s", flush=True)
        self.save()

    def agree(self, case: str, contenders: dict[str, Any], check: Callable[[Any], None]) -> dict[str, Any]:
        """Those that agree with the reference: a time is never reported of a result that is wrong."""
        right = {}
        for name, contender in contenders.items():
            try:
                check(contender)
                right[name] = contender
            except Exception as error:  # one that cannot be compiled, say, must not stop the others
                self.failures.append(f"{case}: {name} was not timed: {type(error).__name__}: {error}")
        if OURS not in right:
            raise WrongResultError(f"{case}: nothing to compare {'; '.join(self.failures[-1:])}")
        return right

    def add_times(
        self,
        base: Row,
        times: dict[str, list[float]],
        moved: dict[str, float],
        targets: dict[str, float | None],
        unchecked: tuple[str, ...] = (),
    ) -> None:
        """A row for each contender, and one of ours for each comparison.

        Args:
            base: what all rows have in common.
            times: seconds, by contender.
            moved: bytes that each has to move, by contender; "" for all others.
            targets: by the beginning of a contender's name (the fastest such is compared with): how many times
                faster ours must be, None if that is only reported. "copy" compares bandwidths.
            unchecked: contenders that have no result to agree on.
        """
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        rate = {name: moved.get(name, moved[""]) / median[name] / 1e9 for name in times}
        for name, seconds in times.items():
            agreed = None if name in unchecked else True
            row = dataclasses.replace(base, name=name, agreed=agreed, gb_per_s=rate[name], **timing.summary(seconds))
            self.rows.append(row)
            self._show(row)
            for family, target in targets.items() if name == OURS else ():
                rivals = [rival for rival in times if rival.startswith(family)]
                if not rivals:
                    continue
                best = min(rivals, key=median.__getitem__)
                ratio = rate[name] / rate[best] if family == "copy" else median[best] / median[name]
                self.compare(row, best, ratio, ">=", target)

    def row_of(self, base: Row, name: str) -> Row:
        """The times of a contender that `add_times` noted last for the case and the clock of ``base``."""
        key = (base.case, base.clock, name, "")
        return next(row for row in reversed(self.rows) if (row.case, row.clock, row.name, row.against) == key)

    def compare(self, row: Row, against: str, ratio: float, wanted: str, target: float | None) -> None:
        """The same row once more, with a comparison."""
        reached = None
        if self.judge and target is not None:
            reached = ratio >= target if wanted == ">=" else ratio <= target
        row = dataclasses.replace(row, against=against, ratio=ratio, wanted=wanted, target=target, reached=reached)
        self.rows.append(row)
        self._show(row)

    def _show(self, row: Row) -> None:
        line = f"{row.case:34s} {row.clock:7s} {row.name:26s}"
        if row.against:
            target = "" if row.target is None else f" (wanted {row.wanted} {row.target:g})"
            verdict = {True: " reached", False: " MISSED", None: ""}[row.reached]
            line += f" {row.ratio:8.3f} against {row.against}{target}{verdict}"
        elif row.p50_ms is not None:
            line += f" {row.p50_ms:9.4f} ms {row.gb_per_s or 0:8.1f} GB/s"
        print(line, flush=True)

    @property
    def missed(self) -> list[str]:
        """Targets that were not reached."""
        return [
            f"{r.case} ({r.clock or 'bytes'}) against {r.against}: {r.ratio:.3f}, wanted {r.wanted} {r.target:g}"
            for r in self.rows
            if r.reached is False
        ]

    def save(self) -> None:
        """results.json and results.csv, so far."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        content = {"command": " ".join(sys.argv), "failures": self.failures, "missed": self.missed, "rows": rows}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        with (self.folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
