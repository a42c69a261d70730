"""Tables of the price list, as Markdown, from its rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from dbmtl_kernels.bench.results import Row

from ..report import grid
from .cases import DENSE, FIRST, MEAN, MEASURING, PART, PEAK, STEP
from .methods import ADDED, AUTHORS, BARE, EW, LOGS, ONE_ROW, ROWS, A
from .models import BY_P

Found = dict[tuple[str, int, str, str], Row]  # by trunk, K, method, what
NAMES = {
    EW: "equal weighting (EW)",
    A: "`OnePassDBMTL`, measurements included",
    BARE: "K passes, gradients thrown away",
    ADDED: "K passes, gradients added up",
    ONE_ROW: "`DBMTL(beta=0)`: one row",
    ROWS: "`DBMTL`: rows",
    AUTHORS: "the authors' arithmetic",
}
TIMES, BEYOND = "time", "memory"
# Time per epoch over equal weighting in tables of papers: of K passes, of one.
PUBLISHED: dict[int, str] = {2: "1.6 to 2.1", 3: "2.3", 11: "6.5", 40: "9 to 12"}
PUBLISHED_ONE = "1.0 to 1.2"
FLOOR = 0.05  # of P numbers: what is below is activations and the like, and no growth is fitted to it


def found_in(rows: Iterable[Row]) -> Found:
    """The last row of each kind."""
    return {(row.model, row.K or 0, row.contender, row.what): row for row in rows}


def exponent(xs: Sequence[float], ys: Sequence[float | None]) -> float | None:
    """A of y = c x ** a, by least squares of the logarithms; None of less than three points that are positive."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y is not None and y > 0]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 2 else None


def price(found: Found, trunk: str, num_tasks: int, method: str, kind: str) -> float | None:
    """Time of a mean step over that of EW; or peak memory beyond that of EW, in units of P float32 numbers."""
    what = PEAK if kind == BEYOND else MEAN if method == A else STEP
    row = found.get((trunk, num_tasks, method, what))
    if row is None:
        return None
    return row.ratio if kind == TIMES else (row.bytes or 0) / (4 * (row.P or 1))


def cell(value: float | None, digits: int = 2) -> str:
    """A number, or "-"."""
    return "-" if value is None else f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def power(xs: Sequence[float], values: Sequence[float | None], kind: str) -> str:
    """A cell of a fitted exponent."""
    if kind == BEYOND:
        values = [None if value is None or value < FLOOR else value for value in values]
    return cell(exponent(xs, values))


def methods_in(found: Found) -> list[str]:
    """In the order of their rows, those of one backward first."""
    return list(dict.fromkeys(method for _, _, method, what in found if what == PEAK))


def tasks_of(found: Found, trunk: str) -> list[int]:
    return sorted({k for model, k, _, what in found if model == trunk and what == STEP})


def trunks_in(found: Found, growing: bool) -> list[str]:
    """Trunks that are there for the growth with P (``growing``), or the others; those of few P first."""
    sizes = {model: row.P or 0 for (model, _, _, _), row in found.items()}
    return [trunk for trunk in sorted(sizes, key=sizes.__getitem__) if (trunk in BY_P) == growing]


def shown(method: str) -> str:
    return NAMES.get(method, method)


def by_tasks(rows: Iterable[Row]) -> str:
    """Of each trunk a table of all methods: time and memory for each K, and their growth with K."""
    found = found_in(rows)
    out = []
    for trunk in trunks_in(found, growing=False):
        ks = tasks_of(found, trunk)
        first = next(
            row for (model, _, method, what), row in found.items() if (model, method, what) == (trunk, EW, STEP)
        )
        head = ["method", *(f"time, K={k}" for k in ks), "K^", *(f"memory, K={k}" for k in ks), "K^"]
        lines = []
        for method in methods_in(found):
            line = [shown(method)]
            for kind in (TIMES, BEYOND):
                values = [price(found, trunk, k, method, kind) for k in ks]
                line += [*(cell(value) for value in values), power(ks, values, kind)]
            lines.append(line)
        out.append(
            f"**{trunk}, {(first.P or 0) / 1e6:.1f} M parameters, batch {first.detail['batch']}**\n\n"
            f"{grid(head, lines)}"
        )
    return "\n\n".join(out)


def by_parameters(rows: Iterable[Row]) -> str:
    """All methods on MLPs of several sizes: time and memory, and their growth with P."""
    found = found_in(rows)
    trunks = sorted(set(trunks_in(found, growing=True)) | {"MLP"} & {key[0] for key in found})
    k = next(iter(tasks_of(found, trunks_in(found, growing=True)[0])))
    sizes = {t: next(row.P or 0 for (model, *_), row in found.items() if model == t) for t in trunks}
    trunks.sort(key=sizes.__getitem__)
    ps = [sizes[t] for t in trunks]
    short = [f"{p / 1e6:.2g} M" for p in ps]
    head = ["method", *(f"time, P={p}" for p in short), "P^", *(f"memory, P={p}" for p in short), "P^ of the bytes"]
    lines = []
    for method in methods_in(found):
        line = [shown(method)]
        for kind in (TIMES, BEYOND):
            values = [price(found, t, k, method, kind) for t in trunks]
            size = [v if v is None or kind == TIMES or v < FLOOR else v * p for v, p in zip(values, ps, strict=True)]
            line += [*(cell(value) for value in values), power(ps, size, kind)]
        lines.append(line)
    ms = [found[t, k, EW, STEP].p50 for t in trunks]
    lines.append(["EW, ms", *(cell(value, 1) for value in ms), cell(exponent(ps, ms)), *[""] * (len(ps) + 1)])
    return grid(head, lines)


