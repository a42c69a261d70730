"""Nothing leaks: memory is flat over hundreds of steps."""

import gc
import re
import weakref
from pathlib import Path

import dbmtl_kernels as dbk
import pytest
import torch

ALIVE = weakref.WeakSet()


class Mark:
    """A hook of a node, and lives as long."""

    def __call__(self, grad):
        return None


def resident():
    status = Path("/proc/self/status")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024 if status.exists() else 0


def live_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def whole(balancer, losses, step, attached):
    balancer(losses).backward()


def micro_batches(balancer, losses, step, attached):
    (balancer(losses, retain_graph=True) / 2).backward()
    (balancer(losses) / 2).backward()


def by_task(balancer, losses, step, attached):
    """One task, two, or all, which are balanced at once."""
    factor = 1.0 + step % 2
    for task in range(1 + step % 3):
        with balancer.task(task, loss_scale=factor):
            (dbk.log_transform(losses[task]) * factor).backward(retain_graph=task < step % 3)
    balancer.balance()


def partial(balancer, losses, step, attached):
    present = [task for task in range(3) if (1 + step % 7) >> task & 1]
    balancer([None, *losses[1:]])  # never backpropagated
    (balancer([losses[task] for task in present], tasks=present) * (1.0 + step % 5)).backward()


def tasks_come_and_go(balancer, losses, step, attached):
    balancer.add_task() if balancer.num_tasks == 3 else balancer.remove_task(step % 4)
    balancer([*losses, losses[0] + losses[1]][: balancer.num_tasks]).backward()


@pytest.mark.slow
@pytest.mark.parametrize("form", [whole, micro_batches, by_task, partial, tasks_come_and_go])
def test_memory_is_flat_over_hundreds_of_steps(form):
    """A graph that stays alive would hold 80 kB a step."""
    p = torch.randn(20, requires_grad=True)
    x = torch.randn(500, 20)
    balancer = dbk.DBMTL([p], 3)
    optimizer = torch.optim.SGD([p], lr=1e-4)
    if attached := form is not whole:
        balancer.attach(optimizer)
    tensors, bytes_held = {}, {}
    for step in range(631):
        optimizer.zero_grad(set_to_none=step % 4 > 1)
        z = (x * p).tanh().square()
        z.register_hook(mark := Mark())
        ALIVE.add(mark)
        form(balancer, [(z - task).square().mean() + 0.1 for task in range(3)], step, attached)
        del z, mark
        assert not ALIVE  # no graph outlives its step
        optimizer.step()
        if step in (210, 630):  # where each form does the same
            tensors[step], bytes_held[step] = live_tensors(), resident()
    assert tensors[630] - tensors[210] < 60  # a leak: 1 in 7 steps at least; other tests' caches come and go
    assert bytes_held[630] - bytes_held[210] < 8 << 20  # a leak: 420 steps of 80 kB, 33 MB
