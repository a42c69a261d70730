"""Builds csrc/cpu, and csrc/cuda if DBMTL_CUDA=1 asks for it, into dbmtl_kernels/lib/. Never imports torch.

csrc/cpu needs a C++17 compiler. Without one the package still installs, says so, and runs on its eager backend.
csrc/cuda needs nvcc >= 12.4. Each file is said as it is done; pip shows that with -v only.

Environment: CXX and CUDACXX are the compilers. DBMTL_BUILD_NATIVE: 0 skips csrc/cpu, 1 makes its failure an error.
DBMTL_CUDA_ARCHS: "80;90;100", say, or "all" that have a form of their own and nvcc knows; by default those of the cards
present, 90 where there is none.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

# No contraction: a fused multiply-add on one instruction set only would change its bits.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]
# Files compiled for one instruction set; the library picks one at run time.
X86 = {
    "kernels_avx2": ["-mavx2", "-mf16c"],
    "kernels_avx512": [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mf16c", "-Wno-maybe-uninitialized"],
}
# -fmad=false for the same reason.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
INCLUDE = ["-Icsrc", "-Icsrc/include"]
LIBRARIES = ("cpu", "cuda")
OLDEST_CUDA = (12, 4)
NO_CARD_ARCH = "90"
# Those whose float64 is slow want code of their own: docs/backends.md, "Sums of squares".
ALL_ARCHS = ("80", "86", "89", "90", "100", "103", "120")


def say(message: str) -> None:
    print(f"dbmtl_kernels: {message}", file=sys.stderr, flush=True)


def switch(name: str) -> bool | None:
    """Of 1, 0 and unset in the environment."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return bool(int(value)) if value else None


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(commands: dict[str, list[str]]) -> list[str]:
    """The object files, in the order of the sources; as many compile at once as there are cores."""
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # By name backwards: kernels_*.cpp take longest.
        jobs = {pool.submit(run, *commands[source]): source for source in sorted(commands, reverse=True)}
        for count, job in enumerate(as_completed(jobs), 1):
            job.result()
            say(f"{jobs[job]} compiled, {count} of {len(jobs)} files, {time.monotonic() - began:.0f} s")
    return [command[-1] for command in commands.values()]


def has_openmp(compiler: list[str], folder: str) -> bool:
    probe = Path(folder, "probe.cpp")
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        run(*compiler, "-fopenmp", str(probe), "-o", str(Path(folder, "probe")))
    except subprocess.CalledProcessError:
        say("this compiler has no OpenMP: the CPU kernels will use one thread.")
        return False
    return True


