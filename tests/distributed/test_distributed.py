"""Several ranks, by torchrun with gloo on this machine: DDP and FSDP2, checkpoints, and what happens to the killed."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import RUN, environment, free_port, torchrun

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def four(folder):
    """What 4 ranks found in all scenarios, run once."""
    torchrun(4, HERE / "scenarios.py", folder)
    return json.loads((folder / "results.json").read_text())["results"]


KINDS = ["ddp", "fsdp", "hsdp", "two meshes"]
HOW = ["", ", task by task", ", partial tasks", ", accumulation", ", scaled accumulation"]
EXACT = [
    *(
        f"{kind}{how}"
        for kind in KINDS
        for how in ("", ", task by task", ", partial tasks", ", accumulation", ", scaled accumulation")
    ),
    "ddp, float64 state",
    "ddp, eager backend",
    "ddp, capturable",
]


@pytest.mark.parametrize("name", EXACT)
def test_ranks_do_what_one_process_does_with_the_whole_batch(four, name):
    result = four[name]
    assert result["difference"] <= 1e-5
    assert result["moved"] > 0.01  # there was something to differ in
    assert result["identical"]
    assert result["norms"] <= 1e-5
    assert result["gramian"] <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_state_per_rank(four, kind):
    ranks = 2 if kind == "hsdp" else 4  # those that a row is spread over; half of the layers of "two meshes"
    if kind == "two meshes":
        assert 0.25 < four[kind]["held"] <= 1.1 / 2
    else:
        assert 1 / ranks <= four[kind]["held"] <= 1.1 / ranks


def test_a_bfloat16_state(four):
    result = four["ddp, bfloat16 state"]
    assert result["identical"]
    assert result["difference"] < 0.05 * result["moved"]


def test_parameters_of_several_dtypes(four):
    assert four["mixed dtypes"]["identical"]
    assert four["mixed dtypes"]["difference"] <= 2**-7  # half of them are bfloat16


def test_what_was_in_grad_before_is_added_to(four):
    assert four["regulariser"]["identical"]
    assert four["regulariser"]["difference"] <= 1e-5


def test_heads_of_plain_replicas_are_found_in_the_graph(four):
    assert four["plain replicas"]["identical"]
    assert four["plain replicas"]["difference"] <= 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_reaches_every_scaler(four, kind):
    result = four[f"overflow, {kind}"]
    assert result["nans"] == [step == 2 for step in range(6)]
    assert all(result["states"])
    assert result["nonfinite"] == [0, 1, 0]
    assert result["scales"][2] == result["scales"][1] / 2
    assert result["scales"][-1] > result["scales"][2]
    assert result["identical"]
    assert result["finite"]


@pytest.mark.parametrize("how", ["dcp", "torch.save"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_bits(four, kind, how):
    assert four[f"resumed, {kind}, {how}"] == {"equal": True, "identical": True}


REFUSALS = {
    "outside no sync": "RuntimeError: DistributedDataParallel.*inside `with model.no_sync\\(\\)",
    "by task outside no sync": "RuntimeError: DistributedDataParallel.*inside `with model.no_sync\\(\\)",
    "unnamed": "RuntimeError: a process group of 4 ranks.*process_group=torch.distributed.group.WORLD.*False",
    "unnamed at the step": "RuntimeError: a process group of 4 ranks.*process_group=",
    "not a group": "TypeError: process_group must be a process group.*got 4",
    "other tasks": r"RuntimeError: .*the ranks give different tasks \(this one \[0(, 1)?\]\)",
    "other task contexts": r"RuntimeError: .*the ranks are not all in task\([01]\)",
    "other heads": "RuntimeError: .*gradients of different heads",
    "re entrant": "RuntimeError: a re-entrant checkpoint hides.*use_reentrant=False",
    "no log": r"RuntimeError: no log_transform\(loss\) inside task\(0\)",
    "negative": "ValueError: the loss of task 1 is -.*must be positive",
    "held back": "RuntimeError: no shared parameter got a gradient.*set_requires_gradient_sync",
    "before fully shard": "RuntimeError: no shared parameter got a gradient.*make the balancer after it",
    "heads of equal shape": "RuntimeError: .*gradients of different heads",
    "no head on one rank": "RuntimeError: .*gradients of different heads",
    "unknown heads": r"RuntimeError: nothing tells which heads task\(0\) gave.*attach",
    "task outside no sync": "RuntimeError: .*inside `with model.no_sync\\(\\)",
    "evaluated in between": "RuntimeError: backward pass of task [01]: .*inside `with model.no_sync\\(\\)",
    "false and sharded": "ValueError: process_group=False would take the log",
    **dict.fromkeys(
        ("pickled replicas", "pickled shards"), "RuntimeError: a balancer of several ranks cannot be pickled"
    ),
    "other balancers": r"RuntimeError: .*the ranks make different balancers \(this one: 3 tasks",
    "fsdp1": "TypeError: shared_parameters are of FullyShardedDataParallel .*fully_shard",
    "plain among two dimensions": "ValueError: shared_parameters has 1 plain tensors.*fully_shard",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_made_by_every_rank(four, name):
    assert len(four[name]) == 4
    for message in four[name]:
        assert re.match(REFUSALS[name], message, re.DOTALL), message


def test_evaluation_needs_no_other_rank(four):
    assert four["evaluation needs no other rank"][0] > 0


def test_ranks_left_alone_differ(four):
    assert not four["left alone"]["identical"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_rank_0_is_refused_by_all(four, kind):
    """It fits rank 0, which would go on from it without the others."""
    mine, *others = four[f"of rank 0, {kind}"]
    assert mine == "ValueError: state_dict: refused on another rank, whose error says why"
    assert all("rows of another rank" in message or "size" in message for message in others), others


def test_a_shared_parameter_with_a_gradient_on_one_rank_gets_it_on_all(four):
    assert four["shared on one rank"]["identical"]
    assert four["shared on one rank"]["gain"] > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_leaves_nothing_anywhere(four, kind):
    result = four[f"sits out, {kind}"]
    assert result["difference"] <= 1e-6
    assert result["nonfinite"] == [0, 1, 0]
    assert result["identical"]
    assert result["finite"]


def test_a_deep_copy_works_with_the_same_ranks(four):
    assert four["copies"] == {"same": True, "identical": True}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_paused_balancer_leaves_the_average_to_the_wrapper(tmp_path, kind):
    torchrun(2, HERE / "paused.py", tmp_path)
    found = json.loads((tmp_path / "paused.json").read_text())[kind]
    assert found["difference"] <= 1e-5
    assert found["identical"]
    assert (found["step"], found["goes on"]) == (0, 2)
    if kind == "ddp":
        assert all("DistributedDataParallel has to average" in said for said in found["refused"])


def test_gradients_of_inputs_are_left_alone(four):
    assert not four["inputs"]["identical"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_goes_from_four_ranks_to_fewer_and_back(four, folder, ranks):
    torchrun(ranks, HERE / "elsewhere.py", folder, 4, 8)
    torchrun(4, HERE / "elsewhere.py", folder, 8, 12, f"of {ranks}")
    for name in (f"{ranks} ranks, 8", "4 ranks, 12"):
        results = json.loads((folder / f"{name}.json").read_text())
        assert results.keys() == {"ddp", "fsdp"}
        assert max(results.values()) <= 1e-5, results


@pytest.mark.parametrize("rows", ["rows", "one row"])
def test_a_failure_of_one_rank_is_not_hidden_by_a_collective(tmp_path, rows):
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, RUN, str(HERE / "failing.py"), str(tmp_path), rows],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert (tmp_path / "1.txt").read_text().startswith("ZeroDivisionError")
    assert re.match(r"RuntimeError: DBMTL: \S+ of .* failed on rank 0 of 2", (tmp_path / "0.txt").read_text())


def launch(folder, kill_at, kind):
    """Four ranks of worker.py without torchrun, whose agent would end the others itself."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, RUN, str(HERE / "worker.py"), str(folder), str(kill_at), kind],
            env=environment(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(4)
    ]


def finished(folder, processes):
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * 4
    results = [torch.load(folder / f"finished {rank}.pt") for rank in range(4)]
    assert all(torch.equal(results[0][1], parameters) for _, parameters in results)
    return results[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ddp, one row", "fsdp, one row"])
def test_a_killed_rank_stops_the_others_and_the_restarted_run_has_the_same_bits(tmp_path, kind):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    first, expected = finished(straight, launch(straight, -1, kind))
    assert first == 0

    processes = launch(killed, 20, kind)
    assert processes[2].wait(timeout=300) == -9
    died = time.monotonic()
    for rank in (0, 1, 3):
        assert processes[rank].wait(timeout=40) == 3
        message = (killed / f"error {rank}.txt").read_text()
        assert re.search(r"all-reduce of the losses failed on rank \d of 4", message), message
    assert time.monotonic() - died < 25  # the time-out is 20 s
    assert sorted(int(path.name) for path in (killed / "checkpoints").glob("*"))[-1] == 15

    first, resumed = finished(killed, launch(killed, -1, kind))
    assert first == 15
    assert torch.equal(resumed, expected)
