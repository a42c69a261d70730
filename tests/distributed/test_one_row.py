"""Exact DB-MTL in one row on 2 and 4 ranks, by torchrun with gloo on this machine."""

import json
from pathlib import Path

import pytest
from ranks import torchrun

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", params=[2, 4])
def found(request, tmp_path_factory):
    """What the ranks found, run once."""
    folder = tmp_path_factory.mktemp("one_row")
    torchrun(request.param, HERE / "one_row.py", folder)
    return json.loads((folder / "one_row.json").read_text())


def test_ranks_do_what_one_process_does_with_the_whole_batch(found):
    cases = {name: result for name, result in found.items() if ", " in name}
    assert len(cases) in (17, 31)
    for name, result in cases.items():
        assert result["difference"] <= 1e-5, name
        assert result["to rows"] <= 1e-5, name
        assert result["moved"] > 0.005, name
        assert result["norms"] <= 1e-5, name
        assert result["identical"], name
        assert not result["allocated"], name


def test_parameters_of_several_dtypes(found):
    assert found["mixed dtypes"]["identical"]
    assert found["mixed dtypes"]["difference"] <= 2**-7  # half of them are bfloat16


def test_a_resumed_run_has_the_same_bits_and_a_state_no_rows(found):
    for result in found["resumed"].values():
        assert result == {"equal": True, "identical": True, "rows": False}


def test_a_second_backward_in_a_step_is_refused_by_every_rank(found):
    assert all(
        "a second backward within a step" in message and "keep_rows=True" in message for message in found["refused"]
    )
