"""The results file: one line a run, appended when the run is complete."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .errors import TrialError

Run = tuple[str, str, float, int]  # setting, method, learning rate, seed


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        validation, test, constant: metric of each task; ``constant`` is that of a constant prediction on the test part.
        commit: of the package.
    """

    setting: str
    method: str
    lr: float
    seed: int
    validation: dict[str, float]
    test: dict[str, float]
    constant: dict[str, float]
    steps: int
    seconds: float
    commit: str
    torch: str
    date: str

    @property
    def run(self) -> Run:
        """What was run."""
        return self.setting, self.method, self.lr, self.seed


COLUMNS = [field.name for field in fields(Row)]
METRICS = ("validation", "test", "constant")


def append(path: Path, row: Row) -> None:
    """One write, so that an interrupted one leaves at most one line without its end."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writerow(COLUMNS)
    writer.writerow([json.dumps(x) if isinstance(x, dict) else x for x in astuple(row)])
    with path.open("a", encoding="utf-8") as file:
        file.write(line.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All rows; what follows the last end of line, an interrupted write, is cut off the file.

    Raises:
        TrialError: not a results file of this schema.
    """
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = csv.reader(io.StringIO(whole))
    if (header := next(lines, [])) != COLUMNS and text:
        raise TrialError(f"{path} has another schema: columns {header}, not {COLUMNS}. Give another --out")
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [_row(path, number, line) for number, line in enumerate(lines, 2)]


def _row(path: Path, number: int, line: list[str]) -> Row:
    try:
        given = dict(zip(COLUMNS, line, strict=True))
        metrics = {name: {k: float(v) for k, v in json.loads(given.pop(name)).items()} for name in METRICS}
        return Row(
            lr=float(given.pop("lr")), seed=int(given.pop("seed")), steps=int(given.pop("steps")),
            seconds=float(given.pop("seconds")), **metrics, **given,
        )  # fmt: skip
    except (ValueError, AttributeError) as error:
        raise TrialError(f"{path}, line {number}: not a row of the trial: {error}") from error
