"""csrc/cpu as setup.py builds it, under GCC's sanitizers, and the programs of tests/sanitizers; kept in build/."""

import os
import shlex
import subprocess
import sys

import emulator

SOURCES = emulator.ROOT / "tests" / "sanitizers"
FLAGS = {
    "address": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}  # first in a process that is not built with it
# What is too large is a null pointer, as it is without a sanitizer. Python keeps what it allocates. How the threads of
# PyTorch wait for one another the thread sanitizer does not see.
OPTIONS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0",
    "TSAN_OPTIONS": "allocator_may_return_null=1:halt_on_error=1:ignore_noninstrumented_modules=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compiler():
    return shlex.split(os.environ.get("CXX", "c++"))


def library(kind):
    """The library; that for the thread sanitizer has the OpenMP of tests/sanitizers/openmp.cpp in it."""
    flags = FLAGS[kind]

    def build(target):
        last = list(flags)  # after setup.py's
        if kind == "thread":
            runtime = target.parents[2] / "openmp.o"
            own = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
            compile_one("openmp.cpp", runtime, kind, *own, "-c")
            last.append(f"-Wl,{runtime}")  # of the linker alone
        script = f'exec {shlex.join(compiler())} "$@" {shlex.join(last)}'
        folder = target.parents[2]
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
        asked = {"CXX": shlex.join(["sh", "-c", script, "sh"]), "DBMTL_BUILD_NATIVE": "1", "DBMTL_CUDA": ""}
        subprocess.run(command, check=True, cwd=emulator.ROOT, env=os.environ | asked)

    return emulator.cached(
        f"{kind}-sanitizer", "dbmtl_kernels/lib/libdbmtl_cpu.so", build, [*compiler(), *flags], SOURCES / "openmp.cpp"
    )


def compile_one(source, target, kind, *more):
    """A program, or what ``more`` flags ask for; kind None is without a sanitizer."""
    include = f"-I{emulator.ROOT / 'csrc' / 'include'}"
    command = [*compiler(), "-std=c++17", include, *FLAGS.get(kind, ["-O1"]), *more, SOURCES / source, "-o", target]
    subprocess.run(command, check=True)


def run(command, preload=None, **environment):
    """A process under the options; with the runtime of a sanitizer first if it is another's program."""
    if preload is not None:
        where = [*compiler(), f"-print-file-name={RUNTIME[preload]}"]
        environment["LD_PRELOAD"] = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    environment = os.environ | OPTIONS | environment
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=emulator.ROOT)