def build_cpu(sources: list[str], target: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as folder:
        openmp = ["-fopenmp"] if has_openmp(compiler, folder) else []
        flags = [*FLAGS, *openmp, *INCLUDE, *(["-DDBMTL_X86"] if x86 else [])]
        commands = {}
        for source in sources:
            name = Path(source).stem
            if name not in X86 or x86:
                made = str(Path(folder, f"{name}.o"))
                commands[source] = [*compiler, *flags, *X86.get(name, []), "-c", source, "-o", made]
        run(*compiler, "-shared", *openmp, *compile_all(commands), "-o", str(target))


def cuda_archs(compiler: list[str]) -> list[str]:
    """As asked for, else those of the cards present."""
    archs = re.findall(r"\w+", os.environ.get("DBMTL_CUDA_ARCHS", "").replace("sm_", ""))
    if archs == ["all"]:
        known = re.findall(r"compute_(\d+)", printed(*compiler, "--list-gpu-arch"))
        return [arch for arch in ALL_ARCHS if arch in known]
    if archs:
        return archs
    try:
        found = re.findall(r"(\d+)\.(\d)", printed("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"))
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not found:
        say(f"no card is here: the CUDA kernels are compiled for sm_{NO_CARD_ARCH}; DBMTL_CUDA_ARCHS chooses others.")
    return sorted({major + minor for major, minor in found}, key=int) or [NO_CARD_ARCH]


def build_cuda(sources: list[str], target: Path) -> None:
    compiler = shlex.split(os.environ.get("CUDACXX", "nvcc"))
    needed = f"DBMTL_CUDA=1 needs nvcc >= {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} (or set CUDACXX)"
    try:
        release = re.search(r"release (\d+)\.(\d+)", printed(*compiler, "--version"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{needed}: {error}") from error
    if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
        raise SystemExit(f"{needed}: {compiler[0]} is of CUDA {'.'.join(release.groups()) if release else 'unknown'}")
    archs = cuda_archs(compiler)
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for what comes after
    flags = [*CUDA_FLAGS, *INCLUDE, *(word for one in targets for word in ("-gencode", one))]
    say(f"compiling the CUDA kernels for {', '.join(f'sm_{arch}' for arch in archs)}")
    with tempfile.TemporaryDirectory() as folder:
        made = {source: str(Path(folder, f"{Path(source).stem}.o")) for source in sources}
        objects = compile_all({s: [*compiler, *flags, "-c", s, "-o", o] for s, o in made.items()})
        run(*compiler, "-shared", "-cudart", "static", *objects, "-o", str(target))


class BuildLibraries(build_ext):
    def run(self) -> None:
        for name in LIBRARIES:  # an earlier build's must not pass for this one's, which may be left out
            file = self.get_ext_filename(f"dbmtl_kernels.lib.libdbmtl_{name}")
            for folder in (self.build_lib, *(["python"] if self.inplace else [])):
                Path(folder, file).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dylib" if sys.platform == "darwin" else ".so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("cuda"):
            build_cuda(ext.sources, target)
            return
        wanted = switch("DBMTL_BUILD_NATIVE")
        if wanted is False:
            say("DBMTL_BUILD_NATIVE=0: the native CPU kernels are not built; the eager backend will serve.")
            return
        try:
            build_cpu(ext.sources, target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted:
                raise
            say(
                f"the native CPU kernels were NOT built ({error}). dbmtl_kernels installs all the same and runs on its "
                "eager backend; for the kernels, install a C++17 compiler (or set CXX) and install again, with pip's "
                "--no-cache-dir --force-reinstall --no-deps: pip may have kept the wheel without them."
            )


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Of this platform if a library was built. No Python symbols: one binary serves every Python and torch."""
        build = self.get_finalized_command("build_ext")
        built = [Path(build.get_ext_fullpath(one.name)).exists() for one in extensions]
        self.root_is_pure = not any(built)
        return "py3", "none", super().get_tag()[2] if any(built) else "any"


def library(name: str, pattern: str, optional: bool) -> Extension:
    folder = Path("csrc", name)
    headers = [
        *folder.glob("*.h"),
        *folder.glob("*.cuh"),
        *Path("csrc/common").glob("*.h"),
        Path("csrc/include/dbmtl.h"),
    ]
    return Extension(
        f"dbmtl_kernels.lib.libdbmtl_{name}",
        sources=[str(path) for path in sorted(folder.glob(pattern))],
        depends=[str(path) for path in headers],
        optional=optional,
    )


def long_description() -> str:
    """README.md as an index shows it: what it finds in the tree by a path has an address at this version's tag."""
    project = Path("pyproject.toml").read_text("utf-8")
    version, home = (re.search(f'^{key} = "(.+)"$', project, re.MULTILINE)[1] for key in ("version", "Repository"))

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if re.search(r"\.(png|svg|jpe?g|gif)$", found[2]) else "blob"
        return f"{found[1]}{home}/{kind}/v{version}/{found[2]}"

    # Every other piece is code, which stays as it is.
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`)", Path("README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [re.sub(r"(\]\(|(?:src|href)=\")(?![\w+.-]+:|#)([^)\"\s]+)", absolute, text) for text in pieces[::2]]
    return "".join(pieces)


extensions = [library("cpu", "*.cpp", optional=True)]
if switch("DBMTL_CUDA"):
    extensions.append(library("cuda", "*.cu", optional=False))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
