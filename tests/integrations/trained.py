"""What the tests of trainers share: a first state, parameters to compare, and what two ranks have to agree on."""

import json

import pytest
import torch
from problems import assert_same_state, state_of
from torch.distributed.tensor import DTensor


def seeded(make):
    """A module, the same in each call and on each rank; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def parameters(module):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in map(torch.detach, module.parameters())]
    return torch.cat([p.reshape(-1) for p in whole])


def assert_same_training(module, balancer, expected, expected_balancer, first):
    """Bit for bit, and something was learnt."""
    assert not torch.equal(parameters(expected), parameters(first).to(parameters(expected).dtype))
    assert torch.equal(parameters(module), parameters(expected))
    assert_same_state(balancer.state_dict(), expected_balancer.state_dict())


def of_two_ranks(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_a_ranks_part(found, alone, balancer, rows):
    """What `ranks.told` says of a rank, against one process with the whole batch; it holds less than ``rows`` of P, or
    if None has no rows.
    """
    assert found["identical"]
    assert (torch.tensor(found["parameters"]) - parameters(alone)).abs().max() <= 1e-5
    assert found["norms"] == pytest.approx(balancer.norms.tolist(), rel=1e-5)
    assert found["step"] == balancer.step
    if rows is not None:
        torch.testing.assert_close(torch.tensor(found["cosine"]), balancer.monitor().cosine, rtol=0, atol=1e-5)
        assert found["rows"] < rows * state_of(balancer).rows.numel()
