"""A model with uneven parameters and heads, wrapped in each way, and its training: what the ranks of the tests run."""

import contextlib
import copy
import functools

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

NUM_TASKS = 3
PER_RANK = 6


class Net(nn.Module):
    """Parameters of 1, 7 and 33 elements among larger ones; the first of the heads is as large as a layer."""

    def __init__(self, width=96):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, 7),
        )  # fmt: skip
        self.gain = nn.Parameter(torch.ones(1))
        self.heads = nn.ModuleList(
            [nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1)), nn.Linear(7, 1), nn.Linear(7, 1)]
        )

    def forward(self, x):
        z = self.trunk(x) * self.gain
        return [
            ((head(z) - (t + 1) * x[:, t : t + 1]).square().mean() + 0.1) * 10**t for t, head in enumerate(self.heads)
        ]

    def shared(self):
        return [*self.trunk.parameters(), self.gain]


@functools.cache
def first_net(width=96):
    torch.manual_seed(0)
    return Net(width)


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard(net, *meshes):
    """fully_shard every linear layer of the trunk, over these meshes in turn, and the rest over the first."""
    layers = [layer for layer in net.trunk if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        fully_shard(layer, mesh=meshes[i % len(meshes)])
    fully_shard(net, mesh=meshes[0])


class Job:
    """A net, its balancer and its optimizer. Kinds: "single", "ddp", "fsdp", "hsdp", "two meshes"."""

    def __init__(self, kind, width=96, lr=1e-2, **options):
        self.kind = kind
        self.net = self.forward = copy.deepcopy(first_net(width))
        size = dist.get_world_size() if dist.is_initialized() else 1
        if kind == "single":
            options["process_group"] = False
        elif kind == "ddp":
            options["process_group"] = dist.group.WORLD
            self.forward = DistributedDataParallel(self.net)
        elif kind == "fsdp":
            shard(self.net, mesh_of(size))
        elif kind == "hsdp":
            shard(self.net, mesh_of(2, size // 2))
        elif kind == "two meshes":
            both = mesh_of(2, size // 2)
            shard(self.net, mesh_of(size), both)
        self.balancer = dbk.DBMTL(self.net.shared(), NUM_TASKS, **options)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9)

    def part(self, x):
        """This rank's part of a batch."""
        if self.kind == "single":
            return x
        rank, size = dist.get_rank(), dist.get_world_size()
        return x[rank * len(x) // size : (rank + 1) * len(x) // size]

    def no_sync(self):
        return self.forward.no_sync() if self.kind == "ddp" else contextlib.nullcontext()

    def step(self, x, tasks=None, factor=1.0, by_task=False):
        """One backward of the balancer; ``optimizer.step`` is the caller's."""
        with self.no_sync():
            if by_task:  # each with a forward pass of its own
                for task in range(NUM_TASKS) if tasks is None else tasks:
                    with self.balancer.task(task):
                        dbk.log_transform(self.forward(self.part(x))[task]).backward()
                self.balancer.balance()
                return
            losses = self.forward(self.part(x))
            if tasks is None:
                (self.balancer(losses) * factor).backward()
            else:
                (self.balancer([losses[t] for t in tasks], tasks=tasks) * factor).backward()

    def train(self, first, last):
        for x in batches(first, last):
            self.optimizer.zero_grad()
            self.step(x)
            self.optimizer.step()

    def parameters(self):
        """All parameters in one vector, gathered."""
        return torch.cat([whole(p.detach()).reshape(-1) for p in self.net.parameters()])

    def gradients(self):
        return torch.cat([whole(p.grad).reshape(-1) for p in self.net.parameters() if p.grad is not None])


def save(job, path):
    """A checkpoint that any number of ranks can load."""
    net, optimizer = get_state_dict(job.net, job.optimizer)
    dcp.save({"net": net, "optimizer": optimizer, "balancer": job.balancer}, checkpoint_id=path)


def load(job, path):
    net, optimizer = get_state_dict(job.net, job.optimizer)
    loaded = {"net": net, "optimizer": optimizer, "balancer": job.balancer}
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(job.net, job.optimizer, model_state_dict=loaded["net"], optim_state_dict=loaded["optimizer"])


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def batches(first, last, size=4 * PER_RANK):
    for step in range(first, last):
        yield torch.randn(size, 7, generator=torch.Generator().manual_seed(1000 + step))


def identical(x):
    """Whether every rank has the same bits."""
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x.contiguous())
    return all(torch.equal(x.view(torch.uint8), other.view(torch.uint8)) for other in others)
