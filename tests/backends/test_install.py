"""Wheels with and without libraries, and how to get them when pip has kept one without."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from dbmtl_kernels import __main__ as command
from dbmtl_kernels import backends
from dbmtl_kernels.backends.c_library import cuda, native

ROOT = Path(__file__).parents[2]
FAST = shlex.join(["sh", "-c", 'exec c++ "$@" -O0', "sh"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What setup.py needs, where nothing was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    left_out = shutil.ignore_patterns("*.so", "*.dylib", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "python", folder / "python", ignore=left_out)
    return folder


def run(arguments, cwd, **environment):
    clean = {"DBMTL_BUILD_NATIVE": "", "DBMTL_CUDA": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel(source, folder, **environment):
    """The tag in its name, the tag and the kind in its metadata, and its libraries."""
    run(["setup.py", "-q", "bdist_wheel", "--dist-dir", folder], source, **environment)
    (made,) = folder.iterdir()
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        said = archive.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert "dbmtl_kernels/backends/c_library.py" in names
    tag, pure = (re.search(f"^{key}: (.*)$", said, re.MULTILINE)[1] for key in ("Tag", "Root-Is-Purelib"))
    return (
        made.stem.split("-", 2)[2],
        tag,
        pure,
        [Path(name).name for name in names if re.search(r"\.(so|dylib)$", name)],
    )


@pytest.mark.parametrize("without", [{"DBMTL_BUILD_NATIVE": "0"}, {"CXX": "/bin/false"}])
def test_a_wheel_without_libraries_is_of_any_platform(without, source, tmp_path):
    stale = source / "build" / "lib" / "dbmtl_kernels" / "lib" / "libdbmtl_cuda.so"  # of an earlier build
    for folder in (stale.parent, *(p / "dbmtl_kernels" / "lib" for p in source.glob("build/lib.*"))):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stale.name).write_text("of an earlier build")
    assert wheel(source, tmp_path / "dist", **without) == ("py3-none-any", "py3-none-any", "true", [])


@pytest.mark.slow
def test_a_wheel_with_a_library_is_of_this_platform(source, tmp_path):
    name, tag, pure, libraries = wheel(source, tmp_path / "dist", CXX=FAST)
    assert re.fullmatch(r"py3-none-(?!any)\w+", name)
    assert (tag, pure, libraries) == (name, "false", [native.path.name])


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """Neither library was built."""
    for library in (native, cuda):
        monkeypatch.setattr(library, "path", tmp_path / library.path.name)
        library.forget()
    backends.clear_cache()
    yield
    monkeypatch.undo()
    native.forget()
    cuda.forget()
    backends.clear_cache()


def remedy(said):
    """What a message tells to run, less the source."""
    return re.search(r"(pip install --no-cache-dir --force-reinstall --no-deps) SOURCE, where SOURCE is ", said)[1]


@pytest.mark.usefixtures("missing")
def test_the_first_use_names_the_remedy():
    with pytest.warns(RuntimeWarning, match="install a C\\+\\+17 compiler .*using the slower eager backend") as warned:
        backends.resolve("auto", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="install a C\\+\\+17 compiler") as raised:
        backends.resolve("native", torch.device("cpu"))
    (line,) = (line for line in command.report() if "  native: not available" in line)
    assert "install a C++17 compiler" in line
    for said in (str(warned[0].message), str(raised.value), line, cuda.missing(torch.device("cuda"))):
        assert remedy(said)
    assert "DBMTL_CUDA=1 pip install" in cuda.missing(torch.device("cuda"))
    native.path.write_bytes(b"junk")
    native.forget()
    assert remedy(native.missing(torch.device("cpu")))


@pytest.mark.slow
def test_the_remedy_gets_what_pip_would_not_build_again(source, tmp_path):
    """Pip keeps a wheel under the address of the archive that it was built of, whatever its tag."""
    archive = tmp_path / "dist"
    run(["setup.py", "-q", "sdist", "--dist-dir", archive], source)
    index = ["--no-index", "--find-links", archive, "--no-build-isolation"]
    here = ["dbmtl-kernels", *index, "--target", tmp_path / "installed", "--upgrade"]

    def install(command, **environment):
        words = ["-m", *command.split(), *here]
        run(words, tmp_path, PIP_CACHE_DIR=str(tmp_path / "cache"), PIP_NO_CACHE_DIR="", **environment)
        return (tmp_path / "installed" / "dbmtl_kernels" / "lib" / native.path.name).exists()

    again = "pip install --force-reinstall --no-deps"
    assert not install(again, CXX="/bin/false")
    (kept,) = (tmp_path / "cache").rglob("*.whl")
    assert kept.name.endswith("py3-none-any.whl")
    assert not install(again, CXX=FAST)
    assert install(remedy(native._remedy), CXX=FAST)


NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_95\\n' ;;
*) echo "$@" >> "$LOG"; while [ $# -gt 1 ]; do shift; done; touch "$1" ;;
esac
"""


def test_all_kinds_of_cards_are_those_that_nvcc_knows(source, tmp_path):
    """Of a wheel that is made where no card is."""
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    asked = {"DBMTL_CUDA": "1", "DBMTL_CUDA_ARCHS": "all", "DBMTL_BUILD_NATIVE": "0", "LOG": str(tmp_path / "log")}
    build = ["setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    run(build, source, CUDACXX=str(tmp_path / "nvcc"), **asked)
    compiled = [line for line in (tmp_path / "log").read_text().splitlines() if " -c " in line]
    assert len(compiled) == len(list((source / "csrc" / "cuda").glob("*.cu")))
    for line in compiled:
        assert re.findall(r"code=(\w+)", line) == ["sm_80", "sm_90", "compute_90"]
