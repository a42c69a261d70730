"""The examples on the paper's image data, run on small generated files of the same formats."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dbmtl_kernels.bench.results import read

pytest.importorskip("tqdm")
pytest.importorskip("rich")

import celeba
import nyuv2
import office
from vision import training
from vision.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples"
MULTI = [name for name in METHODS if name != "stl"]
SCENES = ("--smoke", "--model", "segnet")


def nyu(tmp_path, *arguments):
    places = ("--out", tmp_path / "rows.csv", "--checkpoints", tmp_path / "checkpoints", "--data", tmp_path / "data")
    return nyuv2.main([str(x) for x in (*SCENES, *places, *arguments)])


# --- every method, every data set --------------------------------------------------------------------------------


def test_every_method_on_nyuv2_with_mtan(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert nyuv2.main(["--smoke", "--out", str(out), "--method", *METHODS]) == 0
    rows = read(out)
    assert [row.contender for row in rows] == ["stl"] * 3 + MULTI
    assert {row.model for row in rows} == {"NYUv2, mtan, MTAN protocol"}
    names = {"segmentation": 2, "depth": 2, "normal": 5}
    for row in rows:
        metrics = row.detail["metrics"]
        assert {task: len(of_task) for task, of_task in metrics.items()}.items() <= names.items()
        assert all(math.isfinite(x) for of_task in metrics.values() for x in of_task.values())
        assert row.K == len(metrics) == (1 if row.contender == "stl" else 3)
        assert row.detail["seconds_per_epoch"] > 0
    assert len({json.dumps(row.detail["metrics"], sort_keys=True) for row in rows[3:]}) == len(MULTI)  # all differ
    shown = capsys.readouterr().out
    for word in ("segmentation mIoU", "within 22.5", "Δp, own stl", "db-mtl 0.9/k^0.5", "FairGrad -4.66"):
        assert word in shown


def test_delta_is_against_own_single_task_networks_where_none_are_published(tmp_path):
    out = tmp_path / "rows.csv"
    assert nyuv2.main(["--smoke", "--data-set", "cityscapes", "--out", str(out), "--method", "ew", "stl"]) == 0
    *stl, ew = read(out)
    assert [row.contender for row in stl] == ["stl", "stl"]  # first, though asked for last
    base = {task: metrics for row in stl for task, metrics in row.detail["metrics"].items()}
    worse = [
        100 * (1 if name.endswith("error") else -1) * (value / base[task][name] - 1)
        for task, metrics in ew.detail["metrics"].items()
        for name, value in metrics.items()
    ]
    assert len(worse) == 4
    assert ew.p50 == pytest.approx(sum(worse) / 4, rel=1e-4)
    assert ew.detail["own"]["delta_p"] == pytest.approx(-sum(worse) / 4, rel=1e-4)  # two metrics each
    assert ew.detail["published"] is None  # of generated data


def test_a_row_is_compared_with_the_published_figures_of_its_protocol(tmp_path, monkeypatch):
    """On files of the sample's size that count as the data set itself."""
    nyuv2.write_sample(SimpleNamespace(data_set="nyuv2"), tmp_path / "data")
    monkeypatch.setitem(nyuv2.SIZES, "nyuv2", nyuv2.SMOKE_SIZE)
    monkeypatch.setattr(nyuv2, "WIDTHS", (4, 4, 4, 4, 4))
    out = tmp_path / "rows.csv"
    command = ["--data", tmp_path / "data", "--out", out, "--epochs", 1, "--workers", 0, "--method", "db-mtl"]
    assert nyuv2.main(list(map(str, command))) == 0
    (row,) = read(out)
    base = nyuv2.PROTOCOLS["nyuv2", "mtan"].stl
    assert row.p50 == pytest.approx(
        nyuv2_delta({task: dict(metrics) for task, metrics in row.detail["metrics"].items()}, base), rel=1e-4
    )
    assert row.detail["setting"]["batch"] == 2
    assert row.detail["setting"]["smoke"] is False


def nyuv2_delta(metrics, base):
    signs = {"segmentation": (1, 1), "depth": (-1, -1), "normal": (-1, -1, 1, 1, 1)}
    each = [
        -sign * (metrics[task][name] - base[task][name]) / base[task][name]
        for task, of_task in signs.items()
        for sign, name in zip(of_task, base[task], strict=True)
    ]
    return 100 * sum(each) / 9


