import pytest
from dbmtl_kernels import backends
from device import DEVICE, ON_GPU

FORMS = {"triton": "1", "triton in two launches": "2", "cuda": "1"}


def serve(name, request):
    """Skip where ``name`` is not built; on a CPU emulate it."""
    if name == "cuda" and not ON_GPU:
        request.getfixturevalue("emulated_cuda")
    elif name == "cuda" and (reason := backends.get(name).missing(DEVICE)):
        pytest.skip(reason)
    return name


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    """A backend."""
    return serve(request.param, request)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """A backend, with Triton's dense op in either form."""
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", FORMS[request.param])
    return serve(request.param.split()[0], request)
