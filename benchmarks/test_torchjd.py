"""A step with TorchJD's UPGrad: GradientBalancer against TorchJD's own ways; an MLP trunk of 4.5 M parameters, K=3."""

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.bench import timing
from torch import nn
from torchjd.aggregation import UPGrad, UPGradWeighting
from torchjd.autojac import backward, jac_to_grad, mtl_backward

K, WIDTH, BATCH = 3, 2000, 32


def contenders():
    """A step each; every one returns the gradients it leaves, as one vector."""
    trunk = nn.Sequential(nn.Linear(256, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(K))
    shared, own = list(trunk.parameters()), list(heads.parameters())
    x = torch.randn(BATCH, 256)
    balancer = dbk.GradientBalancer(shared, K, weighting=UPGradWeighting())
    aggregator = UPGrad()

    def features_and_losses():
        for p in (*shared, *own):
            p.grad = None
        z = trunk(x)
        return z, [(head(z) - t).square().mean() for t, head in enumerate(heads)]

    def ours():
        balancer.backward(features_and_losses()[1])

    def torchjd_backward():
        _, losses = features_and_losses()
        backward(losses, inputs=shared, retain_graph=True)
        sum(losses).backward(inputs=own)
        jac_to_grad(shared, aggregator)

    def torchjd_mtl_backward(**options):
        z, losses = features_and_losses()
        mtl_backward(losses, features=z)
        jac_to_grad(shared, aggregator, **options)

    def torchjd_gramian():
        torchjd_mtl_backward(optimize_gramian_computation=True)

    steps = {f.__name__: f for f in (ours, torchjd_backward, torchjd_mtl_backward, torchjd_gramian)}
    return steps, lambda: torch.cat([p.grad.reshape(-1) for p in (*shared, *own)])


def test_a_step_takes_no_longer_than_torchjds():
    torch.set_num_threads(1)  # more would measure who else is on a shared machine
    steps, gradients = contenders()
    found = {}
    for name, step in steps.items():
        step()
        found[name] = gradients()
    largest = found["ours"].abs().max()
    for name, gradient in found.items():  # no speed of a wrong result
        assert (gradient - found["ours"]).abs().max() <= 1e-5 * largest, name
    times = timing.interleaved(steps, rounds=10)
    ratios = {name: timing.ratio(times, name, "ours") for name in steps}
    print({name: round(ratio, 2) for name, ratio in ratios.items()})
    assert min(ratios.values()) >= 1.0
