"""Two ranks of OnePassDBMTL; the second is killed within a step. The first writes the error that it sees."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import dbmtl_kernels as dbk
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import K, Model

folder, kind = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", timeout=timedelta(seconds=10))
rank, model, steps = dist.get_rank(), Model(), 0


def forward(x):
    """Its losses, of this rank's part."""
    global steps
    losses, steps = wrapped(x.chunk(2)[rank]), steps + 1
    if rank == 1 and steps == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses


try:
    if kind == "sharded":
        for layer in (model.trunk[0], model.trunk[2], *model.heads, model):
            fully_shard(layer)
        wrapped, group = model, None
    else:
        wrapped, group = DistributedDataParallel(model), dist.group.WORLD
    model.train_on(dbk.OnePassDBMTL(model.trunk, K, process_group=group), forward, lambda x: x)
except Exception as error:
    (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(3)
