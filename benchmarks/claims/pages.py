"""The tables of docs/claims.md and docs/forms.md, from the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from dbmtl_kernels.bench.results import Row
from report import grid

from . import methods as m
from .measured import SECONDS
from .scores import Outcome, delta_m, delta_p, mean_and_error, number, outcome, outcomes, training
from .settings import FULL, GRAPH, QUICK, SEEDS, SETTINGS, THE_FORMS, choose
from .verdicts import CHOSEN, NOT, Evidence, judge, slope

POOLED_GOAL, WORST_GOAL = 0.5, 2.0
WITHOUT = "rf1-rescaled"  # where a method may lose without bound
Cell = Callable[[str, str], str]  # of a setting and a method


def shown(values: Sequence[float]) -> str:
    """Mean +- standard error."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    if not np.isfinite(mean):
        return "diverged"
    return f"{mean:+.1f}" if np.isnan(error) else f"{mean:+.1f} ± {error:.1f}"


def titles(names: Iterable[str]) -> list[str]:
    """Of settings."""
    return [SETTINGS[name].title for name in names]


def verdicts(rows: Sequence[Row], **how: Any) -> str:
    """A row a claim."""
    evidence = Evidence(rows, **how)
    judged = judge(evidence)
    names = [s.name for s in (*QUICK, *FULL, GRAPH) if any(s.name in v.findings for v in judged)]
    lines = []
    for verdict in judged:
        found = verdict.findings
        cells = [("yes: " if found[x].holds else "no: ") + found[x].figure if x in found else "-" for x in names]
        word = verdict.word
        if word == NOT and len(found) > 1:
            word += f": holds in {sum(x.holds for x in found.values())} of {len(found)}"
        elif not found and verdict.claim.why:
            word += f": {verdict.claim.why}"
        lines.append([verdict.claim.text, verdict.claim.paper, word, *cells])
    return grid(["claim", "paper", "verdict", *titles(names)], lines)


def _by_method(evidence: Evidence, names: Sequence[str], methods: Iterable[str], cell: Cell) -> str:
    lines = [[method, *(cell(name, method) for name in names)] for method in methods]
    return grid(["method", *titles(names)], [line for line in lines if any(x != "-" for x in line[1:])])


def deltas(rows: Sequence[Row], **how: Any) -> str:
    """Delta_p and Delta_m of each method in each setting."""
    evidence = Evidence(rows, **how)
    names = [name for name in evidence.names if evidence.has(name, m.STL)]

    def cell(name: str, method: str) -> str:
        if not evidence.has(name, method):
            return "-"
        setting, alone = SETTINGS[name], evidence.found[name, m.STL].test
        mine = evidence.found[name, method].test
        both = [
            shown([of(setting, a, b) for a, b in zip(mine, alone, strict=True)]) for of in (delta_p, delta_m)
        ]  # fmt: skip
        return "; ".join(both)

    return _by_method(evidence, names, [CHOSEN, *m.MULTI_TASK], cell)


def rates(rows: Sequence[Row], **how: Any) -> str:
    """The learning rates chosen; a star marks an end of the sweep."""
    evidence = Evidence(rows, **how)

    def cell(name: str, method: str) -> str:
        if not evidence.has(name, method):
            return "-"
        sweep, chosen = SETTINGS[name].rates, sorted(set(evidence.found[name, method].rates.values()))
        return ", ".join(f"{lr:g}" + "*" * (len(sweep) > 1 and lr in (sweep[0], sweep[-1])) for lr in chosen)

    return _by_method(evidence, evidence.names, m.METHODS, cell)


def watched(rows: Sequence[Row], **how: Any) -> str:
    """Norms over EW's, the mean cosine at the end and its rise, roughness; means over the seeds."""
    evidence = Evidence(rows, **how)

    def cell(name: str, method: str) -> str:
        if not evidence.has(name, method, m.EW):
            return "-"
        of, base = evidence.found[name, method], evidence.found[name, m.EW]
        if any(len(x) < 2 for x in (*of.watched("norms"), *base.watched("norms"))):
            return "diverged"
        pairs = zip(of.watched("norms"), base.watched("norms"), strict=True)
        norms = np.exp(np.mean([np.mean(np.log(a[1:])[: len(b) - 1] - np.log(b[1:])[: len(a) - 1]) for a, b in pairs]))
        last = float(np.mean([x[-1] for x in of.watched("cosines")]))
        rise = float(np.mean([slope(x) for x in of.watched("cosines")]))
        rough = 100 * float(np.mean([row.detail.get("roughness", np.nan) for row in of.rows]))
        return f"{norms:.2f}; {last:+.2f}, {rise:+.2f}; {rough:.0f} %"

    return _by_method(evidence, evidence.names, m.MULTI_TASK, cell)


