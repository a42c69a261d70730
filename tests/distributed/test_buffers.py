"""Buffers of rows of two ranks, fed by hand: replicas, DTensors, and both in one."""

import json
from pathlib import Path

import pytest
from ranks import torchrun

KINDS = ["ddp", "fsdp", "mixed", "two meshes"]
pytestmark = pytest.mark.slow
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What 2 ranks found, run once."""
    folder = tmp_path_factory.mktemp("buffers")
    torchrun(2, Path(__file__).parent / "buffers_of_ranks.py", folder)
    return json.loads((folder / "results.json").read_text())


EMPTY = [False, True, False, False, False, False, False, True, True, False]
FED = [True, False, True, True, True, True, True, False, False, True]  # in this step, after the pass
PASSES = [(kind, False) for kind in KINDS] + [("ddp", True)]


@pytest.mark.parametrize(("kind", "early"), PASSES)
def test_a_pass_counts_if_any_rank_has_something(two, kind, early):
    for result in two[f"passes, {kind}, {early}, False"]:
        assert all(result["same"])
        if kind == "ddp":  # known when the row has come
            assert result["empty"] == [[None, not fed] for fed in FED]
        else:
            assert result["empty"] == EMPTY


@each_kind
def test_off_a_cpu_the_device_knows(two, kind):
    for result in two[f"passes, {kind}, False, True"]:
        assert all(result["same"])
        assert [empty for empty, _ in result["empty"]] == [None] * len(FED)
        assert [set(fed) for _, fed in result["empty"]] == [{fed} for fed in FED]


@each_kind
def test_zeros_leave_a_buffer_that_was_never_fed(two, kind):
    assert two[f"never fed, {kind}"] == [True, True]


@each_kind
def test_rows_are_taken_over(two, kind):
    for found in two[f"taken over, {kind}"]:
        assert all(found.values()), found


def test_replicas_left_alone_and_back(two):
    assert two["to another kind"] == [[True] * 4] * 2


@each_kind
def test_rows_sit_out_and_are_dropped(two, kind):
    assert two[f"sits out, {kind}"] == [[True] * 4] * 2


@each_kind
def test_a_gradient_that_goes_into_no_row(two, kind):
    assert two[f"into no row, {kind}"] == [[True] * 2] * 2


@each_kind
def test_a_failed_pass_of_replicas_leaves_no_row_half_written(two, kind):
    assert two[f"failed, {kind}"] == [[True] * 2] * 2


def test_no_collective_is_deprecated(two):
    assert two["deprecated"] == []
