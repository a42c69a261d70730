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


class AbsArchitecture(nn.Module):
    """What LibMTL's architectures give a weighting."""

    def __init__(self, task_name, encoder, decoders, rep_grad, multi_input, device):
        super().__init__()
        self.task_name, self.task_num = task_name, len(task_name)
        self.rep_grad, self.multi_input, self.device = rep_grad, multi_input, device
        self.encoder, self.decoders = encoder, decoders

    def forward(self, inputs, task_name=None):
        shared = self.encoder(inputs)
        names = self.task_name if task_name is None else [task_name]
        return {name: self.decoders[name](shared) for name in names}

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
    """With a parameter that nobody uses and one that is used now and then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.sometimes = nn.Parameter(torch.ones(16))
        self.never = nn.Parameter(torch.ones(3))
        self.use = True

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        return torch.tanh(x * self.sometimes if self.use else x)


class Trainer:
    """LibMTL's way with a model: built by inheritance, init_param, .to(device), zeros kept in .grad."""

    def __init__(self, weighting, architecture=AbsArchitecture, rep_grad=False, multi_input=False, **weight_args):
        class MTLmodel(architecture, weighting):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.init_param()

        torch.manual_seed(3)
        decoders = nn.ModuleDict({name: nn.Linear(16, t + 1) for t, name in enumerate(TASKS)})
        self.device = torch.device("cpu")
        self.model = MTLmodel(
            task_name=TASKS,
            encoder=Encoder(),
            decoders=decoders,
            rep_grad=rep_grad,
            multi_input=multi_input,
            device=self.device,
        ).to(self.device)
        self.multi_input, self.weight_args = multi_input, weight_args
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, weight_decay=1e-5)

    def losses(self, step):
        generator = torch.Generator().manual_seed(step)
        dtype = next(self.model.parameters()).dtype
        out = torch.zeros(len(TASKS), dtype=dtype)
        x = torch.randn(5, 8, generator=generator).to(dtype)
        for t, name in enumerate(TASKS):
            if self.multi_input:
                x = torch.randn(5, 8, generator=generator).to(dtype)
                prediction = self.model(x, name)[name]
            else:
                prediction = self.model(x)[name]
            out[t] = (prediction - t).square().mean() * 10.0 ** (t - 1)
        return out

    def step(self, step, **changes):
        losses = self.losses(step)
        self.optimizer.zero_grad(set_to_none=False)
        weights = self.model.backward(losses, **{**self.weight_args, **changes})
        self.optimizer.step()
        return losses.detach(), weights


def pair(double=True, **options):
    trainers = [Trainer(weighting, **options) for weighting in (libmtl.DB_MTL, PlainWeighting)]
    for trainer in trainers:
        if double:
            trainer.model.double()
    return trainers


def assert_close(ours, theirs, rtol):
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=rtol, atol=rtol, err_msg=name)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            np.testing.assert_allclose(
                p.grad, q.grad, rtol=rtol, atol=rtol * float(q.grad.abs().max()) + 1e-30, err_msg=name
            )


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.9, 0.5), (0.5, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("double", "rtol"), [(True, 1e-9), (False, 1e-3)])
def test_twenty_steps_as_the_authors(double, rtol, beta, sigma, multi_input):
    """Parameters, heads included, and .grad; in float32 Adam makes much of small differences."""
    ours, theirs = pair(double, multi_input=multi_input, DB_beta=beta, DB_beta_sigma=sigma)
    for step in range(20):
        for trainer in (ours, theirs):
            trainer.model.encoder.use = step not in (5, 6)
        (losses, weights), (expected, _) = ours.step(step), theirs.step(step)
        np.testing.assert_allclose(losses, expected, rtol=rtol)
        assert isinstance(weights, np.ndarray)
        assert weights.dtype == np.float64
        assert weights.tolist() == [1.0, 1.0, 1.0]
        assert_close(ours, theirs, rtol)
    assert ours.model.encoder.never.grad is None


def test_float32_gradients_of_single_steps():
    """Both from the same parameters in every step, so that nothing adds up but the state."""
    ours, theirs = pair(double=False, DB_beta=0.9, DB_beta_sigma=0.5)
    for step in range(20):
        ours.model.load_state_dict(theirs.model.state_dict())
        ours.step(step)
        theirs.step(step)
        for (name, p), q in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
            if p.grad is not None:
                scale = float(q[1].grad.abs().max()) + 1e-30
                np.testing.assert_allclose(p.grad / scale, q[1].grad / scale, atol=1e-5, err_msg=name)


def test_beta_may_change_from_step_to_step():
    ours, theirs = pair()
    for step in range(20):
        arguments = {"DB_beta": (0.9, 0.1, 0.5)[step % 3], "DB_beta_sigma": 0.1 * (step % 4), "unknown": 1}
        ours.step(step, **arguments)
        theirs.step(step, **arguments)
        assert_close(ours, theirs, 1e-9)


def test_a_frozen_layer_thawed_later():
    ours, theirs = pair(DB_beta=0.9, DB_beta_sigma=0.5)
    for trainer in (ours, theirs):
        trainer.model.encoder.second.requires_grad_(False)
    for step in range(10):
        if step == 4:
            for trainer in (ours, theirs):
                trainer.model.encoder.second.requires_grad_(True)
        ours.step(step)
        theirs.step(step)
        assert ours.model.encoder.second.weight.requires_grad == (step >= 4)
        assert_close(ours, theirs, 1e-9)


