"""The arithmetic of benchmarks/scale against bytes counted on 2 and 4 ranks, by torchrun with gloo on this machine."""

import json
from collections import Counter
from pathlib import Path

import pytest
from ranks import torchrun

from benchmarks.scale import formulas
from benchmarks.scale.formulas import DDP, ONE_PASS, Job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def counted(request, tmp_path_factory):
    """(job, form, what was counted), run once."""
    folder = tmp_path_factory.mktemp("counted")
    torchrun(request.param, Path(__file__).parent / "counted.py", folder)
    sizes, results = json.loads((folder / "counted.json").read_text())

    def job(wrapper, k):
        return Job(
            sizes["P"], k, wrapper, request.param, per_node=2, heads=sizes["H"], gathered=4, transits=2,
            measure_every=sizes["every"],
        )  # fmt: skip

    return [(job(wrapper, k), form, {**found, "bound": sizes["small"]}) for wrapper, form, k, found in results]


def total(found):
    """Bytes of each kind."""
    sums = Counter()
    for one in found:
        sums[one.kind] += one.bytes
    return {kind: size for kind, size in sums.items() if size}


def test_collectives_are_given_the_bytes_that_the_formulas_say(counted):
    assert len(counted) in (8, 12)
    for job, form, found in counted:
        assert found["step"] == total(formulas.collectives(job, form)), (job, form)
        assert found["small"] < found["bound"], (job, form)


def test_a_step_of_one_pass_that_measures(counted):
    for job, form, found in counted:
        if form == ONE_PASS:
            expected = [*formulas.collectives(job, form), *formulas.measuring(job)]
            assert found["measuring"] == total(expected), job


def test_bytes_held_between_steps(counted):
    for job, form, found in counted:
        heads = job.heads / job.shards * 4  # their .grad
        expected = formulas.held(job, form) + heads
        # Of FSDP2 the exact form, by which one pass measures, leaves up to two rows of this rank's columns more.
        more = 2 * 4 * job.columns if form == ONE_PASS and job.wrapper != DDP else 0.05 * 4 * job.parameters
        assert 0 <= found["held"] - expected <= more, (job, form, found["held"], expected)
