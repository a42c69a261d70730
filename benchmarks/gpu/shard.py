"""A pytest plugin: ``-p shard --shard 2/6`` runs every sixth test from the third on.

Compiling the kernels takes most of the tests' time and one core; several processes compile at once.
"""

import pytest


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="I/N: the I-th (from 0) of N parts")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    index, count = map(int, config.getoption("--shard").split("/"))
    others = [item for place, item in enumerate(items) if place % count != index]
    items[:] = items[index::count]
    config.hook.pytest_deselected(items=others)
