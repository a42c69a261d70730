from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="threads for every contender (default: 2)")
    parser.addoption(
        "--save",
        type=Path,
        default=Path("out/benchmarks"),
        help="folder for CSV and JSON (default: out/benchmarks)",
    )
    parser.addoption("--rounds", type=int, default=21, help="rounds of each contender (default: 21)")


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save(request):
    return request.config.getoption("--save")


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")
