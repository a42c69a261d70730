"""Rows of the GPU suite, and the page drawn from them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import gpu_rows
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_rows.py"
DRY = {**os.environ, "COMMIT": "abc123", "TRITON_INTERPRET": "1"}


def written(path, schema="1", fields=None, **values):
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields or gpu_rows.FIELDS, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        row = {"card": "A card", "date": "2027-01-01", "what": "dense", "K": "3", "P": "9", "schema": schema}
        writer.writerow({**row, **values})
    return path


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ({"schema": "0"}, "schema 0"),
        ({"schema": "2", "fields": [*gpu_rows.FIELDS, "phase"]}, "schema 2"),
        ({"fields": ["what", "K", "P"]}, "schema none"),
        ({"fields": gpu_rows.FIELDS[:-1]}, "schema 1"),
    ],
    ids=["older", "newer", "none", "other columns"],
)
def test_a_file_of_another_schema_is_refused(tmp_path, monkeypatch, file, found):
    path = written(tmp_path / "gpu_no_card_a_dry_run.csv", **file)
    before = path.read_text()
    refused = rf"{path}: rows of {found}; needed: schema 1"
    with pytest.raises(SystemExit, match=refused):
        gpu_rows.page([path])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match=refused):
        gpu_rows.Rows(tmp_path)
    assert path.read_text() == before
    done = subprocess.run([sys.executable, SCRIPT, "page", path], capture_output=True, text=True)
    assert done.returncode == 1
    assert found in done.stderr


def test_a_row_says_where_it_is_from_and_files_only_grow(tmp_path):
    for verdict in ("first", "second"):
        note = ["note", tmp_path, "build", verdict, "7"]
        subprocess.run([sys.executable, SCRIPT, *note], check=True, env=DRY)
    first, second = gpu_rows.read(tmp_path / "gpu_no_card_a_dry_run.csv")
    assert [row["verdict"] for row in (first, second)] == ["first", "second"]
    assert {name: first[name] for name in ("what", "contender", "seconds", "commit", "card")} == {
        "what": "stage", "contender": "build", "seconds": "7", "commit": "abc123", "card": "no card: a dry run",
    }  # fmt: skip
    assert first["torch"] == torch.__version__
    assert all(first[name] for name in ("schema", "triton", "nvcc", "date"))
    page = gpu_rows.page(tmp_path.glob("*.csv"))
    assert "second" in page
    assert "first" not in page


def test_a_row_with_missing_cells_is_refused(tmp_path):
    path = written(tmp_path / "a.csv")
    whole = path.read_text()
    for cells in ("1,dense,3\r\n", whole.splitlines()[1] + ",more\r\n"):
        path.write_text(whole + cells)
        with pytest.raises(SystemExit, match="a row with missing cells"):
            gpu_rows.page([path])


def stage(path, contender, verdict, **values):
    row = {"what": "stage", "contender": contender, "verdict": verdict, "seconds": "7", "commit": "abc123", "P": ""}
    written(path, **{**row, **values})


def test_stages_that_ended_at_this_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "gpu_no_card_a_dry_run.csv"
    stage(path, "parity triton", "cut off: 9 s are over")
    stage(path, "parity triton", "FAULT: exit code 124, killed, or ran past 60 s")
    stage(path, "parity cuda", "done")
    stage(path, "first triton cuda", "cut off: 115 s are over")
    stage(path, "tests of parity", "done in part: 200 s are over")
    stage(path, "dense triton cuda", "done", commit="def456")
    stage(path, "step triton cuda", "done", commit="unknown")
    stage(path, "memcheck", "skipped: it is not here", seconds="")
    stage(path, "build", "done")
    found = {}
    for commit in ("abc123", "def456", "", "unknown"):
        monkeypatch.setenv("COMMIT", commit)
        found[commit] = gpu_rows.Rows(tmp_path).ended().splitlines()
    assert found == {
        "abc123": ["parity triton=124", "parity cuda=0", "tests of parity=0"], "def456": ["dense triton cuda=0"],
        "": [], "unknown": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "card"),
    [
        ("NVIDIA H100 80GB HBM3, 550.54.15, 1980, 2619", "NVIDIA H100 80GB HBM3"),
        ("Warning: a, b, c\nNVIDIA A10, 535.1, 1695, [N/A]\nNVIDIA L4, 535.1, 1, 2", "NVIDIA A10"),
        ("sh: nvidia-smi: not found", "unknown card"),
        ("Failed, so, it, says", "unknown card"),
    ],
    ids=["a card", "a warning and two cards", "no such tool", "an error"],
)
def test_the_card_is_found_beside_warnings(monkeypatch, said, card):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu_rows, "getoutput", lambda command: said)
    assert gpu_rows.card()["card"] == card
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_rows.card()["card"] == "no card: a dry run"


def test_what_has_no_rows_is_not_yet_measured():
    page = gpu_rows.page([])
    assert page.count("Not yet measured.") == 2
    assert all(f"| {op} | not yet measured |" in page for op in gpu_rows.OPS)


def test_the_page_in_docs_is_drawn_from_the_results():
    results = sorted((ROOT / "benchmarks" / "results").glob("gpu_*.csv"))
    assert (ROOT / "docs" / "gpu.md").read_text() == gpu_rows.page(results)


def timed(path, triton, again, cuda, **values):
    times = {"triton": triton, "triton, again": again, "cuda": cuda}
    for name, ms in times.items():
        if ms is not None:
            written(path, contender=name, clock="device", p50_ms=ms, dtype="float32", **values)


@pytest.mark.parametrize(
    ("cuda", "verdict"),
    [(0.8, "cuda stays"), (0.97, "a tie: triton stays"), (1.03, "a tie: triton stays"), (1.2, "triton stays")],
)
def test_which_kernel_stays(tmp_path, cuda, verdict):
    path = tmp_path / "a.csv"
    timed(path, 1.0, 1.09, cuda, P="9", commit="abc")
    timed(path, 10.0, 10.0, 10.0 * cuda, P="90", commit="def")
    timed(path, 1.0, 1.0, None, P="900", commit="abc", date="2027-01-02")
    written(path, contender="cuda", clock="device", p50_ms=9.0, P="900", dtype="float32")  # not in turn with the others
    written(path, contender="cuda", clock="host", p50_ms=9.0, dtype="float32")  # decides nothing
    found = f"{verdict} (cuda is {1 / cuda:.3f} times as fast over 2 sizes, A/A spread 4.2%, at abc and def)"
    assert f"| balance_ | {found} |" in gpu_rows.page([path])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_no_kernel_goes_without_both_and_a_spread(tmp_path, missing):
    times = [1.0, 1.0, 0.1]
    times[missing] = None
    timed(tmp_path / "a.csv", *times)
    assert "| balance_ | not yet measured |" in gpu_rows.page([tmp_path / "a.csv"])


def test_of_each_size_the_last_run_counts(tmp_path):
    path = tmp_path / "a.csv"
    written(path, contender="triton", verdict="FAULT early")
    written(path, contender="eager", clock="device", p50_ms=7, commit="abc")
    written(path, contender="eager", verdict="FAULT late", date="2027-01-02", commit="def")
    written(path, contender="triton", clock="device", p50_ms=1, date="2027-01-02")
    written(path, contender="cuda", clock="device", p50_ms=2, date="2027-01-02")
    written(path, contender="triton", P="", what="parity: dense", verdict="right")
    written(path, contender="cuda", P="", what="parity: dense", verdict="FAULT now", date="2027-01-02")
    page = gpu_rows.page([path])
    assert "FAULT early" not in page
    assert all(
        cell in page
        for cell in ("| triton | device |", "| cuda | device |", "right", "FAULT now", "FAULT late", "| 7 |", "abc")
    )
