import os

import pytest
import torch

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
