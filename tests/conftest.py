import os

import emulator
import pytest
import torch
from dbmtl_kernels import backends
from dbmtl_kernels.backends import cuda

os.environ.pop("DBMTL_BACKEND", None)
os.environ.pop("DBMTL_TRITON_LAUNCHES", None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels run on CPU tensors; must be set before their import


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    return emulator.build(tmp_path_factory.mktemp("cuda"))


def _forget():
    cuda._load.cache_clear()
    cuda._workspaces.clear()
    backends.clear_cache()


@pytest.fixture
def emulated_cuda(emulated_library, monkeypatch):
    """The `cuda` backend serves CPU tensors, with its kernels emulated."""
    monkeypatch.setattr(cuda, "library_path", lambda: emulated_library)
    monkeypatch.setattr(cuda, "SERVES", "cpu")
    _forget()
    yield
    _forget()


@pytest.fixture(autouse=True)
def _emulated_where_asked_for(request):
    params = getattr(request.node, "callspec", None)
    if params is not None and params.params.get("backend") == "cuda":
        request.getfixturevalue("emulated_cuda")


def pytest_collection_modifyitems(items):
    gpu = torch.cuda.is_available()
    for item in items:
        interpreted = "interpreter" in item.keywords or (
            hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton"
        )
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif interpreted and gpu and "gpu" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason="has a GPU: tests/test_gpu.py tests the Triton kernels there"))
