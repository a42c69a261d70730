"""The stages of ../gpu_suite.sh: each has its time, and none depends on how another ended.

Both GPU backends are tested and watched; `cuda` is "not available" where its library could not be built.
Writes to OUT_DIR: results.json, results.csv and figure.png (benchmarks), pytest.log, sanitizer.log, suite.log (build,
benchmarks, figure) and environment.json (the machine, the versions, how each stage ended).

Exit code: 0, 1 if a stage failed or a target was missed, 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import environment

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FILES = ("results.json", "results.csv", "figure.png", "pytest.log", "sanitizer.log", "suite.log", "environment.json")
DRY = "DBMTL_GPU_SUITE_DRY"
UNSET = (  # they change what is run
    "TRITON_INTERPRET", "DBMTL_BACKEND", "DBMTL_TRITON_LAUNCHES", "DBMTL_TEST_DEVICE", "DBMTL_TEST_BACKEND",
    "DBMTL_BUILD_CUDA", DRY,
)  # fmt: skip
# Seconds; the tests and the sanitizer share theirs. With the pauses for what must be killed, under eight minutes.
BUILD, TEST, BENCHMARK, FIGURE = 90, 190, 160, 20
# Of each backend's tests, at once: Triton compiles kernels, which takes most of its time, and one core.
PARTS = {"triton": 7, "cuda": 2}
# Without torch's cache every tensor is an allocation of its own: what lies beyond its end is seen.
TOOLS: dict[str, dict[str, str]] = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
CUDA_LIBRARY = ROOT / "python" / "dbmtl_kernels" / "lib" / "libdbmtl_cuda.so"
COMPLETE = "every kernel ran"


class Stage(NamedTuple):
    """How one ended. "not available" and "skipped" are neither success nor failure."""

    stage: str
    status: str
    exit_code: int | None
    seconds: float
    remark: str


class Running:
    """A command in a process group of its own, writing to a log."""

    every: list[Running] = []  # noqa: RUF012

    def __init__(self, command: list[str], log: Path, seconds: float, **changes: str) -> None:
        self.log = log
        self._stopped = False
        self.began = time.monotonic()
        self._end = self.began + seconds
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        settings = {**kept, "PYTHONPATH": "python", "PYTHONUNBUFFERED": "1", **changes}
        self._file = log.open("a")
        print("$", *command, file=self._file, flush=True)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True
        )
        Running.every.append(self)

    def wait(self) -> tuple[str, int]:
        """Its status and exit code; stopped when its time is over."""
        status = "timed out"
        try:
            code = self._process.wait(max(0.1, self._end - time.monotonic()))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code = 124
        self.stop()
        return status, code

    def stop(self) -> None:
        """End it, and whatever it started; once, as its number may be another's later."""
        if self._stopped:
            return
        self._stopped = True
        for number, patience in ((signal.SIGTERM, 4.0), (signal.SIGKILL, 1.0)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(patience)
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                pass
        self._file.close()

    def ended(self, name: str) -> Stage:
        """Wait, and say how it ended."""
        status, code = self.wait()
        lines = self.log.read_text(errors="replace").splitlines()
        return Stage(name, status, code, round(time.monotonic() - self.began, 1), lines[-1][:300] if lines else "")


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def build_settings() -> dict[str, str]:
    """For setup.py: code for the GPU that is here and no other, which is soon compiled."""
    found = {"DBMTL_BUILD_NATIVE": "1"}
    nvcc = tool("nvcc")
    if nvcc and "CUDACXX" not in os.environ:
        found["CUDACXX"] = nvcc
    capability = environment.said_by("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    if re.fullmatch(r"\d+\.\d", capability):
        found["DBMTL_CUDA_ARCHS"] = capability.replace(".", "")
    return found


def built(stage: Stage, log: str) -> Stage:
    """What the build's exit code does not say: whether the CUDA kernels were built, as a compiler may be missing."""
    if stage.status != "passed" or "CUDA kernels were NOT built" not in log:
        return stage
    left = "an earlier build's is used" if CUDA_LIBRARY.exists() else "there is none"
    return stage._replace(remark=f"{CUDA_LIBRARY.name} was not built, {left}")


def together(name: str, found: list[Stage]) -> Stage:
    """One stage of the parts that the tests were run in; it is as good as the worst."""
    # Where every test was skipped, pytest is content.
    found = [s if re.search(r"\d passed", s.remark) or s.exit_code else s._replace(status="failed") for s in found]
    worst = next((stage for stage in found if stage.status != "passed"), found[0])
    remark = " | ".join(s.remark.strip("= ") for s in found)
    return worst._replace(stage=name, seconds=max(s.seconds for s in found), remark=remark)


def watched(tool: str, stage: Stage, log: str) -> Stage:
    """What the sanitizer's exit code does not say: whether it could watch at all, and whether all was watched."""
    if "Device not supported" in log:
        return stage._replace(status="not available", remark="compute-sanitizer: Device not supported")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    remark = summaries[-1] if summaries else "no summary"
    if stage.status == "passed" and (COMPLETE not in log or not summaries):
        return stage._replace(status="failed", remark=f"incomplete: {remark}")
    return stage._replace(remark=remark)


class Suite:
    """Runs the stages one after another, and remembers how they ended.

    Args:
        folder: OUT_DIR.
        work: for what is put together later.
        dry: try the benchmarks on a CPU.
    """

    def __init__(self, folder: Path, work: Path, dry: bool) -> None:
        self.folder = folder
        self.work = work
        self.dry = dry
        self.python = os.path.abspath(shutil.which(os.environ.get("PYTHON", "")) or sys.executable)
        self.stages: list[Stage] = []

    def ended(self, *stages: Stage) -> None:
        """Note, and say, how stages ended."""
        for stage in stages:
            self.stages.append(stage)
            print(f"{stage.stage:22s} {stage.status:14s} {stage.seconds:6.1f} s  {stage.remark}", flush=True)

    def run(self) -> int:
        """All of it."""
        log = self.folder / "suite.log"
        if self.dry:
            self.ended(*(Stage(n, "skipped", None, 0.0, "dry run") for n in ("build", "tests", "sanitizer")))
        else:
            build = [self.python, "setup.py", "build_ext", "--inplace"]
            stage = Running(build, log, BUILD, **build_settings()).ended("build")
            self.ended(built(stage, log.read_text(errors="replace")))
            self.test_and_sanitize()
        benchmarks = [self.python, str(HERE / "run.py"), str(self.folder), *(["--dry-run"] if self.dry else [])]
        stage = Running(benchmarks, log, BENCHMARK).ended("benchmarks")
        self.ended(stage._replace(status="targets missed") if stage.exit_code == 3 else stage)
        self.ended(Running([self.python, str(HERE / "figure.py"), str(self.folder)], log, FIGURE).ended("figure"))
        return int(any(s.status not in ("passed", "not available", "skipped") for s in self.stages))

    def test_and_sanitize(self) -> None:
        """The tests in parts, and both tools of the sanitizer, for each backend that is here: all at once."""
        backends = [name for name in PARTS if name != "cuda" or CUDA_LIBRARY.exists()]
        parts = {name: self._tests(name) for name in backends}
        watching = {name: self._sanitizers(name) for name in backends if tool("compute-sanitizer")}
        for backend in PARTS:
            if backend in parts:
                name = f"tests {backend}"
                self.ended(together(name, [running.ended(name) for running in parts[backend]]))
            else:
                self.ended(Stage(f"tests {backend}", "not available", None, 0.0, f"{CUDA_LIBRARY.name} was not built"))
        self._join("pytest.log", [running for backend in parts.values() for running in backend])
        for backend in PARTS:
            for name in TOOLS:
                stage = f"sanitizer {backend} {name}"
                if backend in watching:
                    running = watching[backend][name]
                    self.ended(watched(name, running.ended(stage), running.log.read_text(errors="replace")))
                elif backend in parts:
                    remark = "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
                    self.ended(Stage(stage, "not available", None, 0.0, remark))
                else:
                    self.ended(Stage(stage, "not available", None, 0.0, f"{CUDA_LIBRARY.name} was not built"))
        self._join("sanitizer.log", [running for backend in watching.values() for running in backend.values()])

    def _tests(self, backend: str) -> list[Running]:
        """Those that need a GPU, begun."""
        files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
        options = ["-p", "shard", "-p", "no:cacheprovider", "-m", "gpu", "-v", "-W", "default"]
        command = [self.python, "-m", "pytest", *options, "-o", "faulthandler_timeout=120"]
        settings = {
            "PYTHONPATH": f"python{os.pathsep}{HERE}", "OMP_NUM_THREADS": "2", "DBMTL_TEST_BACKEND": backend
        }  # fmt: skip
        return [
            Running(
                [*command, "--shard", f"{part}/{PARTS[backend]}", *files],
                self.work / f"pytest.{backend}.{part}", TEST, **settings,
            )
            for part in range(PARTS[backend])
        ]  # fmt: skip

    def _sanitizers(self, backend: str) -> dict[str, Running]:
        """Each tool watching sanitize.py, begun."""
        command = [str(tool("compute-sanitizer")), "--error-exitcode", "1", "--report-api-errors", "no"]
        script = [self.python, str(HERE / "sanitize.py")]
        return {
            name: Running(
                [*command, "--tool", name, *script], self.work / f"{backend}.{name}", TEST,
                DBMTL_TEST_BACKEND=backend, **changes,
            )
            for name, changes in TOOLS.items()
        }  # fmt: skip

    def _join(self, name: str, running: list[Running]) -> None:
        logs = [f"== {r.log.name}\n{r.log.read_text(errors='replace')}\n" for r in running]
        (self.folder / name).write_text("".join(logs) or "nothing was run\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--dry-run", action="store_true", default=os.environ.get(DRY) == "1")
    options = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"torch cannot be imported by {sys.executable}: {error}", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU here that torch can use; --dry-run tries the suite on a CPU", file=sys.stderr)
        return 2
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # what an earlier run left must not pass for this one's
        (folder / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as work:
        suite = Suite(folder, Path(work), options.dry_run)
        code = 1
        try:
            code = suite.run()
        finally:
            for running in Running.every:
                running.stop()
            command = " ".join(["bash benchmarks/gpu_suite.sh", *sys.argv[1:]])
            environment.write(folder, [stage._asdict() for stage in suite.stages], command)
    print(f"wrote {', '.join(p.name for p in sorted(folder.iterdir()))} to {folder}; exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
