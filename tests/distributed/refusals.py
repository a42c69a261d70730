"""What several ranks must not do, and are told so: each attempt is expected to raise on every rank."""

import pickle

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from job import Job, Net, batches, mesh_of, shard
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint


def attempts():
    """Functions to call one after another on every rank."""
    rank = dist.get_rank()
    (x,) = batches(0, 1)

    def outside_no_sync():
        job = Job("ddp")
        job.balancer(job.forward(job.part(x))).backward()

    def by_task_outside_no_sync():
        job = Job("ddp")
        losses = job.forward(job.part(x))
        with job.balancer.task(0):
            dbk.log_transform(losses[0]).backward()

    def unnamed():
        dbk.DBMTL(Net().shared(), 3)

    def not_a_group():
        dbk.DBMTL(Net().shared(), 3, process_group=4)

    def other_tasks():
        job = Job("ddp")
        job.step(x, tasks=[0] if rank == 2 else [0, 1])

    def other_task_contexts():
        job = Job("ddp")
        job.step(x, tasks=[rank % 2], by_task=True)

    def other_heads():
        job = Job("ddp")
        with job.no_sync():
            losses = job.forward(job.part(x))
        if rank == 1:
            losses[2] = losses[0] * 1.0
        job.balancer(losses).backward()

    def re_entrant():
        job = Job("ddp")
        net, part = Net(), job.part(x).requires_grad_()
        balancer = dbk.DBMTL(net.shared(), 1, process_group=dist.group.WORLD)
        z = net.trunk(part) * net.gain
        balancer([checkpoint(net.heads[1], z, use_reentrant=True).square().mean() + 0.1]).backward()

    def no_log():
        job = Job("ddp")
        with job.no_sync():
            losses = job.forward(job.part(x))
            with job.balancer.task(0):
                losses[0].backward()

    def negative():
        job = Job("ddp")
        with job.no_sync():
            losses = job.forward(job.part(x))
            job.balancer([losses[0], -losses[1] if rank < 3 else losses[1], losses[2]])

    def heads_of_equal_shape():
        job = Job("ddp")
        with job.no_sync():
            losses = job.forward(job.part(x))
        missing = 1 + rank % 2
        losses[missing] = losses[0] * 1.0
        job.balancer(losses).backward()

    def no_head_on_one_rank():
        net = Net()
        balancer = dbk.DBMTL(net.shared(), 1, process_group=dist.group.WORLD)
        z = net.trunk(x) * net.gain
        balancer([(z if rank == 1 else net.heads[0](z)).square().mean()]).backward()

    def unknown_heads():
        net = Net()
        balancer = dbk.DBMTL(net.shared(), 3, process_group=dist.group.WORLD, log_transform=False)
        with balancer.task(0):
            net(x)[0].backward()

    def task_outside_no_sync():
        job = Job("ddp")
        with job.no_sync():
            job.step(x)
        with job.balancer.task(0):
            dbk.log_transform(job.forward(job.part(x))[0]).backward()

    def evaluated_in_between():
        job = Job("ddp")
        losses = job.forward(job.part(x))
        with torch.no_grad():
            job.forward(x)
        job.balancer(losses).backward()

    def before_fully_shard():
        net = Net()
        balancer = dbk.DBMTL(net.shared(), 3, process_group=dist.group.WORLD)
        shard(net, mesh_of(dist.get_world_size()))
        balancer(net(x)).backward()

    def false_and_sharded():
        Job("fsdp", process_group=False)

    def held_back():
        job = Job("fsdp")
        job.net.set_requires_gradient_sync(False)
        job.step(x)

    def other_balancers():
        dbk.DBMTL(Net(95 if rank == 3 else 96).shared(), 3, process_group=dist.group.WORLD)

    def fsdp1():
        net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)
        dbk.DBMTL([p for p in net.parameters() if p.numel()], 3, process_group=dist.group.WORLD)

    def pickled_replicas():
        pickle.dumps(Job("ddp").balancer)

    def pickled_shards():
        pickle.dumps(Job("fsdp").balancer)

    def plain_among_two_dimensions():
        net = Net()
        shard(net, mesh_of(2, dist.get_world_size() // 2))
        dbk.DBMTL([*net.trunk.parameters(), nn.Parameter(torch.ones(1))], 3)

    return (
        outside_no_sync, by_task_outside_no_sync, unnamed, not_a_group, other_tasks, other_task_contexts, other_heads,
        re_entrant, no_log, negative, plain_among_two_dimensions,
        heads_of_equal_shape, no_head_on_one_rank, unknown_heads, task_outside_no_sync, evaluated_in_between,
        before_fully_shard, false_and_sharded, held_back, other_balancers, fsdp1, pickled_replicas, pickled_shards,
    )  # fmt: skip
