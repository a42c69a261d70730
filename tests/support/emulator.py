"""The CUDA kernels of csrc/cuda compiled for this CPU (tests/cuda/emulation.h), loaded as the `cuda` backend."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Werror"]
# Every block has the shared memory of its own CUDA threads' system thread; CUDA's own pragmas mean nothing here.
EXTRA = ["-Wno-unknown-pragmas", "-Wno-unused-function", "-DDBMTL_EMULATED"]


def traffic(library):
    """Bytes of rows, gradients and results read and written since the last call, and accesses of 128 bits."""
    numbers = (ctypes.c_int64 * 3)()
    library.emulated_traffic(numbers)
    return tuple(numbers)


def build(folder):
    """The library, made in ``folder``."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{ROOT / path}" for path in ("csrc", "csrc/include", "csrc/cuda", "tests/cuda")]
    running, objects = [], []
    for source in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cuda/emulation.cpp"]:
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, "-x", "c++", *FLAGS, *EXTRA, *includes, "-c", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command))
    assert all(process.wait() == 0 for process in running)
    library = Path(folder, "libdbmtl_cuda_emulated.so")
    subprocess.run([*compiler, "-shared", *objects, "-o", str(library), "-lpthread"], check=True)
    return library
