"""Memory of a step with a TorchJD weighting: GradientBalancer against TorchJD's backward and jac_to_grad."""

import json
import os
import subprocess
import sys

import pytest

K, P = 4, 2_500_000

PROGRAM = """
import json, re, resource, sys
import torch
import dbmtl_kernels as dbk
from torchjd.aggregation import UPGrad, UPGradWeighting
from torchjd.autojac import backward, jac_to_grad

contender, K, P, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 5

def peak():
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def setting(numel):
    params = [torch.nn.Parameter(torch.randn(numel // layers)) for _ in range(layers)]
    targets = [torch.randn(numel // layers) for _ in range(K)]
    return params, lambda: [sum(torch.dot(p, t) for p in params).square() + 1 for t in targets]

def clear(params):
    for p in params:
        p.grad = None

def steps(params, losses):
    balancer = dbk.GradientBalancer(params, K, weighting=UPGradWeighting()) if contender == "ours" else None
    for _ in range(3):
        if balancer is not None:
            balancer(losses()).backward()
        else:
            backward(losses(), inputs=params)
            jac_to_grad(params, UPGrad(), optimize_gramian_computation=contender == "gramian")
        clear(params)

steps(*setting(100))  # everything is imported and loaded
params, losses = setting(P)
for _ in range(6):  # the bare passes, one task's .grad at a time
    for loss in losses():
        loss.backward()
        clear(params)
before = peak()
steps(params, losses)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_one_matrix_where_the_jac_path_holds_two():
    """Beyond the model and one task's gradient, in units of K x P float32."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # as in test_memory.py
    growth = {}
    for contender in ("ours", "torchjd", "gramian"):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, contender, str(K), str(P)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        growth[contender] = json.loads(done.stdout) / (K * P * 4)
    print(growth)
    assert 0.5 <= growth["ours"] <= 1.05 * (K + 1) / K
    assert growth["torchjd"] >= 1.6
    assert growth["ours"] <= 0.7 * growth["torchjd"]
    assert growth["ours"] <= growth["gramian"]
