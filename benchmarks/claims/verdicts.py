"""A verdict on each claim and finding of the paper, computed from the rows.

The rule: a difference counts where its mean over the seeds, pairs of the same seed, is further from zero than two
standard errors. A claim is reproduced where it holds in every setting that has rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dbmtl_kernels.bench.results import Row

from . import methods as m
from .measured import IDENTITY, SECONDS
from .scores import Outcome, delta_p, mean_and_error, outcomes, score
from .settings import FULL, GRAPH, QUICK, SEEDS, SETTINGS
from .trial import BENCHMARK

REPRODUCED, NOT, UNTESTABLE, LACKING = "reproduced", "not reproduced", "not testable here", "no rows yet"
ERRORS = 2.0
PAPERS_SECONDS = {"EW": 85.0, "DB-MTL": 245.0}  # an epoch of NYUv2, read off a chart
PAPERS_SLOWEST = 300.0  # of the other gradient-balancing methods
IDENTICAL = 1e-6
SINGLE = [*m.SIX, m.EW, "GLS", "UW", "IMTL-L", "FAMO"]  # other methods, as they are
BETAS = (m.BETA + "0", *m.CONSTANT_BETAS, *m.DECAYED_BETAS, m.DB_MTL)
CHOSEN = "DB-MTL, beta chosen"


@dataclass(frozen=True)
class Finding:
    """What a setting says of a claim."""

    holds: bool
    figure: str


@dataclass
class Evidence:
    """The rows, and what follows from them."""

    rows: Sequence[Row]
    seeds: int = SEEDS
    small: bool = False
    found: dict[tuple[str, str], Outcome] = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        every = [s.name for s in (*QUICK, *FULL, GRAPH)]
        self.found = outcomes(self.rows, every, m.METHODS, self.seeds, self.small)
        for name in every:
            if all((name, method) in self.found for method in BETAS):
                best = max(BETAS, key=lambda method: self.validated(name, method))
                self.found[name, CHOSEN] = self.found[name, best]
        self.names = [name for name in every if any(key[0] == name for key in self.found)]

    def validated(self, name: str, method: str) -> float:
        """Validation score, mean over the seeds."""
        return float(np.mean([score(SETTINGS[name], x) for x in self.found[name, method].validation]))

    def has(self, name: str, *methods: str) -> bool:
        """Whether all of them have all their runs."""
        return all((name, method) in self.found for method in methods)

    def deltas(self, name: str, method: str) -> list[float]:
        """Delta_p against single-task learning, a seed each."""
        pairs = zip(self.found[name, method].test, self.found[name, m.STL].test, strict=True)
        return [delta_p(SETTINGS[name], mine, alone) for mine, alone in pairs]

    def row(self, what: str, name: str, method: str) -> Row | None:
        """The last row of something measured."""
        rows = [r for r in self.rows if (r.benchmark, r.what, r.model, r.contender) == (BENCHMARK, what, name, method)]
        return rows[-1] if rows else None


Test = Callable[[Evidence, str], Finding | None]  # of a setting; None where rows lack or the claim is not of it


@dataclass(frozen=True)
class Claim:
    """A claim or finding.

    Attributes:
        text: what is claimed.
        paper: its figures.
        test: of a setting; None where it cannot be tested, and then ``why``.
    """

    text: str
    paper: str
    test: Test | None = None
    why: str = ""


def shown(values: Sequence[float], unit: str = "") -> str:
    """Mean +- standard error."""
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:+.2f}{unit}" if math.isnan(error) else f"{mean:+.2f} ± {error:.2f}{unit}"


def above(values: Sequence[float]) -> bool:
    """Whether the mean is above zero by more than two standard errors."""
    mean, error = mean_and_error(values)
    return math.isfinite(mean) and mean > (0.0 if math.isnan(error) else ERRORS * error)


def better(first: str, second: str) -> Test:
    """Delta_p of the first above that of the second."""

    def test(evidence: Evidence, name: str) -> Finding | None:
        if not evidence.has(name, m.STL, first, second):
            return None
        pairs = zip(evidence.deltas(name, first), evidence.deltas(name, second), strict=True)
        change = [a - b for a, b in pairs]
        return Finding(above(change), shown(change))

    return test


def best_of(evidence: Evidence, name: str, methods: Sequence[str]) -> str | None:
    """The method of highest Delta_p, mean over the seeds; None where one lacks runs."""
    if not evidence.has(name, m.STL, *methods):
        return None
    means = {method: float(np.mean(evidence.deltas(name, method))) for method in methods}
    return max(means, key=lambda method: -math.inf if math.isnan(means[method]) else means[method])


def better_than_best(first: str, others: Sequence[str]) -> Test:
    """Delta_p of the first above that of the best of others."""

    def test(evidence: Evidence, name: str) -> Finding | None:
        best = best_of(evidence, name, others)
        finding = None if best is None else better(first, best)(evidence, name)
        return finding and Finding(finding.holds, f"{finding.figure} over {best}")

    return test


def worst(method: str, others: Sequence[str]) -> Test:
    """Delta_p of the method below that of each of others."""

    def test(evidence: Evidence, name: str) -> Finding | None:
        if not evidence.has(name, m.STL, method, *others):
            return None
        means = {x: float(np.nan_to_num(np.mean(evidence.deltas(name, x)), nan=-np.inf)) for x in (method, *others)}
        lowest = min(others, key=lambda x: means[x])
        finding = better(lowest, method)(evidence, name)
        return finding and Finding(finding.holds, f"{finding.figure}: {lowest} over it")

    return test


def best_decayed(evidence: Evidence, name: str) -> Finding | None:
    """The best c / sqrt(k), c chosen on validation, above beta = 0."""
    decayed = (*m.DECAYED_BETAS, m.DB_MTL)
    if not evidence.has(name, m.STL, m.BETA + "0", *decayed):
        return None
    chosen = max(decayed, key=lambda method: evidence.validated(name, method))
    finding = better(chosen, m.BETA + "0")(evidence, name)
    return finding and Finding(finding.holds, f"{finding.figure}, {chosen}")


def against_single_task(evidence: Evidence, name: str) -> Finding | None:
    """Above single-task networks but on QM9, where the paper's are below."""
    if not evidence.has(name, m.STL, m.DB_MTL):
        return None
    values = evidence.deltas(name, m.DB_MTL)
    sign = -1 if name.startswith("qm9") else 1
    return Finding(above([sign * x for x in values]), shown(values))


