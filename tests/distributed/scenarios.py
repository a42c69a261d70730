"""What 4 ranks do together, run by torchrun; rank 0 writes what came of it for test_distributed.py to judge."""

import copy
import functools
import io
import json
import sys
import time
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from dbmtl_kernels.rows import placement
from job import NUM_TASKS, Job, Net, batches, first_net, identical, load, save, whole
from problems import overflowing, state_of
from refusals import attempts
from torch import nn

STEPS = 50
RESULTS = {}
SECONDS = {}
SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


def difference(a, b):
    return float((a - b).abs().max())


def held(balancer):
    parts = getattr(state_of(balancer), "parts", [state_of(balancer)])
    return sum(part.rows.numel() for part in parts)


def refusal(function):
    """What every rank's error said."""
    try:
        function()
        mine = ""
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, mine)
    return messages


def compare(name, kind, play, **options):
    """The same training by one process with whole batches and by all ranks with theirs."""
    jobs = [Job("single", **options), Job(kind, **options)]
    for job in jobs:
        play(job)
    alone, ours = jobs
    numel = sum(p.numel() for p in alone.net.shared())
    RESULTS[name] = {
        "difference": difference(alone.parameters(), ours.parameters()),
        "moved": difference(alone.parameters(), Job("single").parameters()),
        "identical": identical(ours.parameters()),
        "norms": difference(alone.balancer.norms, ours.balancer.norms) / float(alone.balancer.norms.max()),
        "gramian": difference(gramian(alone), gramian(ours)) / float(gramian(alone).abs().max()),
        "held": held(ours.balancer) / (NUM_TASKS * numel),
        "finite": bool(torch.isfinite(ours.parameters()).all()),
    }


def gramian(job):
    return state_of(job.balancer).gramian().double()


@scenario
def trainings():
    for kind in ("ddp", "fsdp", "hsdp", "two meshes"):
        compare(f"{kind}", kind, lambda job: job.train(0, STEPS))
        compare(f"{kind}, task by task", kind, by_task)
        compare(f"{kind}, partial tasks", kind, partial)
        compare(f"{kind}, accumulation", kind, accumulated)
        compare(f"{kind}, scaled accumulation", kind, scaled)
    compare("ddp, float64 state", "ddp", lambda job: job.train(0, 10), state_dtype=torch.float64)
    compare("ddp, eager backend", "ddp", lambda job: job.train(0, 10), backend="eager")
    compare("ddp, capturable", "ddp", lambda job: job.train(0, 10), capturable=True)


def by_task(job):
    for x in batches(0, 10):
        job.optimizer.zero_grad()
        job.step(x, by_task=True)
        job.optimizer.step()


def partial(job):
    for step, x in enumerate(batches(0, 12)):
        job.optimizer.zero_grad()
        job.step(x, tasks=[[0, 2], [1], [0, 1, 2], [2, 1]][step % 4])
        job.optimizer.step()


def accumulated(job):
    job.balancer.attach(job.optimizer)
    for step in range(8):
        job.optimizer.zero_grad()
        for n, x in enumerate(batches(3 * step, 3 * step + 3)):
            job.step(x, factor=1 / 3, by_task=n == 1 and step % 2 == 0)
        job.optimizer.step()


