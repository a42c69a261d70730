"""Builds csrc/cpu, and csrc/cuda where nvcc is, into dbmtl_kernels/lib/. Never imports torch.

csrc/cpu needs a C++17 compiler and nothing else, csrc/cuda an nvcc >= 12.4. Without them the package still installs and
says so: other backends then serve.
Environment: CXX and CUDACXX pick the compilers; DBMTL_BUILD_NATIVE and DBMTL_BUILD_CUDA: 0 skips a build, 1 makes its
failure an error; DBMTL_CUDA_ARCHS: "80;90;100" by default; PTX of the last serves what comes after.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")
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


# -fmad=false for the same reason.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90;100"
OLDEST_CUDA = (12, 4)


class NativeLibrary(Extension):
    """A library for ctypes: no Python symbols, so one binary serves every Python and torch."""


class BuildNative(build_ext):
    def run(self) -> None:
        if self.inplace:  # copied there afterwards, if there is anything to copy
            for ext in self.extensions:
                Path("python", self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dylib" if sys.platform == "darwin" else ".so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an earlier build's must not pass for this one's
        cuda = ext.name.endswith("cuda")
        variable = "DBMTL_BUILD_CUDA" if cuda else "DBMTL_BUILD_NATIVE"
        what, served = ("CUDA kernels", "triton") if cuda else ("native CPU kernels", "eager")
        wanted = os.environ.get(variable, "")
        if wanted == "0":
            self.say(f"{variable}=0: the {what} are not built; the {served} backend will serve.")
            return
        try:
            self.compile_cuda(target) if cuda else self.compile_library(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            tool = (
                f"nvcc >= {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} (or set CUDACXX)"
                if cuda
                else "a C++17 compiler (or set CXX)"
            )
            self.say(
                f"the {what} were NOT built ({error}). dbmtl_kernels installs all the same and runs on its {served} "
                f"backend; for the kernels, install {tool} and install again."
            )

    def compile_cuda(self, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CUDACXX", "nvcc"))
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", said)
        if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
            raise OSError(f"{compiler[0]} is of CUDA {release.group(1, 2) if release else 'an unknown version'}")
        known = subprocess.run(
            [*compiler, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout.split()
        asked = os.environ.get("DBMTL_CUDA_ARCHS", "")
        archs = re.findall(r"\w+", asked.replace("sm_", "")) or CUDA_ARCHS.split(";")
        # An older nvcc does not know the newest by default; what was asked for by name is nvcc's to refuse.
        archs = archs if asked.strip() else [a for a in archs if f"sm_{a}" in known]
        targets = [f"arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = [*CUDA_FLAGS, "-Icsrc", "-Icsrc/include", *(x for t in targets for x in ("-gencode", t))]
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            objects = {source: str(Path(folder, source.stem).with_suffix(".o")) for source in sorted(CUDA.glob("*.cu"))}
            commands = [[*compiler, *flags, "-c", str(source), "-o", made] for source, made in objects.items()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, commands))
            run([*compiler, "-shared", "-cudart", "static", *objects.values(), "-o", str(target)])

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


SHARED = [*Path("csrc/common").glob("*.h"), Path("csrc/include/dbmtl.h")]


def library(name: str, folder: Path, pattern: str) -> NativeLibrary:
    return NativeLibrary(
        f"dbmtl_kernels.lib.libdbmtl_{name}",
        sources=[str(p) for p in sorted(folder.glob(pattern))],
        depends=[str(p) for p in (*folder.glob("*.h"), *folder.glob("*.cuh"), *SHARED)],
        optional=True,  # there may be no compiler
    )


setup(
    ext_modules=[library("cpu", CPU, "*.cpp"), library("cuda", CUDA, "*.cu")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
