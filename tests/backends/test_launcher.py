"""Launching past Triton's bookkeeping: the same kernels, the same arguments; and what is done if the driver refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "stub.py"
POINTERS_LOOKED_AT = {"balance_kernel": ["grads", "ema", "out"]}


@pytest.fixture(scope="module")
def found():
    """Of a process without the interpreter."""
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DBMTL_TRITON_LAUNCHES")}
    command = [sys.executable, str(SCRIPT)]
    return json.loads(subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout)


def test_every_launch_is_what_triton_itself_would_launch(found):
    """Three times: compiled, found again, and of the dense op past the look at its arguments."""
    for case, (theirs, ours) in found["cases"].items():
        assert theirs, case
        assert ours == [theirs] * 3, case
    assert found["direct"] >= len(found["cases"])
    for case, forms in (("dense", [True]), ("dense, no cooperative launch", [False, False])):
        assert [cooperative for _, cooperative, *_ in found["cases"][case][0]] == forms
    compiled = [theirs[0][0] for theirs, _ in found["cases"].values()]
    assert len(set(compiled)) == len(compiled)  # no case is launched with what was compiled for another


def test_no_number_is_specialised_on(found):
    """What the launcher does not look at must not matter to Triton: numbers, how all but three pointers lie."""
    for kernel, parameters in found["parameters"].items():
        for name, unseen, annotation, alignment_unseen in parameters:
            assert unseen == bool(annotation), (kernel, name)
            if kernel in POINTERS_LOOKED_AT and not unseen:
                assert alignment_unseen == (name not in POINTERS_LOOKED_AT[kernel]), (kernel, name)


def test_a_cooperative_launch_that_the_driver_refuses_becomes_two_and_is_said_once(found):
    launched, (warning,) = found["refused"]
    assert launched == [True, *[False, False] * 3]
    assert "balance_ takes two launches on cpu" in warning
    assert "too many blocks in cooperative launch" in warning


def test_another_failure_is_raised(found):
    launched, told = found["failed"]
    assert launched == [True] * 3
    assert told == ["out of memory"] * 3
