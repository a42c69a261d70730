"""Exact DB-MTL in one row on as many ranks as there are; rank 0 writes what came of it for test_one_row.py to judge.

one_row.py FOLDER
"""

import io
import json
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from buffers import defer
from job import Job, batches, first_net, identical
from problems import overflowing, state_of
from torch import nn

# The rate is one at which rounding does not grow over a hundred steps: with rows it does as much at a larger one.
ONE = {"beta": 0.0, "lr": 5e-3}


def difference(a, b):
    return float((a - b).abs().max())


def train(job):
    job.train(0, 100)


def task_by_task(job):
    for step, x in enumerate(batches(0, 12)):
        job.optimizer.zero_grad(set_to_none=step % 2 == 0)
        job.step(x, tasks=[None, [1], [2, 0]][step % 3], by_task=True)
        job.optimizer.step()


def partial(job):
    job.balancer.attach(job.optimizer)
    for step, x in enumerate(batches(0, 12)):
        job.optimizer.zero_grad()
        job.step(x, tasks=[[0, 2], [1], [0, 1, 2], [2, 1]][step % 4])
        job.optimizer.step()


def scaled(job):
    """A GradScaler, and an overflow on the last rank only: every scaler must skip this step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    job.balancer.attach(job.optimizer)
    for step, x in enumerate(batches(0, 6)):
        job.optimizer.zero_grad()
        with job.no_sync():
            losses = job.forward(job.part(x))
            if step == 3 and (job.kind == "single" or dist.get_rank() == dist.get_world_size() - 1):
                losses[0] = overflowing(losses[0])
            scaler.scale(job.balancer(losses)).backward()
        scaler.step(job.optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0, scaler.get_scale()
    assert job.balancer.nonfinite_steps.tolist() == [1, 0, 0]


def sitting_out(job):
    """A loss that is NaN on one rank, and losses that reach nothing shared."""
    for step, x in enumerate(batches(0, 6)):
        job.optimizer.zero_grad()
        with job.no_sync():
            losses = job.forward(job.part(x))
            if step == 2 and (job.kind == "single" or dist.get_rank() == 1):
                losses[1] = losses[1] * torch.nan
            if step == 4:
                losses[2] = losses[2] * 0.0 + 1.0
            job.balancer(losses).backward()
        job.optimizer.step()
    assert job.balancer.nonfinite_steps.tolist() == [0, 1, 0]


PLAYS = {"train": train, "task by task": task_by_task, "partial": partial, "scaled": scaled, "sitting out": sitting_out}


def compare(kind, play, deferred=False, **options):
    jobs = [Job("single", **ONE), Job(kind, **ONE, **options), Job("single", **ONE, keep_rows=True)]
    if deferred:  # as on a GPU, where looking would take a sync
        engine = jobs[1].balancer._engine
        engine.use(defer(engine.rows))
    for job in jobs:
        play(job)
    alone, ours, rows = jobs
    return {
        "difference": difference(alone.parameters(), ours.parameters()),
        "to rows": difference(rows.parameters(), ours.parameters()),
        "moved": difference(alone.parameters(), Job("single", **ONE).parameters()),
        "identical": identical(ours.parameters()),
        "norms": difference(alone.balancer.norms, ours.balancer.norms) / float(alone.balancer.norms.max()),
        "allocated": state_of(ours.balancer).allocated,
    }


def resumed(kind):
    """Train 4 and 4 more, or 4, save, load into a new job, and 4 more: the same bits. A state has no rows."""
    straight, first, second = (Job(kind, **ONE) for _ in range(3))
    straight.train(0, 8)
    first.train(0, 4)
    torch.save(
        {"net": first.net.state_dict(), "optimizer": first.optimizer.state_dict(), "it": first.balancer.state_dict()},
        stream := io.BytesIO(),
    )
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    second.net.load_state_dict(loaded["net"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    second.balancer.load_state_dict(loaded["it"])
    second.train(4, 8)
    with_rows = Job(kind, **ONE, keep_rows=True)
    with_rows.train(0, 2)
    second.balancer.load_state_dict(with_rows.balancer.state_dict())
    return {
        "equal": torch.equal(second.parameters(), straight.parameters()),
        "identical": identical(second.parameters()),
        "rows": first.balancer.state_dict()["buffer"].get("rows", {}) != {},
    }


def mixed_dtypes():
    """Parameters of several dtypes: a row of its own, in float64."""

    def gradients(group, scales, **options):
        torch.manual_seed(1)
        dtypes = ((33, torch.float32), (7, torch.bfloat16), (1, torch.float64), (300, torch.bfloat16))
        params = nn.ParameterList([nn.Parameter(torch.randn(n).to(d)) for n, d in dtypes])
        balancer = dbk.DBMTL(params, 2, process_group=group, beta=0.0, **options)
        losses = [s * sum((p.double() - t).square().sum() for p in params) + 1 for t, s in enumerate(scales)]
        balancer(losses).backward()
        return torch.cat([p.grad.double() for p in params])

    rank, size = dist.get_rank(), dist.get_world_size()
    # loss of task t on rank r: (1 + r) * f_t; the mean over ranks has the factor (1 + size) / 2
    alone = gradients(False, [(1 + size) / 2, (1 + size)], keep_rows=True)
    ours = gradients(dist.group.WORLD, [1.0 + rank, 2.0 + 2 * rank])
    return {"difference": difference(alone, ours) / float(alone.abs().max()), "identical": identical(ours)}


def refused():
    job = Job("ddp", **ONE)
    job.balancer.attach(job.optimizer)
    job.step(next(batches(0, 1)))
    before = job.gradients()
    messages = [None] * dist.get_world_size()
    try:
        job.step(next(batches(1, 2)))
    except RuntimeError as error:
        dist.all_gather_object(messages, str(error))
    assert torch.equal(before, job.gradients())
    return messages


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first_net()
    kinds = ("ddp", "fsdp") if dist.get_world_size() < 4 else ("ddp", "fsdp", "hsdp", "two meshes")
    results = {
        f"{kind}, {name}": compare(kind, play)
        for kind in kinds
        for name, play in PLAYS.items()
        if name != "train" or kind in ("ddp", "fsdp")
    }
    for kind in kinds:
        for name in ("scaled", "sitting out", "partial"):
            results[f"{kind}, {name}, deferred"] = compare(kind, PLAYS[name], deferred=True)
    results["ddp, eager"] = compare("ddp", lambda job: job.train(0, 10), backend="eager")
    results["resumed"] = {kind: resumed(kind) for kind in kinds}
    results["mixed dtypes"] = mixed_dtypes()
    results["refused"] = refused()
    if dist.get_rank() == 0:
        Path(sys.argv[1], "one_row.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
