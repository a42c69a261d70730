"""Counts the bytes that collectives are given in a step, and those held between steps, of every form and wrapper.

counted.py FOLDER: rank 0 writes counted.json, by wrapper and form.
"""

import collections
import gc
import json
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, LAYERS, CLASSES = 128, 4, 8  # whole on 2 and 4 ranks, so that nothing is padded
KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
SMALL = 1024  # bytes: messages of a few numbers a task
EVERY = 3  # of one pass: a step that measures one task is the third


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors given to collectives, whoever calls them: us, DDP or FSDP2."""

    def __init__(self):
        super().__init__()
        self.large, self.small = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            size = max(sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args)
            name = func.__name__.partition(".")[0]
            if name in KINDS and size > SMALL:
                self.large[KINDS[name]] += size
            else:
                self.small += size
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self, num_tasks):
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES, bias=False) for _ in range(num_tasks))

    def forward(self, x):
        z = self.trunk(x)
        return [head(z).square().mean() + t for t, head in enumerate(self.heads)]


def wrapped(wrapper, num_tasks):
    """The net, what its forward pass is called on, and what a balancer is told."""
    torch.manual_seed(0)
    net = Net(num_tasks)
    if wrapper == "DDP":
        model = DistributedDataParallel(net)
        return net, model, {"process_group": model}
    size = dist.get_world_size()
    shape, names = ((size,), ("shard",)) if wrapper == "FSDP2" else ((2, size // 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in net.trunk:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, net, {}


def made(form, net, options):
    shared, num_tasks = net.trunk.parameters(), len(net.heads)
    if form == "plain sum":
        return lambda losses: sum(losses).backward()
    if form == "one pass":
        return dbk.OnePassDBMTL(shared, num_tasks, measure_every=EVERY, **options).backward
    return dbk.DBMTL(shared, num_tasks, **({"beta": 0.0} if form == "one row" else {}), **options).backward


def storages(net):
    """Bytes of the memory that tensors known to Python have, by address.

    The profiler does not see what all threads free.
    """
    gc.collect()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    tensors = [x for x in (*gc.get_objects(), *grads) if issubclass(type(x), torch.Tensor)]
    plain = [getattr(x, "_local_tensor", x) for x in tensors]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in plain}


def counted(wrapper, form, num_tasks):
    """Of a step that measures nothing, of one that measures, and held after steps in which nothing is measured."""
    net, model, options = wrapped(wrapper, num_tasks)
    x = torch.randn(4, WIDTH)
    for _ in range(3):  # DDP makes its buckets anew
        with Collectives():  # Python comes to know these, and they are not the balancer's
            sum(model(x)).backward()
        net.zero_grad()
    found, before = {}, storages(net)
    backward = made(form, net, options)
    for step in range(1, 6):
        net.zero_grad()
        with Collectives() as seen:
            backward(model(x))
        found[step] = dict(seen.large), seen.small
    after = storages(net)
    return {
        "step": found[5][0],
        "measuring": found[3 if wrapper == "DDP" else 4][0],
        "small": max(small for _, small in found.values()),
        "held": sum(size for address, size in after.items() if address not in before),
    }


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wrappers = ("DDP", "FSDP2") if dist.get_world_size() < 4 else ("DDP", "FSDP2", "HSDP")
    k = dist.get_world_size() + 1
    results = [
        [wrapper, form, k, counted(wrapper, form, k)]
        for wrapper in wrappers
        for form in ("plain sum", "one pass", "one row", "rows")
    ]
    if dist.get_rank() == 0:
        sizes = {"P": LAYERS * WIDTH * WIDTH, "H": k * WIDTH * CLASSES, "every": EVERY, "small": SMALL}
        Path(sys.argv[1], "counted.json").write_text(json.dumps([sizes, results]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
