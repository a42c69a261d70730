"""Load a checkpoint on as many ranks as there are, train on as those did who saved it, and save.

    elsewhere.py FOLDER FIRST LAST [SOURCE]

SOURCE "": what scenarios.py saved after step 4 on 4 ranks; "of N": what this script saved on N ranks.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from job import Job, load, save


def main(folder, first, last, source=""):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    results = {}
    for kind in ("ddp", "fsdp"):
        job = Job(kind)
        load(job, folder / f"{source or 'dcp'} {kind}")
        job.train(first, last)
        if not source:
            save(job, folder / f"of {ranks} {kind}")
        expected = torch.load(folder / f"straight {kind}.pt")[last == 12]
        results[kind] = float((job.parameters() - expected).abs().max())
    if dist.get_rank() == 0:
        (folder / f"{ranks} ranks, {last}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), *sys.argv[4:])
