"""Run by test_fork.py: a child forked after training in its parent, at sizes where PyTorch alone uses one thread.

Prints what became of each way of going on there: [way, "the same bits", "other bits" or "hangs"].
"""

import hashlib
import json
import os
import select
import signal
import sys

import dbmtl_kernels as dbk
import torch

SECONDS = 30
SIZES = [100] * 400  # below PyTorch's grain each, above it together
parameters = [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in SIZES]


def losses(factors=(1.0, 1.0, 1.0)):
    return [sum((w - t).square().sum() for w in parameters) * f + 1 for t, f in enumerate(factors)]


def trained(balancer, factors=(1.0, 1.0, 1.0)):
    for p in parameters:
        p.grad = None
    balancer(losses(factors)).backward()
    return [*(p.grad for p in parameters), balancer.norms]


def loaded():
    again = dbk.DBMTL(parameters, 3)
    again.load_state_dict(first.state_dict())
    again.add_task()
    again.remove_task(3)
    return trained(again)


first = dbk.DBMTL(parameters, 3)
WAYS = {
    "the same balancer": lambda: trained(first),
    "a task sits out": lambda: trained(first, (1.0, torch.nan, 1.0)),
    "a new balancer": lambda: trained(dbk.DBMTL(parameters, 3)),
    "one row": lambda: trained(dbk.DBMTL(parameters, 3, beta=0.0)),
    "one pass": lambda: trained(dbk.OnePassDBMTL(parameters, 3)),
    "a Gramian": lambda: trained(dbk.GradientBalancer(parameters, 3, weighting=dbk.GradNorm(3))),
    "a checkpoint": loaded,
    "eager": lambda: trained(dbk.DBMTL(parameters, 3, backend="eager")),
    "the op": lambda: dbk.balance_(matrix, ema),  # no copy of it here: PyTorch would use its threads
}


def digest(tensors):
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest().encode()


def in_a_child(way):
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writable, digest(WAYS[way]()))
        os._exit(0)
    os.close(writable)
    ready, _, _ = select.select([readable], [], [], SECONDS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return os.read(readable, 64) if ready else None


matrix, ema = torch.linspace(-1, 1, 120_000).view(3, 40_000), torch.zeros(3, 40_000)
torch.set_num_threads(2)
trained(first)
trained(first)
matrix.exp()  # PyTorch's own threads are there as well
for way in sys.argv[1:] or WAYS:
    found = in_a_child(way)
    what = "hangs" if found is None else "the same bits" if found == digest(WAYS[way]()) else "other bits"
    print(json.dumps([way, what]), flush=True)
print(json.dumps(["threads afterwards", torch.get_num_threads()]))