def test_a_diverged_task_does_not_end_the_run():
    """Each loss in a graph of its own: in the one graph of a tensor an inf reaches all tasks."""
    ours, _ = pair(DB_beta=0.9, DB_beta_sigma=0.5)
    ours.step(0)
    apart = [loss * (float("inf") if t == 1 else 1.0) for t, loss in enumerate(ours.losses(1))]
    ours.optimizer.zero_grad(set_to_none=False)
    ours.model.backward(apart, **ours.weight_args)
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.model.get_share_params())
    assert ours.model.balancer.nonfinite_steps.tolist() == [0, 1, 0]


def test_refusals():
    trainer = Trainer(libmtl.DB_MTL, rep_grad=True, DB_beta=0.9, DB_beta_sigma=0.0)
    with pytest.raises(ValueError, match="rep_grad=True is not supported"):
        trainer.step(0)
    trainer = Trainer(libmtl.DB_MTL)
    with pytest.raises(TypeError, match="DB_beta"):
        trainer.step(0)
    for arguments, message in (((1.0, 0.0), "beta must be in"), ((0.5, -1.0), "beta_sigma must be")):
        with pytest.raises(ValueError, match=message):
            trainer.step(0, DB_beta=arguments[0], DB_beta_sigma=arguments[1])
    arguments = {"DB_beta": 0.5, "DB_beta_sigma": 0.0}
    with pytest.raises(ValueError, match="expected 3 losses"):
        trainer.model.backward(trainer.losses(0)[:2], **arguments)
    with pytest.raises(ValueError, match="the loss of task 1 is -"):
        trainer.model.backward(trainer.losses(0) * torch.tensor([1.0, -1.0, 1.0]), **arguments)
    trainer.step(0, **arguments)
    trainer.model.encoder.second = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match="call init_param"):
        trainer.step(1, **arguments)
    trainer.model.init_param()
    trainer.step(1, **arguments)
    assert trainer.model.balancer.step == 1


def test_the_models_state_dict_is_as_without_us_and_the_engines_resumes():
    plain = nn.ModuleDict({"encoder": Encoder(), "decoders": nn.ModuleDict({n: nn.Linear(16, 1) for n in TASKS})})
    ours, other = (Trainer(libmtl.DB_MTL, DB_beta=0.9, DB_beta_sigma=0.5) for _ in range(2))
    for step in range(3):
        ours.step(step)
    assert ours.model.state_dict().keys() == plain.state_dict().keys()
    other.step(0)  # makes the engine
    other.model.load_state_dict(ours.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    other.model.balancer.load_state_dict(copy.deepcopy(ours.model.balancer.state_dict()))
    for step in range(3, 6):
        ours.step(step)
        other.step(step)
    assert_same_state(ours.model.state_dict(), other.model.state_dict())
    assert_same_state(ours.model.balancer.state_dict(), other.model.balancer.state_dict())


def test_a_copied_model_trains_on_alone():
    ours = Trainer(libmtl.DB_MTL, DB_beta=0.9, DB_beta_sigma=0.5)
    ours.step(0)
    copied = copy.deepcopy(ours)
    before = copy.deepcopy(ours.model.state_dict())
    copied.step(1)
    assert_same_state(ours.model.state_dict(), before)
    ours.step(1)
    assert_same_state(ours.model.state_dict(), copied.model.state_dict())


def test_register(monkeypatch):
    package, weighting = types.ModuleType("LibMTL"), types.ModuleType("LibMTL.weighting")
    package.weighting = weighting
    weighting.EW, weighting.DB_MTL, weighting.__all__ = object, object, ["EW"]
    monkeypatch.setitem(sys.modules, "LibMTL", package)
    monkeypatch.setitem(sys.modules, "LibMTL.weighting", weighting)
    for _ in range(2):
        libmtl.register()
        assert weighting.__dict__["DB_MTL"] is libmtl.DB_MTL
        assert weighting.__all__ == ["EW", "DB_MTL"]
    trainer = Trainer(weighting.__dict__["DB_MTL"], DB_beta=0.9, DB_beta_sigma=0.5)
    trainer.step(0)
    assert trainer.model.balancer.step == 1


def test_register_without_libmtl(monkeypatch):
    monkeypatch.setitem(sys.modules, "LibMTL", None)
    with pytest.raises(ImportError, match="needs LibMTL"):
        libmtl.register()


def test_a_model_that_supplies_no_more_than_it_must():
    class Model(libmtl.DB_MTL):
        def __init__(self):
            super().__init__()
            self.task_num, self.device = 2, torch.device("cpu")
            self.p = nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)

        def get_share_params(self):
            return self.parameters()

    model = Model()
    model.init_param()
    for _ in range(2):
        weights = model.backward(torch.stack([model.p.sum(), model.p.square().sum()]), DB_beta=0.5, DB_beta_sigma=0.0)
    assert weights.tolist() == [1.0, 1.0]
    assert model.p.grad is not None
    assert [p.requires_grad for p in (model.p, model.frozen, model.quantised)] == [True, False, False]
