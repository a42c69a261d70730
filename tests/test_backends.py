"""Which backend serves, what is said when it cannot, and a package that was installed without a compiler."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels import backends
from dbmtl_kernels.backends import eager, native

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("DBMTL_BACKEND", raising=False)
    backends.clear_cache()
    native._load.cache_clear()
    yield
    backends.clear_cache()
    native._load.cache_clear()


def without_library(monkeypatch, tmp_path, content=None):
    path = tmp_path / "libdbmtl_cpu.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native, "library_path", lambda: path)


def test_cpu_is_served_by_the_kernels():
    assert backends.resolve("auto", CPU) is native
    assert backends.resolve("native", CPU) is native
    assert backends.resolve("eager", CPU) is eager
    assert backends.resolve("auto", torch.device("meta")) is eager
    assert native.isa() in ("avx512", "avx2", "baseline")


def test_environment(monkeypatch):
    monkeypatch.setenv("DBMTL_BACKEND", "eager")
    assert backends.resolve("auto", CPU) is eager
    assert backends.resolve("native", CPU) is native
    monkeypatch.setenv("DBMTL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="DBMTL_BACKEND=nonsense"):
        dbk.balance_(torch.ones(2, 2), torch.zeros(2, 2))


def test_native_refuses_other_devices():
    with pytest.raises(RuntimeError, match=r"backend='native'.*'meta'.*CPU tensors only"):
        backends.resolve("native", torch.device("meta"))


@pytest.mark.parametrize(("content", "reason"), [(None, "was not built.*compiler"), (b"junk", "could not be loaded")])
def test_without_the_library(monkeypatch, tmp_path, content, reason):
    without_library(monkeypatch, tmp_path, content)
    grads = torch.randn(3, 40)
    with pytest.warns(RuntimeWarning, match=reason):
        grad, _ = dbk.balance_(grads, torch.zeros(3, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        dbk.balance_(grads, torch.zeros(3, 40))
    torch.testing.assert_close(grad, dbk.reference.balance(grads, torch.zeros(3, 40))[0])
    with pytest.raises(RuntimeError, match=f"backend='native'.*{reason}"):
        dbk.balance_(grads, torch.zeros(3, 40), backend="native")
    with pytest.raises(RuntimeError, match=reason):
        dbk.DBMTL([torch.zeros(3, requires_grad=True)], 2, backend="native")
    with pytest.raises(RuntimeError, match=reason):
        native.isa()


def test_an_old_library(monkeypatch):
    monkeypatch.setattr(native.abi, "ABI_VERSION", 99)
    assert "ABI version 3, this package needs 99" in native.missing(CPU)


def test_report():
    lines = subprocess.run([sys.executable, "-m", "dbmtl_kernels"], capture_output=True, text=True, check=True).stdout
    assert "native" in lines
    assert "will be used" in lines
    assert "eager: works, not used unless asked for" in lines
    if not torch.cuda.is_available():
        assert "triton (balance_ in 1 launch: interpreted): works" in lines
        plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        lines = subprocess.run(
            [sys.executable, "-m", "dbmtl_kernels"], capture_output=True, text=True, check=True, env=plain
        ).stdout
        assert "triton: not available: it serves CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1" in lines


def test_importing_is_light():
    code = "import sys, dbmtl_kernels; print(*[m for m in ('triton', 'matplotlib', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before = "import sys, torch; print(*[m for m in ('triton', 'matplotlib', 'scipy') if m in sys.modules])"
    base = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True).stdout
    assert out == base


def test_building_without_a_compiler_succeeds_and_says_so(tmp_path):
    """Runs setup.py itself, with a compiler that does not exist, and with one that cannot compile."""
    root = Path(__file__).parent.parent
    stale = tmp_path / "dbmtl_kernels" / "lib" / native.library_path().name
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    for compiler in ("no-such-compiler", "false"):
        build = subprocess.run(
            [
                sys.executable,
                "setup.py",
                "build_ext",
                "--build-lib",
                str(tmp_path),
                "--build-temp",
                str(tmp_path),
            ],
            cwd=root,
            env={**os.environ, "CXX": compiler, "CUDACXX": compiler},
            capture_output=True,
            text=True,
        )
        assert build.returncode == 0, build.stderr
        assert "NOT built" in build.stdout + build.stderr
        assert not list(tmp_path.rglob("*.so"))