def seen(test: Test) -> Test:
    """Of what was seen in training, against equal weighting; a run of either that diverged fails."""

    def guarded(evidence: Evidence, name: str) -> Finding | None:
        if not evidence.has(name, m.EW, m.DB_MTL):
            return None
        rows = [row for method in (m.EW, m.DB_MTL) for row in evidence.found[name, method].rows]
        if any(value is None for row in rows for value in row.detail["test"].values()):
            return Finding(False, "diverged")
        return test(evidence, name) if all("roughness" in row.detail for row in rows) else None

    return guarded


def smooth(evidence: Evidence, name: str) -> Finding | None:
    """Every loss falls, and no rougher than with equal weighting."""
    ours, theirs = (evidence.found[name, x].watched("roughness") for x in (m.DB_MTL, m.EW))
    fell = all(evidence.found[name, m.DB_MTL].watched("fell"))
    rougher = [a - b for a, b in zip(ours, theirs, strict=True)]
    text = f"up {100 * float(np.mean(ours)):.1f} % of down; EW {100 * float(np.mean(theirs)):.1f} %"
    return Finding(fell and not above(rougher), text if fell else f"{text}; a loss did not fall")


def lower_norms(evidence: Evidence, name: str) -> Finding | None:
    """Norms of the task gradients below equal weighting's, after the first step."""
    pairs = zip(*(evidence.found[name, x].watched("norms") for x in (m.DB_MTL, m.EW)), strict=True)
    change = [
        100 * (math.exp(float(np.mean(np.log(ours[1:]) - np.log(theirs[1:])))) - 1) for ours, theirs in pairs
    ]  # fmt: skip
    return Finding(above([-x for x in change]), shown(change, " %"))


