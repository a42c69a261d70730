"""A graph that was compiled for one backward pass, and comes from Inductor's cache on disk: PyTorch asks nothing."""

import os
import subprocess
import sys

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn


class CompiledFunction(torch.autograd.Function):
    """Its node has the name of one that stands for a compiled graph; the first backward overwrites what it saved."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        found = grad @ weight.t(), x.t() @ grad
        if CompiledFunction.overwrites:
            x.data.zero_()
        return found


@pytest.mark.parametrize("form", [dbk.DBMTL, dbk.OnePassDBMTL])
def test_a_graph_that_overwrites_what_later_passes_need_is_refused(form):
    weight, heads = nn.Parameter(torch.randn(4, 3)), [nn.Linear(3, 1) for _ in range(3)]
    balancer = form([weight], 3)

    def step():
        z = CompiledFunction.apply(torch.randn(5, 4).requires_grad_(), weight)
        balancer([head(z).square().mean() for head in heads]).backward()

    CompiledFunction.overwrites = False
    step()
    before = weight.grad.clone()
    CompiledFunction.overwrites = True
    with pytest.raises(RuntimeError, match=r"comes from Inductor's cache on disk.*fx_graph_cache = False"):
        step()
    assert torch.equal(weight.grad, before)


FROM_THE_CACHE = """
import torch, dbmtl_kernels as dbk
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
heads = [nn.Linear(128, 1) for _ in range(3)]
for again in range(2):
    z = torch.compile(net)(torch.randn(8, 3, 8, 8))
    losses = [head(z).square().mean() for head in heads]
    if again:
        dbk.DBMTL(net.parameters(), 3)(losses).backward()
    else:  # a first process trains on the sum, and fills the cache
        sum(losses).backward()
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
"""


@pytest.mark.slow
def test_a_graph_of_inductors_cache_that_was_compiled_for_one_pass(tmp_path):
    command = [sys.executable, "-c", FROM_THE_CACHE]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Or PyTorch has mended it, and nothing is overwritten.
    assert done.returncode == 0 or "comes from Inductor's cache on disk" in done.stderr, done.stderr
    both = "donated_buffer = torch._inductor.config.fx_graph_cache = False"
    remedy = FROM_THE_CACHE.replace("donated_buffer = False", both)
    subprocess.run([sys.executable, "-c", remedy], env=environment, check=True)
