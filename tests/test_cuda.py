"""The CUDA C++ kernels: emulated on this CPU against the native ones, and what nvcc made of them.

That their numbers are right is tested beside the other backends (test_balance, test_ops, test_rounding, ...).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import dbmtl_kernels as dbk
import emulator
import numpy as np
import pytest
import torch
import triton
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import abi, cuda

CPU = torch.device("cpu")
NVCC = shutil.which("nvcc")
# Registers a thread at most, and static shared memory, by kernel; nothing may spill or lie in local memory. 512 threads
# of the dense op have 128 registers, two blocks of 256 threads of the others as many.
RESOURCES = {
    "balance_kernel": (128, 1024), "accumulate_kernel": (128, 2048), "rows_kernel": (128, 8192),
    "gramian_kernel": (128, 37000),
}  # fmt: skip


# --- emulated -----------------------------------------------------------------------------------------------------


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("size", [1, 8, 4097, 12288, 70000])
def test_the_dense_op_has_the_bits_of_the_native_backend(size, backend):
    """Up to 24,000 columns of fp32 all tiles stay in shared memory, beyond that only some."""
    for grad, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2):
        for beta, seed in ((0.9, None), (0.0, None), (0.5, 7)):
            seed = seed if state == torch.bfloat16 else None
            grads, ema = torch.randn(3, size).to(grad), torch.randn(3, size).to(state)
            other = ema.clone()
            out, norms = dbk.balance_(grads, ema, beta, backend=backend, seed=seed)
            expected, exact = dbk.balance_(grads, other, beta, backend="native", seed=seed)
            same_bits(ema, other)
            torch.testing.assert_close(norms, exact, rtol=1e-7, atol=0)
            torch.testing.assert_close(out, expected, rtol=2**-7 if grad == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("num_tasks", "megabytes", "state"),
    [*((k, 25, torch.float32) for k in (1, 2, 3, 5, 8, 11, 16, 64)), (3, 30, torch.float32), (5, 25, torch.bfloat16)],
)
@pytest.mark.usefixtures("emulated_cuda")
def test_what_fits_on_an_h200_moves_once(num_tasks, megabytes, state, monkeypatch):
    """3 K P + P elements: 4 of its 132 multiprocessors, with their part of the columns."""
    size = megabytes * 10**6 // (num_tasks * state.itemsize) // 33 // 8 * 8
    read, written = moved(monkeypatch, num_tasks, size, state, multiprocessors=4)
    assert (read, written) == (2 * num_tasks * size, (num_tasks + 1) * size)


@pytest.mark.usefixtures("emulated_cuda")
def test_24_mb_on_all_of_an_h200_move_once_and_40_mb_in_part_twice(monkeypatch):
    size = 2_000_000
    assert moved(monkeypatch, 3, size, torch.float32, multiprocessors=132) == (6 * size, 4 * size)
    size = 40_000_000 // 12 // 33 // 8 * 8
    read, written = moved(monkeypatch, 3, size, torch.float32, multiprocessors=4)
    assert 6.5 * size < read < 7.5 * size
    assert written == 4 * size


def moved(monkeypatch, num_tasks, size, dtype, multiprocessors):
    """Elements read and written by the dense op on some multiprocessors of an H200."""
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", str(227 * 1024))
    grads, ema = torch.randn(num_tasks, size).to(dtype), torch.zeros(num_tasks, size, dtype=dtype)
    emulator.traffic(cuda._library())
    dbk.balance_(grads, ema, backend="cuda")
    read, written, _ = emulator.traffic(cuda._library())
    return read // dtype.itemsize, written // dtype.itemsize


@pytest.mark.parametrize("shared", ["40000", "100000", "150000"])
@pytest.mark.parametrize("num_tasks", [1, 8, 16])
@pytest.mark.usefixtures("emulated_cuda")
def test_tiles_kept_in_part(num_tasks, shared, monkeypatch):
    """All, some or none of a tile's tasks in shared memory."""
    monkeypatch.setenv("DBMTL_EMULATED_SHARED_BYTES", shared)
    for state in (torch.float32, torch.bfloat16):
        grads, ema = torch.randn(num_tasks, 20000), torch.randn(num_tasks, 20000).to(state)
        other = ema.clone()
        out, _ = dbk.balance_(grads, ema, 0.9, backend="cuda")
        expected, _ = dbk.balance_(grads, other, 0.9, backend="native")
        same_bits(ema, other)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("emulated_cuda")
