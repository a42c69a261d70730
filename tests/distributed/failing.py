"""Two ranks; the second fails in the second micro-batch of a step, or with one row in the second step. Each writes the
error that it saw.

    failing.py FOLDER "rows" | "one row"
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from job import Job, batches


def main():
    one_row = sys.argv[2] == "one row"
    job = Job("ddp", **({"beta": 0.0} if one_row else {}))
    job.balancer.attach(job.optimizer)
    for n, x in enumerate(batches(0, 2)):
        if one_row:
            job.optimizer.zero_grad()
        with job.no_sync():
            losses = job.forward(job.part(x))
            if n == 1 and dist.get_rank() == 1:
                losses[1].register_hook(lambda grad: 1 / 0)
            job.balancer(losses).backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    try:
        main()
    except Exception as error:
        Path(sys.argv[1], f"{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
