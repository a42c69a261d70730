"""What the compiler makes of every Triton kernel, with no GPU: for sm_90, and in CI for four more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dbmtl_kernels.backends.triton.tuning import TABLE

pytestmark = pytest.mark.slow  # the first compiles every kernel

PAIRS = (89, 103)  # squares are summed as pairs of fp32 numbers
ARCHITECTURES = (80, 89, 90, 100, 103) if os.environ.get("CI") else (90,)
# Where an input's addresses or sizes rule out 128-bit accesses.
SCALAR = (
    "dense, odd P", "dense bf16, odd P", "combine, odd P", "combine bf16, odd P", "accumulate, unaligned row",
)  # fmt: skip
# Two dtypes, of which the narrower moves 64 bits; and 16 bits beside 64, which move 32.
NARROW = ("dense bf16", "rows fp32, bf16 state", "rows mixed, scaled, partial")
READS = "any_nonzero_kernel"  # a block or so, one number at a time
NARROWER = ("combine bf16 to fp64", "combine fp64 to bf16", "rows bf16 to all")
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


def bits(access):
    """How many a thread moves, as far as it matters: 128, 64 or fewer."""
    if ".v4.b32" in access or ".v2.b64" in access or access.endswith(" 16"):
        return 128
    return 64 if ".v2.b32" in access else 32


def count(report, kind, *widths):
    """Accesses of a kind, of any of these widths."""
    return sum(
        n for access, n in report["accesses"].items() if kind in access and (not widths or bits(access) in widths)
    )


def test_every_kernel_fuses_and_flushes_nothing(compiled, reports):
    assert {(r["kernel"], r["arch"]) for r in reports} == {(k, a) for k in compiled["kernels"] for a in ARCHITECTURES}
    assert len(compiled["kernels"]) == 7
    phase_two = [r for r in reports if r["case"] == "dense, two launches"][1::2]
    for report in reports:
        where = case, kernel, arch = report["case"], report["kernel"], report["arch"]
        # State must have the bits of the CPU kernels. Squares as pairs are fused, each once: of a dense tile; of each
        # dtype of gradients, aligned and not, in whole blocks and the rest.
        sums = {"balance_kernel": report not in phase_two, "accumulate_kernel": 8 if "mixed" in case else 4}
        if arch in PAIRS and "fp64" not in case and sums.get(kernel):
            elements = max(8, report["elements"])  # the compiler makes one of equal rests
            assert 0 < report["fused"] <= elements * sums[kernel], where
            assert report["fused"] % elements == 0, where
        else:
            assert report["fused"] == 0, where
        assert report["flushed"] == 0, where  # subnormals stay
        assert report["address64"], where


# Instructions and slow ones (fp64 and conversions) an element, at most: of a loop that updates a row, and of one that
# adds up four rows.
BOUNDS = {"update": (17, 2.7), "update in pairs": (30, 1.6), "combine": (6.3, 0.13), "fp64": (24, 5.7)}


def check_line(report):
    """That a line of the tuning table fits on a multiprocessor, and has in flight what it says."""
    line = f"the line {report['line']} of backends/triton/tuning.py ({report['case']}, sm_{report['arch']})"
    assert report["registers"] <= report["limit"], f"{line} takes {report['registers']} registers"
    assert report["stack"] == count(report, ".local") == 0, f"{line} spills {report['stack']} bytes"
    assert report["threads"] * report["limit"] <= 65536, f"{line} asks for more registers than there are"
    for loop in report["loops"]:
        found = loop["in_flight"] * report["threads"] // 1024
        assert found >= report["claimed"], f"{line} has {found} KB in flight in a loop that {loop['kind']}s"


def test_every_line_of_the_tuning_table_holds(reports):
    for report in reports:
        check_line(report)
    lines = {report["line"].split("Tuning")[1] for report in reports}
    used = {repr(line.tuning).removeprefix("Tuning") for line in TABLE}
    assert len(ARCHITECTURES) == 1 or lines == used  # no line is left out


def test_a_line_that_spills_or_claims_too_much_is_named(compiled):
    """The line of fp32 gradients with 32 registers, and with 1,000 KB in flight."""
    for report, reason in zip(compiled["doctored"], ("spills [0-9]+ bytes", "has [0-9]+ KB in flight"), strict=True):
        with pytest.raises(AssertionError, match=rf"the line 'accumulate'.* \(accumulate fp32, sm_[0-9]+\) {reason}"):
            check_line(report)


def test_instructions_of_an_element(reports):
    phase_two = [r for r in reports if r["case"] == "dense, two launches"][1::2]
    for report in reports:
        case, kernel = report["case"], report["kernel"]
        kinds = [loop["kind"] for loop in report["loops"]]
        if case in SCALAR or "gramian" in kernel or kernel == READS:
            assert kinds == [], case
            continue
        if kernel == "balance_kernel":
            expected = ["update", "combine"]
            assert kinds == (expected if case != "dense, two launches" else [expected[report in phase_two]]), case
        elif kernel == "accumulate_kernel":
            assert kinds == ["update"] * (2 if "mixed" in case else 1), case
        elif case not in NARROWER:
            assert kinds == ["combine"] * (3 if "mixed" in case else 1), case
        for loop in report["loops"]:
            kind = loop["kind"]
            if "fp64" in case:
                kind = "fp64"
            elif kind == "update" and report["arch"] in PAIRS:
                kind = "update in pairs"
            instructions, slow = BOUNDS[kind]
            assert loop["instructions"] <= instructions, (case, report["arch"], loop)
            assert loop["slow"] <= slow, (case, report["arch"], loop)


def test_the_main_path_moves_128_bits_at_a_time(reports):
    """Gradients and rows are what is loaded with evict_first, or copied asynchronously for the Gramian.

    Of two dtypes the wider one; the narrower one moves 64 bits, so that a warp's accesses to both are one stretch.
    """
    for report in reports:
        case, kernel, stores = report["case"], report["kernel"], count(report, "st.global", 128)
        if case in SCALAR:  # a vector access there would be a misaligned address
            assert stores == 0, case
            assert kernel == "accumulate_kernel" or count(report, "evict_first", 128) == 0, case
        elif kernel == "gramian_kernel":
            assert count(report, "cp.async", 128) > 0, case
            assert count(report, "ld.global") == 0, case
        elif case.startswith("sum"):
            assert stores == 0, case
            assert count(report, "ld.global", 128) > 0, case
        elif kernel == "accumulate_kernel" and "mixed" not in case:
            # Whole blocks, gradients aligned and not; a parameter's tail and unaligned gradients go one by one.
            grad = case.split()[1].strip(",")
            row = BITS["bf16" if "bf16 state" in case else "fp64" if grad == "fp64" else "fp32"]
            grad, widest = BITS[grad], max(BITS[grad], row)
            elements = 16 if widest == 16 else 8
            assert count(report, "evict_first", 128 * grad // widest) == elements * widest // 128, case
            assert count(report, "evict_first", 128, 64) == elements * widest // 128, case
            assert count(report, "st.global", 128 * row // widest) == 2 * elements * widest // 128, case
        elif kernel == READS:
            assert stores == 0, case
            assert count(report, "st.global") == 0, case  # what it found goes by an atomic, the same to all threads
        elif kernel != "add_gramians_kernel" and case not in NARROWER:
            assert count(report, "evict_first", 128) > 0 or case == "rows fp32, bf16 state", case
            assert stores > 0, case
            assert (count(report, "global", 64) > 0) == (case in NARROW or "mixed" in case), case
            if kernel != "accumulate_kernel":
                assert count(report, "evict_first", 32) == 0, case
                # What else is stored one number at a time: sums, weights, counters, never a row.
                assert count(report, "st.global", 32) <= 7, (case, report["accesses"])


def test_barriers_release_and_acquire_in_the_right_order(reports):
    """All threads of a program have stored before it counts itself in; others' stores are read past L1."""
    for report in reports:
        case, kernel, events, waits = report["case"], report["kernel"], report["events"], report["cooperative"]
        assert waits == (kernel == "balance_kernel" and case != "dense, two launches"), case
        arrivals = [i for i, event in enumerate(events) if event == "atom.global.gpu.acq_rel.add.u32"]
        adds = "update" in [loop["kind"] for loop in report["loops"]] or "accumulate_kernel" in kernel or waits
        assert len(arrivals) == (adds or kernel == "balance_rows_kernel"), case
        for arrival in arrivals:
            before = [event for event in events[:arrival] if event in ("st.global", "bar.sync")]
            assert before[-1] == "bar.sync", case
            after = events[arrival + 1 :]
            assert after[0] == "bar.sync"
            assert ("ld.global.cg" in after) == adds  # the last program adds up the others' slots
            assert "ld.global.cg" not in events[:arrival]
            assert ("ld.global.gpu.acquire" in after) == waits
            if waits:
                assert events[0] == "ld.global.gpu.acquire"  # how often it had opened, before anyone can open it
                releases = ("atom.global.gpu.release.add.u32", "red.global.gpu.release.add.u32")  # by Triton's version
                release = next(i for i, event in enumerate(after) if event in releases)
                written = len(after[:release]) - 1 - after[:release][::-1].index("st.global")
                assert after.index("ld.global.cg") < written < after.index("bar.sync", written) < release
                opened = len(after) - after[::-1].index("ld.global.gpu.acquire")
                assert after[opened] == "bar.sync"
                # Weights and rows of phase two are read after that, none before.
                assert after.index("ld.global") > opened
                assert not {"ld.global.cg", "st.global"} & set(after[release:opened])


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
