"""DistributedDataParallel named to the balancer: no ``no_sync()`` by the user, no search for the wrapper."""

import json
from pathlib import Path

import pytest
from ranks import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    torchrun(2, Path(__file__).parent / "named.py", folder)
    return json.loads((folder / "named.json").read_text())


def test_ranks_do_what_one_process_does_without_no_sync(found):
    trainings = {name: result for name, result in found.items() if isinstance(result, dict)}
    assert len(trainings) == 27
    for name, result in trainings.items():
        assert result["difference"] <= 1e-5, name
        assert result["moved"] > 0.003, name
        assert result["identical"], name


def test_a_wrapper_that_is_named_is_not_looked_for_and_others_ever_more_rarely(found):
    assert found["looked for, named"] == 0
    assert 3 <= found["looked for, none"] <= 7  # of some 40 times that one is asked for


def test_a_wrapper_that_is_made_after_the_first_steps_is_found(found):
    assert "process_group=model" in found["made later"]
    assert "no_sync()" in found["made later"]


def test_a_static_graph_is_refused(found):
    assert "static_graph=True" in found["static graph"]
