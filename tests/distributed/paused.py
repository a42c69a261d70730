"""2 ranks whose balancer is paused: plain gradients of the whole batch, or a refusal. paused.py FOLDER"""

import contextlib
import json
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from job import NUM_TASKS, Job, batches, first_net, identical


def plain():
    """Of one process with the whole batch; the log is of the mean loss."""
    net = first_net()
    (x,) = batches(0, 1)
    net.zero_grad()
    sum(torch.log(loss + 1e-8) for loss in net(x)).backward()
    return torch.cat([p.grad.reshape(-1) for p in net.parameters()])


def refused(run):
    try:
        run()
    except RuntimeError as error:
        return str(error)
    return ""


def by_task(job, x):
    for task in range(NUM_TASKS):
        with job.balancer.task(task):
            dbk.log_transform(job.forward(job.part(x))[task]).backward()


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results, (x,) = {}, batches(0, 1)
    for kind in ("ddp", "fsdp"):
        job = Job(kind)
        job.balancer.enabled = False
        within = refused(lambda: job.step(x)), refused(lambda: by_task_within(job, x))  # noqa: B023 - called at once
        job.optimizer.zero_grad()
        job.balancer(job.forward(job.part(x))).backward()
        gradients = job.gradients()
        results[kind] = {
            "refused": within if kind == "ddp" else None,
            "difference": float((gradients - plain()).abs().max() / gradients.abs().max()),
            "identical": identical(gradients),
            "step": job.balancer.step,
        }
        job.balancer.enabled = True
        job.train(0, 2)
        results[kind]["goes on"] = job.balancer.step
    if dist.get_rank() == 0:
        (folder / "paused.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def by_task_within(job, x):
    with job.no_sync() if job.kind == "ddp" else contextlib.nullcontext():
        by_task(job, x)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