def slope(cosines: Sequence[float]) -> float:
    """Of a straight line through the cosines, from the start of the run to its end."""
    return float(np.polyfit(np.linspace(0, 1, len(cosines)), cosines, 1)[0])


def faster_cosines(evidence: Evidence, name: str) -> Finding | None:
    """The mean cosine of pairs of task gradients rises faster than with equal weighting."""
    ours, theirs = ([slope(x) for x in evidence.found[name, y].watched("cosines")] for y in (m.DB_MTL, m.EW))
    change = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Finding(above(change), f"{shown(change)} a run; EW {shown(theirs)}")


def positive_cosines(evidence: Evidence, name: str) -> Finding | None:
    """The mean cosine is positive whenever it was looked at."""
    least = [min(x) for x in evidence.found[name, m.DB_MTL].watched("cosines")]
    return Finding(min(least) > 0, f"least {min(least):+.3f}")


def equality(evidence: Evidence, name: str) -> Finding | None:
    """IMTL-L at its minimiser is the logarithm."""
    row = evidence.row(IDENTITY, name, "IMTL-L")
    return None if row is None or row.p50 is None else Finding(row.p50 < IDENTICAL, f"differ by {row.p50:.1g}")


def _ratio(evidence: Evidence, name: str, method: str) -> float | None:
    row = evidence.row(SECONDS, name, method)
    return None if row is None else row.ratio


def as_slow_as_said(evidence: Evidence, name: str) -> Finding | None:
    """At K = 3 an epoch takes at most as many times equal weighting's as the paper's."""
    ratio = _ratio(evidence, name, m.DB_MTL)
    if ratio is None or len(SETTINGS[name].tasks) != 3:
        return None
    return Finding(ratio <= PAPERS_SECONDS["DB-MTL"] / PAPERS_SECONDS["EW"], f"{ratio:.2f} times EW's")


def no_slower(evidence: Evidence, name: str) -> Finding | None:
    """An epoch takes no longer than the slowest of the six other gradient-balancing methods'."""
    ours = _ratio(evidence, name, m.DB_MTL)
    others = [x for method in m.SIX if (x := _ratio(evidence, name, method)) is not None]
    if ours is None or len(others) < len(m.SIX):
        return None
    text = f"{ours:.2f}; the six {min(others):.2f} to {max(others):.2f}"
    return Finding(ours <= max(others), text)


def one_pass_as_good(evidence: Evidence, name: str) -> Finding | None:
    """One backward pass is not worse."""
    if not evidence.has(name, m.STL, m.DB_MTL, m.ONE_PASS):
        return None
    pairs = zip(evidence.deltas(name, m.ONE_PASS), evidence.deltas(name, m.DB_MTL), strict=True)
    change = [a - b for a, b in pairs]
    return Finding(math.isfinite(sum(change)) and not above([-x for x in change]), shown(change))


def only(names: str, test: Test) -> Test:
    """Of settings whose name begins so."""
    return lambda evidence, name: test(evidence, name) if name.startswith(names) else None


