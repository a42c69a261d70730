"""The CUDA kernels of csrc/cuda, compiled for this CPU (tests/cuda/emulation.h) or by nvcc, and kept in build/."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from dbmtl_kernels import backends
from dbmtl_kernels.backends.c_library import cuda
from filelock import FileLock

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "build" / "tests"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Werror"]
# CUDA's own pragmas mean nothing here.
EXTRA = ["-Wno-unknown-pragmas", "-Wno-unused-function", "-DDBMTL_EMULATED"]


@contextmanager
def serving_cpu():
    """The `cuda` backend serves CPU tensors, with its kernels emulated."""
    before = cuda.path, cuda.serves
    cuda.path, cuda.serves = emulated_library(), "cpu"
    cuda.forget()
    backends.clear_cache()
    try:
        yield cuda
    finally:
        cuda.library().emulated_forget()
        cuda.path, cuda.serves = before
        cuda.forget()
        backends.clear_cache()


def traffic(library):
    """Bytes of rows, gradients and results read and written since the last call, accesses of 128 bits, sectors (of 32
    bytes, that each access of a warp touched), launches, and blocks and threads of the last of these."""
    numbers = (ctypes.c_int64 * 7)()
    library.emulated_traffic(numbers)
    return tuple(numbers)


def draws(library, blocks):
    """How often each block has asked for a tile since the last call."""
    numbers = (ctypes.c_int64 * blocks)()
    library.emulated_draws(numbers, ctypes.c_int64(blocks))
    return list(numbers)


def emulated_library():
    """For a CPU."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))

    def build(target):
        includes = [f"-I{ROOT / path}" for path in ("csrc", "csrc/include", "csrc/cuda", "tests/cuda")]
        running, objects = [], []
        for source in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cuda/emulation.cpp"]:
            objects.append(str(target.parent / f"{source.stem}.o"))
            command = [*compiler, "-x", "c++", *FLAGS, *EXTRA, *includes, "-c", str(source), "-o", objects[-1]]
            running.append(subprocess.Popen(command))
        assert [process.wait() for process in running] == [0] * len(running)
        subprocess.run([*compiler, "-shared", *objects, "-o", str(target), "-lpthread"], check=True)

    return cached("emulated", "libdbmtl_cuda.so", build, [*compiler, *FLAGS, *EXTRA])


def nvcc_library(architectures):
    """As setup.py builds it for ``architectures``; None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None

    def build(target):
        asked = {"DBMTL_CUDA": "1", "DBMTL_CUDA_ARCHS": ";".join(architectures)}
        into = ["--build-lib", str(target.parents[2]), "--build-temp", str(target.parents[2] / "temp")]
        command = [sys.executable, "setup.py", "build_ext", *into]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | asked)

    return cached("nvcc", "dbmtl_kernels/lib/libdbmtl_cuda.so", build, architectures)


def cached(kind, file, build, flags, *more):
    """Built once for its sources, and ``more`` of them, whatever the process or the run."""
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests" / "cuda").glob("*.*"), ROOT / "setup.py", *more]
    key = hashlib.sha256("\0".join(flags).encode())
    for path in sorted(sources):
        key.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    folder = CACHE / f"{kind}-{key.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            (fresh / file).parent.mkdir(parents=True)
            build(fresh / file)
            assert (fresh / file).exists()
            fresh.rename(folder)
    return folder / file