def exact(rows: Iterable[Row]) -> str:
    """`DBMTL` next to (1 + 2 K) / 3, and where the rest comes from."""
    rows = list(rows)
    found = found_in(rows)
    # Of equal weighting the steps that stood beside those of K passes, and not beside those of one.
    found |= found_in(row for row in rows if row.contender == EW and "copy_bytes_per_s" in row.detail)
    head = [
        "trunk", "K", "(1 + 2K)/3", "f, b, o: shares of EW's step", "f + K b + o", "K passes", "`DBMTL`",
        "over (1 + 2K)/3", "beyond the passes, ms", "bytes moved, MB", "these at copy speed, ms", "memory held, MB",
    ]  # fmt: skip
    lines = []
    for trunk in trunks_in(found, growing=False):
        for k in tasks_of(found, trunk):
            if (trunk, k, ROWS, STEP) not in found:
                continue
            f, b, o = (found[trunk, k, name, PART].ratio or 0.0 for name in ("forward", "backward", "optimizer"))
            ew, bare, ours = (found[trunk, k, name, STEP] for name in (EW, BARE, ROWS))
            ms, moved = ew.p50 or 0.0, ours.bytes or 0
            more = (ours.ratio or 0.0) - (bare.ratio or 0.0)
            paper = (1 + 2 * k) / 3
            copy = moved / ew.detail["copy_bytes_per_s"] * 1e3
            lines.append([
                trunk, k, cell(paper), f"{f:.2f}, {b:.2f}, {o:.2f}", cell(f + k * b + o), cell(bare.ratio),
                cell(ours.ratio), cell((ours.ratio or 0.0) / paper), cell(more * ms, 1),
                f"{moved / 1e6:.0f}", cell(copy, 1), f"{4 * (k + 1) * (ours.P or 0) / 1e6:.0f}",
            ])  # fmt: skip
    return grid(head, lines)


def published(rows: Iterable[Row]) -> str:
    """What others publish of time over equal weighting, next to ours."""
    found = found_in(rows)
    trunks = trunks_in(found, growing=False)

    def span(methods: Sequence[str], k: int) -> str:
        values = [v for t in trunks for m in methods if (v := price(found, t, k, m, TIMES)) is not None]
        return f"{min(values):.2f} to {max(values):.2f}" if values else "-"

    timed = {method for _, _, method, what in found if what == STEP}
    ours = [m for m in methods_in(found) if m in timed]
    one = [m for m in (LOGS, "IMTL-L", A) if m in ours]
    own = [m for m in ours if m.startswith("TorchJD") or m == AUTHORS]
    many = [m for m in ours if m not in (*one, *own, EW, BARE, ADDED)]
    head = ["K", "K passes: others", "ours (all methods)", "`DBMTL`", "TorchJD's own way, and the authors' arithmetic",
            "one pass: others", "ours"]  # fmt: skip
    ks = sorted(set(itertools.chain.from_iterable(tasks_of(found, t) for t in trunks)))
    return grid(
        head,
        (
            [k, PUBLISHED.get(k, "-"), span(many, k), span([ROWS], k), span(own, k), PUBLISHED_ONE, span(one, k)]
            for k in ks
        ),
    )


def forms(rows: Iterable[Row]) -> str:
    """The three forms of DB-MTL: the table of docs/forms.md."""
    found = found_in(rows)
    head = [
        "trunk", "K", "plain sum, ms", "one pass: a step", "a step that measures", "mean", f"first {DENSE} steps",
        "K bare passes", "one row, over those", "rows, over those", "memory: one pass, and measuring",
        "one row", "rows",
    ]  # fmt: skip
    lines = []
    for trunk in trunks_in(found, growing=False):
        for k in tasks_of(found, trunk):
            get: Callable[..., Row | None] = lambda m, w, t=trunk, k=k: found.get((t, k, m, w))  # noqa: E731
            ratios = {w: row.ratio for w in (STEP, MEASURING, MEAN, FIRST) if (row := get(A, w)) is not None}
            over = {m: row.ratio or 0.0 for m in (BARE, ONE_ROW, ROWS) if (row := get(m, STEP)) is not None}
            ew, measured = get(EW, STEP), get(A, f"{PEAK}, one measured")
            assert ew is not None
            size = 4 * (ew.P or 1)
            memory = {m: price(found, trunk, k, m, BEYOND) for m in (A, ONE_ROW, ROWS)}
            bare = over.get(BARE)
            lines.append([
                f"{trunk}, {(ew.P or 0) / 1e6:.1f} M, batch {ew.detail['batch']}", k, cell(ew.p50, 0),
                *(cell(ratios.get(w)) for w in (STEP, MEASURING, MEAN, FIRST)), cell(bare),
                *(cell(over[m] / bare if bare and m in over else None) for m in (ONE_ROW, ROWS)),
                f"{cell(memory[A])}, {cell((measured.bytes or 0) / size if measured else None)}",
                cell(memory[ONE_ROW]), cell(memory[ROWS]),
            ])  # fmt: skip
    return grid(head, lines)


def which(rows: Iterable[Row]) -> str:
    """What the forms take beyond the plain sum, in short: the table of docs/which.md."""
    found, methods = found_in(rows), (A, ONE_ROW, ROWS)
    head = ["trunk", "K", *(f"{form}: time" for form in ("one pass", "one row", "rows")),
            *(f"{form}: memory" for form in ("one pass", "one row", "rows"))]  # fmt: skip
    lines = []
    for trunk in trunks_in(found, growing=False):
        for k in tasks_of(found, trunk):
            cells = [cell(price(found, trunk, k, m, kind)) for kind in (TIMES, BEYOND) for m in methods]
            lines.append([trunk, k, *cells])
    return grid(head, lines)
