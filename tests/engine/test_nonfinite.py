"""Gradients that are not finite; a state saved in the middle of a step."""

import copy

import oracle
import pytest
import torch
from problems import assert_same_state, close, flat_gradients, leaf, make, quadratics, state_of


def poisoned(p, poison):
    good, bad = quadratics(p)
    return [good, bad * torch.tensor(poison, dtype=torch.float64)]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nonfinite_task_heals(poison):
    p = leaf(6)
    balancer = make(p, beta=0.5)
    balancer(quadratics(p)).backward()
    row = state_of(balancer).rows[0].clone()
    p.grad = None
    balancer(poisoned(p, poison)).backward()
    grads = flat_gradients(quadratics(p), [p])
    expected, _, _ = oracle.balance(grads[:1], row[None, :6].numpy(), 0.5)
    close(p.grad.numpy(), expected, rtol=1e-7)  # the oracle leaves a single task unscaled: eps is not in it
    assert balancer.nonfinite_steps.tolist() == [0, 1]
    assert balancer.weights[1] == 0
    assert not torch.isfinite(balancer.norms[1])
    assert torch.isfinite(state_of(balancer).rows).all()
    p.grad = None
    balancer(quadratics(p)).backward()
    close(state_of(balancer).rows[1, :6].numpy(), 0.5 * flat_gradients(quadratics(p), [p])[1])
    assert torch.isfinite(p.grad).all()
    assert balancer.nonfinite_steps.tolist() == [0, 1]


def test_state_dict_in_the_middle_of_an_accumulated_step():
    def run(interrupt):
        torch.manual_seed(5)
        p = leaf(6)
        balancer = make(p, beta=0.5)
        optimizer = torch.optim.SGD([p], lr=0.1)
        balancer.attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                balancer([x * (1 + micro) for x in quadratics(p)]).backward()
                if interrupt and step == 1 and micro == 1:
                    state = copy.deepcopy(balancer.state_dict())
                    balancer = make(p, beta=0.5)
                    balancer.load_state_dict(state)
                    optimizer = torch.optim.SGD([p], lr=0.1)
                    balancer.attach(optimizer)
            optimizer.step()
        return p.detach(), balancer.state_dict()

    (p, state), (q, other) = run(False), run(True)
    assert torch.equal(p, q)
    assert_same_state(state, other)
