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
EMPTY = "empty cooperative launch"
UNCHECKED = {"bare K backward passes", EMPTY}  # have no result to agree on


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
    import engine
    import report
    import shard
    import suite

    return SimpleNamespace(clock=clock, dense=dense, engine=engine, report=report, shard=shard, suite=suite)


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
            assert row["gb_per_s"] > 0 or row["name"] == EMPTY
    # Every target of the project's table that a GPU is held to
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


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_what_the_sanitizer_watches_runs(backend, request):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "sanitize.py"), "--device", "cpu"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "DBMTL_TEST_BACKEND": backend}
    if backend == "cuda":
        settings["DBMTL_EMULATED"] = str(request.getfixturevalue("emulated_library"))
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every kernel ran"


# --- Both backends --------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_the_cuda_kernels_are_measured_against_triton(modules, tmp_path, emulated_cuda):
    report = modules.report.Report(tmp_path, judge=False, seconds=60)
    timer = modules.clock.Clock(torch.device("cpu"), 1, 1)
    dense = modules.dense.Dense(report, timer, tiny=True)
    dense.large(3, 100_000_000, torch.float32, torch.float32)
    for size in (1_000_000, 2_000_000, 100_000):
        dense.small(size)
    dense.gramian(11, 50_000_000)
    modules.engine.gathering(report, timer, True, None)
    modules.engine.whole_step(report, timer, True, tf32=False)
    assert report.failures == []
    judged = [
        (r.section, r.clock, r.against, r.wanted, r.target) for r in report.rows if r.name == "cuda" and r.against
    ]
    small = [("small", "device", "triton", ">=", 1.15), ("small", "device", EMPTY, "<=", None)]
    call = ("small", "call", "triton", ">=", 1.0)
    assert judged == [
        ("dense", "device", "triton", ">=", 1.0), ("dense", "device", "copy", ">=", None),
        *small, call, *small, call,
        ("small", "device", "triton", ">=", 1.0), ("small", "device", EMPTY, "<=", 2.0), call,
        ("gramian", "device", "triton", ">=", None),
        ("engine", "device", "triton", ">=", 1.0), ("engine", "call", "triton", ">=", 1.0),
        ("step", "call", "bare K backward passes", "<=", 1.05),
    ]  # fmt: skip


def test_how_the_backends_are_compared(modules, tmp_path):
    report = modules.report.Report(tmp_path, judge=True, seconds=60)
    base = modules.report.Row("small", "case", "", 3, 100, clock="device")
    times = {"dbmtl_kernels": [1.1] * 3, "cuda": [1.0] * 3, EMPTY: [0.4] * 3}
    report.add_times(base, times, {"": 1.0, EMPTY: 0.0}, {}, (EMPTY,))
    modules.dense.compare_backends(report, base, times)
    modules.dense.compare_backends(report, base, times, 1.15)
    modules.dense.compare_with_empty(report, base, times, judged=True)
    found = [(r.name, r.against, round(r.ratio, 6), r.reached) for r in report.rows if r.against]
    assert found == [
        ("cuda", "triton", 1.1, True), ("cuda", "triton", 1.1, False),
        ("dbmtl_kernels", EMPTY, 2.75, None), ("cuda", EMPTY, 2.5, False),
    ]  # fmt: skip
    assert [row.p50_ms for row in report.rows if row.name == "cuda"] == [1e3] * 4
    del times["cuda"]  # where its library is not built
    modules.dense.compare_backends(report, base, times)
    assert len(report.rows) == 7


@pytest.mark.parametrize("built", [True, False])
def test_both_backends_are_tested_and_watched(modules, tmp_path, monkeypatch, built):
    python, library = tmp_path / "python", tmp_path / "libdbmtl_cuda.so"
    python.write_text(
        '#!/bin/sh\necho "backend: $DBMTL_TEST_BACKEND"\n'
        'if [ "$1" = -m ]; then echo "1 passed"; else echo "every kernel ran"; echo "ERROR SUMMARY: 0 errors"; fi\n'
    )
    watcher = tmp_path / "compute-sanitizer"
    watcher.write_text('#!/bin/sh\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
    for path in (python, watcher):
        path.chmod(0o755)
    if built:
        library.touch()
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DBMTL_TEST_BACKEND", "another")
    monkeypatch.setattr(modules.suite, "CUDA_LIBRARY", library)
    suite = modules.suite.Suite(tmp_path, tmp_path, dry=False)
    suite.test_and_sanitize()
    names = ("tests {}", "sanitizer {} memcheck", "sanitizer {} racecheck")
    statuses = {stage.stage: stage.status for stage in suite.stages}
    other = "passed" if built else "not available"
    assert statuses == {name.format(b): s for b, s in (("triton", "passed"), ("cuda", other)) for name in names}
    assert all("was not built" in stage.remark for stage in suite.stages if stage.status == "not available")
    for log, triton, cuda in (("pytest.log", 7, 2), ("sanitizer.log", 2, 2)):
        text = (tmp_path / log).read_text()
        assert (text.count("backend: triton"), text.count("backend: cuda")) == (triton, cuda * built)
        assert "another" not in text


def test_part_of_a_backends_tests_failing_or_all_skipped_is_a_failure(modules):
    passed, failed, skipped = (
        modules.suite.Stage("part", status, code, 1.0, remark)
        for status, code, remark in (("passed", 0, "3 passed"), ("failed", 1, "1 failed"), ("passed", 0, "3 skipped"))
    )
    assert modules.suite.together("tests cuda", [passed, passed]) == passed._replace(
        stage="tests cuda", remark="3 passed | 3 passed"
    )
    assert modules.suite.together("tests cuda", [passed, failed]).status == "failed"
    assert modules.suite.together("tests cuda", [passed, skipped]).status == "failed"


@pytest.mark.parametrize(("said", "archs"), [("9.0", "90"), ("10.0", "100"), ("[N/A]", None), (None, None)])
def test_the_build_is_for_the_gpu_that_is_there(modules, monkeypatch, said, archs):
    monkeypatch.setattr(modules.suite.environment, "said_by", lambda *command: said)
    assert modules.suite.build_settings().get("DBMTL_CUDA_ARCHS") == archs


def test_a_build_without_the_cuda_kernels_says_so(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.suite, "CUDA_LIBRARY", tmp_path / "libdbmtl_cuda.so")
    stage = modules.suite.Stage("build", "passed", 0, 1.0, "copying")
    log = "dbmtl_kernels: the CUDA kernels were NOT built (no nvcc)."
    assert log.split(" (")[0].removeprefix("dbmtl_kernels: the CUDA kernels ") in (ROOT / "setup.py").read_text()
    assert modules.suite.built(stage, "all is well") == stage
    assert modules.suite.built(stage, log).remark.endswith("there is none")
    (tmp_path / "libdbmtl_cuda.so").touch()
    assert modules.suite.built(stage, log).remark.endswith("an earlier build's is used")


def test_it_ends_within_eight_minutes(modules):
    suite = modules.suite
    assert suite.BUILD + suite.TEST + suite.BENCHMARK + suite.FIGURE < 480 - 15
