"""gpu_suite.sh beside stand-ins for Python and compute-sanitizer: which stages, in which order, and the exit code."""

import os
import subprocess
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.sh"

# Stands for Python: says what it was asked for, and ends as ENDS says of a section ("parity cuda=3 tests=1").
STUB = """#!/usr/bin/env bash
[[ $1 == -c ]] && { [[ " $MISSING " != *" ${2#import } "* ]]; exit; }
[[ $1 == benchmarks/gpu_rows.py ]] && { echo "${*:5}" >> "$3/notes"; exit; }
case "$*" in
    benchmarks/gpu.py*) name="${*:3}" ;;
    *pytest*) name=tests ;;
    *) name=build ;;
esac
[[ ${name:-} == tests ]] && echo "9 passed"
for end in $ENDS; do
    [[ ${end%=*} == "${name// /_}" ]] && code="${end#*=}"
done
[[ ${code:-} == hang ]] && sleep 60
exit "${code:-0}"
"""
# And for compute-sanitizer: finds what FINDS says.
SANITIZER = """#!/usr/bin/env bash
[[ $* == *"-c import"* ]] && exit "${REFUSES:-0}"
[[ " $FINDS " == *" $2 "* ]] && exit 9
exit 0
"""


def script(folder, *options, deadline=None, tool=True, **environment):
    """Exit code, and what it noted of each stage."""
    text = SUITE.read_text()
    assert "deadline=115" in text
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "suite.sh").write_text(text.replace("deadline=115", f"deadline={deadline or 115}"))
    for name, stub in {"python": STUB, "compute-sanitizer": SANITIZER}.items():
        (folder / name).write_text(stub)
        (folder / name).chmod(0o755 if tool or name == "python" else 0o644)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    given = {"MISSING": "", "ENDS": "", "FINDS": "", **environment, "PATH": path, "PYTHON": str(folder / "python")}
    command = ["bash", folder / "benchmarks" / "suite.sh", folder / "out", *options]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=50)
    notes = folder / "out" / "notes"
    lines = notes.read_text().splitlines() if notes.exists() else []
    return done.returncode, [line.rsplit(" ", 1)[0] if line[-1].isdigit() else line for line in lines]


FIRST = ["parity triton done", "build done", "parity cuda done", "first triton cuda done"]
TIMES = ["tests done", "tests, last line 9 passed", *(f"{name} triton cuda done" for name in ("dense", "step", "ops"))]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def test_the_order_of_stages(tmp_path):
    assert script(tmp_path) == (0, [*FIRST, *TIMES, *(f"{tool} done" for tool in TOOLS)])


def test_first_stops_after_the_first_numbers(tmp_path):
    assert script(tmp_path, "--first") == (0, FIRST)


def test_first_ends_in_time_and_a_stage_cut_off_is_no_fault(tmp_path):
    code, notes = script(tmp_path, "--first", deadline=3, ENDS="parity_cuda=hang")
    assert code == 0
    assert notes == [*FIRST[:2], "parity cuda cut off: 3 s are over", "first triton cut off: 3 s are over"]


@pytest.mark.parametrize("code", [1, 3, 134])
def test_a_fault_is_the_exit_code_and_the_rest_goes_on(tmp_path, code):
    """A backend that is wrong is still measured where it is right; one that loses the device is not."""
    found, notes = script(tmp_path, "--first", ENDS=f"parity_triton={code}")
    assert found == 1
    assert notes == [
        f"parity triton FAULT: exit code {code}", *FIRST[1:3], f"first {'triton cuda' if code == 1 else 'cuda'} done"
    ]  # fmt: skip


def test_what_a_machine_lacks_is_skipped_and_said(tmp_path):
    code, notes = script(tmp_path, tool=False, MISSING="pytest setuptools")
    assert code == 0
    assert "build skipped: no setuptools" in notes
    assert [note for note in notes if note.startswith("tests")] == ["tests skipped: no pytest"]
    assert [note.split(" ", 1)[0] for note in notes if "skipped: compute-sanitizer" in note] == [*TOOLS]


def test_what_compute_sanitizer_finds_is_a_fault(tmp_path):
    code, notes = script(tmp_path, FINDS="racecheck")
    assert code == 1
    assert [note for note in notes if "FAULT" in note] == ["racecheck FAULT: compute-sanitizer found something"]


def test_a_device_that_compute_sanitizer_refuses_is_no_fault(tmp_path):
    code, notes = script(tmp_path, REFUSES="1")
    assert code == 0
    assert sum("skipped: compute-sanitizer" in note for note in notes) == 4


def test_without_a_gpu_the_script_says_so_and_leaves(tmp_path):
    assert script(tmp_path, MISSING="torch; torch.zeros(1, device='cuda')") == (2, [])
