"""One rank of a run that may be killed: trains to step 30, with a checkpoint every fifth step.

    worker.py FOLDER KILL_AT [KIND]

Rank 2 kills itself with SIGKILL after the forward pass of step KILL_AT (-1: never). A run that finds a checkpoint goes
on from the newest. With a KIND that ends with ", one row" there is one row for all tasks. Each rank writes the bits of
its parameters, or the error it stopped with.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from job import Job, batches, load, save

TIMEOUT = timedelta(seconds=20)
STEPS, EVERY = 30, 5


def main(folder, kill_at, kind):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
    job = Job(kind.removesuffix(", one row"), **({"beta": 0.0} if kind.endswith("one row") else {}))
    saved = sorted(int(path.name) for path in folder.glob("checkpoints/*"))
    first = saved[-1] if saved else 0
    if saved:
        load(job, folder / "checkpoints" / str(first))
    for step, x in enumerate(batches(first, STEPS), first):
        if step > first and step % EVERY == 0 and step != kill_at:
            save(job, folder / "checkpoints" / str(step))
        job.optimizer.zero_grad()
        with job.no_sync():
            losses = job.forward(job.part(x))
            if step == kill_at and rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            job.balancer(losses).backward()
        job.optimizer.step()
    torch.save((first, job.parameters()), folder / f"finished {rank}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        main(folder, int(sys.argv[2]), sys.argv[3])
    except Exception as error:
        (folder / f"error {os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)  # what is left of the process group may wait for the dead
