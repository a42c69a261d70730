"""What the compiler makes of every Triton kernel, with no GPU: for sm_90, and in CI for sm_80 and sm_100 too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = (80, 90, 100) if os.environ.get("CI") else (90,)
# Where an input's addresses or sizes rule out 128-bit accesses.
SCALAR = ("dense, odd P", "accumulate, unaligned row")


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


def count(report, kind, select):
    return sum(n for access, n in report["accesses"].items() if kind in access and select(access))


def test_every_kernel_is_compiled(compiled, reports):
    assert {(r["kernel"], r["arch"]) for r in reports} == {(k, a) for k in compiled["kernels"] for a in ARCHITECTURES}
    assert len(compiled["kernels"]) == 6


def test_registers_stay_within_the_bound_and_nothing_goes_to_local_memory(reports):
    for report in reports:
        where = report["case"], report["kernel"], report["arch"]
        assert report["registers"] <= report["limit"], where
        assert report["stack"] == 0, where  # where spilled registers would be
        assert not any(".local" in access for access in report["accesses"]), where


def test_addresses_have_64_bits_and_products_are_not_fused(reports):
    for report in reports:
        assert report["address64"]
        assert report["fused"] == 0, report["case"]  # state must have the bits of the CPU kernels
        assert report["flushed"] == 0, report["case"]  # subnormals stay


def test_the_main_path_moves_128_bits_at_a_time(reports):
    """Gradients and rows are what is loaded with evict_first, or copied asynchronously for the Gramian."""
    for report in reports:
        case, kernel = report["case"], report["kernel"]
        if case in SCALAR or kernel == "add_gramians_kernel":
            continue
        if kernel == "gramian_kernel":
            assert count(report, "cp.async", wide) > 0, case
            assert count(report, "ld.global", lambda access: True) == 0, case
            continue
        assert count(report, "evict_first", wide) > 0, case
        assert count(report, "st.global", wide) > 0, case
        if kernel != "accumulate_kernel":
            assert count(report, "evict_first", lambda access: not wide(access)) == 0, case
            # What else is loaded or stored one number at a time: sums, weights, counters, never a row.
            assert count(report, "st.global", lambda access: not wide(access)) <= 7, (case, report["accesses"])


def test_gathering_is_vectorised_for_each_dtype(reports):
    """The tail of a parameter and unaligned gradients go one by one; whole blocks must not."""
    elements = 1024 // 128  # of a block, per thread
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}
    for report in reports:
        if report["kernel"] != "accumulate_kernel" or report["case"] in SCALAR or "mixed" in report["case"]:
            continue
        grad, state = report["case"].split()[1].strip(","), "bf16" if "bf16 state" in report["case"] else "fp32"
        state = "fp64" if grad == "fp64" else state
        assert count(report, "evict_first", wide) == elements * bits[grad] // 128, report["accesses"]
        stores = 2 * elements * bits[state] // 128  # gradients aligned, and not
        assert count(report, "st.global", wide) == stores, report["accesses"]


def test_what_cannot_be_aligned_is_not_taken_together(reports):
    """A vector access there would be a misaligned address."""
    for report in reports:
        if report["case"] in SCALAR:
            assert count(report, "st.global", wide) == 0
        if report["case"] == "dense, odd P":
            assert count(report, "evict_first", wide) == 0


def test_barriers_release_and_acquire_in_the_right_order(reports):
    """All threads of a program have stored before it counts itself in; others' stores are read past L1."""
    for report in reports:
        kernel, events = report["kernel"], report["events"]
        waits = report["cooperative"]
        arrivals = [i for i, event in enumerate(events) if event == "atom.global.gpu.acq_rel.add.u32"]
        assert len(arrivals) == (waits or kernel in ("accumulate_kernel", "balance_rows_kernel")), report["case"]
        for arrival in arrivals:
            before = [event for event in events[:arrival] if event in ("st.global", "bar.sync")]
            assert before[-1] == "bar.sync", report["case"]
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


def test_the_one_launch_form_alone_is_cooperative(compiled, reports):
    """And the driver is asked how much of it is resident: of its function, threads and bytes of shared memory."""
    one = [report for report in reports if report["kernel"] == "balance_kernel" and "two" not in report["case"]]
    assert [report for report in reports if report["cooperative"]] == one
    assert len(compiled["asked"]) > 0
    for name, function, threads, shared in compiled["asked"]:
        assert (name, function) == ("cuOccupancyMaxActiveBlocksPerMultiprocessor", 77)
        assert threads in (128, 256)
        assert 0 <= shared <= 100 << 10


def test_a_layout_compiles_a_handful_of_kernels(compiled):
    """12 steps in which every number changes, gradients of two dtypes, parameters of five sizes."""
    made = {name: n for name, n in compiled["specialisations"].items() if n}
    assert made == {"balance_kernel": 1, "accumulate_kernel": 2, "balance_rows_kernel": 1}
