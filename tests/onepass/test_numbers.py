"""What a one-pass balancer makes of NaN, infinity, and numbers beyond half precision."""

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn
from zoo import K, Setting


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_beyond_half_precision(dtype):
    shared = nn.Parameter(torch.ones(4, dtype=dtype))
    heads = [nn.Parameter(torch.full((4,), x, dtype=dtype)) for x in (1e-3, 1.0)]
    balancer = dbk.OnePassDBMTL([shared], 2, scale=100.0)
    balancer([(shared * head).float().sum().square() + 1.0 for head in heads]).backward()
    assert balancer.weights[0] > 1e4
    assert shared.grad.isfinite().all()
    assert (shared.grad.float().norm() - 200).abs() < 2


def test_a_slope_that_half_precision_cannot_hold_takes_the_exact_form():
    shared, head = (nn.Parameter(torch.ones(4, dtype=torch.float16)) for _ in range(2))
    balancer = dbk.OnePassDBMTL([shared], 2)
    small = ((shared * head).sum() - 4 + 1e-3).square()
    assert 0 < small < 1e-5
    slope = 2 * small.detach().float().sqrt() / (small.detach().float() + 1e-8)
    with pytest.warns(RuntimeWarning, match="does not fit into float16"):
        balancer([small, (shared * 2).sum()]).backward()
    torch.testing.assert_close(head.grad.float(), slope.expand(4), rtol=1e-2, atol=0)
    assert shared.grad.isfinite().all()
    assert balancer.nonfinite_steps.tolist() == [0, 0]


def test_measuring_is_refused_while_a_cuda_graph_is_captured(monkeypatch):
    setting, x = Setting(), torch.randn(16, 8)
    monkeypatch.setattr(setting.balancer._engine.rows, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="norms are due to be measured, and a CUDA graph is being captured"):
        setting.balancer(setting.losses(x)).backward()
    assert setting.balancer.step == 0


# --- NaN where a gradient of zero does not help -------------------------------------------------------------------


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_a_loss_that_is_not_finite_with_a_function_of_ones_own(factor):
    setting, x = Setting(), torch.randn(16, 8)
    targets = [0.0, float("nan"), 1.0]
    seen = []
    for _ in range(3):
        z = setting.trunk(x)
        outputs = [head(z) for head in setting.heads]
        outputs[1].register_hook(lambda grad: seen.append(grad.shape) or grad.clamp(-1, 1))
        losses = [Squared.apply(out - t).mean() for out, t in zip(outputs, targets, strict=True)]
        (setting.balancer(losses) * factor).backward()
    assert seen
    assert all(p.grad.isfinite().all() for p in setting.all)
    assert (setting.heads[1].weight.grad == 0).all()


def test_no_loss_is_finite():
    setting, x = Setting(measure_every=1), torch.randn(16, 8)
    setting.step(x)
    setting.optimizer.zero_grad()
    setting.balancer([loss * float("inf") for loss in setting.losses(x)]).backward()
    assert all((p.grad == 0).all() for p in setting.all)
    assert setting.balancer.nonfinite_steps.tolist() == [1, 1, 1]


def test_losses_of_one_node_one_of_which_is_not_finite():
    shared = nn.Parameter(torch.randn(8, K))
    balancer = dbk.OnePassDBMTL([shared], K)
    x = torch.randn(16, 8)
    balancer((x @ shared - torch.tensor([0.0, float("nan"), 2.0])).square().mean(0)).backward()
    assert shared.grad is None or (shared.grad == 0).all()
