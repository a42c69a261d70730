"""The trial of the claims: on generated data, and on what it refuses."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from claims import graphs, measured, methods, runs, scores, settings, trial
from claims.__main__ import main
from claims.methods import DB_MTL, EW, FORMS, MAKE, METHODS, ONE_PASS, STL
from claims.settings import SETTINGS, SUITES
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import Row

ROOT = Path(__file__).parents[1]
TABULAR = [name for name in SETTINGS if name not in ("qm9-graph", "qm9-full", "mnist3-full", "mnist4-full")]


def run_row(setting, method, lr, seed, steps=None):
    detail = {"lr": lr, "seed": seed, "steps": steps or SETTINGS[setting].steps}
    return Row("claims", "training", method, setting, 4, p50=1.0, unit="s", detail=detail)


# --- the command --------------------------------------------------------------------------------------------------


def test_a_run_resumes_measures_and_is_shown(tmp_path, capsys):
    out = tmp_path / "deep" / "rows.csv"
    some = ["--smoke", "--settings", "adult", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks", "claims", "forms", *some, "--methods", DB_MTL, ONE_PASS]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    kept = out.read_text()
    assert [row.contender for row in results.read(out)] == [DB_MTL, ONE_PASS]
    assert results.read(out)[0].machine["command"].startswith("python -m benchmarks claims forms --smoke")
    out.write_text(kept + "2,claims,training,FAMO,adu")  # a write that was cut short

    assert main(["forms", *some, "--resume", "--jobs", "2"]) == 0
    assert out.read_text().startswith(kept)
    assert {row.contender for row in results.read(out)} == set(FORMS)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| pooled"))
    assert line.count("|") == len(FORMS) + 1  # but DB-MTL, and the name of the row
    whole = out.read_text()
    assert main(["forms", *some, "--resume"]) == 0
    assert out.read_text() == whole

    # of the claims: single-task networks besides, and what is measured beside training
    assert main(["quick", *some, "--resume", "--methods", STL, EW, DB_MTL]) == 0
    added = {(row.what, row.contender) for row in results.read(out)} - {("training", method) for method in FORMS}
    assert added == {("training", STL), ("step", STL), ("step", EW), ("step", DB_MTL), ("identity", "IMTL-L")}
    capsys.readouterr()
    assert main(["show", "--smoke", "--out", str(out)]) == 0
    assert "| log is IMTL-L at its minimiser | exactly |" in capsys.readouterr().out


def test_a_sweep_is_followed_by_the_other_seeds_at_the_rates_it_chose():
    setting = SETTINGS["mnist3"]
    sweep = scores.wanted(setting, EW, {}, 3)
    assert sweep == [("mnist3", EW, lr, 0) for lr in setting.rates]

    def found(method, better):  # by rate and task: how good; the last two are errors
        rows = {}
        for lr in setting.rates:
            told = {name: better(lr, name) ** sign for name, sign in scores.signs(setting).items()}
            row = run_row("mnist3", method, lr, 0)
            rows["mnist3", method, lr, 0] = replace(row, detail={**row.detail, "validation": told})
        return rows

    best = setting.rates[1]
    rows = found(EW, lambda lr, name: 2.0 if lr == best else 1.0)
    assert scores.wanted(setting, EW, rows, 3)[len(sweep) :] == [("mnist3", EW, best, seed) for seed in (1, 2)]
    # single-task networks have a rate each
    own = found(STL, lambda lr, name: 2.0 if lr == setting.rates[2 if name == "left digit" else 0] else 1.0)
    more = scores.wanted(setting, STL, own, 2)[len(sweep) :]
    assert more == [("mnist3", STL, setting.rates[0], 1), ("mnist3", STL, setting.rates[2], 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quik",), "no suite 'quik'"),
        (("--settings", "mnits"), "no setting 'mnits'"),
        (("--methods", "PCGard"), "no method 'PCGard'"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        ((), "give --resume"),
        (("--resume",), "another schema"),
        (("show",), "another schema"),
    ],
)
def test_bad_arguments_are_told_at_once(tmp_path, capsys, arguments, message):
    out = tmp_path / "rows.csv"
    out.write_text("setting,method\n")
    assert main(["--smoke", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert out.read_text() == "setting,method\n"


def test_rows_of_another_trial_are_refused(tmp_path, capsys):
    for row, said in (
        (run_row("adult", EW, 0.002, 0), f"{SETTINGS['adult'].steps} steps, this trial's have 70"),
        (replace(run_row("adult", EW, 0.002, 0), model="mnist5"), "a setting 'mnist5'"),
    ):
        out = tmp_path / f"{row.model}.csv"
        results.append(out, [row])
        assert main(["--smoke", "--resume", "--settings", "adult", "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_a_missing_library_or_gpu_is_told_before_training(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "rows.csv"), "--data", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.delitem(sys.modules, "dbmtl_kernels.integrations.torchjd", raising=False)
    assert main([*out, "--methods", "PCGrad + log"]) == 2
    assert "pip install 'dbmtl-kernels[torchjd]'" in capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    assert main(["graph", *out, "--methods", EW]) == 2
    assert "pip install 'dbmtl-kernels[qm9]'" in capsys.readouterr().err

    monkeypatch.setattr(graphs, "library", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["graph", *out, "--methods", EW]) == 2
    assert "qm9-graph is for a GPU, and there is none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- training -----------------------------------------------------------------------------------------------------


SLOW = [name for name in MAKE if name not in (EW, "GLS", "UW", "IMTL-L", "FAMO", DB_MTL, ONE_PASS, "PCGrad + log")]


@pytest.mark.parametrize("method", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in (STL, *MAKE)])
def test_networks_learn_more_than_a_constant(method):
    small = settings.choose("adult", True)
    parts = small.load(Path(), 0)
    idle = trial.constant(parts[0], parts[2], small.tasks)
    told = trial.fit(small, method, 0.005, 0, parts)
    assert scores.delta_p(small, told["test"], idle) > 25


def test_a_run_repeats_bit_for_bit():
    rows = [trial.run_one(("qm9", ONE_PASS, 0.002, 0), Path(), True, {}) for _ in range(2)]
    assert rows[0].detail == rows[1].detail


def test_a_run_that_diverges_is_never_chosen():
    bad = trial.run_one(("rf1", EW, 1e30, 0), Path(), True, {})
    assert set(bad.detail["test"].values()) == {None}
    good = trial.run_one(("rf1", EW, 0.004, 0), Path(), True, {})
    assert scores.best_rate(replace(SETTINGS["rf1"], rates=(1e30, 0.004)), [bad, good]) == 0.004


def test_single_task_networks_are_trained_on_one_task_each():
    small = replace(settings.choose("adult", True), steps=5)
    parts = small.load(Path(), 0)
    told = trial.fit(small, STL, 0.005, 0, parts)
    alone = replace(small, tasks=small.tasks[2:3])
    network, _ = trial.train(alone, EW, 0.005, 0, parts[0].only(2))
    assert told["test"]["age"] == trial.measure(network, parts[2].only(2), alone.tasks)["age"]


def test_what_is_seen_of_a_run():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    watch = trial.Watch(trial.WINDOWS, [weight])
    for k in range(trial.WINDOWS):
        scale = 1.0 + 0.5 * (k % 2) - 0.04 * k  # up by 0.46, down by 0.54
        watch.see([(scale * 3.0 * weight[0]).exp(), scale * weight[1]])
    told = watch.told()
    assert len(told["norms"]) == len(told["cosines"]) == trial.PROBES
    assert told["norms"][0] == pytest.approx(math.sqrt(3 * math.exp(3.0)))  # geometric mean of 3 e^3 and 1
    assert told["cosines"] == [0.0] * trial.PROBES
    logs = [math.log(1.0 + 0.5 * (k % 2) - 0.04 * k) for k in range(trial.WINDOWS)]
    moves = np.diff(logs)
    first = [3 * (1.0 + 0.5 * (k % 2) - 0.04 * k) for k in range(trial.WINDOWS)]
    both = [np.diff(first), moves]
    rough = np.mean([x[x > 0].sum() / -x[x < 0].sum() for x in both])
    assert told["roughness"] == pytest.approx(rough, rel=1e-4)
    assert told["fell"]


def test_watching_changes_nothing():
    small = replace(settings.choose("mnist3", True), steps=20)
    training, *_ = small.load(Path(), 0)
    for method in (DB_MTL, ONE_PASS):
        weights = [
            torch.cat([p.flatten() for p in trial.train(small, method, 0.003, 0, training, watched)[0].parameters()])
            for watched in (False, True)
        ]
        assert torch.equal(*weights), method


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABULAR)
def test_one_pass_and_one_row_agree_in_the_first_step(name):
    """No setting's graph sends one pass to the exact form, and none is treated otherwise."""
    small = settings.choose(name, True)
    training, *_ = small.load(Path(), 0)
    gradients = []
    for method in (ONE_PASS, methods.BETA + "0"):
        torch.manual_seed(0)
        network = small.network(training.inputs, small.tasks)
        objective = MAKE[method](list(network.trunk.parameters()), len(small.tasks))
        assert isinstance(objective, dbk.OnePassDBMTL if method == ONE_PASS else dbk.DBMTL)
        objective(trial.losses_of(network, training.batch(torch.arange(64)), small.tasks)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 1e-5


def test_every_method_of_the_issue_is_there():
    trunk = [torch.nn.Parameter(torch.ones(2))]
    scales = {name: MAKE[name](trunk, 4).scale for name in METHODS if name.startswith(methods.ALPHA)}
    assert set(scales.values()) == {"mean", "median", "min", 0.25, 0.01, 1.0, 10.0}
    betas = {(m := MAKE[name](trunk, 4))._settings and (m.beta, m.beta_sigma) for name in (*methods.DECAYED_BETAS,)}
    assert betas == {(0.1, 0.5), (0.5, 0.5)}
    assert {MAKE[name](trunk, 4).beta for name in methods.CONSTANT_BETAS} == {0.1, 0.5, 0.9}
    assert all(MAKE[name](trunk, 4).beta_sigma == 0.0 for name in methods.CONSTANT_BETAS)
    for name in methods.SIX:
        assert [MAKE[name + end](trunk, 2)._settings.log_transform for end in ("", " + log")] == [False, True]
    assert set(SUITES["quick"].methods) == set(SUITES["full"].methods) == set(METHODS)


def test_famo_weighs_the_task_that_fell_least():
    famo = methods.FAMO(2, torch.device("cpu"))
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    famo(list(x)).backward()
    # d/dx of c * sum_t z_t log x_t, with c = 1 / sum_t (z_t / x_t) and z = 1/2
    torch.testing.assert_close(x.grad, torch.tensor([0.25, 0.125]) / 0.375)
    famo.update([torch.tensor(1.0), torch.tensor(4.0)])
    first, second = famo.logits.softmax(0).tolist()
    assert second > first


def test_objectives_of_the_losses():
    x = torch.tensor([2.0, 8.0], requires_grad=True)
    trunk = [torch.nn.Parameter(torch.ones(1))]
    for method, value, slope in (
        ("GLS", 4.0, [1.0, 0.25]),
        ("UW", 5.0, [0.5, 0.5]),
        ("IMTL-L", 8.0, [1.0, 1.0]),  # less 1 a task
        (methods.LOG, math.log(16.0), [0.5, 0.125]),
    ):
        x.grad = None
        loss = MAKE[method](trunk, 2)(list(x))
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-6), method
        torch.testing.assert_close(x.grad, torch.tensor(slope), rtol=1e-5, atol=0)
    uw = methods.Uncertainty(2)
    uw(list(x)).backward()
    torch.testing.assert_close(uw.log_variances.grad, torch.tensor([0.5 - 1.0, 0.5 - 4.0]))


