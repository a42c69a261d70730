"""Tables drawn from benchmarks/results/bench.csv."""

from __future__ import annotations

from collections.abc import Iterable

from dbmtl_kernels.bench import cases, show
from dbmtl_kernels.bench.results import Row
from report import grid

HEAD = (
    "what", "ours, ms", "best eager / ours", "best torch.compile / ours", "authors' arithmetic / ours",
    "of the speed of a copy", "threads, commit, date",
)  # fmt: skip


def readme(rows: Iterable[Row]) -> str:
    """How many times as long others take."""
    lines = []
    for case in show.found(rows):
        ours = {"op": cases.OP, "grads": cases.LISTS, "step": cases.ROWS}[case.level]
        row = case.times.get(ours)
        if row is None or row.p50 is None:
            continue
        authors = cases.ON_DEVICE if case.level == "op" else cases.SHIPPED
        ratios = [show.times_as_fast(case, ours, family) for family in ("eager", "torch.compile", authors)]
        share = "-" if row.of_copy is None else f"{row.of_copy:.2f}"
        of = row.machine
        where = ", ".join(filter(None, (of["threads"], of["commit"], of["date"][:10])))
        lines.append([case.title, f"{row.p50:.3g}", *ratios, share, where])
    return grid(HEAD, lines)


def steps(rows: Iterable[Row]) -> str:
    """A whole step of each form, over the bare passes in both readings and over equal weighting."""
    lines = []
    for case in show.found(rows):
        if case.level != "step":
            continue
        plain = case.p50(cases.EW)
        for name, row in case.times.items():
            if row.p50 is None or name == cases.COPY:
                continue
            taken = row.detail.get("ms_amortised", row.p50)
            held = case.bytes.get((name, "held"))
            lines.append([
                case.model, name, f"{taken:.3g}", "-" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.detail['over_let_go']:.2f}" if "over_let_go" in row.detail else "-",
                f"{taken / plain:.2f}" if plain else "-",
                f"{row.detail['floor_by_bytes']:.2f}" if "floor_by_bytes" in row.detail else "",
                "-" if held is None else f"{held / 4e6 / (case.P or 1) * 1e6:.2f}",
            ])  # fmt: skip
    head = [
        "model",
        "a step of",
        "ms",
        "over bare passes, added up",
        "over bare passes, let go",
        "over equal weighting",
    ]
    head += ["floor by bytes", "held beyond the model, in P numbers"]
    return grid(head, lines)


FELT = {
    cases.EW: "the plain sum of the losses",
    cases.ONE_PASS: "`OnePassDBMTL`",
    cases.ROWS: "`DBMTL`: exact, three backward passes",
    "eager": "DB-MTL written by hand, the best of three ways",
    cases.SHIPPED: "the authors' code",
}


def felt(rows: Iterable[Row]) -> str:
    """What a user feels: a step and its memory over the plain sum, the last whole run."""
    case = next(c for c in show.found(rows) if c.level == "step" and c.p50(cases.EW) and c.p50(cases.ONE_PASS))
    plain, base = case.p50(cases.EW) or 1.0, case.bytes[cases.EW, "peak"]
    lines = []
    for family, title in FELT.items():
        name = case.best(family)
        if name is None:
            continue
        taken = case.times[name].detail.get("ms_amortised", case.p50(name))
        more = (case.bytes[name, "peak"] - base) / (4 * (case.P or 1))
        lines.append([title, f"{taken / plain:.2f}", f"{max(0.0, more):.1f} P"])
    return grid(["a step", "time over the plain sum", "memory beyond it, at the peak"], lines)
