"""Whether the Triton backend can serve, in how many launches, and why not. No GPU is needed."""

import pkgutil
from importlib import import_module
from types import SimpleNamespace

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels import backends, ops
from dbmtl_kernels.backends import triton as backend

pytestmark = pytest.mark.interpreter
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAUNCHES = "DBMTL_TRITON_LAUNCHES"


@pytest.fixture
def launches():
    backends.resolve("triton", CPU)
    return import_module("dbmtl_kernels.backends.triton.launches")


@pytest.fixture
def no_cache():
    backends.clear_cache()
    yield
    backends.clear_cache()


def test_more_tasks_than_the_gramian_takes():
    with pytest.raises(ValueError, match=r"backend='triton'.*Gramian takes at most 64 tasks, got 65"):
        ops.gramian(torch.zeros(65, 4), "triton")


@pytest.mark.parametrize(
    ("version", "message"), [(None, r"not installed.*triton >= 3.3"), ("3.2.1", r"3\.2\.1 is too old.*>= 3.3")]
)
def test_triton_absent_or_too_old(no_cache, monkeypatch, version, message):
    monkeypatch.setattr(backend, "_version", lambda: version)
    ema = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=f"backend='triton'.*{message}"):
        dbk.balance_(torch.ones(2, 4), ema, backend="triton")
    assert (ema == 1).all()
    match = f"triton backend is not available for cuda.*{message}.*cuda backend is not available.*eager"
    with pytest.warns(RuntimeWarning, match=match):
        assert backends.resolve("auto", CUDA) is backends.get("eager")


def test_where_it_serves(no_cache, launches, monkeypatch):
    assert backends.resolve("auto", CPU) is not backend
    assert "CUDA tensors only" in backend.missing(torch.device("meta"))
    assert "TRITON_INTERPRET=1 is set" in backend.missing(CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in backend.missing(CPU)
    monkeypatch.setattr(launches, "INTERPRETED", False)
    assert backend.missing(CUDA) is None
    assert backends.resolve("auto", CUDA) is backend


def test_an_interpreter_that_does_not_run_is_a_reason(launches, monkeypatch):
    monkeypatch.setattr(launches, "combine_out", lambda *args: 1 / 0)
    assert "division by zero" in backend.missing(CPU)


def test_how_many_launches(launches, monkeypatch):
    """`resident_programs` is in test_codegen.py, where there is something to load."""
    device = launches.driver

    def answer(cooperative, status=0):
        def ask(out, *args):  # cuDeviceGet(handle, index), cuDeviceGetAttribute(value, attribute, handle)
            asked.append([arg.value for arg in args])
            out._obj.value = 40 + args[0].value if len(args) == 1 else cooperative
            return status

        asked = []
        library = SimpleNamespace(cuDeviceGet=ask, cuDeviceGetAttribute=ask)
        monkeypatch.setattr(device, "_driver", lambda: library)
        device._launches.cache_clear()
        return asked

    asked = answer(1)
    assert device.launches(torch.device("cuda", 2)) == (1, "cooperative launch")
    assert asked == [[2], [95, 42]]
    answer(0)
    assert device.launches(CUDA) == (2, "the device cannot launch cooperatively")
    for form, error, match in (
        ("1", RuntimeError, "DBMTL_TRITON_LAUNCHES=1.*cuda:0 cannot launch cooperatively"),
        ("three", ValueError, "must be 1 or 2, got 'three'"),
    ):
        monkeypatch.setenv(LAUNCHES, form)
        with pytest.raises(error, match=match):
            device.launches(CUDA)
    monkeypatch.setenv(LAUNCHES, "2")
    assert device.launches(CUDA) == (2, "DBMTL_TRITON_LAUNCHES=2")
    answer(1, status=100)
    with pytest.raises(RuntimeError, match="cuDeviceGet failed with CUDA error 100"):
        device.has_cooperative_launch(CUDA)
    device._launches.cache_clear()


def test_a_refusal_is_remembered_for_the_device_that_gave_it(launches, monkeypatch):
    device, other = launches.driver, torch.device("cuda", 1)
    monkeypatch.delenv(LAUNCHES, raising=False)
    monkeypatch.setattr(device, "has_cooperative_launch", lambda device: True)
    monkeypatch.setattr(device, "_refused", {})
    device._launches.cache_clear()
    for refusal in device.REFUSALS:
        device._refused.clear()
        with pytest.warns(RuntimeWarning, match=f"balance_ takes two launches on cuda:0.*{refusal}"):
            device.refuse(CUDA, RuntimeError(f"Triton Error [CUDA]: {refusal}"))
        assert device.launches(CUDA)[0] == 2
        assert refusal in device.launches(CUDA)[1]
        assert device.launches(other)[0] == 1
    with pytest.raises(RuntimeError, match="global/shared address space"):
        device.refuse(CUDA, RuntimeError("Triton Error [CUDA]: operation not supported on global/shared address space"))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        device.refuse(other, RuntimeError("an illegal memory access"))
    monkeypatch.setenv(LAUNCHES, "1")
    with pytest.raises(RuntimeError, match="DBMTL_TRITON_LAUNCHES=1 was asked for but cuda:1 refused it"):
        device.refuse(other, RuntimeError(device.REFUSALS[0]))
    assert device.launches(other)[0] == 1
    device._launches.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "triton.runtime.jit.JITFunction.warmup",  # device.py
        "triton.compiler.CompiledKernel.__getitem__",
        "triton.runtime:driver.set_active",  # tests/support/codegen.py
        "triton.runtime.interpreter.InterpreterBuilder.create_masked_load",  # Traffic
        "triton.runtime.interpreter.InterpreterBuilder.create_masked_store",
    ],
)
def test_triton_has_what_it_does_not_document(name):
    assert pkgutil.resolve_name(name) is not None
