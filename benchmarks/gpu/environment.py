"""OUT_DIR/environment.json: the machine, the versions, and how every stage ended."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GPU_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,compute_mode,pstate"


def said_by(*command: str) -> str | None:
    """The first line that a command prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """What torch sees, and what nvidia-smi says; it is only asked, never told."""
    import torch

    values = (said_by("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader") or "").split(", ")
    asked = GPU_QUERY.split(",")
    found: dict[str, Any] = {"cuda": torch.version.cuda, "devices": torch.cuda.device_count()}
    found["nvidia-smi"] = dict(zip(asked, values, strict=True)) if len(values) == len(asked) else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["name"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
    return found


def nvcc() -> str | None:
    """Its release, if it is where the suite looks for it."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    try:
        done = subprocess.run([found or "nvcc", "--version"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if "release" in line), None)


def sources() -> str:
    """A digest of the package and its kernels, for a checkout that came without its .git."""
    digest = hashlib.sha256()
    kernels = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    for path in sorted([*(ROOT / "python" / "dbmtl_kernels").rglob("*.py"), *kernels]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write(folder: Path, stages: list[dict[str, Any]], command: str) -> None:
    """environment.json, with how each stage ended."""
    commit = said_by("git", "rev-parse", "HEAD")
    changed = said_by("bash", "-c", "git status --porcelain --untracked-files=no | wc -l") if commit else None
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "changed_files": changed,
        "sources": sources(),
        "gpu": gpu(),
        "nvcc": nvcc(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "pytest", "matplotlib")},
        "stages": stages,
    }
    (folder / "environment.json").write_text(json.dumps(content, indent=1) + "\n")
