"""Scripts on several ranks, by torchrun with gloo on this machine, and how a rank leaves."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from problems import state_of

RUN = str(Path(__file__))  # runs a script and leaves as a rank should


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(ranks, script, *arguments, cwd=None, **more):
    """Run a script on several ranks; its output is in the assertion if it fails."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
        str(free_port()), RUN, str(script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def told(parameters, balancer, rows=True):
    """What a rank tells of its training; a collective. Of a balancer that has no ``rows`` less."""
    others = [torch.empty_like(parameters) for _ in range(dist.get_world_size())]
    dist.all_gather(others, parameters)
    found = {
        "identical": all(torch.equal(parameters, other) for other in others),
        "parameters": parameters.tolist(),
        "norms": balancer.norms.tolist(),
        "step": balancer.step,
    }
    if rows:
        found |= {"cosine": balancer.monitor().cosine.tolist(), "rows": state_of(balancer).rows.numel()}
    return found


def leave():
    """End this rank, whose work is done, without taking the interpreter down.

    Gloo's threads may still drop the last reference to a tensor then, and PyTorch aborts where they wait for a GIL that
    is gone ("terminate called without an active exception"; pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
