"""OnePassDBMTL under DistributedDataParallel does what one process does with the whole batch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.onepass.levels import Levels
from ranks import RUN, environment, free_port, torchrun
from zoo import K, Model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["replicas", "sharded"])
def test_a_killed_rank_ends_the_others(tmp_path, kind):
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, RUN, str(Path(__file__).parent / "killed.py"), str(tmp_path), kind],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [3, -9]
    message = (tmp_path / "0.txt").read_text()
    assert re.search(r"all-reduce of the losses failed on rank 0 of 2 \(has another rank stopped", message), message


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    torchrun(request.param, Path(__file__).parent / "replicas.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_a_hundred_steps(ranks):
    model = Model()
    start = torch.cat([p.detach().reshape(-1) for p in Model().parameters()])
    expected = model.train_on(dbk.OnePassDBMTL(model.trunk, K, measure_every=3), model, lambda x: x)
    assert (expected - start).norm() > 0.01
    for result in ranks:
        for run in result["trained"]:
            assert run["identical"]
            assert (torch.tensor(run["parameters"], dtype=torch.float64) - expected).norm() <= 1e-8 * expected.norm()


def test_a_hundred_steps_of_a_sharded_model(ranks):
    model = Model()
    balancer = dbk.OnePassDBMTL(model.trunk, K)
    balancer._weigher.levels = Levels(K, 10, 0, True, balancer.norms.device)  # the schedule of sharded parameters
    expected = model.train_on(balancer, model, lambda x: x)
    for result in ranks:
        run = result["sharded"]
        assert run["identical"]
        assert run["moved"]
        assert run["measured"] == (7 + 3) * (K - 1)  # in steps 1, 2, 4, ..., 64 and 30, 60, 90
        assert (torch.tensor(run["parameters"], dtype=torch.float64) - expected).norm() <= 1e-8 * expected.norm()


def test_predictions_among_other_outputs(ranks):
    for result in ranks:
        assert result["predictions"] <= 1e-12


def test_a_sharded_model_that_is_told_not_to_reduce_every_backward(ranks):
    for result in ranks:
        assert result["held back"] <= 1e-12


def test_a_sharded_layer_that_one_task_alone_reaches(ranks):
    for result in ranks:
        assert result["block"] <= 1e-12


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unnamed group", "was given none"),
        ("no wrapper", "no DistributedDataParallel holds all of the shared parameters"),
        ("static graph", "static_graph=True"),
        ("plain heads", "is in no fully_shard"),
        ("part of the trunk", "no DistributedDataParallel holds all"),
        ("thawed", "no DistributedDataParallel holds all"),
        ("absent on one rank", "the ranks give different tasks"),
    ],
)
def test_refusals_on_every_rank(ranks, case, words):
    for result in ranks:
        assert words in result[case]
