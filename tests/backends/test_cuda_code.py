"""What nvcc makes of the CUDA C++ kernels: registers, spills, and SASS."""

import ctypes
import os
import re
from typing import NamedTuple

import emulator
import pytest
import sass
import torch
from dbmtl_kernels.backends import c_library as c
from dbmtl_kernels.backends.c_library import cuda
from dbmtl_kernels.ops.arguments import check_accumulate

ARCHITECTURES = ("80", "86", "90", "100") if os.environ.get("CI") else ("86", "90")
PAIRS = ("sm_86",)  # squares are summed in pairs of floats there, as fp64 is slow
# Registers a thread at most, and static shared memory, by kernel; nothing may spill or lie in local memory. 512 threads
# of the dense op have 128 registers, two blocks of 256 threads of the others as many. The dense op asks for all shared
# memory but kOwnShared of csrc/cuda/runtime.h.
RESOURCES = {
    "balance_kernel": (128, 64), "accumulate_kernel": (128, 2048), "rows_kernel": (128, 8192),
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


def dtypes_of(name):
    """The dtype of a mangled kernel's rows, and elements of a unit (of the dense op alone)."""
    found = re.search(r"_kernelI((?:NS_\d(?:bf16|f16)E|S\d_|[fd])+)(?:Li(\d+))?E", name)
    return re.match(r"\w*?(bf16|f16|[fd])", found[1])[1], int(found[2] or 0)


def loads_of(loop, least=4):
    """Those of at least so many bytes."""
    return {one for one in loop.body if one.loads >= least}


def loaded(loop, least=4):
    """Bytes of a thread in one round, by such loads."""
    return sum(one.loads for one in loop.body if one.loads >= least)


class Main(NamedTuple):
    """A loop over whole tiles on aligned addresses, or all of the Gramian, and the elements of rows that it takes."""

    line: str
    loop: sass.Loop
    elements: int


def main_loops(name, text):
    """Phases one and two of the dense op; one for each dtype of the gradients that are gathered and of results of rows.

    Left out: tails, misaligned rows, and the one tile of a block of which a part is in shared memory. K is an argument
    of the kernels: with K = 3, three of the four rows that are loaded at once are there; 11 and 64 fill all.
    """
    kernel, (rows, _) = kernel_of(name), dtypes_of(name)
    code = sass.parse(text)
    if kernel == "gramian_kernel":
        return [Main("gramian_kernel", sass.Loop(code), 0)]
    size = {"d": 8, "f": 4, "bf16": 2}[rows]
    found = [x for x in sass.loops(code) if x.count("[FD]MUL2?") >= 8 and loaded(x, 8) >= 64]
    if kernel == "rows_kernel":
        return [Main(f"{kernel} {rows}", x, 4 * 32 // size) for x in found if not x.count("STG")]
    if kernel == "balance_kernel":
        (one,) = [x for x in found if x.count("STG")]
        two = min((x for x in found if not x.count("STG")), key=lambda x: x.count("LDS"))
        return [Main(f"{kernel} {rows} 1", one, 2 * 32 // size), Main(f"{kernel} {rows} 2", two, 4 * 32 // size)]
    forms = {}  # whole strides of a block come first, then the same with bounds
    for loop in sorted((x for x in found if loaded(x, 16)), key=lambda x: len(x.body)):
        loads = tuple(sorted(one.loads for one in loop.body if one.loads))
        forms.setdefault((loads, loop.count(r"F2F\.F32\.F64") > 0 or size == 8), []).append(loop)
    return [
        Main(f"{kernel} {rows}" + " of d" * wide, x, 64 // (8 if wide else 2 if size == 2 and sum(loads) == 128 else 4))
        for (loads, wide), loops in forms.items()
        for x in loops[: len(loops) // 2]
    ]


# Of each kernel and dtype of rows (of the dense op, phase; of what gathers fp64 gradients, too): KB of loads in flight
# on a multiprocessor, at least; instructions and slow ones (fp64 and its conversions) of a loop for an element of a
# row, at most, with squares in doubles and in pairs of floats. 3.35 TB/s need some 23 KB on each of 132 of them.
THREADS = {"balance_kernel": 512, "accumulate_kernel": 256, "rows_kernel": 256, "gramian_kernel": 256}
BLOCKS = {"balance_kernel": 1, "accumulate_kernel": 3, "rows_kernel": 2, "gramian_kernel": 2}
FIGURES = {
    "balance_kernel f 1": (48, (16.5, 2.5), (29.2, 0.32)),
    "balance_kernel f 2": (64, (5.3, 0), (5.2, 0)),
    "balance_kernel bf16 1": (64, (16.2, 2.25), (27.6, 0.22)),
    "balance_kernel bf16 2": (64, (6.2, 0), (6.1, 0)),
    "balance_kernel d 1": (64, (27.7, 5.25), (27.7, 5.25)),
    "balance_kernel d 2": (64, (10.4, 2.25), (10.4, 2.25)),
    "accumulate_kernel f": (72, (10.4, 2.07), (21.3, 0.32)),
    "accumulate_kernel f of d": (72, (12.4, 3.13), (24.3, 1.63)),
    "accumulate_kernel bf16": (72, (13.5, 2.07), (24.1, 0.32)),
    "accumulate_kernel bf16 of d": (60, (16.5, 3.13), (28.4, 1.63)),
    "accumulate_kernel d of d": (60, (16.7, 5.25), (16.0, 5.25)),
    "rows_kernel f": (64, (5.3, 0), (5.1, 0)),
    "rows_kernel bf16": (64, (5.5, 0), (5.1, 0)),
    "rows_kernel d": (64, (10.7, 2.25), (10.7, 2.25)),
    "gramian_kernel": (64, (0, 0), (0, 0)),
}


def in_flight(main, claimed, threads, blocks):
    """Whether a loop has as many KB in flight on a multiprocessor as its line claims."""
    found = main.loop.in_flight(loads_of(main.loop)) * threads * blocks / 1024
    assert found >= claimed, f"{main.line}: {found:.0f} KB in flight, {claimed} claimed"


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


def test_what_main_loops_store_is_whole_units(built):
    """16 bytes, or as many elements of the narrower dtype: a row of two dtypes, or of gradients that are wider."""
    for (arch, name), (*_, text) in built.items():
        kernel, (rows, unit) = kernel_of(name), dtypes_of(name)
        if kernel == "gramian_kernel" or unit == 1:
            continue
        size = {"d": 8, "f": 4, "bf16": 2}[rows]
        for main in main_loops(name, text):
            least = min(one.loads for one in loads_of(main.loop))
            narrower = rows == "bf16" or (rows == "f" and "of d" in main.line)
            expected = unit * size if kernel == "balance_kernel" else least if narrower else 16
            stored = [sass.num_bytes(one.name) for one in main.loop.body if one.name.startswith("STG.")]
            assert set(stored) <= {expected}, (arch, name, main.line, stored)
            update = kernel == "accumulate_kernel" or main.line.endswith(" 1")
            assert len(stored) * expected == update * main.elements * size, (arch, name, main.line)


def test_bytes_in_flight_and_instructions_are_within_the_figures(built):
    lines = set()
    for (arch, name), (registers, *_, text) in built.items():
        kernel, (_, unit) = kernel_of(name), dtypes_of(name)
        if unit == 1:
            continue  # misaligned
        threads, blocks = THREADS[kernel], BLOCKS[kernel]
        assert 65536 // (-(-registers // 8) * 8 * threads) >= blocks, (arch, name)
        for main in main_loops(name, text):
            lines.add(main.line)
            kilobytes, *bounds = FIGURES[main.line]
            in_flight(main, kilobytes, threads, blocks)
            if main.elements:
                instructions, slow = bounds[arch in PAIRS]
                assert len(main.loop.body) / main.elements <= instructions, (arch, name, main.line)
                assert main.loop.slow / main.elements <= slow, (arch, name, main.line)
    assert lines == set(FIGURES)


def test_a_claim_that_the_code_does_not_keep_is_named(built):
    name, (*_, text) = next((n, x) for (_, n), x in built.items() if "rows_kernelIf" in n)
    with pytest.raises(AssertionError, match="rows_kernel f: 64 KB in flight, 65 claimed"):
        in_flight(main_loops(name, text)[0], 65, THREADS["rows_kernel"], BLOCKS["rows_kernel"])


@pytest.mark.usefixtures("emulated_cuda")
def test_the_blocks_of_the_figures_are_launched(monkeypatch):
    """On one multiprocessor, for sizes that need more."""
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "1")
    row, size, sumsq = torch.ones(2, 1 << 16), 1 << 16, torch.zeros(1).double()
    given = torch.tensor([[0, size]]), (0.9, 0.1), None
    calls = {
        "balance_kernel": lambda: cuda.balance_(row, row.clone(), 0.9, 1e-8, "max", 0.0),
        "accumulate_kernel": lambda: cuda.accumulate_(
            row[0], sumsq, check_accumulate(row[0], sumsq, [row[1]], *given), *given
        ),
        "rows_kernel": lambda: cuda.combine_out(row, torch.ones(2), torch.empty(size), False),
        "gramian_kernel": lambda: cuda.gramian(row),
    }
    for kernel, call in calls.items():
        emulator.traffic(cuda.library())
        call()
        assert emulator.traffic(cuda.library())[4:] == (1, BLOCKS[kernel], THREADS[kernel])


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
        if (
            kernel == "balance_kernel"
        ):  # what other blocks wrote may be read then: nothing of it is left in the L1 cache
            found = re.findall(r"\b(STRONG\.SYS|MEMBAR\.SC\.GPU|CCTL\.IVALL|BAR\.SYNC)", text)
            polled = len(found) - found[::-1].index("STRONG.SYS")
            assert found[polled : polled + 3] == ["MEMBAR.SC.GPU", "CCTL.IVALL", "BAR.SYNC"], (arch, name)
        if kernel != "rows_kernel":  # which has no slots
            assert re.search(r"LDG\.E\.64\.STRONG\.GPU", text), (arch, name)


def test_products_are_not_fused_with_sums(built):
    """State must have the bits of the CPU kernels. The few FFMA are those of the division and the square root; in pairs
    of floats, one for the error of each square."""
    for (arch, name), (*_, text) in built.items():
        if arch not in PAIRS or kernel_of(name) in ("rows_kernel", "gramian_kernel") or dtypes_of(name)[0] == "d":
            assert len(re.findall(r"\bFFMA\b", text)) <= 8, (arch, name)
        elif dtypes_of(name)[1] != 1:
            for main in main_loops(name, text):
                squares = main.elements if main.loop.count("STG") else 0
                assert main.loop.count("FFMA") == squares, (arch, name, main.line)


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
    array = c.Array(*c._array(out))
    args = c.CombineArgs(c.Rows(*c._rows(ones)), array, array, 0, c.Where(0, ones.data_ptr(), None))
    assert ctypes.CDLL(str(library)).dbmtl_combine(ctypes.byref(args)) == 4
    assert (out == 1).all()
