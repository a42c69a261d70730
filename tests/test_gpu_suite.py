"""The GPU suite, tried on a CPU: what it writes, what it refuses to time, and how it ends."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.sh"
UNCHECKED = {"bare K backward passes"}  # has no result to agree on


def suite(folder, *options, **changes):
    settings = {**os.environ, "PYTHON": sys.executable, **changes}
    return subprocess.run(["bash", SCRIPT, *options, folder], capture_output=True, text=True, env=settings, timeout=300)


def stages(folder):
    found = json.loads((folder / "environment.json").read_text())["stages"]
    return {stage["stage"]: stage for stage in found}


@pytest.fixture
def modules(monkeypatch):
    """Those of benchmarks/gpu, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import clock
    import dense
    import report
    import shard
    import suite

    return SimpleNamespace(clock=clock, dense=dense, report=report, shard=shard, suite=suite)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    (folder / "pytest.log").write_text("of an earlier run")
    return suite(folder, "--dry-run"), folder


def test_a_dry_run_writes_every_file(tried):
    done, folder = tried
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"results.json", "results.csv", "suite.log", "environment.json"}
    if importlib.util.find_spec("matplotlib"):
        expected.add("figure.png")
        assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in folder.iterdir()} == expected
    statuses = {name: stage["status"] for name, stage in stages(folder).items()}
    skipped = dict.fromkeys(("build", "tests", "sanitizer"), "skipped")
    assert statuses == {**skipped, "benchmarks": "passed", "figure": "passed"}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert len(environment["sources"]) == 16


def test_a_dry_run_times_only_what_agreed_and_judges_nothing(tried):
    _, folder = tried
    content = json.loads((folder / "results.json").read_text())
    assert content["failures"] == content["missed"] == []
    rows = content["rows"]
    assert {row["section"] for row in rows} == {"dense", "small", "engine", "step", "memory", "gramian"}
    for row in rows:
        assert row["agreed"] is True or row["name"] in UNCHECKED
        assert row["reached"] is None
        assert row["K"] > 1
        assert row["P"] > 1
        if row["section"] != "memory":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["gb_per_s"] > 0
    # Every target of DESIGN.md's table that a GPU is held to
    targets = {(row["section"], row["against"].split(" ")[0], row["target"]) for row in rows if row["target"]}
    assert targets == {
        ("dense", "copy", 0.9), ("dense", "eager", 1.2), ("dense", "authors'", 4.0), ("small", "eager", 3.0),
        ("small", "authors'", 4.0), ("engine", "eager", 1.6), ("engine", "torch.compile", 1.3), ("step", "bare", 1.05),
    }  # fmt: skip
    with (folder / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    assert list(table[0]) == list(rows[0])


def test_a_stage_that_fails_loses_no_other_and_shows_in_the_exit_code(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$1" in *run.py) echo gone; exit 7;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = suite(tmp_path / "out", DBMTL_GPU_SUITE_DRY="1", PYTHON=str(python))
    assert done.returncode == 1
    found = stages(tmp_path / "out")
    assert (found["benchmarks"]["status"], found["benchmarks"]["exit_code"]) == ("failed", 7)
    assert found["benchmarks"]["remark"] == "gone"
    assert found["figure"]["status"] == "failed"  # tried, but there is nothing to draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = suite(tmp_path / "out", DBMTL_GPU_SUITE_DRY="")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
    assert subprocess.run(
        ["bash", SCRIPT], capture_output=True, env={**os.environ, "PYTHON": sys.executable}
    ).returncode


def test_what_takes_too_long_is_stopped(modules, tmp_path):
    began = time.monotonic()
    running = modules.suite.Running(["sh", "-c", "echo begun; sleep 60"], tmp_path / "log", 0.5)
    stage = running.ended("slow")
    assert (stage.status, stage.exit_code, stage.remark) == ("timed out", 124, "begun")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("log", "code", "status"),
    [
        ("every kernel ran\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("every kernel ran\n========= ERROR SUMMARY: 2 errors", 1, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 0, "failed"),
        ("every kernel ran", 0, "failed"),
        ("========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors", 1, "not available"),
    ],
)
def test_a_sanitizer_that_watched_nothing_did_not_pass(modules, log, code, status):
    stage = modules.suite.Stage("sanitizer", "failed" if code else "passed", code, 1.0, "")
    assert modules.suite.watched("memcheck", stage, log).status == status


def test_a_wrong_or_raising_contender_is_not_timed(modules, tmp_path):
    report = modules.report.Report(tmp_path, judge=True, seconds=60)
    inputs = modules.dense.Inputs(3, 64, torch.float32, torch.float32, torch.device("cpu"))

    def right(grads, ema):
        ema.lerp_(grads, 0.1)
        norms = ema.norm(dim=1)
        return (norms.max() / norms) @ ema

    def late(grads, ema):  # by one state
        return right(grads, ema.clone())

    def wrong(grads, ema):
        return 1.001 * right(grads, ema)

    def poisoned(grads, ema):
        return right(grads, ema) * torch.nan

    def raising(grads, ema):
        raise RuntimeError("out of memory")

    named = {"dbmtl_kernels": right, "late": late, "wrong": wrong, "poisoned": poisoned, "raising": raising}
    assert list(report.agree("case", named, inputs.check)) == ["dbmtl_kernels"]
    assert [failure.split(" ")[1] for failure in report.failures] == ["late", "wrong", "poisoned", "raising"]
    with pytest.raises(modules.report.WrongResultError, match="nothing to compare"):
        report.agree("case", {"dbmtl_kernels": wrong, "right": right}, inputs.check)


def test_a_section_that_raises_or_comes_too_late_is_a_failure(modules, tmp_path):
    report = modules.report.Report(tmp_path, judge=True, seconds=60)
    report.section("broken", lambda: 1 / 0)
    modules.report.Report.section(late := modules.report.Report(tmp_path, True, -1.0), "late", lambda: None)
    assert report.failures == ["broken: ZeroDivisionError: division by zero"]
    assert late.failures == ["late: not begun, no time was left"]


def test_targets_are_judged(modules, tmp_path):
    report = modules.report.Report(tmp_path, judge=True, seconds=60)
    base = modules.report.Row("dense", "case", "", 3, 100, clock="device")
    times = {"dbmtl_kernels": [1.0, 1.1, 0.9], "eager (a)": [2.0] * 3, "eager (b)": [1.5] * 3, "copy": [0.8] * 3}
    report.add_times(base, times, {"": 10e9, "copy": 8e9}, {"eager": 1.6, "copy": 0.9, "authors": 4.0})
    compared = {row.against: (round(row.ratio, 3), row.reached) for row in report.rows if row.against}
    assert compared == {"eager (b)": (1.5, False), "copy": (1.0, True)}
    report.compare(base, "bare", 1.06, "<=", 1.05)
    report.compare(base, "bare", 1.04, "<=", 1.05)
    assert [row.reached for row in report.rows[-2:]] == [False, True]
    assert len(report.missed) == 2


def test_parts_of_the_tests_are_all_of_them(modules):
    parts = []
    for part in range(5):
        items = list(range(23))
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        config = SimpleNamespace(getoption=lambda _, part=part: f"{part}/5", hook=hook)
        modules.shard.pytest_collection_modifyitems(config, items)
        parts += items
    assert sorted(parts) == list(range(23))


def test_what_the_sanitizer_watches_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "sanitize.py"), "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "python")}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every kernel ran"
