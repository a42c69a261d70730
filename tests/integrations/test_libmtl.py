"""DB_MTL in a stand-in of LibMTL's trainer, against the oracle (PyTorch and NumPy, nothing of ours)."""

import copy
import sys
import types

import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.integrations import libmtl
from problems import assert_same_state
from torch import nn

TASKS = ["class", "depth", "normal"]
BETA = {"DB_beta": 0.9, "DB_beta_sigma": 0.5}


class AbsArchitecture(nn.Module):
    """What LibMTL's architectures give a weighting."""

    def __init__(self, encoder, decoders):
        super().__init__()
        self.task_num, self.encoder, self.decoders = len(decoders), encoder, decoders

    def get_share_params(self):
        return self.encoder.parameters()

    def zero_grad_share_params(self):
        self.encoder.zero_grad(set_to_none=False)


class PlainWeighting(nn.Module):
    """The yardstick: gradients by autograd into the oracle."""

    def init_param(self):
        self.exact = None

    def backward(self, losses, **kwargs):
        shared = list(self.get_share_params())
        rows = []
        for loss in torch.log(losses + 1e-8):
            loss.backward(retain_graph=True)
            rows.append([np.zeros(p.numel()) if p.grad is None else p.grad.double().numpy().flatten() for p in shared])
            self.zero_grad_share_params()
        grads = np.array([np.concatenate(row) for row in rows])
        self.exact = self.exact or oracle.Training(*grads.shape)
        self.exact.beta, self.exact.sigma = kwargs["DB_beta"], kwargs["DB_beta_sigma"]
        out = torch.from_numpy(self.exact.update(grads))
        for p, part in zip(shared, out.split([p.numel() for p in shared]), strict=True):
            if p.grad is not None:
                p.grad = part.view_as(p).to(p.dtype)
        return np.ones(self.task_num)


class Encoder(nn.Module):
    """With a parameter that nobody uses, one that is used now and then, and one that can have no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.sometimes = nn.Parameter(torch.ones(16))
        self.never = nn.Parameter(torch.ones(3))
        self.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
        self.use = True

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        return torch.tanh(x * self.sometimes if self.use else x)


class Trainer:
    """LibMTL's way with a model: built by inheritance, init_param, .to(device), zeros kept in .grad."""

    def __init__(self, weighting, double=False, multi_input=False, **weight_args):
        class MTLmodel(AbsArchitecture, weighting):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.init_param()

        torch.manual_seed(3)
        decoders = nn.ModuleDict({name: nn.Linear(16, t + 1) for t, name in enumerate(TASKS)})
        self.model = MTLmodel(Encoder(), decoders).to(torch.float64 if double else torch.float32)
        self.multi_input, self.weight_args = multi_input, weight_args
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, weight_decay=1e-5)

    def losses(self, step):
        generator = torch.Generator().manual_seed(step)
        dtype = next(self.model.parameters()).dtype
        out = torch.zeros(len(TASKS), dtype=dtype)
        for t, name in enumerate(TASKS):
            if t == 0 or self.multi_input:
                x = torch.randn(5, 8, generator=generator).to(dtype)
            prediction = self.model.decoders[name](self.model.encoder(x))
            out[t] = (prediction - t).square().mean() * 10.0 ** (t - 1)
        return out

    def step(self, step, **changes):
        losses = self.losses(step)
        self.optimizer.zero_grad(set_to_none=False)
        weights = self.model.backward(losses, **{**self.weight_args, **changes})
        self.optimizer.step()
        return losses.detach(), weights


@pytest.mark.parametrize(
    ("betas", "options", "frozen"),  # of each step in turn; the encoder's second layer thaws after so many
    [
        ([(0.9, 0.0)], {}, 0),
        ([(0.9, 0.5)], {"multi_input": True}, 0),
        ([(0.5, 1.0)], {"multi_input": True}, 0),
        ([(0.0, 0.0)], {}, 0),
        ([((0.9, 0.1, 0.5)[step % 3], 0.1 * (step % 4)) for step in range(12)], {}, 0),
        ([(0.9, 0.5)], {}, 4),
        ([(0.9, 0.5)], {"double": False}, 0),
        ([(0.9, 0.5)], {"double": False, "multi_input": True}, 0),
    ],
)
def test_twenty_steps_as_the_authors(betas, options, frozen):
    """Parameters, heads included, and .grad.

    In float32 both start from the same parameters in every step, so that nothing adds up but the state; Adam makes much
    of small differences.
    """
    ours, theirs = (Trainer(weighting, **{"double": True, **options}) for weighting in (libmtl.DB_MTL, PlainWeighting))
    double = options.get("double", True)
    of_parameters, of_gradients = (1e-9, 1e-9) if double else (1e-3, 1e-5)
    for step in range(20):
        beta, sigma = betas[step % len(betas)]
        if not double:
            ours.model.load_state_dict(theirs.model.state_dict())
        results = []
        for trainer in (ours, theirs):
            trainer.model.encoder.use = step not in (5, 6)
            trainer.model.encoder.second.requires_grad_(step >= frozen)
            results.append(trainer.step(step, DB_beta=beta, DB_beta_sigma=sigma, unknown=1))
        (losses, weights), (expected, _) = results
        np.testing.assert_allclose(losses, expected, rtol=of_parameters)
        assert isinstance(weights, np.ndarray)
        assert weights.dtype == np.float64
        assert weights.tolist() == [1.0, 1.0, 1.0]
        for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
            close = np.testing.assert_allclose
            close(p.detach(), q.detach(), rtol=of_parameters, atol=of_parameters, err_msg=name)
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                close(p.grad, q.grad, rtol=0, atol=of_gradients * float(q.grad.abs().max()) + 1e-30, err_msg=name)
        assert ours.model.encoder.second.weight.requires_grad == (step >= frozen)
    assert ours.model.encoder.never.grad is None
    assert not ours.model.encoder.quantised.requires_grad


