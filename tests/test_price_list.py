"""The price list: on a tiny trunk, on what it refuses, and its arithmetic."""

import json

import pytest
import torch
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

from benchmarks.__main__ import main as benchmarks
from benchmarks.price_list import command, figure, methods, tables
from benchmarks.price_list.cases import MEASURING, PEAK, STEP, Case
from benchmarks.price_list.methods import BARE, EW, METHODS, ONE_ROW, ROWS, A, Gradients, Method
from benchmarks.price_list.models import Model

FEW = [EW, A, BARE, ROWS]
TINY = ["--trunks", "tiny", "--steps", "20", "--visits", "1", "--pairs", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in this process; its exit status and rows."""
    monkeypatch.setattr(command, "measure", Case.rows)

    def call(*words):
        path = tmp_path / "rows.csv"
        status = command.main([*words, "--results", str(path)])
        return status, results.read(path)

    return call


@pytest.mark.slow
def test_every_method_is_verified_measured_and_drawn(run, tmp_path, capsys):
    status, rows = run(*TINY, "--tasks", "3")
    assert status == 0
    assert "3 cases measured" in capsys.readouterr().out
    for what in (STEP, PEAK):
        assert {row.contender for row in rows if row.what == what} == set(METHODS)
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in rows)
    memory = {row.contender: row.bytes for row in rows if row.what == PEAK}
    assert memory["sum of logs"] == 0 < memory[ONE_ROW] < memory[ROWS]
    assert any(row.what == MEASURING for row in rows)
    for draw in (tables.by_tasks, tables.exact, tables.published, tables.forms):
        assert "| tiny" in draw(rows) or "**tiny" in draw(rows) or draw is tables.published
    figure.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_left_out_and_an_interrupt_keeps_what_is_done(run, monkeypatch, capsys):
    few = [*TINY, "--tasks", "2", "--methods", *FEW, "--resume"]
    part = []

    def measure(case):
        if part:
            raise KeyboardInterrupt
        part.append(case)
        return case.rows()

    monkeypatch.setattr(command, "measure", measure)
    status, rows = run(*few)
    assert status == 130
    assert {row.what.partition(",")[0] for row in rows} == {PEAK}
    monkeypatch.setattr(command, "measure", Case.rows)
    assert "2 cases measured" in (run(*few), capsys.readouterr().out)[1]
    assert "0 cases measured" in (run(*few), capsys.readouterr().out)[1]


@pytest.mark.slow
def test_a_case_in_a_process_of_its_own(monkeypatch):
    case = Case("K backwards", "tiny", 2, [BARE], 1, 1, 1, 1, "cpu")
    assert [(row.what, row.contender) for row in command.measure(case)][0::4] == [(STEP, EW), (STEP, BARE)]
    with pytest.raises(BenchError, match=r"num_tasks=-1.* ended with 1"):
        command.measure(case._replace(num_tasks=-1))


def test_a_method_that_is_wrong_is_not_timed(monkeypatch):
    wrong = Method(METHODS[EW].make, METHODS[ROWS].weights)
    monkeypatch.setitem(methods.METHODS, "wrong", wrong)
    with pytest.raises(BenchError, match=r"the gradients of wrong with K=2 are off by .*, allowed is 1e-04"):
        Case("K backwards", "tiny", 2, ["wrong"], 1, 1, 1, 1, "wall").rows()


def test_what_must_be_left_is_what_autograd_gives():
    model = Model("tiny", 3)
    found = Gradients(model)
    expected = methods.expected("tiny", 3, ["sum of logs"])["sum of logs"]
    torch.log(torch.stack(model.losses()) + 1e-8).sum().backward()
    given = torch.cat([p.grad.reshape(-1) for p in model.shared])
    assert torch.allclose(given, expected, rtol=1e-5, atol=1e-7)
    logs = found.rows.double() * found.by_logs[:, None]
    assert torch.allclose(found.gramian_of_logs(), logs @ logs.T)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trunks", "vgg"], "no trunk 'vgg': there are 'MLP', 'ResNet-18', 'transformer'"),
        (["--methods", "DBMTL2"], "no method 'DBMTL2': there are 'equal weighting', "),
        (["--tasks", "1"], "--tasks must be at least 2, got 1"),
        (["--visits", "0"], "--visits must be at least 1, got 0"),
    ],
)
def test_what_is_not_there_is_named(words, said, capsys):
    assert benchmarks(["price_list", *words]) == 2
    assert said in capsys.readouterr().err


def test_results_of_another_schema_are_left_alone(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("contender,K\nours,3\n")
    assert benchmarks(["price_list", *TINY, "--results", str(path)]) == 2
    assert "another schema" in capsys.readouterr().err
    assert path.read_text() == "contender,K\nours,3\n"


def test_exponents():
    assert tables.exponent([2, 3, 11], [8.0, 18.0, 242.0]) == pytest.approx(2.0)
    assert tables.exponent([2, 3, 11, 40], [1.0, 1.0, None, 1.0]) == pytest.approx(0.0)
    assert tables.exponent([2, 3, 11], [1.0, 0.0, 2.0]) is None


def test_tables_show_the_last_row_of_each_kind():
    base = {"model": "MLP", "K": 3, "P": 1000, "over": EW, "detail": {"batch": 4, "copy_bytes_per_s": 1e9}}
    parts = [
        Row("price_list", "part of a step", name, ratio=share, **base)
        for name, share in (("forward", 0.25), ("backward", 0.5), ("optimizer", 0.25))
    ]
    steps = [
        Row("price_list", STEP, name, p50=10.0 * ratio, ratio=ratio, bytes=52_000_000, **base)
        for name, ratio in ((EW, 1.0), (BARE, 2.0), (ROWS, 9.0), (ROWS, 2.5))
    ]
    # A later run of methods of one backward has a step of EW too, and copied nothing.
    steps.append(Row("price_list", STEP, EW, p50=99.0, ratio=1.0, **{**base, "detail": {"batch": 4}}))
    peak = [Row("price_list", PEAK, name, bytes=4000 * k, **base) for name, k in ((EW, 0), (ROWS, 4))]
    exact = tables.exact([*parts, *steps, *peak]).splitlines()[-1]
    assert exact.split(" | ")[2:] == [
        "2.33", "0.25, 0.50, 0.25", "2.00", "2.00", "2.50", "1.07", "5.0", "52", "52.0", "0 |",
    ]  # fmt: skip
    line = next(line for line in tables.by_tasks([*parts, *steps, *peak]).splitlines() if "`DBMTL`" in line)
    assert line == "| `DBMTL`: rows | 2.50 | - | 4.00 | - |"


def test_cases_are_of_the_methods_that_serve_so_many_tasks():
    found = command.cases(command.parse([]))
    assert len(found) == 3 * (3 * 4 + 3)
    assert json.loads(json.dumps(found[0]))[1] == found[0].trunk
    for case in found:
        assert ("Krum" in case.methods) == (case.num_tasks > 2 and case.part != "one backward" and "Krum" in METHODS)
