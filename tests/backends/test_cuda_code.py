"""What nvcc makes of the CUDA C++ kernels: registers, spills, and SASS."""

import ctypes
import os
import re

import emulator
import pytest
import sass
import torch
from dbmtl_kernels.backends import c_library as c

ARCHITECTURES = ("80", "90", "100") if os.environ.get("CI") else ("90",)
# Registers a thread at most, and static shared memory, by kernel; nothing may spill or lie in local memory. 512 threads
# of the dense op have 128 registers, two blocks of 256 threads of the others as many.
RESOURCES = {
    "balance_kernel": (128, 1024), "accumulate_kernel": (128, 2048), "rows_kernel": (128, 8192),
    "gramian_kernel": (128, 37000),
}  # fmt: skip


@pytest.fixture(scope="module")
def library():
    path = emulator.nvcc_library(ARCHITECTURES)
    if path is None:
        pytest.skip("no nvcc here")
    return path


@pytest.fixture(scope="module")
def built(library):
    """By architecture and mangled kernel: (registers, stack, shared, local, SASS)."""
    found = {}
    arch = name = ""
    for line in sass.dump("-res-usage", library).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            name = match.group(1)
        elif "probe" not in name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            found[arch, name] = [*map(int, match.groups()), ""]
    for line in sass.dump("-sass", library).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\S+)", line):
            name = match.group(1)
        elif "/*" in line and (arch, name) in found:
            found[arch, name][4] += line + "\n"
    return found


def kernel_of(name):
    return next(kernel for kernel in RESOURCES if kernel in name)


def test_every_kernel_is_built_for_every_architecture(built, library):
    architectures = {f"sm_{arch}" for arch in ARCHITECTURES}
    kinds = {(arch, kernel_of(name)) for arch, name in built}
    assert kinds == {(arch, kernel) for arch in architectures for kernel in RESOURCES}
    assert len(built) == len(architectures) * (14 + 6 + 3 + 3)
    assert re.search(r"sm_\d+\.ptx", sass.dump("-lptx", library))  # for what comes after


def test_resources_are_within_the_table(built):
    for (arch, name), (registers, stack, shared, local, text) in built.items():
        most, memory = RESOURCES[kernel_of(name)]
        where = arch, name
        assert registers <= most, where
        assert shared <= memory + 1024, where  # of which sm_90 keeps 1 KB for itself
        assert stack == local == 0, where
        assert not re.search(r"\b(LDL|STL)\b", text), where


def test_aligned_kernels_move_128_bits(built):
    for (arch, name), (*_, text) in built.items():
        where = arch, name
        kernel = kernel_of(name)
        if kernel == "balance_kernel":
            aligned = int(re.search(r"Li(\d+)E", name).group(1)) > 1  # elements of a unit
            wide = re.search(r"\b(LDG|STG)\.E\.[\w.]*128", text) is not None
            assert wide == aligned, where
            if aligned:
                assert re.search(r"\bLDS\.128", text), where  # tiles cached across the barrier
        else:
            assert re.search(r"\bLDG\.E\.[\w.]*128", text), where
            assert re.search(r"\bSTG\.E\.[\w.]*128", text) or kernel == "gramian_kernel", where  # stores K x K numbers


def test_barriers_lie_behind_fences(built):
    """A block's threads have arrived and a fence lies before it counts itself in; the barrier is polled."""
    for (arch, name), (*_, text) in built.items():
        kernel = kernel_of(name)
        events = re.findall(r"\b(BAR\.SYNC|MEMBAR\.SC\.GPU|ATOMG?\.E\.ADD\.STRONG\.GPU|STRONG\.SYS)", text)
        arrival = next(i for i, event in enumerate(events) if event.startswith("ATOM"))
        before, after = events[:arrival], events[arrival + 1 :]
        assert before[-1] == "MEMBAR.SC.GPU", (arch, name)
        assert "BAR.SYNC" in before, (arch, name)
        assert "MEMBAR.SC.GPU" in after, (arch, name)
        assert ("STRONG.SYS" in events) == (kernel == "balance_kernel"), (arch, name)
        if kernel != "rows_kernel":  # which has no slots
            assert re.search(r"LDG\.E\.64\.STRONG\.GPU", text), (arch, name)


def test_products_are_not_fused_with_sums(built):
    """State must have the bits of the CPU kernels. The few FFMA are those of the division and the square root."""
    for (arch, name), (*_, text) in built.items():
        assert len(re.findall(r"\bFFMA\b", text)) <= 8, (arch, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
def test_a_library_without_a_driver_says_so(library):
    """It loads; asking it for anything gives a status."""
    alone = c.CLibrary("cuda", "libdbmtl_cuda", True, "")
    alone.path = library
    assert "no CUDA device to run on" in alone.missing(torch.device("cuda"))
    assert alone.missing(torch.device("cpu")) == "it serves CUDA tensors only"
    with pytest.raises(RuntimeError, match="no CUDA device to run on"):
        alone.library()
    ones, out = torch.ones(2, 2), torch.ones(2)
    args = c.CombineArgs(c._rows(ones), c._array(out), c._array(out), 0, c.Where(0, ones.data_ptr(), None))
    assert ctypes.CDLL(str(library)).dbmtl_combine(ctypes.byref(args)) == 4
    assert (out == 1).all()