# --- what is measured ---------------------------------------------------------------------------------------------


def test_the_minimiser_is_found_without_the_formula():
    x = torch.tensor([1e-6, 0.3, 1.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(measured.minimiser(x), -x.log(), rtol=1e-12, atol=1e-12)


def test_the_identity_holds_on_data_and_would_fail_elsewhere(monkeypatch):
    assert measured.identity("mnist4", Path(), True, {}).p50 < 1e-6
    monkeypatch.setattr(measured, "minimiser", lambda losses: 0.1 - losses.log())
    assert measured.identity("mnist4", Path(), True, {}).p50 > 1e-3


def test_steps_are_taken_in_turns(monkeypatch):
    order = []
    real = measured.stepper

    def counted(setting, method, samples):
        step = real(setting, method, samples)
        return lambda batch: (order.append(method), step(batch))

    monkeypatch.setattr(measured, "stepper", counted)
    monkeypatch.setattr(measured, "EACH", 2)
    rows = measured.seconds("adult", [DB_MTL, ONE_PASS], Path(), True, {}, rounds=3)
    warm, turns = order[:-18], order[-18:]
    assert [warm.count(method) for method in (EW, DB_MTL, ONE_PASS)] == [3, 3, 65]
    assert turns[::2] == turns[1::2] == [EW, DB_MTL, ONE_PASS, DB_MTL, ONE_PASS, EW, ONE_PASS, EW, DB_MTL]
    assert [row.contender for row in rows] == [EW, DB_MTL, ONE_PASS]
    assert rows[0].ratio == 1.0
    assert all(row.p20 <= row.p50 <= row.p80 for row in rows)


def test_an_interrupt_keeps_what_is_complete(tmp_path, monkeypatch, capsys):
    real = runs.run_one
    monkeypatch.setattr(runs, "run_one", lambda run, *rest: real(run, *rest) if run[1] == EW else _interrupt())
    out = tmp_path / "rows.csv"
    assert main(["forms", "--smoke", "--settings", "adult", "--methods", EW, DB_MTL, "--out", str(out)]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert [row.contender for row in results.read(out)] == [EW]


def _interrupt():
    raise KeyboardInterrupt


def test_a_file_that_lacks_nothing_starts_nothing(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    row = run_row("adult", EW, SETTINGS["adult"].rates[1], 0, steps=70)
    names = scores.signs(SETTINGS["adult"])
    results.append(out, [replace(row, detail={**row.detail, "validation": dict.fromkeys(names, 1.0)})])
    monkeypatch.setattr(runs, "run_one", lambda *_: pytest.fail("a run was repeated"))
    runs.run_all(out, tmp_path, ["adult"], [EW], 1, resume=True, small=True, jobs=1, command="")
    assert len(results.read(out)) == 1
