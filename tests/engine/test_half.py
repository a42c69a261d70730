"""Losses in half precision: 1 / loss may not fit into their dtype; gradients are those of float32 all the same."""

import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from problems import EPS
from torch.utils.checkpoint import checkpoint

F16 = torch.float16


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"zero_gradients": "count"}])
@pytest.mark.parametrize(("size", "scale"), [(1e-5, None), (0.25, 65536.0), (2e-6, 1024.0)])
def test_a_slope_that_does_not_fit_into_the_dtype_of_the_loss(size, scale, options):
    """1 / (loss + eps), times the scale, is beyond 65504; gradients are those of float32."""
    torch.manual_seed(0)
    found = []
    for dtype in (F16, torch.float32):
        p = torch.linspace(0.5, 1.5, 8).requires_grad_()
        heads = [torch.ones(8).requires_grad_() for _ in range(2)]
        balancer = dbk.DBMTL([p], 2, **options)
        losses = [((p * head).square().mean() * size * (1 + t)).to(dtype) for t, head in enumerate(heads)]
        if dtype == torch.float32:  # what float16 made of them
            losses = [loss + (loss.half().float() - loss).detach() for loss in losses]
        loss = balancer(losses)
        (loss if scale is None else loss * scale).backward()
        assert not balancer.nonfinite_steps.any()
        found.append([p.grad, *(head.grad for head in heads), balancer.norms])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)


@pytest.mark.parametrize("named", [False, True])
def test_whoever_gets_a_gradient_gets_it_whole(named):
    """A leaf below the trunk, in a step whose graphs are not searched to their ends."""
    torch.manual_seed(0)
    found = []
    for size in (1e-5, 1.0):
        p, head = torch.linspace(0.5, 1.5, 8).requires_grad_(), torch.ones(8).requires_grad_()
        balancer = dbk.DBMTL([p], 2, beta=0.0, eps=1e-12)
        for _ in range(3):  # the third looks no further than it must
            x = torch.linspace(0.9, 1.1, 8).requires_grad_()
            z = (x * p).square()  # where the graphs of the losses meet
            losses = [(z * weight).mean() * size for weight in (head, 2.0)]
            losses = [loss.to(F16) if size < 1 else loss for loss in losses]
            p.grad = head.grad = None
            balancer(losses).backward(inputs=[p, x, head] if named else None)
        found.append([p.grad, x.grad, head.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


def test_a_head_that_is_hidden_is_told():
    p, head = torch.linspace(0.5, 1.5, 8).requires_grad_(), torch.ones(8).requires_grad_()
    through = lambda z: (z * head).square().mean() * 1e-6  # noqa: E731
    balancer = dbk.DBMTL([p], 1)
    for size, dtype in ((1.0, F16), (1e6, F16), (1.0, torch.float32)):
        loss = (checkpoint(through, p * 2, use_reentrant=True) * size).to(dtype)
        if size == 1.0 and dtype == F16:
            with pytest.raises(RuntimeError, match="a re-entrant checkpoint hides"):
                balancer([loss]).backward()
            assert p.grad is None
            assert head.grad is None
        else:
            balancer([loss]).backward()


def test_one_pass_that_never_passes_infinities_on_takes_the_exact_form_under_a_large_scale():
    torch.manual_seed(0)
    p = torch.linspace(0.5, 1.5, 8).requires_grad_()
    balancer = dbk.OnePassDBMTL([p], 2, nonfinite="skip")
    for step in range(4):
        p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            (balancer([((p - t) ** 2).mean().to(F16) * 0.25 for t in range(2)]) * 65536.0).backward()
        assert bool(p.grad.any()) == (step > 0)  # the first does not know the scale yet
    assert balancer.nonfinite_steps.tolist() == [1, 1]


def test_a_slope_that_fits_has_the_bits_it_had():
    torch.manual_seed(0)
    p = torch.randn(8).half().requires_grad_()
    balancer = dbk.DBMTL([p], 2, beta=0.0)
    balancer.backward([p.square().mean(), (p - 1).square().mean()])
    rows = [
        torch.autograd.grad(x, p, (x.float() + EPS).reciprocal().half())[0]
        for x in (p.square().mean(), (p - 1).square().mean())
    ]
    assert torch.equal(balancer.norms, torch.stack([row.double().norm() for row in rows]).float())


def test_a_slope_beyond_float16_in_a_graph_that_is_not_ours():
    """One pass takes the exact form, and says so; `log_transform` can only say so."""
    p = torch.linspace(0.5, 1.5, 8).requires_grad_()
    heads = [torch.ones(8).requires_grad_() for _ in range(2)]
    losses = lambda: [((p * head).square().mean() * 1e-5 * (1 + t)).half() for t, head in enumerate(heads)]  # noqa: E731
    exact = dbk.DBMTL([p], 2, beta=0.0)
    exact.backward(losses())
    expected, p.grad = p.grad.clone(), None
    with pytest.warns(RuntimeWarning, match="does not fit into float16.*The exact form takes such steps"):
        dbk.OnePassDBMTL([p], 2)(losses()).backward()
    assert torch.equal(p.grad, expected)
    with pytest.raises(ValueError, match="does not fit into float16"):
        dbk.OnePassDBMTL([p], 2, strict=True)(losses())
    with pytest.warns(RuntimeWarning, match="will be inf"):
        dbk.log_transform(losses()[0])
    with pytest.warns(RuntimeWarning, match="will be inf"), exact.paused():
        exact(losses())
