"""Builds csrc/cpu into dbmtl_kernels/lib/. Needs a C++17 compiler and nothing else; never imports torch.

Without a compiler the package still installs and says so: the eager backend then serves.
Environment: CXX picks the compiler; DBMTL_BUILD_NATIVE=0 skips the build, =1 makes its failure an error.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

CPU = Path("csrc/cpu")
COMMON = ["balance.cpp", "buffer.cpp", "dispatch.cpp", "kernels_baseline.cpp"]
# One translation unit per instruction set; the library picks one at run time.
X86 = {
    "kernels_avx2.cpp": ["-mavx2", "-mf16c"],
    "kernels_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mf16c",
        "-Wno-maybe-uninitialized",
    ],
}
# No contraction: a fused multiply-add on one instruction set only would change its bits.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]


class NativeLibrary(Extension):
    """A library for ctypes: no Python symbols, so one binary serves every Python and torch."""


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dylib" if sys.platform == "darwin" else ".so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an earlier build's must not pass for this one's
        wanted = os.environ.get("DBMTL_BUILD_NATIVE", "")
        if wanted == "0":
            self.say("DBMTL_BUILD_NATIVE=0: the native CPU kernels are not built; the eager backend will serve.")
            return
        try:
            self.compile_library(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            self.say(
                f"the native CPU kernels were NOT built ({error}). dbmtl_kernels installs all the same and runs on "
                "its eager backend; for the kernels, install a C++17 compiler (or set CXX) and install again."
            )

    def compile_library(self, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            openmp = self.openmp_flags(compiler, folder)
            sources: dict[str, list[str]] = {name: [] for name in COMMON}
            flags = [*FLAGS, *openmp, "-Icsrc/include", "-Icsrc"]
            if platform.machine().lower() in {"x86_64", "amd64"}:
                sources.update(X86)
                flags.append("-DDBMTL_X86")
            objects = []
            for name, extra in sources.items():
                objects.append(str(Path(folder, name).with_suffix(".o")))
                run([*compiler, *flags, *extra, "-c", str(CPU / name), "-o", objects[-1]])
            run([*compiler, "-shared", *openmp, *objects, "-o", str(target)])

    def openmp_flags(self, compiler: list[str], folder: str) -> list[str]:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        try:
            run([*compiler, "-fopenmp", str(probe), "-o", str(Path(folder, "probe"))])
        except subprocess.CalledProcessError:
            self.say("this compiler has no OpenMP: the CPU kernels will use one thread.")
            return []
        return ["-fopenmp"]

    def say(self, message: str) -> None:
        print(f"dbmtl_kernels: {message}", file=sys.stderr, flush=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


setup(
    ext_modules=[
        NativeLibrary(
            "dbmtl_kernels.lib.libdbmtl_cpu",
            sources=[str(p) for p in sorted(CPU.glob("*.cpp"))],
            depends=[str(p) for p in (*CPU.glob("*.h"), *Path("csrc/common").glob("*.h"), "csrc/include/dbmtl.h")],
            optional=True,  # there may be no compiler
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