def seconds(rows: Sequence[Row], **how: Any) -> str:
    """Seconds of an epoch over equal weighting's, and of equal weighting."""
    evidence = Evidence(rows, **how)
    names = [s.name for s in (*QUICK, *FULL, GRAPH) if evidence.row(SECONDS, s.name, m.EW)]

    def cell(name: str, method: str) -> str:
        row = evidence.row(SECONDS, name, method)
        if row is None:
            return "-"
        return f"{row.detail['epoch_s']:.2g} s" if method == m.EW else f"{row.ratio:.2f}"

    return _by_method(evidence, names, m.METHODS, cell)


def levels(rows: Sequence[Row], **how: Any) -> str:
    """That networks learn: test metrics beside those of a constant prediction."""
    evidence = Evidence(rows, **how)
    shown_methods = (m.STL, m.EW, m.DB_MTL)
    lines = []
    for name in evidence.names:
        if not evidence.has(name, *shown_methods):
            continue
        idle = evidence.found[name, m.DB_MTL].watched("constant")
        for task in SETTINGS[name].tasks:
            for metric, kind in task.metrics.items():
                reached = [[x[metric] for x in evidence.found[name, method].test] for method in shown_methods]
                values = [np.mean([x[metric] for x in idle]), *(np.mean([number(v) for v in of]) for of in reached)]
                unit = "higher" if kind.sign > 0 else "lower"
                lines.append([SETTINGS[name].title, metric, unit, *(f"{float(v):.3g}" for v in values)])
    return grid(["setting", "metric", "better", "constant", *shown_methods], lines)


def differences(found: dict[tuple[str, str], Outcome], base: dict[str, Outcome], method: str) -> dict[str, list[float]]:
    """Of each setting a change a seed, from the base."""
    return {
        name: [delta_p(SETTINGS[name], a, b) for a, b in zip(found[name, method].test, to.test, strict=True)]
        for name, to in base.items()
        if (name, method) in found
    }


def pool(by_setting: dict[str, list[float]], without: str | None = None) -> list[float]:
    """The pairs of all settings."""
    return [x for name, values in by_setting.items() if name != without for x in values]


def _forms(
    rows: Sequence[Row], same_rate: bool, seeds: int = SEEDS, small: bool = False
) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    found = outcomes(rows, [s.name for s in THE_FORMS], m.MAKE, seeds, small)
    base = {name: result for (name, method), result in found.items() if method == m.DB_MTL}
    if same_rate:
        runs = training(rows)
        for name, method in list(found):
            at = next(iter(base[name].rates.values())) if name in base else None
            again = outcome(choose(name, small), method, runs, seeds, at) if at is not None else None
            if again is not None:
                found[name, method] = again
    methods = [method for method in m.FORMS if method != m.DB_MTL]
    return list(base), {method: differences(found, base, method) for method in methods}


def forms(rows: Sequence[Row], same_rate: bool = False, **how: Any) -> str:
    """Each form's test metrics against DB-MTL's, and of all settings pooled; at DB-MTL's rate if ``same_rate``."""
    names, by_method = _forms(rows, same_rate, **how)
    whole = [x if len(x) == len(names) else {} for x in by_method.values()]
    lines = [[SETTINGS[name].title, *(shown(x.get(name, [])) for x in by_method.values())] for name in names]
    lines.append([f"pooled, {len(pool(by_method[m.ONE_PASS]))} pairs", *(shown(pool(x)) for x in whole)])
    lines.append(["pooled without the 1 : 10,000", *(shown(pool(x, WITHOUT)) for x in whole)])
    return grid(["setting (K)", *by_method], lines)


def same_rates(rows: Sequence[Row], **how: Any) -> str:
    """`forms`, all at the rate that DB-MTL chose."""
    return forms(rows, same_rate=True, **how)


def goals(rows: Sequence[Row], **how: Any) -> str:
    """Whether one pass meets its goals."""
    return "\n".join(f"- {line}" for line in judge_forms(_forms(rows, False, **how)[1][m.ONE_PASS]))


def judge_forms(by_setting: dict[str, list[float]]) -> list[str]:
    """Whether changes of one pass meet the goals."""
    pooled, error = mean_and_error(pool(by_setting))
    means = {name: mean_and_error(values)[0] for name, values in by_setting.items()}
    worst = min(means, key=lambda name: means[name])
    met = {True: "met", False: "NOT met"}
    low = [name for name in means if not means[name] >= -WORST_GOAL]
    unsure = f", though the error is wider than {POOLED_GOAL}" if error > POOLED_GOAL else ""
    return [
        f"Goal, pooled within {POOLED_GOAL} points of exact: {pooled:+.2f} ± {error:.2f}, "
        f"{met[abs(pooled) <= POOLED_GOAL]}{unsure}.",
        f"Goal, no setting worse by more than {WORST_GOAL:g}: lowest is {worst}, {means[worst]:+.2f}, {met[not low]}"
        + (f" in {', '.join(low)}." if low else "."),
    ]


TABLES = (verdicts, deltas, rates, watched, seconds, levels)
FORM_TABLES = (forms, same_rates, goals)
