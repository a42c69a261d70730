"""csrc/cpu under GCC's address, undefined and thread sanitizers: its tests, and random structs for its entry points."""

import re
import shutil
import sys

import emulator
import pytest
import sanitized
from dbmtl_kernels.backends import native

CASES = {"address": 10000, "thread": 3000}  # from each seed
SEEDS = (1, 2, 3)
TESTS = ("tests/backends/test_c_abi.py", "tests/ops/test_balance.py", "tests/ops/test_rows.py")
# Call with one number more than there is.
BEYOND = """
import ctypes, sys, torch
from pathlib import Path
from dbmtl_kernels.backends import c_library as c
c.native.path = Path(sys.argv[1])
rows = torch.ones(2, 1000)
claimed = c.Rows(rows.data_ptr(), 0, 1000, 2, 1000 + int(sys.argv[2]))
claimed.stride = claimed.num_params
gramian = torch.empty(2, 2)
args = c.GramianArgs(claimed, c.Array(*c._array(gramian)), c.Where(1))
c.native.check(c.native.library().dbmtl_gramian(ctypes.byref(args)))
print(gramian.tolist())
"""


def fuzz(program, library, on_gpu, seed, count):
    """Cases done, refused, and without memory, of so many."""
    done = sanitized.run([program, library, on_gpu, seed, count])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    counts = [int(n) for n in re.findall(r"[a-z] (\d+)", done.stdout)]
    assert sum(counts[:2]) + counts[3] <= count
    return counts[:3]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The program without a sanitizer."""
    target = tmp_path_factory.mktemp("fuzz") / "fuzz"
    sanitized.compile_one("fuzz.cpp", target, None, "-Wall", "-Wextra", "-Werror", "-ldl")
    return target


def test_random_structs(plain):
    done, refused, without_memory = fuzz(plain, native.path, 0, 1, 5000)
    assert min(done, refused, without_memory) > 1000


def test_random_structs_for_the_emulated_kernels(plain):
    done, refused, _ = fuzz(plain, emulator.emulated_library(), 1, 1, 500)
    assert min(done, refused) > 100


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", CASES)
class TestUnder:
    def test_random_structs(self, kind, tmp_path):
        sanitized.compile_one("fuzz.cpp", tmp_path / "fuzz", kind, "-ldl")
        for seed in SEEDS:
            done, refused, without_memory = fuzz(tmp_path / "fuzz", sanitized.library(kind), 0, seed, CASES[kind])
            assert min(done, refused) > CASES[kind] / 5
            assert kind == "thread" or without_memory > CASES[kind] / 5

    def test_tests(self, kind):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *TESTS]
        command += ["-k", "native and not (compile or triton or cuda)"]
        emulator.emulated_library()  # not to be compiled under a sanitizer
        environment = {"DBMTL_TEST_LIBRARY": str(sanitized.library(kind)), "OMP_NUM_THREADS": "3"}
        done = sanitized.run(command, preload=kind, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200

    def test_it_is_watched(self, kind, tmp_path):
        """What is wrong is found, and what is right is not."""
        if kind == "address":
            for more in (0, 1):
                library = sanitized.library(kind)
                done = sanitized.run([sys.executable, "-c", BEYOND, library, more], preload=kind, PYTHONMALLOC="malloc")
                assert ("heap-buffer-overflow" in done.stderr) == (more == 1), done.stderr
                assert (done.returncode == 0) == (more == 0)
            return
        own = [sanitized.SOURCES / "openmp.cpp", "-fopenmp"]
        sanitized.compile_one("races.cpp", tmp_path / "races", kind, *own)
        for how in ("none", "loop", "single", "barrier"):
            done = sanitized.run([tmp_path / "races", how])
            assert ("data race" in done.stderr) == (how != "none"), done.stderr
        assert sanitized.run([tmp_path / "races", "none"]).stdout == f"{4 * 4000 + 4000 * 3999 // 2}\n"


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
@pytest.mark.parametrize(
    ("machine", "isa"), [("Haswell", "avx2"), ("Haswell,-f16c", "baseline"), ("Haswell,-avx2", "baseline")]
)
def test_a_machine_that_hides_an_instruction_set_is_not_asked_for_it(machine, isa, plain):
    """The same cases, of halves too, on a processor that stops at an instruction that it does not tell of."""
    done = sanitized.run(["qemu-x86_64", "-cpu", machine, plain, native.path, 0, 1, 500])
    assert done.returncode == 0, done.stderr
    assert f"on {isa}" in done.stdout
