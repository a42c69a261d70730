import os
from contextlib import nullcontext
from pathlib import Path

import defaults
import emulator
import pytest
import torch
from dbmtl_kernels.backends import native

os.environ.pop("DBMTL_BACKEND", None)
os.environ.pop("DBMTL_TRITON_LAUNCHES", None)
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels run on CPU tensors; must be set before their import
if "DBMTL_TEST_LIBRARY" in os.environ:  # another build of csrc/cpu: tests/sanitizers
    native.path = Path(os.environ["DBMTL_TEST_LIBRARY"])
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; a test that is about threads asks for its own
    torch.set_num_threads(1)


# Fixtures that run a script, or nvcc, for many seconds. Use --dist loadfile: one worker has all tests of a file.
SLOW_FIXTURES = {"four", "folder", "ranks", "library"}


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


if os.environ.get("DBMTL_FOREIGN_DEFAULTS") == "1":  # make test-all runs the quick tests once like this

    @pytest.fixture(autouse=True)
    def _foreign_defaults(request):
        counts = request.node.get_closest_marker("counts_calls")
        with nullcontext() if counts else defaults.foreign_to_the_package():
            yield


@pytest.fixture
def emulated_cuda():
    """The `cuda` backend serves CPU tensors, with its kernels emulated."""
    with emulator.serving_cpu() as cuda:
        yield cuda


@pytest.fixture(autouse=True)
def _emulated_where_asked_for(request):
    params = getattr(request.node, "callspec", None)
    if params is not None and params.params.get("backend") == "cuda":
        request.getfixturevalue("emulated_cuda")


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif ON_GPU and not item.get_closest_marker("gpu") and ("interpreter" in item.keywords or backend == "triton"):
            item.add_marker(pytest.mark.skip(reason="has a GPU: tests/gpu tests the Triton kernels there"))
