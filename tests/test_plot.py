"""Pictures of a run: what is in them, and what is said of rows that hold nothing to draw."""

import csv
import io
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter

LOSSES, NORMS, WEIGHTS = (
    "Loss of each task",
    "Norm of each task gradient, shared parameters",
    "Weight of each task gradient",
)
COSINES = "Cosine of each pair of task gradients"


def trained(tasks, steps=3, tell=lambda monitor: monitor.as_dict(gramian=True), method=dbk.DBMTL):
    """Rows of a short run."""
    torch.manual_seed(0)
    trunk = nn.Linear(4, 8)
    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(tasks if isinstance(tasks, int) else len(tasks)))
    balancer = method(trunk, tasks)
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.01)
    rows = []
    for _ in range(steps):
        features = trunk(torch.randn(5, 4))
        optimizer.zero_grad()
        balancer([(head(features) - task).square().mean() for task, head in enumerate(heads)]).backward()
        optimizer.step()
        rows.append(tell(balancer.monitor()))
    return rows


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def drawn(axes):
    """(x, y) of the lines that are of a run, without those under a running mean and at zero."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_linewidth() > 1]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_number_of_a_run_is_in_its_panel():
    rows = trained(["depth", "normals", "a-b/c"], steps=4)
    figure = dbk.plot(rows, smooth=1)
    assert isinstance(figure, Figure)
    found = panels(figure)
    assert list(found) == [LOSSES, NORMS, WEIGHTS, COSINES]
    pairs = ["depth-normals", "depth-a-b/c", "normals-a-b/c"]
    for title, kind in {LOSSES: "loss", NORMS: "norm", WEIGHTS: "weight", COSINES: "cosine"}.items():
        names = pairs if kind == "cosine" else ["depth", "normals", "a-b/c"]
        assert legend(found[title]) == names
        assert drawn(found[title]) == [([1, 2, 3, 4], [row[f"{kind}/{name}"] for row in rows]) for name in names]
    colours = {
        title: [line.get_color() for line in axes.lines if line.get_linewidth() > 1] for title, axes in found.items()
    }
    assert colours[LOSSES] == colours[NORMS] == colours[WEIGHTS]  # a task's is the same everywhere
    assert len({*colours[LOSSES], *colours[COSINES]}) == 6  # and no pair's


def test_tensors_on_the_device_a_prefix_and_panels_that_rows_lack():
    rows = trained(2, tell=lambda monitor: {f"run/{tag}": value for tag, value in monitor.scalars().items()})
    rows.insert(1, {"eval/loss/0": 7.0})  # of somebody else
    found = panels(dbk.plot(rows, prefix="run/", smooth=1))
    assert list(found) == [LOSSES, NORMS, WEIGHTS]
    kept = [rows[0], *rows[2:]]
    assert drawn(found[NORMS]) == [([1, 2, 3], [float(row[f"run/norm/{task}"]) for row in kept]) for task in (0, 1)]


def test_of_one_pass_there_are_no_cosines():
    found = panels(dbk.plot(trained(["a", "b"], tell=lambda monitor: monitor.as_dict(), method=dbk.OnePassDBMTL)))
    assert list(found) == [LOSSES, NORMS, WEIGHTS]


def test_a_file_of_a_logger():
    """Its numbers are text, and a column that a row has nothing for is empty."""
    text = "step,balancer/norm/a,balancer/norm/b,lr\n10,1.5,,0.1\n20,,,0.1\n30,2.5,1e-3,0.1\n"
    axes = dbk.plot(csv.DictReader(io.StringIO(text)), prefix="balancer/", smooth=1).axes[0]
    assert drawn(axes) == [([10, 30], [1.5, 2.5]), ([30], [1e-3])]
    assert axes.get_yscale() == "log"


def test_runs_are_line_styles():
    found = panels(dbk.plot({"ours": trained(["a", "b"]), "theirs": [{"step": s, "loss/a": 1.0} for s in (1, 2)]}))
    assert legend(found[LOSSES]) == ["a", "b", "ours", "theirs"]
    assert [line.get_linestyle() for line in found[LOSSES].lines] == ["-", "-", "--"]
    assert legend(found[NORMS]) == ["a", "b", "ours"]  # the other has no norms


def test_what_is_not_finite_is_a_gap_and_what_is_zero_does_not_break_the_axis():
    values = [1.0, float("nan"), float("inf"), 0.0, 100.0]
    axes = dbk.plot([{"step": s, "norm/a": value} for s, value in enumerate(values)], smooth=1).axes[0]
    np.testing.assert_array_equal(drawn(axes)[0][1], [1.0, np.nan, np.nan, 0.0, 100.0])
    assert axes.get_yscale() == "log"
    for negative in ([-1.0, 100.0], [2.0, 3.0], [float("nan")] * 2):
        rows = [{"step": s, "loss/a": value} for s, value in enumerate(negative)]
        assert dbk.plot(rows).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("smooth", [None, 7, 1000])
def test_a_running_mean_over_many_rows(smooth):
    values = np.random.default_rng(0).random(100)
    values[3], values[20] = np.nan, 1e25  # after which a difference of sums would be nothing but rounding
    axes = dbk.plot([{"step": s, "norm/a": value} for s, value in enumerate(values)], smooth=smooth).axes[0]
    window = {None: 5, 7: 7, 1000: 100}[smooth]
    wanted = [np.nanmean(values[max(0, end - window) : end]) for end in range(1, 101)]
    wanted[3] = np.nan
    ((_, mean),) = drawn(axes)
    np.testing.assert_allclose(mean, wanted, rtol=1e-12)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)  # what it is of is under it


def test_many_tasks_have_no_legend_and_are_counted():
    found = panels(dbk.plot(trained(20)))
    assert list(found) == [f"{title}: 20 lines" for title in (LOSSES, NORMS, WEIGHTS)] + [
        "Mean cosine with the other tasks: 20 lines",
        "Least cosine with another task: 20 lines",
    ]
    assert all(axes.get_legend() is None and len(drawn(axes)) == 20 for axes in found.values())


def test_names_are_shown_as_they_are(tmp_path):
    figure = dbk.plot([{"step": 1, "norm/$cost^": 1.0, "norm/_hidden": 2.0, "norm/50$": 2.0}])
    assert legend(figure.axes[0]) == [r"\$cost^", " _hidden", r"50\$"]
    figure.savefig(tmp_path / "run.png")  # where a formula would raise


def test_pyplot_knows_nothing_of_it_and_tensorboard_takes_it(tmp_path):
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    figure = dbk.plot(trained(2))
    assert plt.get_fignums() == before
    with SummaryWriter(tmp_path) as writer:
        writer.add_figure("balancer", figure, 3)
    assert any(path.stat().st_size > 10_000 for path in Path(tmp_path).iterdir())


ROW = {"step": 1, "norm/a": 1.0}


@pytest.mark.parametrize(
    ("rows", "options", "error", "said"),
    [
        ([], {}, ValueError, "no row has loss/NAME, norm/NAME.*: collect balancer.monitor"),
        ([{"step": 1, "train_loss": 2.0}], {}, ValueError, "no row has loss/NAME"),
        ([{"step": 1, "balancer/norm/a": 2.0}], {}, ValueError, "there are such tags with prefix='balancer/'"),
        ([ROW], {"prefix": "run/"}, ValueError, "no row has run/loss/NAME.*with prefix=''"),
        (ROW, {}, TypeError, "rows is one dict, whose 'step' is not a list of dicts: collect"),
        ({"step": torch.tensor(1), "norm/a": torch.tensor(1.0)}, {}, TypeError, "whose 'step' is not a list of dicts"),
        (dbk.DBMTL(nn.Linear(1, 1), 1).monitor(), {}, TypeError, "must be a list of dicts, got Monitor: collect"),
        ("run.csv", {}, TypeError, "must be a list of dicts, got str"),
        ([ROW, 3.0], {}, TypeError, "row 1 is no dict of numbers, but float"),
        ({"ours": [ROW], "theirs": [3.0]}, {}, TypeError, "row 0 of run 'theirs' is no dict"),
        ({"ours": [ROW], "theirs": []}, {}, ValueError, "no row of run 'theirs' has loss/NAME"),
        ([ROW, {"norm/a": 1.0}], {}, ValueError, "row 1 has no 'step'"),
        ([{"step": 1, "norm/a": "fast"}], {}, TypeError, "row 0 has no number under 'norm/a', but 'fast'"),
        ([{"step": 1, "norm/a": torch.ones(2)}], {}, TypeError, "row 0 has no number under 'norm/a', but tensor"),
        ([{"step": "one", "norm/a": 1}], {}, TypeError, "row 0 has no number under 'step', but 'one'"),
        ({name: [ROW] for name in "abcde"}, {}, ValueError, "1 to 4 runs can be drawn, got 5"),
        ({}, {}, ValueError, "1 to 4 runs can be drawn, got 0"),
        ([ROW], {"smooth": 0}, ValueError, "smooth must be an integer >= 1, got 0"),
        ([ROW], {"smooth": 2.5}, ValueError, "smooth must be an integer >= 1, got 2.5"),
    ],
)
def test_rows_that_cannot_be_drawn_are_told(rows, options, error, said):
    with pytest.raises(error, match=said):
        dbk.plot(rows, **options)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dbmtl-kernels\[plot\]'"):
        dbk.plot([ROW])
