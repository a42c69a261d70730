"""What the engine holds beyond the model and one task's .grad, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, re, resource, sys
import torch
import dbmtl_kernels as dbk

K, P, layers = 4, 20_000_000, 5

def peak():
    if sys.platform == "linux":  # ru_maxrss would begin with the size of the process that started this one
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

params = [torch.nn.Parameter(torch.randn(P // layers)) for _ in range(layers)]
targets = [torch.randn(P // layers) for _ in range(K)]

def losses():
    return [sum(torch.dot(p, t) for p in params).square() + 1 for t in targets]

def clear():
    for p in params:
        p.grad = None

dbk.balance_(torch.randn(2, 10), torch.zeros(2, 10))  # the library is loaded
for _ in range(6):  # the bare passes, one task's .grad at a time, until malloc has settled
    for loss in losses():
        loss.backward()
        clear()
before = peak()
balancer = dbk.DBMTL(params, K)
peaks = []
for step in range(6):
    balancer(losses()).backward()
    clear()
    peaks.append(peak() - before)
print(json.dumps({"growth": peaks[-1], "after_two": peaks[1], "budget": (K * P + P) * 4}))
"""


@pytest.mark.slow
def test_growth_is_the_state_and_one_balanced_gradient_and_ends_there():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc gives large blocks back at once
    command = [sys.executable, "-c", PROGRAM]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert measured["growth"] <= 1.05 * measured["budget"]
    assert measured["growth"] >= 0.5 * measured["budget"]  # else nothing was measured
    assert measured["growth"] - measured["after_two"] <= 0.02 * measured["budget"]
