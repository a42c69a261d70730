"""Which backend serves, what is said when it cannot, and a package that was installed without a compiler."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import dbmtl_kernels as dbk
import pytest
import torch
from cases import new_stats, step_of
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import cuda, eager, native, triton

ROOT = Path(__file__).parents[2]
CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("DBMTL_BACKEND", raising=False)
    backends.clear_cache()
    yield
    monkeypatch.undo()
    backends.clear_cache()
    native.forget()


def test_cpu_is_served_by_the_kernels(monkeypatch):
    for name, device, served in (
        ("auto", CPU, native), ("native", CPU, native), ("eager", CPU, eager), ("auto", META, eager),
    ):  # fmt: skip
        assert backends.resolve(name, device) is served
    with pytest.raises(RuntimeError, match=r"backend='native'.*'meta'.*CPU tensors only"):
        backends.resolve("native", META)
    assert native.isa() in ("avx512", "avx2", "baseline")
    monkeypatch.setenv("DBMTL_BACKEND", "eager")
    assert backends.resolve("auto", CPU) is eager
    assert backends.resolve("native", CPU) is native
    monkeypatch.setenv("DBMTL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="DBMTL_BACKEND=nonsense"):
        dbk.balance_(torch.ones(2, 2), torch.zeros(2, 2))


def test_a_device_without_kernels_is_served_by_pytorch_and_told_so_once():
    with pytest.warns(RuntimeWarning, match="there are no kernels for mps tensors; using the slower eager backend"):
        assert backends.resolve("auto", torch.device("mps")) is eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", torch.device("mps")) is eager
        assert backends.resolve("eager", torch.device("xpu")) is eager  # asked for
        assert backends.resolve("auto", META) is eager  # nothing is computed there


@pytest.mark.parametrize(("content", "reason"), [(None, "was not built.*compiler"), (b"junk", "could not be loaded")])
def test_without_the_library(monkeypatch, tmp_path, content, reason):
    monkeypatch.setattr(native, "path", tmp_path / "libdbmtl_cpu.so")
    if content is not None:
        native.path.write_bytes(content)
    native.forget()
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


@pytest.fixture
def all_there(monkeypatch):
    """Every backend can serve CUDA tensors, as far as it is asked."""
    for name in backends.NAMES:
        monkeypatch.setattr(backends.get(name), "missing", lambda device: None)


@pytest.mark.usefixtures("all_there")
def test_auto_takes_the_first_backend_that_takes_so_many_tasks():
    assert backends.resolve("auto", CUDA) is triton
    assert [backends.resolve("auto", CUDA, n) for n in (1, 64, 65, 256)] == [triton, triton, cuda, cuda]
    assert backends.resolve("auto", CUDA, 64, gramian=True) is triton
    for many, gramian, reasons in (
        (257, False, "triton.*it takes at most 64 tasks, got 257.*cuda.*it takes at most 256 tasks, got 257"),
        (65, True, "triton.*its Gramian takes at most 64 tasks, got 65.*cuda.*its Gramian takes at most 64"),
    ):
        with pytest.warns(RuntimeWarning, match=f"{reasons}.*using the slower eager backend"):
            assert backends.resolve("auto", CUDA, many, gramian) is eager
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert backends.resolve("auto", CUDA, many, gramian) is eager
    assert backends.resolve("auto", CPU, 10**6) is native
    assert backends.resolve("auto", META, 10**6) is eager


@pytest.mark.usefixtures("all_there")
def test_a_backend_asked_for_by_name_names_its_limit(monkeypatch):
    for name, most, gramian in (("triton", 64, False), ("triton", 64, True), ("cuda", 256, False), ("cuda", 64, True)):
        assert backends.resolve(name, CUDA, most, gramian) is backends.get(name)
        message = f"asked for but it{'s Gramian' if gramian else ''} takes at most {most} tasks, got {most + 1}"
        with pytest.raises(ValueError, match=f"backend='{name}' was {message}"):
            backends.resolve(name, CUDA, most + 1, gramian)
        monkeypatch.setenv("DBMTL_BACKEND", name)
        with pytest.raises(ValueError, match=f"DBMTL_BACKEND={name} was {message}"):
            backends.resolve("auto", CUDA, most + 1, gramian)
        monkeypatch.delenv("DBMTL_BACKEND")
    for name in ("native", "eager"):
        assert backends.resolve(name, CUDA, 10**6, gramian=True) is backends.get(name)


def test_a_missing_backend_is_not_asked_how_many_it_takes(monkeypatch, all_there):
    monkeypatch.setattr(cuda, "missing", lambda device: "not built")
    with pytest.warns(RuntimeWarning, match=r"triton.*at most 64 tasks, got 65.*cuda.*\(not built\); using.*eager"):
        assert backends.resolve("auto", CUDA, 65) is eager


@pytest.mark.interpreter
@pytest.mark.usefixtures("emulated_cuda")
def test_every_op_says_how_many_tasks_it_has(monkeypatch):
    """On this CPU, with the choice of a GPU: 65 rows go past Triton, one of 65 does not."""
    monkeypatch.setitem(backends.CHOICE, "cpu", ("triton", "cuda", "eager"))
    served = []
    for name in ("triton", "cuda", "eager"):
        for op in ("balance_", "accumulate_", "combine_out", "balance_rows_", "gramian"):
            module = backends.get(name)
            run = getattr(module, op)
            monkeypatch.setattr(
                module, op, lambda *a, n=name, op=op, run=run: (served.append((n, op)), run(*a))[1], raising=False
            )
    for many, expected in ((64, "triton"), (65, "cuda")):
        served.clear()
        rows, ema = torch.randn(many, 40), torch.zeros(many, 40)
        out, _ = dbk.balance_(rows, ema, 0.0)
        torch.testing.assert_close(out, dbk.reference.balance(rows, torch.zeros(many, 40), 0.0)[0])
        stats, segments = new_stats(many), torch.tensor([[0, 40]])
        ops.accumulate_(ema[0], stats.sumsq[:1], [rows[0]], segments, (0.0, 1.0))
        ops.balance_rows_(step_of(ema, stats, [out]))
        torch.testing.assert_close(ops.combine(rows, torch.ones(many)), rows.sum(0))
        ops.combine_out(rows, torch.ones(many), out, True)
        ops_of_all = [("balance_", expected), ("accumulate_", "triton"), ("balance_rows_", expected)]
        assert [(op, n) for n, op in served] == [*ops_of_all, *[("combine_out", expected)] * 2]
    with pytest.warns(RuntimeWarning, match="Gramian takes at most 64 tasks, got 65"):
        gram = ops.gramian(rows)
    torch.testing.assert_close(gram, dbk.reference.gramian(rows))
    assert served[-1] == ("eager", "gramian")


@pytest.mark.slow
def test_report():
    def report(**options):
        command = [sys.executable, "-m", "dbmtl_kernels"]
        return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout

    lines = report()
    assert "native" in lines
    assert "will be used" in lines
    assert "eager: works, not used unless asked for" in lines
    if not torch.cuda.is_available():
        assert "triton (balance_ in 1 launch: interpreted): works" in lines
        plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        message = "triton: not available: it serves CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1"
        assert message in report(env=plain)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])  # "false" is there and cannot compile
@pytest.mark.parametrize("asked", ["", "DBMTL_BUILD_NATIVE", "DBMTL_CUDA"])
def test_building_without_a_compiler_fails_only_where_one_was_asked_for(tmp_path, compiler, asked):
    stale = tmp_path / "dbmtl_kernels" / "lib" / native.path.name
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier build")
    switches = {"DBMTL_BUILD_NATIVE": "", "DBMTL_CUDA": ""} | ({asked: "1"} if asked else {})
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, **switches, "CXX": compiler, "CUDACXX": compiler},
        capture_output=True,
        text=True,
    )
    said = build.stdout + build.stderr
    assert (build.returncode == 0) == (not asked), said
    assert {"": "NOT built", "DBMTL_BUILD_NATIVE": compiler, "DBMTL_CUDA": "DBMTL_CUDA=1 needs nvcc"}[asked] in said
    assert not list(tmp_path.rglob("*.so"))


def test_the_choice_is_made_for_each_gpu(monkeypatch):
    """Two that differ in what there is code for; each is asked once."""
    first, second = (torch.device("cuda", index) for index in range(2))
    asked = []

    def only_on(index, name):
        def missing(device):
            asked.append((name, device.index))
            return None if device.index == index else "no code"

        return missing

    monkeypatch.setattr(triton, "missing", only_on(0, "triton"))
    monkeypatch.setattr(cuda, "missing", only_on(1, "cuda"))
    for _ in range(2):
        assert [backends.resolve("auto", device) for device in (first, second)] == [triton, cuda]
    assert asked == [("triton", 0), ("triton", 1), ("cuda", 1)]
    assert backends.resolve("triton", first) is triton
    with pytest.raises(RuntimeError, match=r"backend='triton' was asked for.*on 'cuda:1': no code"):
        backends.resolve("triton", second)
    monkeypatch.setattr(cuda, "missing", only_on(0, "cuda"))
    backends.clear_cache()
    with pytest.warns(RuntimeWarning, match=r"triton.*not available for cuda:1.*cuda backend.*cuda:1.*slower eager"):
        assert [backends.resolve("auto", device) for device in (second, first)] == [eager, triton]


def test_a_library_is_asked_about_the_gpu_of_the_tensors(monkeypatch):
    """It speaks of the current one: that with code is asked while it is, and the other while that is."""
    current, failed = [0], []

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    def available():
        failed.append(current[0])
        return 0 if current[0] == 1 else 4

    library = SimpleNamespace(dbmtl_available=available, dbmtl_last_error=lambda: b"no code for this device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(cuda, "_loaded", library)
    found = [cuda.missing(torch.device("cuda", index)) for index in (0, 1, 0)]
    assert found == ["no code for this device", None, "no code for this device"]
    assert (failed, current) == ([0, 1, 0], [0])
    with pytest.raises(RuntimeError, match="no code for this device"):
        cuda.library()
