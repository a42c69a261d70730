"""gpu_suite.sh beside stand-ins for Python and compute-sanitizer: which stages, in which order, and the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.sh"

# Stands for Python: says what it was asked for, and ends as ENDS says of a section ("parity_cuda=3 tests=1"). Rows are
# those of gpu_rows.py itself if ROWS names it.
STUB = """#!/usr/bin/env bash
[[ $1 == -c ]] && { [[ " $MISSING " != *" ${2#import } "* ]]; exit; }
[[ $1 == benchmarks/gpu_rows.py && $2 == note ]] && echo "${*:4}" >> "$3/notes"
[[ $1 == benchmarks/gpu_rows.py && -n $ROWS ]] && exec "$REAL" "$ROWS" "${@:2}"
[[ $1 == benchmarks/gpu_rows.py ]] && exit
case "$*" in
    benchmarks/gpu.py*) name="${*:3}$DBMTL_TRITON_LAUNCHES" ;;
    *pytest*) name=tests ;;
    *) name=build$DBMTL_BUILD_NATIVE ;;
esac
echo "$name began" >> "$BEGAN"
[[ $name == tests ]] && echo "9 passed"
for end in $ENDS; do
    [[ ${end%=*} == "${name// /_}" ]] && code="${end#*=}"
done
[[ ${code:-} == hang ]] && sleep 60
exit "${code:-0}"
"""
# And for compute-sanitizer: finds what FINDS says.
SANITIZER = """#!/usr/bin/env bash
[[ $* == *"-c import"* ]] || echo "$*" >> "$BEGAN"
[[ $* == *"-c import"* ]] && exit "${REFUSES:-0}"
[[ " $FINDS " == *" $2 "* ]] && exit 9
exit 0
"""


def script(folder, *options, tool=True, **environment):
    """Exit code, and what it noted of each stage; a file ``began`` has what was started."""
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks" / "suite.sh").write_text(SUITE.read_text())
    for name, stub in {"python": STUB, "compute-sanitizer": SANITIZER}.items():
        (folder / name).write_text(stub)
        (folder / name).chmod(0o755 if tool or name == "python" else 0o644)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    given = {
        "MISSING": "xdist", "ENDS": "", "FINDS": "", "ROWS": "", "COMMIT": "abc", **environment, "PATH": path,
        "PYTHON": str(folder / "python"), "REAL": sys.executable, "BEGAN": str(folder / "began"),
    }  # fmt: skip
    (folder / "began").unlink(missing_ok=True)
    command = ["bash", folder / "benchmarks" / "suite.sh", folder / "out", *options]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=50)
    notes = folder / "out" / "notes"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return done.returncode, [line.rsplit(" ", 1)[0] if line[-1].isdigit() else line for line in lines]


def began(folder):
    return [line.removesuffix(" began") for line in (folder / "began").read_text().splitlines()]


START = "start abc"
FIRST = ["parity triton done", "build done", "parity cuda done", "first triton cuda done"]
TIMES = [f"{name} triton cuda done" for name in ("dense", "step", "ops")]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def of_tests(what):
    return [f"tests of {what}, last line 9 passed", f"tests of {what} done"]


def in_order(notes):
    """The build goes on beside the first check."""
    if "build done" in notes[:3]:
        notes.remove("build done")
        notes.insert(2, "build done")
    return notes


def test_the_order_of_stages(tmp_path):
    code, notes = script(tmp_path)
    assert code == 0
    tools = [f"{tool} done" for tool in TOOLS]
    assert in_order(notes) == [START, *FIRST, *of_tests("parity"), *TIMES, *of_tests("CUDA"), *tools, *of_tests("2^31")]
    asked = {line.split()[1]: line for line in began(tmp_path) if line.startswith("--tool")}
    assert [tool for tool in TOOLS if "--kernel-name kns=gramian" in asked[tool]] == ["racecheck"]


def test_first_stops_after_the_first_numbers(tmp_path):
    code, notes = script(tmp_path, "--first")
    assert (code, in_order(notes)) == (0, [START, *FIRST])
    assert "build0" in began(tmp_path)  # nothing needs the CPU library


def test_first_ends_in_time_and_a_stage_cut_off_is_no_fault(tmp_path):
    code, notes = script(tmp_path, "--first", SECONDS_LEFT="3", ENDS="parity_cuda=hang")
    assert code == 0
    assert in_order(notes)[3:] == ["parity cuda cut off: 3 s are over", "first triton cuda cut off: 3 s are over"]


@pytest.mark.parametrize("code", [1, 3, 134])
def test_a_fault_is_the_exit_code_and_the_rest_goes_on(tmp_path, code):
    """A backend that is wrong is still measured where it is right; one that loses the device is not."""
    found, notes = script(tmp_path, "--first", ENDS=f"parity_triton={code}")
    assert found == 1
    assert in_order(notes)[1:] == [
        f"parity triton FAULT: exit code {code}", *FIRST[1:3], f"first {'triton cuda' if code == 1 else 'cuda'} done"
    ]  # fmt: skip


def test_a_barrier_that_hangs_leaves_the_form_without_one(tmp_path):
    code, notes = script(tmp_path, "--first", ENDS="parity_triton=124")
    assert code == 1
    assert [note for note in notes if "build" not in note] == [
        START, "parity triton FAULT: exit code 124, killed, or ran past 60 s", "parity triton, two launches done",
        "parity cuda, two launches done", "first triton cuda, two launches done",
    ]  # fmt: skip
    assert "parity triton2" in began(tmp_path)


def test_a_section_that_loses_the_device_is_run_for_each_backend_alone(tmp_path):
    code, notes = script(tmp_path, ENDS="dense_triton_cuda=3 step_triton_cuda=1")
    assert code == 1
    assert [note for note in notes if note.startswith(("dense", "step"))] == [
        "dense triton cuda FAULT: exit code 3", "dense triton done", "dense cuda done",
        "step triton cuda FAULT: exit code 1",
    ]  # fmt: skip


def test_a_second_call_goes_on_where_the_first_ended(tmp_path):
    """At the same commit on the same card what ended, well or not, is not repeated; a build is."""
    rows = str(SUITE.with_name("gpu_rows.py"))
    code, _ = script(tmp_path, "--first", ROWS=rows, ENDS="parity_cuda=1 first_triton_cuda=3")
    assert code == 1
    code, notes = script(tmp_path, ROWS=rows)
    rest = [*of_tests("parity"), *TIMES, *of_tests("CUDA"), *(f"{tool} done" for tool in TOOLS), *of_tests("2^31")]
    assert (code, notes) == (1, [START, "build done", *rest])
    assert not {"parity triton", "parity cuda", "first triton cuda", "first cuda"} & set(began(tmp_path))


def test_rows_of_another_schema_end_it_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu_no_card_a_dry_run.csv").write_text("schema,what\n0,dense\n")
    assert script(tmp_path, "--cpu", ROWS=str(SUITE.with_name("gpu_rows.py"))) == (2, [])


def test_a_commit_that_git_cannot_name_is_said_first(tmp_path):
    _, notes = script(tmp_path, "--first", COMMIT="", GIT_DIR="/nowhere")
    assert notes[0] == "start commit unknown, a second call repeats everything: COMMIT=... names it"


def test_what_a_machine_lacks_is_skipped_and_said(tmp_path):
    code, notes = script(tmp_path, tool=False, MISSING="pytest setuptools xdist")
    assert code == 0
    assert "build skipped: no setuptools" in notes
    whats = ("parity", "CUDA", "2^31")
    assert [note for note in notes if note.startswith("tests")] == [f"tests of {w} skipped: no pytest" for w in whats]
    assert [note.split(" ", 1)[0] for note in notes if "skipped: compute-sanitizer" in note] == [*TOOLS]


def test_what_compute_sanitizer_finds_is_a_fault(tmp_path):
    code, notes = script(tmp_path, FINDS="racecheck")
    assert code == 1
    assert [note for note in notes if "FAULT" in note] == [
        "racecheck FAULT: exit code 9, compute-sanitizer found something"
    ]


def test_a_device_that_compute_sanitizer_refuses_is_no_fault(tmp_path):
    code, notes = script(tmp_path, REFUSES="1")
    assert code == 0
    assert sum("skipped: compute-sanitizer" in note for note in notes) == 4


def test_without_a_gpu_the_script_says_so_and_leaves(tmp_path):
    assert script(tmp_path, MISSING="torch; torch.zeros(1, device='cuda')") == (2, [])