def test_every_method_on_celeba(tmp_path):
    pytest.importorskip("PIL")
    out = tmp_path / "rows.csv"
    command = ["--smoke", "--out", str(out), "--task", "Attribute_5", "--method", "stl", *MULTI]
    assert celeba.main(command) == 0
    rows = read(out)
    assert [row.contender for row in rows] == ["stl", *MULTI]
    assert list(rows[0].detail["metrics"]) == ["Attribute_5"]
    for row in rows[1:]:
        assert row.K == len(row.detail["metrics"]) == 40
        assert row.detail["selected"] == "epoch 1"
        assert row.p50 is None  # 39 single-task networks are missing


@pytest.mark.parametrize("data_set", ["office-31", "office-home"])
def test_every_method_on_office(data_set, tmp_path, small_office):
    out = tmp_path / "rows.csv"
    assert office.main(["--smoke", "--data-set", data_set, "--out", str(out), "--method", *METHODS]) == 0
    domains = list(office.SPLITS[data_set])
    rows = read(out)
    assert [row.contender for row in rows] == ["stl"] * len(domains) + MULTI
    assert [list(row.detail["metrics"]) for row in rows[: len(domains)]] == [[domain] for domain in domains]
    assert all(sorted(row.detail["metrics"]) == domains for row in rows[len(domains) :])


