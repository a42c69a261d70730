"""Parameters whose gradients have another dtype (``p.grad_dtype``): balanced, and given in the dtype autograd gives."""

import copy

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.rows import dtensors
from torch import nn

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Wide(torch.autograd.Function):
    """A gradient that is wider than its parameter, as a kernel of somebody's may make it."""

    @staticmethod
    def forward(ctx, x):
        return x.float()

    @staticmethod
    def backward(ctx, grad):
        return grad


def parameters(*kinds):
    """(dtype, grad_dtype) of each; "" leaves it alone."""
    out = []
    for number, (dtype, wanted) in enumerate(kinds):
        p = nn.Parameter(torch.linspace(-1, 2, 6 + number).to(dtype))
        if wanted != "":
            p.grad_dtype = wanted
        out.append(p)
    return out


def losses(params):
    wide = [Wide.apply(p) if p.dtype in (BF16, F16) else p.float() for p in params]
    return [sum((x - 3).square().sum() for x in wide) + 1, sum((x + 2).square().sum() for x in wide) + 10]


def dtypes_of_autograd(params):
    sum(losses(params)).backward()
    found = [p.grad.dtype for p in params]
    for p in params:
        p.grad = None
    return found


KINDS = {
    "wider": [(F32, ""), (BF16, F32)],
    "any": [(F32, None), (BF16, None), (F16, F16)],
    "some": [(BF16, F32), (BF16, ""), (BF16, None)],
    "narrower": [(F32, F16), (F32, "")],
    "double": [(F32, F64), (F16, F32)],
}
FORMS = {
    "rows": lambda params: dbk.DBMTL(params, 2, beta=0.5),
    "one row": lambda params: dbk.DBMTL(params, 2, beta=0.0),
    "Gramian": lambda params: dbk.GradientBalancer(params, 2, weighting=dbk.EqualWeights(), log_transform=True),
    "one pass": lambda params: dbk.OnePassDBMTL(params, 2),
    "eager": lambda params: dbk.DBMTL(params, 2, beta=0.5, backend="eager"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kinds", KINDS)
def test_gradients_are_balanced_and_have_the_dtype_of_autograd(kinds, form):
    """Compared with parameters of the widest dtype, whose gradients are rounded in the end."""
    params = parameters(*KINDS[kinds])
    wide = [nn.Parameter(p.detach().to(F64 if kinds == "double" else F32)) for p in params]
    wanted = dtypes_of_autograd(params)
    ours, theirs = FORMS[form](params), FORMS[form](wide)
    for _ in range(3):
        for balancer, some in ((ours, params), (theirs, wide)):
            for p in some:
                p.grad = None
            balancer(losses(some)).backward()
        assert [p.grad.dtype for p in params] == wanted
        tolerance = 0.02 if BF16 in wanted else 4e-3 if F16 in wanted else 1e-6
        for p, q in zip(params, wide, strict=True):
            torch.testing.assert_close(
                p.grad.to(q.dtype), q.grad, rtol=tolerance, atol=tolerance * float(q.grad.norm())
            )
    assert ours.step == 3


def test_float32_gradients_of_bfloat16_parameters_are_not_rounded():
    """The bits of float32 parameters, in the rows and in .grad."""
    params = parameters((BF16, F32), (BF16, None))
    wide = [nn.Parameter(p.detach().float()) for p in params]
    for some in (params, wide):
        dbk.DBMTL(some, 2)(losses(some)).backward()
    assert [p.grad.dtype for p in params] == [F32, F32]
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, wide, strict=True))


def test_a_second_backward_of_a_step_a_regulariser_and_a_frozen_one():
    params = parameters((BF16, F32), (BF16, ""))
    balancer = dbk.DBMTL(params, 2)
    optimizer = torch.optim.SGD(params, lr=0.1)
    balancer.attach(optimizer)
    balancer(losses(params)).backward()
    once = [p.grad.clone() for p in params]
    balancer(losses(params)).backward()
    for p, grad in zip(params, once, strict=True):  # twice the gradient of one batch has the direction of once
        cosine = torch.nn.functional.cosine_similarity(p.grad.float(), grad.float(), dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-2)
    twice = [p.grad.clone() for p in params]
    (params[0].float().sum() * 8).backward()
    balancer(losses(params)).backward()  # the regulariser's part stays
    assert float((params[0].grad - twice[0]).mean()) == pytest.approx(8.0, abs=float(twice[0].abs().max()) * 0.6)
    for p in params:
        p.grad = None
    with balancer.no_update():
        balancer.backward(losses(params))
    assert [p.grad.dtype for p in params] == [F32, BF16]
    optimizer.step()
    found = torch.autograd.grad(balancer(losses(params)), params)
    assert [grad.dtype for grad in found] == [F32, BF16]


def test_rows_and_checkpoints_do_not_depend_on_it():
    plain, named = parameters((BF16, ""), (BF16, "")), parameters((BF16, F32), (BF16, ""))
    balancers = [dbk.DBMTL(params, 2) for params in (plain, named)]
    for balancer, params in zip(balancers, (plain, named), strict=True):
        balancer(losses(params)).backward()
    state = copy.deepcopy(balancers[0].state_dict())
    balancers[1].load_state_dict(state)
    balancers[1](losses(named)).backward()
    assert [p.grad.dtype for p in named] == [F32, BF16]


@pytest.mark.parametrize("one_row", [False, True])
def test_parts_on_several_devices(one_row):
    params = parameters((BF16, F32), (F32, ""), (BF16, ""), (F32, F16))
    key = dtensors.placement_key
    places = {id(p): number % 2 for number, p in enumerate(params)}
    dtensors.placement_key = lambda p: places[id(p)]
    try:
        balancer = dbk.DBMTL(params, 2, beta=0.0 if one_row else 0.5)
    finally:
        dtensors.placement_key = key
    assert len(balancer._engine.rows.parts) == 2
    balancer.backward(losses(params))
    assert [p.grad.dtype for p in params] == [F32, F32, BF16, F16]


def test_one_that_was_changed_since_is_named_before_anything_is_fed():
    params = parameters((BF16, ""), (F32, ""))
    balancer = dbk.DBMTL(params, 2)
    params[0].grad_dtype = F32
    with pytest.raises(RuntimeError, match=r"grad_dtype .*rebind"):
        balancer(losses(params)).backward()
    assert balancer.step == 0
    balancer.rebind(params)
    balancer(losses(params)).backward()
    assert params[0].grad.dtype == F32


def test_a_dtype_in_which_nothing_can_be_balanced_is_refused():
    params = parameters((BF16, torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="grad_dtype"):
        dbk.DBMTL(params, 2)
