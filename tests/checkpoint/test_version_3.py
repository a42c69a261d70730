"""A state_dict saved before the rooms (commit a36a204) loads, and training goes on with the same bits.

`state_version_3.pt` was written there by ``python tests/checkpoint/test_version_3.py``. Gradients are the constants by
which a loss multiplies the parameters, so that no bit depends on the machine.
"""

from pathlib import Path

import dbmtl_kernels as dbk
import pytest
import torch

FILE = Path(__file__).with_name("state_version_3.pt")
SHAPES = ((5, 7), (3,), (2, 3, 2, 2))
CASES = {
    "fp32": (torch.float32, {"beta": 0.9}),
    "fp64": (torch.float64, {"beta": 0.9, "state_dtype": torch.float64}),
    "mean, constant beta": (torch.float32, {"beta": 0.5, "beta_sigma": 0.0, "scale": "mean"}),
    "bf16 state": (torch.float32, {"beta": 0.9, "state_dtype": torch.bfloat16}),
    "gradnorm": (torch.float32, {"weighting": dbk.GradNorm}),
}


def make(case):
    dtype, options = CASES[case]
    parameters = [torch.full(shape, 0.5, dtype=dtype, requires_grad=True) for shape in SHAPES]
    parameters[2] = parameters[2].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.SGD(parameters, lr=0.125)
    if "weighting" in options:
        balancer = dbk.GradientBalancer(parameters, 3, weighting=dbk.GradNorm(3), beta=0.75)
    else:
        balancer = dbk.DBMTL(parameters, 3, log_transform=False, **options)
    balancer.attach(optimizer)
    return parameters, optimizer, balancer


def backward(parameters, balancer, number):
    """One backward of a step; task t multiplies parameter i by numbers in eighths."""
    losses = []
    for task in range(3):
        terms = []
        for index, p in enumerate(parameters):
            numbers = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
            factor = ((numbers * (7 + index) + 5 * task + 3 * number) % 33 - 16) / 8 + (1 if task == number % 3 else 0)
            terms.append((p * factor).sum())
        losses.append(torch.stack(terms).sum() * 2.0**-task)
    balancer.backward(losses)


def run(parameters, optimizer, balancer, numbers):
    """Steps of two backwards each; ends in the middle of one."""
    for number in numbers:
        backward(parameters, balancer, number)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_goes_on(case):
    saved = torch.load(FILE, weights_only=True)[case]
    parameters, optimizer, balancer = make(case)
    with torch.no_grad():
        for p, value, grad in zip(parameters, saved["parameters"], saved["grads"], strict=True):
            p.copy_(value)
            p.grad = grad
    balancer.load_state_dict(saved["state"])
    assert balancer.step == 3
    run(parameters, optimizer, balancer, range(5, 10))
    backward(parameters, balancer, 10)
    exact = case != "bf16 state"  # rounded to nearest now, stochastically then
    rtol = 0.0 if exact else 2.0**-6
    for p, value, grad in zip(parameters, saved["final"], saved["final_grads"], strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=rtol, atol=rtol)
        torch.testing.assert_close(p.grad, grad, rtol=rtol, atol=rtol)
    torch.testing.assert_close(balancer.norms, saved["norms"], rtol=rtol, atol=0.0)


if __name__ == "__main__":
    out = {}
    for name in CASES:
        mine = make(name)
        run(*mine, range(5))
        saved = {
            "parameters": [p.detach().clone() for p in mine[0]],
            "grads": [p.grad.clone() for p in mine[0]],
            "state": mine[2].state_dict(),
        }
        torch.save(saved, FILE)  # a copy, as the run goes on
        saved = torch.load(FILE, weights_only=True)
        run(*mine, range(5, 10))
        backward(mine[0], mine[2], 10)
        final = {"final": [p.detach() for p in mine[0]], "final_grads": [p.grad for p in mine[0]]}
        out[name] = {**saved, **final, "norms": mine[2].norms}
    torch.save(out, FILE)
