"""From rows of the claims to verdicts and tables."""

import math
from dataclasses import replace

import pytest
from claims import methods as m
from claims import pages, scores, verdicts
from claims.methods import DB_MTL, EW, ONE_PASS, STL
from claims.settings import SEEDS, SETTINGS, THE_FORMS
from claims.verdicts import LACKING, NOT, REPRODUCED, UNTESTABLE, Evidence, judge
from dbmtl_kernels.bench.results import Row

ADULT, THREE = SETTINGS["adult"], SETTINGS["mnist3"]
FLAT = {"norms": [2.0] * 12, "cosines": [0.1] * 12, "roughness": 0.1, "fell": True}


def row(name, method, lr, seed, value, better=1.0, **seen):
    """Metrics of ``value``, of which accuracies are multiplied by ``better``, errors divided."""
    metrics = {metric: value * better**sign for metric, sign in scores.signs(SETTINGS[name]).items()}
    detail = {
        "lr": lr, "seed": seed, "steps": SETTINGS[name].steps, **FLAT, **seen,
        "validation": metrics, "test": metrics, "constant": metrics,
    }  # fmt: skip
    return Row("claims", "training", method, name, 3, p50=1.0, unit="s", detail=detail)


def runs(name, method, better=1.0, **seen):
    """A sweep of which the second rate is best, where seed s reaches (10 + s) * better."""
    setting = SETTINGS[name]
    return [
        row(name, method, lr, seed, 10.0 + seed, better if lr == setting.rates[1] else 0.9 * better, **seen)
        for seed in range(SEEDS)
        for lr in (setting.rates if seed < setting.sweep_seeds else setting.rates[1:2])
    ]


def verdict_of(text, rows):
    (found,) = (v for v in judge(Evidence(rows)) if v.claim.text == text)
    return found


# --- figures ------------------------------------------------------------------------------------------------------


def test_delta_p_averages_tasks_and_delta_m_metrics():
    alone = dict.fromkeys(scores.signs(THREE), 10.0)
    # accuracies +10 % and 0; of the reconstruction one error halves and the other stays
    mine = {**alone, "left digit": 11.0, "reconstruction": 5.0}
    assert scores.delta_p(THREE, mine, alone) == pytest.approx((10 + 0 + 25) / 3)
    assert scores.delta_m(THREE, mine, alone) == pytest.approx(-(10 + 0 + 50 + 0) / 4)


def test_changes_are_signed_and_scores_differ_by_them():
    a, b = row("adult", EW, 0.1, 0, 10.0), row("adult", EW, 0.1, 0, 10.0, better=1.1)
    # two accuracies rise by 10 %, two errors fall to 1 / 1.1
    expected = (2 * 10 + 2 * (100 - 100 / 1.1)) / 4
    assert scores.delta_p(ADULT, b.detail["test"], a.detail["test"]) == pytest.approx(expected)
    gap = scores.score(ADULT, b.detail["test"]) - scores.score(ADULT, a.detail["test"])
    assert gap == pytest.approx(math.log(1.1))
    assert scores.mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))


def test_a_method_that_lacks_a_run_is_left_out():
    rows = runs("mnist3", EW)
    assert list(scores.outcomes(rows, ["mnist3"], [EW, DB_MTL])) == [("mnist3", EW)]
    assert scores.outcomes(rows, ["mnist3"], [EW])["mnist3", EW].rates == dict.fromkeys(
        (task.name for task in THREE.tasks), THREE.rates[1]
    )
    for i in range(len(rows)):
        assert not scores.outcomes(rows[:i] + rows[i + 1 :], ["mnist3"], [EW])


def test_single_task_networks_are_each_taken_at_their_own_rate():
    low, best, high = THREE.rates
    rows = []
    for seed in range(SEEDS):
        for lr in (low, best, high):
            one = row("mnist3", STL, lr, seed, 10.0)
            told = {name: 20.0 if (lr == high) == (name == "left digit") else 10.0 for name in one.detail["test"]}
            told |= {name: 1.0 if lr == low else 9.0 for name in told if name.startswith("reconstruction")}
            rows.append(replace(one, detail={**one.detail, "test": told, "validation": told}))
    found = scores.outcomes(rows, ["mnist3"], [STL])["mnist3", STL]
    assert found.rates == {"left digit": high, "right digit": low, "reconstruction": low}
    assert found.test[0]["left digit"] == found.test[0]["right digit"] == 20.0
    assert found.test[0]["reconstruction: absolute error"] == 1.0


# --- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "holds"),
    [([1.0, 1.1, 0.9], True), ([1.0, -1.0, 0.3], False), ([-1.0, -1.1, -0.9], False), ([math.nan, 1.0], False)],
)
def test_a_difference_counts_beyond_two_standard_errors(values, holds):
    assert verdicts.above(values) == holds


