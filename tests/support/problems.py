"""Small problems, and their task gradients by autograd, for the tests of the balancer."""

import dbmtl_kernels as dbk
import numpy as np
import torch

EPS = 1e-8


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def state_of(balancer):
    """The K x P state, where the public interface does not show it."""
    return balancer._engine.rows


def rows_of(balancer):
    """(K, P) in float64: the rows without padding, parameters in the order given."""
    buffer = state_of(balancer)
    return torch.cat([buffer.rows[:, o : o + n] for o, n in buffer.layout.segments.tolist()], dim=1).double().numpy()


def make(*params, num_tasks=2, **options):
    return dbk.DBMTL(params, num_tasks, **{"state_dtype": torch.float64, "beta_sigma": 0.0, **options})


def quadratics(*params, num_tasks=2):
    """Positive losses that all parameters take part in."""
    return [sum(((p - t) * (1 + 3 * t)).square().sum() for p in params) + 0.5 for t in range(num_tasks)]


def overflowing(loss, *_):
    """The same loss, finite, whose gradient is not."""
    loss = loss.clone()
    loss.register_hook(lambda grad: grad * torch.inf)
    return loss


def flat_gradients(losses, params, log=True):
    rows = []
    for loss in losses:
        value = torch.log(loss + EPS) if log else loss
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(grads, params, strict=True)]
            )
        )
    return torch.stack(rows).double().numpy()


def flat_grad(params):
    return torch.cat([p.grad.reshape(-1) for p in params]).double().numpy()


def entries(state, prefix=""):
    """A nested state_dict as one dict of its leaves."""
    out = {}
    for key, value in state.items():
        out |= entries(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def assert_same_state(state, other):
    """Bit for bit."""
    state, other = entries(state), entries(other)
    assert state.keys() == other.keys()
    for key, value in state.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


def close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