def test_a_device_that_says_nothing_and_a_gradient_that_is_not_there(monkeypatch):
    rows, sums = torch.ones(2, 64), torch.ones(2, 1, dtype=torch.float64)
    for row, sumsq, name in zip(rows, sums, ("cuda", "native"), strict=True):
        ops.accumulate_(row, sumsq, [None], torch.tensor([[0, 64]]), 0.0, -1.0, torch.tensor(float("nan")), None, name)
        assert (row == 0).all()
        assert sumsq == 0
    same_bits(rows[0], rows[1])
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", "0")
    with pytest.raises(RuntimeError, match="does not say what it is"):
        dbk.balance_(torch.ones(2, 4), torch.ones(2, 4), backend="cuda")


@pytest.mark.parametrize("multiprocessors", ["1", "2", "5"])
@pytest.mark.usefixtures("emulated_cuda")
def test_any_number_of_blocks_meet(multiprocessors, monkeypatch):
    monkeypatch.setenv("DBMTL_EMULATED_MULTIPROCESSORS", multiprocessors)
    grads = torch.randn(4, 50000)
    expected, _ = dbk.balance_(grads, torch.zeros(4, 50000), 0.5, backend="native")
    for _ in range(3):  # the counters come back to zero
        out, _ = dbk.balance_(grads, torch.zeros(4, 50000), 0.5, backend="cuda")
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ops.gramian(grads, "cuda"), ops.gramian(grads, "native"), rtol=1e-5, atol=1e-2)
    counters = next(iter(cuda._workspaces.values()))[:16].view(torch.int32)
    assert counters[[0, 2, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("large", ["0", "1"])
@pytest.mark.usefixtures("emulated_cuda")
def test_pointer_lists_of_any_length(large, monkeypatch):
    """125 gradients a launch, or 1,021 where the driver takes 32 KB of arguments; all launches count."""
    monkeypatch.setenv("DBMTL_EMULATED_LARGE_ARGUMENTS", large)
    rng = np.random.default_rng(0)
    for count in (0, 1, 124, 126, 1002, 2100):
        sizes = rng.integers(0, 40, count)
        starts = np.cumsum([0, *(-(-sizes // 32) * 32)])
        segments = torch.tensor(np.stack([starts[:-1], sizes], axis=1).reshape(-1, 2))
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        grads = [torch.randn(int(n)).to(dtypes[i % 4]) for i, n in enumerate(sizes)]
        rows = torch.ones(2, int(starts[-1]))
        sums = torch.full((2, 1), 5.0, dtype=torch.float64)
        for row, sumsq, name in zip(rows, sums, ("cuda", "native"), strict=True):
            ops.accumulate_(row, sumsq, grads, segments, 0.9, 0.1, torch.tensor(4.0), None, name)
        same_bits(rows[0], rows[1])
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)


@pytest.mark.usefixtures("emulated_cuda")
def test_misaligned_addresses_take_the_slow_path():
    segments = torch.tensor([[1, 1000], [1004, 999], [2048, 4096]])
    store = torch.randn(3, 4097)
    for shift in (0, 1):
        grads = [store[i, shift : shift + n] for i, n in enumerate((1000, 999, 4096))]
        rows, sums = torch.ones(2, 6144), torch.zeros(2, 1, dtype=torch.float64)
        for row, sumsq, name in zip(rows, sums, ("cuda", "native"), strict=True):
            ops.accumulate_(row, sumsq, grads, segments, 0.5, 2.0, None, None, name)
        same_bits(rows[0], rows[1])
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)
    ema = torch.zeros(8193)[1:].view(2, 4096)  # 4 bytes off
    out, _ = dbk.balance_(store[:2, 1:], ema, 0.0, backend="cuda")
    same_bits(ema, store[:2, 1:])
    torch.testing.assert_close(out, dbk.reference.balance(store[:2, 1:], ema, 0.0)[0])


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("emulated_cuda")
def test_the_gramian_loads_128_bits_where_rows_are_aligned(state):
    """And the same numbers one by one where they are not: the same bits, whatever the number of columns."""
    per_vector = 16 // state.itemsize
    for size in (1, 63, 64, 1000, 6401):
        values, found = torch.randn(5, size).to(state), []
        even = -(-size // 8) * 8
        for first, stride in ((0, even), (1, even), (0, even + 1), (per_vector, even + 16)):
            rows = torch.empty(5 * stride + 8, dtype=state)[first:].as_strided((5, size), (stride, 1)).copy_(values)
            emulator.traffic(cuda._library())
            found.append(ops.gramian(rows, "cuda"))
            read, written, vectors = emulator.traffic(cuda._library())
            aligned = (first % per_vector, stride % per_vector) == (0, 0)
            assert (read, written) == (values.nbytes, 0)
            assert vectors == (5 * (size // 64) * 64 // per_vector if aligned else 0)
        for gram in found:
            same_bits(gram, found[0])
        torch.testing.assert_close(found[0], ops.gramian(values, "native"), rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("emulated_cuda")
def test_the_emulation_refuses_a_misaligned_access_as_a_device_does():
    library, ones, out = cuda._library(), torch.ones(9), torch.zeros(2)
    space = torch.zeros(library.dbmtl_workspace_bytes(1), dtype=torch.uint8)
    off = (ones.data_ptr() + 2, 0, 4, 2)  # fp32 between two numbers
    status = library.dbmtl_combine(*off, 2, ones.data_ptr(), 0, out.data_ptr(), 0, 0, 0, space.data_ptr(), None)
    with pytest.raises(RuntimeError, match="misaligned"):
        cuda._check(status)


@pytest.mark.usefixtures("emulated_cuda")
def test_an_engine_step_on_the_cuda_backend():
    def run(name):
        torch.manual_seed(0)
        params = [torch.randn(n, requires_grad=True) for n in (1000, 7)]
        params.append(torch.randn(33, dtype=torch.bfloat16, requires_grad=True))
        balancer = dbk.DBMTL(params, 3, backend=name)
        assert balancer.buffer.early == (name == "native")
        for _ in range(3):
            for p in params:
                p.grad = None
            losses = [sum((p.float() - t).square().mean() for p in params) for t in range(3)]
            (balancer(losses) * 8).backward()
        return [p.grad for p in params], balancer.buffer.rows

    (ours, rows), (theirs, exact) = run("cuda"), run("native")
    torch.testing.assert_close(rows, exact, rtol=1e-6, atol=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


# --- what nvcc made of them -----------------------------------------------------------------------------------------


def dump(option):
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cuda.library_path()], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built():
    """By architecture and mangled kernel: (registers, stack, shared, local, SASS). Nothing where there is no nvcc."""
    found = {}
    if not cuda.library_path().exists():
        assert "was not built" in cuda.missing(torch.device("cuda"))
        pytest.skip("no nvcc here, so there is no GPU library to look at")
    arch = name = ""
    for line in dump("-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            name = match.group(1)
        elif "probe" not in name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            found[arch, name] = [*map(int, match.groups()), ""]
    for line in dump("-sass").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\S+)", line):
            name = match.group(1)
        elif "/*" in line and (arch, name) in found:
            found[arch, name][4] += line + "\n"
    return found


def kernel_of(name):
    return next(kernel for kernel in RESOURCES if kernel in name)


def test_every_kernel_is_built_for_every_architecture(built):
    asked = os.environ.get("DBMTL_CUDA_ARCHS", "80;90;100")
    known = subprocess.run(
        [NVCC or "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    architectures = {f"sm_{arch}" for arch in re.findall(r"\w+", asked)} & set(known)
    assert {arch for arch, _ in built} == architectures
    kinds = {(arch, kernel_of(name)) for arch, name in built}
    assert kinds == {(arch, kernel) for arch in architectures for kernel in RESOURCES}
    assert len(built) == len(architectures) * (20 + 8 + 3 + 3)
    assert re.search(r"sm_\d+\.ptx", dump("-lptx"))  # for what comes after


def test_resources_are_within_the_table(built):
    for (arch, name), (registers, stack, shared, local, sass) in built.items():
        most, memory = RESOURCES[kernel_of(name)]
        where = arch, name
        assert registers <= most, where
        assert shared <= memory + 1024, where  # of which sm_90 keeps 1 KB for itself
        assert stack == local == 0, where
        assert not re.search(r"\b(LDL|STL)\b", sass), where


def test_aligned_kernels_move_128_bits(built):
    for (arch, name), (*_, sass) in built.items():
        where = arch, name
        kernel = kernel_of(name)
        if kernel == "balance_kernel":
            aligned = re.search(r"Lb([01])ELb[01]E", name).group(1) == "1"
            wide = re.search(r"\b(LDG|STG)\.E\.[\w.]*128", sass) is not None
            assert wide == aligned, where
            if aligned:
                assert re.search(r"\bLDS\.128", sass), where  # tiles kept across the barrier
        else:
            assert re.search(r"\bLDG\.E\.[\w.]*128", sass), where
            assert re.search(r"\bSTG\.E\.[\w.]*128", sass) or kernel == "gramian_kernel", where  # stores K x K numbers


def test_blocks_meet_behind_fences(built):
    """A block's threads have come and a fence lies before it counts itself in; the barrier is polled."""
    for (arch, name), (*_, sass) in built.items():
        kernel = kernel_of(name)
        events = re.findall(r"\b(BAR\.SYNC|MEMBAR\.SC\.GPU|ATOMG?\.E\.ADD\.STRONG\.GPU|STRONG\.SYS)", sass)
        arrival = next(i for i, event in enumerate(events) if event.startswith("ATOM"))
        before, after = events[:arrival], events[arrival + 1 :]
        assert before[-1] == "MEMBAR.SC.GPU", (arch, name)
        assert "BAR.SYNC" in before, (arch, name)
        assert "MEMBAR.SC.GPU" in after, (arch, name)
        assert ("STRONG.SYS" in events) == (kernel == "balance_kernel"), (arch, name)
        if kernel != "rows_kernel":  # which has no slots
            assert re.search(r"LDG\.E\.64\.STRONG\.GPU", sass), (arch, name)


def test_products_are_not_fused_with_sums(built):
    """State must have the bits of the CPU kernels. The few FFMA are those of the division and the square root."""
    for (arch, name), (*_, sass) in built.items():
        assert len(re.findall(r"\bFFMA\b", sass)) <= 8, (arch, name)


def test_a_library_without_a_driver_says_so():
    """It loads; asking it for anything gives a status."""
    if not cuda.library_path().exists() or torch.cuda.is_available():
        pytest.skip("no nvcc here, so there is no GPU library, or there is a GPU")
    cuda._load.cache_clear()
    backends.clear_cache()
    reason = cuda.missing(torch.device("cuda"))
    assert "no CUDA device to run on" in reason
    assert cuda.missing(CPU) == "it serves CUDA tensors only"
    with pytest.raises(RuntimeError, match=r"backend='cuda'.*no CUDA device to run on"):
        backends.resolve("cuda", torch.device("cuda"))
    library = abi.load(cuda.library_path(), abi.SIGNATURES, "")
    ones = torch.ones(4)
    pointer = ones.data_ptr()
    assert library.dbmtl_combine(pointer, 0, 2, 2, 2, pointer, 0, pointer, 0, 0, 0, pointer, None) == 4
    with pytest.raises(RuntimeError, match="no CUDA device"):
        abi.check(library, 4, "cuda")
    assert (ones == 1).all()