@pytest.mark.parametrize(
    ("rep_grad", "factors", "arguments", "kind", "message"),
    [
        (True, [1.0, 1.0, 1.0], BETA, ValueError, "rep_grad=True is not supported"),
        (False, [1.0, 1.0, 1.0], {}, TypeError, "DB_beta"),
        (False, [1.0, 1.0, 1.0], {**BETA, "DB_beta": 1.0}, ValueError, "beta must be in"),
        (False, [1.0, 1.0, 1.0], {**BETA, "DB_beta_sigma": -1.0}, ValueError, "beta_sigma must be"),
        (False, [1.0, 1.0], BETA, ValueError, "expected 3 losses"),
        (False, [1.0, -1.0, 1.0], BETA, ValueError, "the loss of task 1 is -"),
    ],
)
def test_refusals(rep_grad, factors, arguments, kind, message):
    trainer = Trainer(libmtl.DB_MTL)
    trainer.model.rep_grad = rep_grad  # a model need not have it
    with pytest.raises(kind, match=message):
        trainer.model.backward(trainer.losses(0)[: len(factors)] * torch.tensor(factors), **arguments)
    trainer.model.rep_grad = False
    trainer.step(0, **BETA)
    assert trainer.model.balancer.step == 1
    trainer.model.encoder.second = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match="call init_param"):
        trainer.step(1, **BETA)
    trainer.model.init_param()
    trainer.step(1, **BETA)
    assert trainer.model.balancer.step == 1


def test_the_models_state_dict_is_as_without_us_and_the_engines_resumes():
    plain = nn.ModuleDict({"encoder": Encoder(), "decoders": nn.ModuleDict({n: nn.Linear(16, 1) for n in TASKS})})
    ours, other = (Trainer(libmtl.DB_MTL, **BETA) for _ in range(2))
    for step in range(3):
        ours.step(step)
    assert ours.model.state_dict().keys() == plain.state_dict().keys()
    other.step(0)  # makes the engine
    for name in ("model", "optimizer"):
        getattr(other, name).load_state_dict(copy.deepcopy(getattr(ours, name).state_dict()))
    other.model.balancer.load_state_dict(copy.deepcopy(ours.model.balancer.state_dict()))
    copied, before = copy.deepcopy(ours), copy.deepcopy(ours.model.state_dict())
    copied.model.balancer.load_state_dict(ours.model.balancer.state_dict())
    for trainer in (copied, other):
        for step in range(3, 6):
            trainer.step(step)
    assert_same_state(ours.model.state_dict(), before)  # the copy trains alone
    for step in range(3, 6):
        ours.step(step)
    assert_same_state(ours.model.state_dict(), copied.model.state_dict())
    assert_same_state(ours.model.state_dict(), other.model.state_dict())
    assert_same_state(ours.model.balancer.state_dict(), other.model.balancer.state_dict())


def test_register(monkeypatch):
    monkeypatch.setitem(sys.modules, "LibMTL", None)
    with pytest.raises(ImportError, match="needs LibMTL"):
        libmtl.register()
    package, weighting = types.ModuleType("LibMTL"), types.ModuleType("LibMTL.weighting")
    package.weighting = weighting
    weighting.EW, weighting.DB_MTL, weighting.__all__ = object, object, ["EW"]
    monkeypatch.setitem(sys.modules, "LibMTL", package)
    monkeypatch.setitem(sys.modules, "LibMTL.weighting", weighting)
    for _ in range(2):
        libmtl.register()
        assert weighting.__dict__["DB_MTL"] is libmtl.DB_MTL
        assert weighting.__all__ == ["EW", "DB_MTL"]