_ELSEWHERE = "the data cannot be fetched; who holds it: [datasets.md](datasets.md)"
CLAIMS = (
    Claim("DB-MTL's Δp above EW's", "in all six tables", better(m.DB_MTL, m.EW)),
    Claim("DB-MTL's Δp above the best other method's", "in all six tables", better_than_best(m.DB_MTL, SINGLE)),
    Claim("the same, beta chosen on validation, as the paper does", "same", better_than_best(CHOSEN, SINGLE)),
    Claim("Δp above 0; on QM9 below", "+0.17 to +8.91; -58.1", against_single_task),
    Claim("NYUv2, DeepLabV3+: Δp", "+1.15; EW -1.78; GLS +0.30", None, _ELSEWHERE),
    Claim("NYUv2, SegNet: Δp", "+8.91; EW +0.88; Aligned-MTL +8.16", None, _ELSEWHERE),
    Claim("Cityscapes: Δp", "+0.20; EW -2.05; MGDA -0.19", None, _ELSEWHERE),
    Claim("Office-31: Δp", "+1.05; EW -0.61; IGBv2 +0.56", None, _ELSEWHERE),
    Claim("Office-Home: Δp", "+0.17; EW -0.92; Nash-MTL -0.08", None, _ELSEWHERE),
    Claim(
        "QM9, message-passing network: Δp above the best other's", "-58.1; EW -146; Nash-MTL -73.9",
        only(GRAPH.name, better_than_best(m.DB_MTL, SINGLE)), "needs a GPU: `python -m benchmarks claims graph`",
    ),
    Claim("log alone above EW", "+0.06 over -1.78", better(m.LOG, m.EW)),
    Claim("max-norm alone above EW", "+0.76 over -1.78", better(m.MAX_NORM, m.EW)),
    Claim("both above log alone", "+1.15 over +0.06", better(m.DB_MTL, m.LOG)),
    Claim("both above max-norm alone", "+1.15 over +0.76", better(m.DB_MTL, m.MAX_NORM)),
    Claim("alpha: max above mean", "1.25 over 0.8", better(m.DB_MTL, m.ALPHA + "mean")),
    Claim("alpha: max above median", "1.25 over 0.55", better(m.DB_MTL, m.ALPHA + "median")),
    Claim("alpha: max above min", "1.25 over 0.4", better(m.DB_MTL, m.ALPHA + "min")),
    Claim("alpha: max above 1/K", "1.25 over 0.3", better(m.DB_MTL, m.ALPHA + "1/K")),
    Claim(
        "alpha: max above the best constant", "1.25 over at most 0.5",
        better_than_best(m.DB_MTL, [f"{m.ALPHA}{value:g}" for value in m.CONSTANTS]),
    ),
    Claim("beta: c/sqrt(k) above 0", "+0.95 to +1.6 over +0.9 (Office-31)", best_decayed),
    Claim("beta: 0 above constant 0.5", "+0.9 over -0.45", better(m.BETA + "0", m.BETA + "0.5")),
    Claim(
        "beta: constant 0.9, the authors' default, the worst", "-2.9",
        worst(m.BETA + "0.9", [x for x in BETAS if x != m.BETA + "0.9"]),
    ),
    *(Claim(f"log improves {x}", "yes (NYUv2)", better(x + m.WITH_LOG, x)) for x in m.SIX),
    Claim("log is IMTL-L at its minimiser", "exactly", equality),
    Claim("losses fall smoothly", "yes", seen(smooth)),
    Claim("gradient norms lower than EW's", "yes", seen(lower_norms)),
    Claim("cosine of task gradients rises faster than EW's", "yes (Office-31)", seen(faster_cosines)),
    Claim("that cosine stays positive", "yes (Office-31)", seen(positive_cosines)),
    Claim("an epoch takes 2.9 times EW's, K = 3", "245 s over 85 s", as_slow_as_said),
    Claim("no slower than other gradient balancing", "245 s; others 200 to 300 s", no_slower),
    Claim("one backward pass as good as DB-MTL (ours)", "-", one_pass_as_good),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """On a claim.

    Attributes:
        word: `REPRODUCED`, `NOT`, `UNTESTABLE` or `LACKING`.
        findings: of each setting that has one.
    """

    claim: Claim
    word: str
    findings: dict[str, Finding]


def judge(evidence: Evidence) -> list[Verdict]:
    """All claims."""
    judged = []
    for claim in CLAIMS:
        found = {}
        if claim.test is not None:
            for name in [s.name for s in (*QUICK, *FULL, GRAPH)]:
                finding = claim.test(evidence, name)
                if finding is not None:
                    found[name] = finding
        if found:
            word = REPRODUCED if all(x.holds for x in found.values()) else NOT
        else:
            word = UNTESTABLE if claim.why else LACKING
        judged.append(Verdict(claim, word, found))
    return judged
