"""The one schema of results."""

import sys

import pytest
from dbmtl_kernels.bench.results import COLUMNS, BenchError, Row, append, machine, read, typed

ROW = Row(
    "bench", "op", 'ours, "quoted"', K=3, P=10, p20=1.0, p50=2.5, p80=3.0, ratio=0.5, over="eager", bytes=1 << 40,
    of_copy=0.9, rounds=7, detail={"seed": 1, "tasks": ["a", "b"]},
)  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows = [Row("bench", "op", "x", machine=machine()), Row(**{**vars(ROW), "machine": machine()})]
    append(path, rows[:1])
    before = path.read_bytes()
    append(path, rows[1:])
    assert path.read_bytes().startswith(before)
    assert read(path) == rows
    assert all(rows[0].machine[name] for name in ("device", "threads", "torch", "dbmtl_kernels", "command", "date"))


def test_a_command_tells_no_place_of_this_machine(tmp_path, monkeypatch):
    where = str(tmp_path / "rows.csv")
    assert typed("python -m x", "--out", where, "--png", "a/b.png") == "python -m x --out rows.csv --png a/b.png"
    assert typed("x", f"--out={where}", "--beta=0.5") == "x --out=rows.csv --beta=0.5"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bench" / "__main__.py"), "--out", where])
    assert machine()["command"] == "python -m bench --out rows.csv"


def test_a_line_cut_off_at_the_end_is_left_out_and_one_before_is_told(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, [Row(**{**vars(ROW), "machine": machine()})] * 2)
    text = path.read_text()
    path.write_text(text[: len(text) - 40])
    assert len(read(path)) == 1
    cut = tmp_path / "cut.csv"
    cut.write_text(path.read_text())
    append(cut, [ROW])
    assert len(read(cut)) == 2  # what was cut off has gone
    lines = text.splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:30] + "\n", lines[2]]))
    with pytest.raises(BenchError, match="row 2 is damaged"):
        read(path)


def test_a_file_of_another_schema_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(BenchError, match="no results file"):
        read(path)
    for text in ("", "schema,what\n1,op\n", ",".join(COLUMNS[::-1]) + "\n"):
        path.write_text(text)
        for call in (lambda: read(path), lambda: append(path, [ROW])):
            with pytest.raises(BenchError, match="of another schema"):
                call()
        assert path.read_text() == text
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(["1"] * len(COLUMNS)) + "\n")
    with pytest.raises(BenchError, match=r"row 2 is damaged.*schema '1'"):
        read(path)