@pytest.mark.parametrize(("better", "word"), [(1.1, REPRODUCED), (1.0, NOT), (0.9, NOT)])
def test_a_claim_follows_its_rows(better, word):
    rows = runs("mnist3", STL) + runs("mnist3", EW) + runs("mnist3", DB_MTL, better)
    found = verdict_of("DB-MTL's Δp above EW's", rows)
    assert found.word == word
    assert list(found.findings) == ["mnist3"]
    sign = {1.1: "+", 1.0: "+0.00", 0.9: "-"}[better]
    assert found.findings["mnist3"].figure.startswith(sign)


def test_a_claim_must_hold_in_every_setting_that_has_rows():
    rows = [
        *runs("mnist3", STL), *runs("mnist3", EW), *runs("mnist3", DB_MTL, 1.1),
        *runs("qm9", STL), *runs("qm9", EW), *runs("qm9", DB_MTL, 0.9),
    ]  # fmt: skip
    found = verdict_of("DB-MTL's Δp above EW's", rows)
    assert (found.word, [x.holds for x in found.findings.values()]) == (NOT, [True, False])
    line = next(x for x in pages.verdicts(rows).splitlines() if x.startswith("| DB-MTL's Δp above EW's"))
    assert "not reproduced: holds in 1 of 2" in line
    # on QM9 the paper's is below single-task learning, elsewhere above
    assert verdict_of("Δp above 0; on QM9 below", rows).word == REPRODUCED


def test_without_rows_there_is_no_verdict():
    words = {v.claim.text: v.word for v in judge(Evidence([]))}
    assert set(words.values()) == {LACKING, UNTESTABLE}
    assert words["Office-31: Δp"] == UNTESTABLE
    assert words["losses fall smoothly"] == LACKING


def test_the_best_other_method_and_the_worst_beta_are_found():
    rows = runs("mnist3", STL) + runs("mnist3", DB_MTL, 1.2)
    for method in verdicts.SINGLE:
        rows += runs("mnist3", method, 1.1 if method == "GLS" else 1.0)
    found = verdict_of("DB-MTL's Δp above the best other method's", rows)
    assert found.word == REPRODUCED
    assert found.findings["mnist3"].figure.endswith("over GLS")
    for method in verdicts.BETAS:
        if method != DB_MTL:
            rows += runs("mnist3", method, {m.BETA + "0.9": 0.7, m.BETA + "0.5": 0.8}.get(method, 1.0))
    worst = verdict_of("beta: constant 0.9, the authors' default, the worst", rows)
    assert worst.word == REPRODUCED
    assert worst.findings["mnist3"].figure.endswith("beta 0.5 over it")
    assert verdict_of("beta: 0 above constant 0.5", rows).word == REPRODUCED
    chosen = verdict_of("the same, beta chosen on validation, as the paper does", rows)
    assert chosen.findings["mnist3"].figure == found.findings["mnist3"].figure  # DB-MTL's own beta is the best


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("losses fall smoothly", {"roughness": 0.05}, {"roughness": 0.2}),
        ("losses fall smoothly", {"roughness": 0.05}, {"roughness": 0.05, "fell": False}),
        ("gradient norms lower than EW's", {"norms": [9.0] + [1.0] * 11}, {"norms": [0.1] + [2.1] * 11}),
        (
            "cosine of task gradients rises faster than EW's",
            {"cosines": [0.01 * i for i in range(12)]}, {"cosines": [0.5 - 0.01 * i for i in range(12)]},
        ),
        ("that cosine stays positive", {"cosines": [0.01] * 12}, {"cosines": [0.5] * 11 + [-0.01]}),
    ],
)  # fmt: skip
def test_what_was_seen_in_training_is_judged(text, good, bad):
    base = runs("mnist3", STL) + runs("mnist3", EW)
    assert verdict_of(text, base + runs("mnist3", DB_MTL, **good)).word == REPRODUCED
    assert verdict_of(text, base + runs("mnist3", DB_MTL, **bad)).word == NOT


def test_a_run_that_diverged_is_no_verdict_of_luck():
    rows = runs("mnist3", STL) + runs("mnist3", EW)
    for one in runs("mnist3", DB_MTL, 1.1):
        lost = dict.fromkeys(one.detail["test"]) if one.detail["seed"] == 1 else one.detail["test"]
        rows.append(replace(one, detail={**one.detail, "test": lost, "norms": [1.0]}))
    for text in ("DB-MTL's Δp above EW's", "gradient norms lower than EW's", "losses fall smoothly"):
        found = verdict_of(text, rows)
        assert (found.word, found.findings["mnist3"].figure) == (NOT, "diverged")
    assert f"| {DB_MTL} | diverged; diverged |" in pages.deltas(rows)


