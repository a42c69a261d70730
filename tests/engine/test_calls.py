"""What one step costs in calls of ours, and that none goes up."""

import collections
import os
import sys

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn

ROOT = os.path.dirname(dbk.__file__)
# From the top down; what is called lies in the caller's room or below.
ROOMS = ("balancer.py", "functional.py", "engine", "weightings.py", "rows", "ops", "backends", "reference.py")


def room(code):
    return os.path.relpath(code.co_filename, ROOT).split(os.sep)[0] if code.co_filename.startswith(ROOT) else None


def calls_of(run):
    """(room of the nearest caller of ours or None, room, function) of every call of ours."""
    calls = []

    def profile(frame, event, _):
        if event != "call" or room(frame.f_code) is None:
            return
        caller = frame.f_back
        while caller is not None and room(caller.f_code) is None:
            caller = caller.f_back
        calls.append((caller and room(caller.f_code), room(frame.f_code), frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def task_by_task(balancer, losses):
    for task, loss in enumerate(losses):
        with balancer.task(task):
            dbk.log_transform(loss).backward(retain_graph=True)
    balancer.balance()


WAYS = {
    "call": (172, lambda balancer, losses: balancer(losses).backward()),
    "backward": (165, lambda balancer, losses: balancer.backward(losses)),
    "task": (292, task_by_task),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_three_tasks_and_four_parameters(way):
    most, run = WAYS[way]
    trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32))
    heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(3))
    balancer = dbk.DBMTL(trunk.parameters(), num_tasks=3, backend="native")
    for _ in range(7):  # the first fill what is remembered; every power of two the whole graph is looked at
        features = trunk(torch.randn(16, 8))
        losses = [head(features).square().mean() for head in heads]
        calls = calls_of(lambda: run(balancer, losses))  # noqa: B023 - called at once
    assert len(calls) <= most, collections.Counter(calls)
    upwards = [call for call in calls if call[0] is not None and ROOMS.index(call[1]) < ROOMS.index(call[0])]
    assert not upwards
