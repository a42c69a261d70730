"""The benchmark of the forms, tried on a tiny case."""

import sys

import forms
import pytest
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row
from forms_cases import CONTENDERS

TINY = ["--trunks", "tiny", "--tasks", "2", "--steps", "2", "--rounds", "2"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script; what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["forms.py", *words, "--results", str(tmp_path / "forms.csv")])
        forms.main()
        return capsys.readouterr().out

    return call


def test_a_case_in_a_process_of_its_own():
    case = forms.Case("K backwards", "tiny", 2, ["DBMTL"], steps=1, rounds=2, threads=1)
    found = forms.measure(case)
    assert [(row.contender, row.what, row.over, row.rounds) for row in found] == [
        ("K passes", "step", "plain sum", 2),
        ("K passes", "backward", "plain sum", 2),
        ("DBMTL", "step", "K passes", 2),
        ("DBMTL", "backward", "K passes", 2),
    ]


def test_a_case_that_fails_is_named():
    case = forms.Case("memory", "tiny", -1, ["DBMTL"], steps=1, rounds=2, threads=1)
    with pytest.raises(SystemExit, match=r"num_tasks=-1.* ended with 1 (.|\n)*Error"):
        forms.measure(case)


def test_every_contender_is_measured_once_and_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "measure", forms.Case.rows)
    printed = run(*TINY, "--resume")
    found = results.read(tmp_path / "forms.csv")
    for what in ("step", "backward", "memory"):
        assert [row.contender for row in found if row.what == what] == list(CONTENDERS)
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in found if row.unit == "ms")
    assert all(row.P and row.detail["batch"] == 4 and row.machine["date"] for row in found)
    memory = {row.contender: row.p50 for row in found if row.what == "memory"}
    assert memory["plain sum"] == memory["sum of logs"] < memory["DBMTL"]
    assert "| tiny, " in printed

    written = (tmp_path / "forms.csv").read_text()
    assert run(*TINY, "--resume") == printed  # nothing is left to measure
    assert run("--report") == printed
    assert (tmp_path / "forms.csv").read_text() == written
    run(*TINY)
    assert (tmp_path / "forms.csv").read_text().startswith(written)
    assert len((tmp_path / "forms.csv").read_text()) > 1.9 * len(written)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trunks", "vgg"], "no trunk 'vgg': there are 'mlp', 'resnet18', 'transformer', 'small', 'tiny'"),
        (["--contenders", "PCGrad"], "no contender 'PCGrad': there are 'plain sum', "),
        (["--report"], "no rows in "),
    ],
)
def test_what_is_not_there_is_named(run, words, said):
    with pytest.raises(SystemExit, match=said):
        run(*words)


def test_results_with_other_columns_are_not_added_to(run, tmp_path):
    results = tmp_path / "forms.csv"
    results.write_text("contender,K\nours,3\n")
    with pytest.raises(BenchError, match="of another schema: its columns are contender, K"):
        run(*TINY)
    assert results.read_text() == "contender,K\nours,3\n"


def test_the_table_has_the_last_row_of_each_kind():
    common = {"contender": "OnePassDBMTL", "model": "mlp", "K": 3, "P": 8_000_000, "over": "plain sum"}
    old, new = (Row("forms", "step", p50=70.0, ratio=ratio, **common) for ratio in (1.5, 1.01))
    memory = Row("forms", "memory", p50=3e7, ratio=1.5, unit="bytes", **common)
    (line,) = forms.table([old, memory, new])
    cells = dict(zip(["trunk", "K", *forms.COLUMNS], line, strict=True))
    assert cells["trunk"] == "mlp, 8 M"
    assert cells["A / sum"] == "1.010"
    assert cells["A, MB"] == "10.0"
    assert cells["exact, MB"] == "-"