@pytest.mark.parametrize("command", [["nyuv2.py", "--model", "deeplab"], ["office.py"]])
def test_networks_of_torchvision(command, tmp_path):
    try:
        import torchvision.models  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision is missing, or does not load beside this torch: {error}")
    run = [sys.executable, EXAMPLES / command[0], *command[1:], "--smoke", "--method", "db-mtl", "one-pass"]
    done = subprocess.run([*run, "--out", tmp_path / "rows.csv"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row.contender for row in read(tmp_path / "rows.csv")] == ["db-mtl", "one-pass"]


@pytest.mark.parametrize("name", ["nyuv2.py", "celeba.py", "office.py"])
def test_as_programs_they_explain_themselves(name):
    done = subprocess.run([sys.executable, EXAMPLES / name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--data", "--method", "--smoke", "--resume", "--out", "--seed"):
        assert option in done.stdout


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["db-mtl", "one-pass", "famo", "uw"])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    command = ("--method", method, "--epochs", 3)
    (tmp_path / "whole").mkdir()
    assert nyu(tmp_path / "whole", *command) == 0
    true_step, count = training.step, iter(range(100))

    def interrupted(*arguments):
        if next(count) == 3:  # within the second epoch
            raise KeyboardInterrupt
        true_step(*arguments)

    (tmp_path / "parts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(training, "step", interrupted)
        assert nyu(tmp_path / "parts", *command) == 130
    assert not (tmp_path / "parts" / "rows.csv").exists()
    steps = []
    monkeypatch.setattr(training, "step", lambda *arguments: (steps.append(1), true_step(*arguments)))
    assert nyu(tmp_path / "parts", *command, "--resume") == 0
    assert len(steps) == 4  # two epochs of two
    whole, parts = ([(row.detail["metrics"]) for row in read(tmp_path / x / "rows.csv")] for x in ("whole", "parts"))
    assert whole == parts
    networks = [
        torch.load(next((tmp_path / x / "checkpoints").iterdir()), weights_only=True)["network"]
        for x in ("whole", "parts")
    ]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


def test_what_has_its_row_is_not_run_again(tmp_path, monkeypatch):
    assert nyu(tmp_path, "--method", "ew") == 0
    steps = []
    true_step = training.step
    monkeypatch.setattr(training, "step", lambda *arguments: (steps.append(1), true_step(*arguments)))
    assert nyu(tmp_path, "--method", "ew", "log", "--resume") == 0
    assert len(steps) == 2
    assert [row.contender for row in read(tmp_path / "rows.csv")] == ["ew", "log"]
    assert nyu(tmp_path, "--method", "ew", "--seed", "3", "--resume") == 0
    assert len(steps) == 4  # another seed is another run


def test_a_whole_checkpoint_without_its_row_gets_it(tmp_path):
    assert nyu(tmp_path, "--method", "ew") == 0
    before = read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").unlink()
    assert nyu(tmp_path, "--method", "ew", "--resume") == 0
    assert [row.detail["metrics"] for row in read(tmp_path / "rows.csv")] == [row.detail["metrics"] for row in before]


def test_checkpoints_of_another_run_and_damaged_ones_are_refused(tmp_path, capsys):
    assert nyu(tmp_path, "--method", "ew") == 0
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert nyu(tmp_path, "--method", "ew") == 2
    assert f"{path} exists: --resume goes on from there" in capsys.readouterr().err
    assert nyu(tmp_path, "--method", "ew", "--resume", "--epochs", 2) == 2
    assert f"{path} is of another run: epochs 1 for 2" in capsys.readouterr().err
    (tmp_path / "rows.csv").unlink()
    path.write_bytes(path.read_bytes()[:1000])
    assert nyu(tmp_path, "--method", "ew", "--resume") == 2
    assert f"{path} is no checkpoint, or damaged" in capsys.readouterr().err


# --- what a user gets wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--smoke", "--method", "db-mlt"],
            "no method 'db-mlt': it is one of stl, ew, log, uw,",
        ),
        (
            ["--smoke", "--method", "stl", "--task", "depths"],
            "no task 'depths': it is one of segmentation,",
        ),
        ([], "give --data FOLDER"),
        (["--data", "/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["--smoke", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--smoke", "--device", "nonsense"], "no device 'nonsense' here"),
        (["--smoke", "--beta", "1"], "--beta 1.0 is out of range"),
        (["--smoke", "--epochs", "0"], "--epochs 0 is out of range"),
        (["--smoke", "--rate", "nan"], "--rate nan is out of range"),
        (["--smoke", "--weights", "imagenet"], "--weights is of --model deeplab"),
        (["--smoke", "--protocol", "libmtl", "--batch", "9"], "--batch 9 is more than the 5 training samples"),
        (["--report", "--out", "missing.csv"], "no results file missing.csv"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "step", lambda *_: pytest.fail("trained"))
    assert nyuv2.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_results_file_of_another_schema_is_refused_and_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "step", lambda *_: pytest.fail("trained"))
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    assert nyu(tmp_path) == 2
    assert "another schema" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n"


def test_what_a_reading_process_finds_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(training, "step", lambda *_: pytest.fail("trained"))
    celeba.write_sample(None, tmp_path / "data")
    for path in (tmp_path / "data" / "Img" / "img_align_celeba").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "rows.csv")]
    assert celeba.main([*places, "--workers", "1", "--no-check", "--batch", "2"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert ".jpg cannot be read" in told
    assert "Traceback" not in told


def test_torchvision_that_is_missing_or_broken_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for command in (["--smoke", "--model", "deeplab"],):
        assert nyuv2.main(command) == 2
    assert "needs torchvision, which is not installed: pip install 'dbmtl-kernels[vision]'" in capsys.readouterr().err
    assert office.main(["--smoke"]) == 2
    assert "needs torchvision" in capsys.readouterr().err


def test_the_report_needs_no_data(tmp_path, capsys):
    assert nyu(tmp_path, "--method", "stl", "ew") == 0
    capsys.readouterr()
    assert nyuv2.main(["--report", "--out", str(tmp_path / "rows.csv")]) == 0
    shown = capsys.readouterr().out
    assert "NYUv2, segnet, MTAN protocol" in shown
    assert "Δm, own stl" in shown


def test_the_page_has_the_figures_that_the_examples_print():
    table = (EXAMPLES.parent / "docs" / "datasets.md").read_text().partition("## What others publish")[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    columns = {cells[0][i]: {row[0]: float(row[i]) for row in cells[2:] if row[i] != "-"} for i in (2, 3, 4)}
    known = (nyuv2.PROTOCOLS["nyuv2", "mtan"], nyuv2.PROTOCOLS["cityscapes", "mtan"], celeba.PROTOCOL)
    assert columns == dict(zip(("NYUv2", "Cityscapes", "CelebA"), (dict(x.others) for x in known), strict=True))
