"""What the compiler makes of every Triton kernel, with no GPU: for sm_90, and in CI for sm_80 and sm_100 too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the first compiles every kernel

ARCHITECTURES = (80, 90, 100) if os.environ.get("CI") else (90,)
# Where an input's addresses or sizes rule out 128-bit accesses.
SCALAR = ("dense, odd P", "accumulate, unaligned row")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}


@pytest.fixture(scope="session")
def compiled():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "DBMTL_"))}
    script = Path(__file__).parents[1] / "support" / "codegen.py"
    command = [sys.executable, str(script), *map(str, ARCHITECTURES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def reports(compiled):
    return compiled["reports"]


def wide(access):
    return ".v4.b32" in access or ".v2.b64" in access or access.endswith(" 16")


def count(report, kind, width=None):
    """Accesses of a kind, 128 bits wide or not."""
    return sum(n for access, n in report["accesses"].items() if kind in access and width in (None, wide(access)))


def test_every_kernel_stays_in_registers_and_fuses_nothing(compiled, reports):
    assert {(r["kernel"], r["arch"]) for r in reports} == {(k, a) for k in compiled["kernels"] for a in ARCHITECTURES}
    assert len(compiled["kernels"]) == 6
    for report in reports:
        where = report["case"], report["kernel"], report["arch"]
        assert report["registers"] <= report["limit"], where
        assert report["stack"] == count(report, ".local") == 0, where  # where spilled registers would be
        assert report["fused"] == 0, where  # state must have the bits of the CPU kernels
        assert report["flushed"] == 0, where  # subnormals stay
        assert report["address64"], where


def test_the_main_path_moves_128_bits_at_a_time(reports):
    """Gradients and rows are what is loaded with evict_first, or copied asynchronously for the Gramian."""
    for report in reports:
        case, kernel, stores = report["case"], report["kernel"], count(report, "st.global", True)
        if case in SCALAR:  # a vector access there would be a misaligned address
            assert stores == 0, case
            assert kernel == "accumulate_kernel" or count(report, "evict_first", True) == 0, case
        elif kernel == "gramian_kernel":
            assert count(report, "cp.async", True) > 0, case
            assert count(report, "ld.global") == 0, case
        elif kernel == "accumulate_kernel" and "mixed" not in case:
            # Whole blocks, gradients aligned and not; a parameter's tail and unaligned gradients go one by one.
            grad = case.split()[1].strip(",")
            state, elements = "bf16" if "bf16 state" in case else "fp64" if grad == "fp64" else "fp32", 1024 // 128
            assert count(report, "evict_first", True) == elements * BITS[grad] // 128, case
            assert stores == 2 * elements * BITS[state] // 128, case
        elif kernel != "add_gramians_kernel":
            assert count(report, "evict_first", True) > 0, case
            assert stores > 0, case
            if kernel != "accumulate_kernel":
                assert count(report, "evict_first", False) == 0, case
                # What else is stored one number at a time: sums, weights, counters, never a row.
                assert count(report, "st.global", False) <= 7, (case, report["accesses"])


def test_barriers_release_and_acquire_in_the_right_order(reports):
    """All threads of a program have stored before it counts itself in; others' stores are read past L1."""
    for report in reports:
        case, kernel, events, waits = report["case"], report["kernel"], report["events"], report["cooperative"]
        assert waits == (kernel == "balance_kernel" and case != "dense, two launches"), case
        arrivals = [i for i, event in enumerate(events) if event == "atom.global.gpu.acq_rel.add.u32"]
        assert len(arrivals) == (waits or kernel in ("accumulate_kernel", "balance_rows_kernel")), case
        for arrival in arrivals:
            before = [event for event in events[:arrival] if event in ("st.global", "bar.sync")]
            assert before[-1] == "bar.sync", case
            after = events[arrival + 1 :]
            assert after[0] == "bar.sync"
            assert ("ld.global.gpu.acquire" in after) == waits
            if waits:
                releases = ("atom.global.gpu.release.add.u32", "red.global.gpu.release.add.u32")  # by Triton's version
                assert any(event in after for event in releases)
                opened = len(after) - after[::-1].index("ld.global.gpu.acquire")
                assert after[opened] == "bar.sync"
                assert "ld.global.cg" not in events[: arrival + 1 + opened]
            if kernel != "balance_rows_kernel":
                assert "ld.global.cg" in after


def test_the_driver_is_asked_what_is_resident(compiled):
    """Of the loaded function, with its threads and bytes of shared memory."""
    assert {(name, function) for name, function, _, _ in compiled["asked"]} == {
        ("cuOccupancyMaxActiveBlocksPerMultiprocessor", 77)
    }
    assert {threads for _, _, threads, _ in compiled["asked"]} == {128, 256}
    assert all(0 < shared <= 100 << 10 for _, _, _, shared in compiled["asked"])


def test_a_layout_compiles_a_handful_of_kernels(compiled):
    """12 steps in which every number changes, gradients of two dtypes, parameters of five sizes."""
    made = {name: n for name, n in compiled["specialisations"].items() if n}
    assert made == {"balance_kernel": 1, "accumulate_kernel": 2, "balance_rows_kernel": 1}