def scaled(job):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    job.balancer.attach(job.optimizer)
    for step in range(6):
        job.optimizer.zero_grad()
        for x in batches(2 * step, 2 * step + 2):
            with job.no_sync():
                losses = job.forward(job.part(x))
                if step == 3:  # on the last rank only: every scaler must skip this step
                    part = job.kind == "single" or dist.get_rank() == dist.get_world_size() - 1
                    losses[0] = overflowing(losses[0]) if part else losses[0]
                scaler.scale(job.balancer(losses) / 2).backward()
        scaler.unscale_(job.optimizer)
        scaler.step(job.optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0, scaler.get_scale()  # doubled after step 1, halved after 3, doubled after 5


@scenario
def bfloat16_state():
    """Rounded to 8 bits: close, replicas the same."""
    compare("ddp, bfloat16 state", "ddp", lambda job: job.train(0, STEPS), state_dtype=torch.bfloat16)


@scenario
def mixed_dtypes():
    """Two dtypes of parameters: two groups of columns, each sharded."""

    def make():
        torch.manual_seed(1)
        return nn.ParameterList(
            [
                nn.Parameter(torch.randn(n).to(d))
                for n, d in ((33, torch.float32), (7, torch.bfloat16), (1, torch.float64), (300, torch.bfloat16))
            ]
        )

    def gradients(group, scales):
        params = make()
        balancer = dbk.DBMTL(params, 2, process_group=group)
        for _ in range(3):
            for p in params:
                p.grad = None
            total = sum(s * sum((p.double() - t).square().sum() for p in params) for t, s in enumerate(scales)) * 0
            losses = [
                total + s * sum((p.double() - t).square().sum() for p in params) + 1 for t, s in enumerate(scales)
            ]
            balancer(losses).backward()
        return torch.cat([p.grad.double() for p in params])

    rank, size = dist.get_rank(), dist.get_world_size()
    # loss of task t on rank r: (1 + r) * f_t; the mean over ranks has the factor (1 + size) / 2
    alone = gradients(False, [(1 + size) / 2, (1 + size)])
    ours = gradients(dist.group.WORLD, [1.0 + rank, 2.0 + 2 * rank])
    RESULTS["mixed dtypes"] = {
        "difference": difference(alone, ours) / float(alone.abs().max()),
        "identical": identical(ours),
    }


@scenario
def regulariser_before():
    """What is in .grad before, on shared parameters and heads, is added to and not averaged again."""
    job, alone = Job("ddp"), Job("single")
    (x,) = batches(0, 1)
    for each in (job, alone):
        for p in each.net.parameters():
            p.grad = torch.ones_like(p)
        each.step(x)
    RESULTS["regulariser"] = {
        "difference": difference(job.gradients(), alone.gradients()),
        "identical": identical(job.gradients()),
    }


@scenario
def shared_parameter_of_one_rank():
    """A branch taken on one rank only: the parameter there gets its gradient on all."""
    net = Net()
    balancer = dbk.DBMTL(net.shared(), NUM_TASKS, process_group=dist.group.WORLD)
    z = net.trunk(next(batches(0, 1)))
    z = z * net.gain if dist.get_rank() == 0 else z
    balancer([head(z).square().mean() + 0.1 for head in net.heads]).backward()
    grads = torch.cat([p.grad.reshape(-1) for p in net.shared()])
    RESULTS["shared on one rank"] = {"identical": identical(grads), "gain": float(net.gain.grad.abs())}


@scenario
def sitting_out():
    """One rank's loss of a task is NaN: the task sits out on all, and leaves nothing in any .grad."""
    for kind in ("ddp", "fsdp"):
        job, without = Job(kind), Job(kind)
        for each, bad in ((job, True), (without, False)):
            for step, x in enumerate(batches(0, 3)):
                each.optimizer.zero_grad()
                with each.no_sync():
                    losses = each.forward(each.part(x))
                    if step == 1 and bad and dist.get_rank() == 1:
                        losses[1] = losses[1] * torch.nan
                    tasks = [0, 2] if step == 1 and not bad else [0, 1, 2]
                    each.balancer([losses[t] for t in tasks], tasks=tasks).backward()
                if step == 1:
                    each.seen = each.gradients()
        RESULTS[f"sits out, {kind}"] = {
            "difference": difference(job.seen, without.seen),
            "nonfinite": job.balancer.nonfinite_steps.tolist(),
            "identical": identical(job.gradients()),
            "finite": bool(job.gradients().isfinite().all()),
        }


@scenario
def copies():
    """A deep copy works with the same ranks."""
    net = Net()
    balancer = dbk.DBMTL(net.shared(), NUM_TASKS, process_group=dist.group.WORLD)
    x, *more = (x[dist.get_rank() :: dist.get_world_size()] for x in batches(0, 3))
    balancer(net(x)).backward()
    twin_net, twin = copy.deepcopy((net, balancer))
    twin.load_state_dict(balancer.state_dict())
    for x in more:
        for each, owner in ((net, balancer), (twin_net, twin)):
            each.zero_grad()
            owner(each(x)).backward()
    grads = [torch.cat([p.grad.reshape(-1) for p in each.shared()]) for each in (net, twin_net)]
    RESULTS["copies"] = {"same": torch.equal(*grads), "identical": identical(grads[0])}


@scenario
def inputs_that_require_grad():
    """Their gradients are each rank's own."""
    job = Job("ddp")
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    with job.no_sync():
        job.balancer(job.forward(x)).backward()
    RESULTS["inputs"] = {"identical": identical(x.grad)}


@scenario
def heads_without_a_wrapper():
    """Plain replicas, no DistributedDataParallel: heads are found in the graph."""
    job, alone = Job("ddp"), Job("single")
    job.forward, job.no_sync = job.net, alone.no_sync
    for each in (job, alone):
        each.train(0, 5)
    RESULTS["plain replicas"] = {
        "difference": difference(job.parameters(), alone.parameters()),
        "identical": identical(job.parameters()),
    }


@scenario
def overflow_on_one_rank():
    """One rank's gradient of a task is infinite: every scaler sees it, the state stays finite, the next step counts."""
    for kind in ("ddp", "fsdp"):
        job = Job(kind)
        nans, states, scales = [], [], []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step, x in enumerate(batches(0, 6)):
            job.optimizer.zero_grad()
            with job.no_sync():
                losses = job.forward(job.part(x))
                if step == 2 and dist.get_rank() == 1:
                    losses[1] = overflowing(losses[1])
                scaler.scale(job.balancer(losses)).backward()
            shared = torch.cat([whole(p.grad).reshape(-1) for p in job.net.shared()])
            nans.append(bool(shared.isnan().all()))
            scaler.step(job.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            states.append(bool(torch.isfinite(state_of(job.balancer).rows).all()))
        RESULTS[f"overflow, {kind}"] = {
            "nans": nans,
            "states": states,
            "scales": scales,
            "nonfinite": job.balancer.nonfinite_steps.tolist(),
            "identical": identical(job.parameters()),
            "finite": bool(torch.isfinite(job.parameters()).all()),
        }


@scenario
def resumed():
    """Train 4 and 4 more, or 4, save, load into a new job, and 4 more: the same bits."""
    folder = Path(sys.argv[1])
    for kind in ("ddp", "fsdp", "hsdp", "two meshes"):
        straight = Job(kind)
        straight.train(0, 8)
        for how in ("dcp", "torch.save"):
            first, second = Job(kind), Job(kind)
            first.train(0, 4)
            path = folder / f"{how} {kind}"
            if how == "dcp":
                save(first, path)
                load(second, path)
            else:
                stream = io.BytesIO()
                torch.save(state(first), stream)
                stream.seek(0)
                loaded = torch.load(stream, weights_only=True)
                second.net.load_state_dict(loaded["net"])
                second.optimizer.load_state_dict(loaded["optimizer"])
                second.balancer.load_state_dict(loaded["balancer"])
            second.train(4, 8)
            if how == "torch.save":  # as who saves on rank 0 alone would load it
                others = [None] * dist.get_world_size()
                dist.all_gather_object(others, stream.getvalue())
                RESULTS[f"of rank 0, {kind}"] = refusal(functools.partial(load_of, others[0], kind))
            RESULTS[f"resumed, {kind}, {how}"] = {
                "equal": torch.equal(second.parameters(), straight.parameters()),
                "identical": identical(second.parameters()),
            }
        parameters = straight.parameters()
        straight.train(8, 12)
        longer = straight.parameters()
        if dist.get_rank() == 0:
            torch.save((parameters, longer), folder / f"straight {kind}.pt")


def load_of(stream, kind):
    balancer = Job(kind).balancer
    try:
        balancer.load_state_dict(torch.load(io.BytesIO(stream), weights_only=True)["balancer"])
    finally:  # refused on any rank, it changes none
        assert balancer.step == 0
        assert not balancer.norms.any()


def state(job):
    return {"net": job.net.state_dict(), "optimizer": job.optimizer.state_dict(), "balancer": job.balancer.state_dict()}


@scenario
def refusals():
    for function in attempts():
        RESULTS[function.__name__.replace("_", " ")] = refusal(function)


@scenario
def after_the_fact():
    """A process group that is initialised after the balancer was made."""
    net = Net()
    placed = placement.refuse_unnamed_group
    placement.refuse_unnamed_group = lambda: None
    try:
        balancer = dbk.DBMTL(net.shared(), 3)
    finally:
        placement.refuse_unnamed_group = placed
    (x,) = batches(0, 1)
    RESULTS["unnamed at the step"] = refusal(lambda: balancer(net(x)).backward())
    RESULTS["evaluation needs no other rank"] = [float(evaluate(balancer, net, x))]


@torch.no_grad()
def evaluate(balancer, net, x):
    return balancer(net(x)) if dist.get_rank() == 0 else torch.zeros(())


@scenario
def leave_alone():
    """process_group=False: each rank on its own."""
    torch.manual_seed(dist.get_rank())
    job = Job("single")
    x = torch.randn(6, 7)
    job.step(x)
    RESULTS["left alone"] = {"identical": identical(job.gradients())}


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first_net()
    only = sys.argv[2:]
    for function in SCENARIOS:
        if not only or function.__name__ in only:
            start = time.perf_counter()
            function()
            SECONDS[function.__name__] = time.perf_counter() - start
    if dist.get_rank() == 0:
        Path(sys.argv[1], "results.json").write_text(json.dumps({"results": RESULTS, "seconds": SECONDS}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
