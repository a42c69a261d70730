"""One pass against the gradients of single tasks: what the trunk gets, what the heads get, and the exact form."""

import dbmtl_kernels as dbk
import older
import pytest
import torch
import torch._functorch.config
from zoo import ZOO, K

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)


@pytest.fixture
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def gradients(parameters, losses, weights):
    """sum_t weights[t] * grad log(loss_t + eps), in float64, as one vector."""
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for loss, weight in zip(losses, weights, strict=True):
        grads = torch.autograd.grad((loss + 1e-8).log(), parameters, retain_graph=True, allow_unused=True)
        for out, grad in zip(total, grads, strict=True):
            if grad is not None:
                out += weight * grad.double()
    return torch.cat([x.reshape(-1) for x in total])


def left(parameters):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([x.reshape(-1).double() for x in found])


def close(a, b, tolerance):
    assert (a - b).norm() <= tolerance * b.norm()


@DTYPES
@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
@pytest.mark.usefixtures("default")
@pytest.mark.filterwarnings("error")
def test_trunk_and_heads(make, dtype, tolerance):
    torch.manual_seed(3)
    trunk, heads, losses, batch = make()
    shared, own = list(trunk.parameters()), list(heads.parameters())
    one = dbk.OnePassDBMTL(shared, K)
    exact = dbk.DBMTL(shared, K, beta=0.0, state_dtype=dtype)
    for step in range(1, 6):
        x = batch()
        one(losses(x)).backward()
        trunk_grad, heads_grad = left(shared), left(own) if own else None
        for p in shared + own:
            p.grad = None
        close(trunk_grad, gradients(shared, list(losses(x)), one.weights), tolerance)
        if own:
            close(heads_grad, gradients(own, list(losses(x)), [1.0] * K), tolerance)
        if step in (1, 2, 4):  # all were measured
            exact(losses(x)).backward()
            close(trunk_grad, left(shared), tolerance)
            for p in shared + own:
                p.grad = None
    assert one.step == 5


@pytest.mark.parametrize("scale", ["max", "mean", "median", "min", 2.5])
def test_every_scale(scale):
    trunk, _, losses, batch = ZOO[0]()
    shared, x = list(trunk.parameters()), batch()
    dbk.OnePassDBMTL(shared, K, scale=scale)(losses(x)).backward()
    found = left(shared)
    for p in shared:
        p.grad = None
    dbk.DBMTL(shared, K, beta=0.0, scale=scale)(losses(x)).backward()
    close(found, left(shared), 2e-6)


@older.compiled_is_seen
def test_a_model_compiled_as_a_whole_is_taken_by_the_exact_form():
    trunk, heads, losses, batch = ZOO[0]()
    shared, x = list(trunk.parameters()), batch()
    model = torch.compile(losses, backend="aot_eager")
    one = dbk.OnePassDBMTL(shared, K)
    with torch._functorch.config.patch(donated_buffer=False):
        with pytest.warns(RuntimeWarning, match="one compiled model"):
            one(model(x)).backward()
        with pytest.raises(ValueError, match="one compiled model"):
            dbk.OnePassDBMTL(shared, K, strict=True)(model(x))
    close(left(shared), gradients(shared, losses(x), one.weights), 2e-6)
    close(left(list(heads.parameters())), gradients(list(heads.parameters()), losses(x), [1.0] * K), 2e-6)


def test_a_compiled_trunk():
    trunk, heads, losses, batch = ZOO[0]()
    shared, x = list(trunk.parameters()), batch()
    before = torch._functorch.config.donated_buffer
    torch._functorch.config.donated_buffer = False
    try:
        trunk.compile(backend="aot_eager")
        one = dbk.OnePassDBMTL(shared, K)
        for _ in range(3):
            for p in (*shared, *heads.parameters()):
                p.grad = None
            one(losses(x)).backward()
        close(left(shared), gradients(shared, losses(x), one.weights), 2e-6)
        close(left(list(heads.parameters())), gradients(list(heads.parameters()), losses(x), [1.0] * K), 2e-6)
    finally:
        torch._functorch.config.donated_buffer = before
