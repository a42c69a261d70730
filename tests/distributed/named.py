"""A DistributedDataParallel named as process_group, without ``no_sync()``: two ranks and one process, by torchrun.

named.py FOLDER
"""

import contextlib
import gc
import json
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from dbmtl_kernels.rows import placement
from job import Job, batches, identical
from torch.nn.parallel import DistributedDataParallel

RESULTS = {}


class Named(Job):
    """As a Job of kind "ddp", but that the wrapper is named and nobody calls ``no_sync()``."""

    def __init__(self, find_unused=False, **options):
        super().__init__("ddp", **options)
        self.forward = DistributedDataParallel(self.net, find_unused_parameters=find_unused)
        self.balancer = dbk.DBMTL(self.net.shared(), 3, process_group=self.forward, **options)

    def no_sync(self):
        return contextlib.nullcontext()


def plain(job, x):
    """A step of DistributedDataParallel alone, between balanced ones."""
    job.optimizer.zero_grad()
    (torch.stack(job.forward(job.part(x))).sum() / 1000).backward()
    job.optimizer.step()


def trained(job, how):
    for step, x in enumerate(batches(0, 8)):
        if how == "beside plain steps" and step % 2:
            plain(job, x)
            continue
        job.optimizer.zero_grad()
        if how == "forward before the tasks":
            losses = job.forward(job.part(x))
            for task, loss in enumerate(losses):
                with job.balancer.task(task):
                    dbk.log_transform(loss).backward(retain_graph=task < 2)
        elif how == "evaluated in between":
            balanced = job.balancer(job.forward(job.part(x)))
            with torch.no_grad():
                job.forward(job.part(x))
            job.forward(job.part(x))  # prepared once more, and thrown away
            balanced.backward()
        else:
            job.step(x, by_task=how == "by task", tasks=[[0, 2], [1]][step % 2] if how == "partial" else None)
        job.optimizer.step()
    return job.parameters()


def trainings():
    for how in (
        "whole",
        "by task",
        "partial",
        "forward before the tasks",
        "evaluated in between",
        "beside plain steps",
    ):
        for find_unused in (False, True):
            for options in ({}, {"beta": 0.0}):
                expected, found = trained(Job("single", **options), how), trained(Named(find_unused, **options), how)
                RESULTS[f"{how}, {find_unused}, {options}"] = {
                    "difference": float((expected - found).abs().max()),
                    "moved": float((expected - Job("single").parameters()).abs().max()),
                    "identical": identical(found),
                }


class OfTheTrunk(Named):
    """The wrapper has the shared part alone; heads are found in the graphs."""

    def __init__(self):
        Job.__init__(self, "single")
        self.kind, self.forward = "named", self._losses
        self.wrapper = DistributedDataParallel(self.net.trunk)
        self.balancer = dbk.DBMTL(self.net.shared(), 3, process_group=self.wrapper)

    def _losses(self, x):
        z, heads = self.wrapper(x) * self.net.gain, enumerate(self.net.heads)
        return [((head(z) - (t + 1) * x[:, t : t + 1]).square().mean() + 0.1) * 10**t for t, head in heads]


def part_of_the_model():
    """Heads outside of the wrapper: averaged all the same."""
    for how in ("whole", "by task", "partial"):
        expected, found = (trained(job, how) for job in (Job("single"), OfTheTrunk()))
        RESULTS[f"part of the model, {how}"] = {
            "difference": float((expected - found).abs().max()),
            "moved": float((expected - Job("single").parameters()).abs().max()),
            "identical": identical(found),
        }


def looked_for():
    """How often all objects are looked through, with the wrapper named and with none."""
    real, calls = gc.get_objects, []

    def counted(*args):
        calls.append(1)
        return real(*args)

    placement.gc.get_objects = counted
    try:
        for name, job in (("named", Named()), ("none", Job("ddp"))):
            if name == "none":
                job.forward = job.net
                job.no_sync = contextlib.nullcontext
                gc.collect()
            calls.clear()
            for x in batches(0, 20):
                job.optimizer.zero_grad()
                job.balancer(job.forward(job.part(x))).backward()
            RESULTS[f"looked for, {name}"] = len(calls)
    finally:
        placement.gc.get_objects = real


def made_later():
    """A wrapper that is made after steps without one is found: its forward pass outside of no_sync() is refused."""
    job = Job("ddp")
    job.forward, job.no_sync = job.net, contextlib.nullcontext
    gc.collect()
    job.train(0, 3)
    wrapper = DistributedDataParallel(job.net)
    said = ""
    for x in batches(3, 8):
        job.optimizer.zero_grad()
        with wrapper.no_sync():
            job.balancer(wrapper(job.part(x))).backward()
    try:
        job.balancer(wrapper(job.part(x)))
    except RuntimeError as error:
        said = str(error)
    RESULTS["made later"] = said


def static():
    job = Job("ddp")
    wrapper = DistributedDataParallel(job.net, static_graph=True)
    balancer = dbk.DBMTL(job.net.shared(), 3, process_group=wrapper)
    (x,) = batches(0, 1)
    try:
        balancer(wrapper(job.part(x)))
        RESULTS["static graph"] = ""
    except RuntimeError as error:
        RESULTS["static graph"] = str(error)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainings()
    part_of_the_model()
    looked_for()
    made_later()
    static()
    if dist.get_rank() == 0:
        Path(sys.argv[1], "named.json").write_text(json.dumps(RESULTS))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
