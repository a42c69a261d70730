"""Load what 4 ranks saved after step 4 on as many as there are, and train to step 8 as they did."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from job import Job, load

FOLDER = Path(sys.argv[1])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for kind in ("ddp", "fsdp", "hsdp"):
        if kind == "hsdp" and dist.get_world_size() == 1:
            results[kind] = {}
            continue
        job = Job(kind)
        load(job, FOLDER / f"dcp {kind}")
        job.train(4, 8)
        expected, norms = torch.load(FOLDER / f"straight {kind}.pt")
        results[kind] = {
            "difference": float((job.parameters() - expected).abs().max()),
            "norms": float((job.balancer.norms - norms).abs().max() / norms.max()),
        }
    if dist.get_rank() == 0:
        (FOLDER / f"fewer {dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