def test_what_was_measured_is_judged():
    def step(method, ratio):
        return Row("claims", "step", method, "mnist3", 3, p50=ratio, ratio=ratio, over=EW, detail={"epoch_s": 1.0})

    six = [step(method, 2.0 + i / 10) for i, method in enumerate(m.SIX)]
    for ratio, said, slower in ((2.4, REPRODUCED, REPRODUCED), (2.8, REPRODUCED, NOT), (3.0, NOT, NOT)):
        rows = [*six, step(EW, 1.0), step(DB_MTL, ratio)]
        assert verdict_of("an epoch takes 2.9 times EW's, K = 3", rows).word == said
        assert verdict_of("no slower than other gradient balancing", rows).word == slower
    assert f"| {DB_MTL} | 3.00 |" in pages.seconds(rows)
    for off, word in ((1e-9, REPRODUCED), (1e-3, NOT)):
        rows = [Row("claims", "identity", "IMTL-L", "mnist3", 3, p50=off, unit="1")]
        assert verdict_of("log is IMTL-L at its minimiser", rows).word == word


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_tables_have_a_cell_for_what_there_is():
    rows = runs("mnist3", STL) + runs("mnist3", EW) + runs("mnist3", DB_MTL, 1.1) + runs("qm9", EW)
    # accuracies +10 %, errors -9.09 %; the tasks' mean, and that over four metrics the other way round
    assert f"| {DB_MTL} | +3.6 ± 0.0; -0.5 ± 0.0 |" not in pages.deltas(rows)
    expected = (10 + 10 + 100 - 100 / 1.1) / 3, -(10 + 10 + 2 * (100 - 100 / 1.1)) / 4
    cell = "; ".join(f"{x:+.1f} ± 0.0" for x in expected)
    assert f"| {DB_MTL} | {cell} |" in pages.deltas(rows)
    assert f"| {DB_MTL} | {THREE.rates[1]:g} | - |" in pages.rates(rows)
    assert f"| {DB_MTL} | 1.00; +0.10, +0.00; 10 % | - |" in pages.watched(rows).replace("-0.00", "+0.00")
    assert "| MultiMNIST, K = 3 | left digit | higher | 12.1 | 11 | 11 | 12.1 |" in pages.levels(rows)


def forms_rows(names, one_pass=1.0):
    return [
        x for name in names for method in m.FORMS for x in runs(name, method, one_pass if method == ONE_PASS else 1)
    ]


def test_the_forms_are_pooled_over_all_settings():
    names = [setting.name for setting in THE_FORMS]
    table = pages.forms(forms_rows(names, 1.1)).splitlines()
    assert len(table) == 2 + len(names) + 2
    assert table[-2].startswith("| pooled, 21 pairs | +9.")
    rows = [x for x in forms_rows(names) if (x.model, x.contender) != ("adult", "FAMO")]
    assert pages.forms(rows).splitlines()[-2].endswith("| +0.0 ± 0.0 | - |")  # FAMO lacks a setting
    # at the rate that DB-MTL chose, a method that does better at another is worse
    rows = [x for x in forms_rows(["adult"]) if x.contender != ONE_PASS]
    other = ADULT.rates[2]
    rows += [
        row("adult", ONE_PASS, lr, seed, 10.0 + seed, 1.0 if lr == other else 0.9)
        for lr in ADULT.rates
        for seed in range(SEEDS)
    ]
    assert "| +0.0 ± 0.0 | +0.0" in pages.forms(rows).splitlines()[2]
    assert "| -10.6 ± 0.0 |" in pages.same_rates(rows).splitlines()[2]


@pytest.mark.parametrize(
    ("changes", "pooled", "worst"),
    [
        ({"a": [0.4], "b": [-0.2]}, True, True),
        ({"a": [3.0], "b": [-2.5]}, True, False),
        ({"a": [0.9], "b": [0.5]}, False, True),
        ({"a": [math.nan], "b": [0.0]}, False, False),
    ],
)
def test_the_goals_of_one_pass_say_what_is_not_met(changes, pooled, worst):
    first, second = pages.judge_forms(changes)
    assert ("NOT met" not in first) == pooled
    assert ("NOT met" not in second) == worst


def test_the_goal_says_where_the_error_is_wider_than_it():
    wide, _ = pages.judge_forms({"a": [3.0, -3.0, 0.1]})
    narrow, _ = pages.judge_forms({"a": [0.1, -0.1, 0.0]})
    assert "wider" in wide
    assert "wider" not in narrow
