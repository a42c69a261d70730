"""What a one-pass balancer keeps: checkpoints, copies, other parameters, the audit; and what it refuses."""

import copy
import pickle
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import K, Setting, each, same


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_bit_for_bit(way):
    setting = Setting(measure_every=3)
    for _ in range(7):
        setting.step()
    twin = Setting(measure_every=3)
    if way == "state_dict":
        for p, q in zip(twin.all, setting.all, strict=True):
            p.data.copy_(q.data)
        twin.balancer.load_state_dict(copy.deepcopy(setting.balancer.state_dict()))
    else:
        both = setting.balancer, setting.trunk, setting.heads
        twin.balancer, trunk, heads = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
        twin.all = [*trunk.parameters(), *heads.parameters()]
        twin.optimizer = torch.optim.SGD(twin.all, lr=1e-3)
        twin.losses = lambda x: each(heads, trunk(x))
        assert twin.balancer.shared_parameters[0] is trunk[0].weight
    for seed in range(8):
        for one in (setting, twin):
            torch.manual_seed(seed)
            one.step()
        assert torch.equal(setting.balancer.weights, twin.balancer.weights)
        assert same(setting.all, twin.all)
    assert twin.balancer.step == 15


def test_states_that_do_not_fit_change_nothing():
    setting = Setting()
    setting.step()
    state = copy.deepcopy(setting.balancer.state_dict())
    exact = dbk.DBMTL(setting.trunk, K)
    with pytest.raises(ValueError, match="version"):
        setting.balancer.load_state_dict(exact.state_dict())
    with pytest.raises(ValueError, match="version"):
        exact.load_state_dict(state)
    levels = {key: value for key, value in state["levels"].items() if key != "turn"}
    with pytest.raises(ValueError, match=r"state_dict\['levels'\]\['turn'\] is missing"):
        setting.balancer.load_state_dict({**state, "levels": levels})
    with pytest.raises(ValueError, match=r"state_dict\['levels'\]\['norms'\]: of shape \(3,\), here of shape \(2,\)"):
        dbk.OnePassDBMTL(setting.trunk, 2).load_state_dict(state)
    after = setting.balancer.state_dict()
    assert torch.equal(after["engine"]["buffer"]["weights"], state["engine"]["buffer"]["weights"])
    assert after["levels"]["step"] == 1


def test_other_parameters():
    setting = Setting()
    setting.step()
    norms = setting.balancer.norms
    setting.trunk[2] = nn.Linear(32, 16)
    setting.balancer.rebind(setting.trunk)
    assert torch.equal(setting.balancer.norms, norms)
    setting.balancer(setting.losses(setting.batch())).backward()
    assert setting.trunk[2].weight.grad is not None


def test_tasks_that_come_and_go():
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    for _ in range(4):
        setting.step(x)
    norms, balancer = setting.balancer.norms, setting.balancer
    assert balancer.add_task() == 3
    head = nn.Linear(16, 1)
    z = setting.trunk(x)
    balancer([*each(setting.heads, z), head(z).square().mean()]).backward()
    assert balancer.norms[:3].tolist() == norms.tolist()
    assert balancer.norms[3].isfinite()
    last = balancer.norms
    with pytest.raises(ValueError, match="-1"):
        balancer.remove_task(-1)
    balancer.remove_task(1)
    z = setting.trunk(x)
    first, _, third = each(setting.heads, z)
    balancer([first, third, head(z).square().mean()]).backward()
    assert balancer.norms.tolist() == last[[0, 2, 3]].tolist()
    assert balancer.weights.argmin() == balancer.norms.argmax()


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_kept_within_a_step(way):
    setting = Setting(measure_every=1)
    setting.balancer.attach(setting.optimizer)
    setting.balancer(setting.losses(setting.batch())).backward()
    twin = Setting(measure_every=1)
    if way == "pickle":
        twin.balancer, twin.trunk, twin.heads = pickle.loads(
            pickle.dumps((setting.balancer, setting.trunk, setting.heads))
        )
        twin.losses = lambda x: each(twin.heads, twin.trunk(x))
        twin.shared = list(twin.trunk.parameters())
        twin.all = [*twin.shared, *twin.heads.parameters()]
        twin.optimizer = torch.optim.SGD(twin.all, lr=1e-3)
    twin.balancer.attach(twin.optimizer)
    for p, q in zip(twin.all, setting.all, strict=True):
        p.data, p.grad = q.data.clone(), q.grad.clone()
    if way == "state_dict":
        twin.balancer.load_state_dict(copy.deepcopy(setting.balancer.state_dict()))
    for seed in range(3):
        for one in (setting, twin):
            torch.manual_seed(seed)
            one.balancer(one.losses(one.batch())).backward()
            one.optimizer.step()
            one.optimizer.zero_grad()
        assert same(setting.all, twin.all)
        assert torch.equal(setting.balancer.weights, twin.balancer.weights)
    assert twin.balancer.step == setting.balancer.step == 3


# --- the audit ----------------------------------------------------------------------------------------------------


def test_the_audit_tells_how_far_weights_were_off():
    setting = Setting(measure_every=2)
    for _ in range(100):
        setting.step()
    audit = setting.balancer.audit
    assert audit.measured == 7 * K + 50 - 6  # of the powers of two all but 1 are even
    assert audit.saved == 100 * (K - 1) - audit.measured
    assert (audit.median > 0).all()
    assert (audit.median <= audit.p90).all()
    assert audit.cosine != audit.cosine
    full = Setting(audit="full")
    for _ in range(100):
        full.step()
    assert 0.5 < full.balancer.audit.cosine <= 1.0 + 1e-6


def test_weights_that_are_far_off_are_said():
    setting = Setting(measure_every=1)
    x = torch.randn(16, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(64):
            losses = setting.losses(x)
            losses[0] = losses[0] ** (1 + 9 * (step // 3 % 2))  # its log has ten times the gradient
            setting.balancer(losses).backward()
    assert [str(one.message)[:57] for one in said] == ["the gradients of task(s) [0] changed in length by more th"]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure_every": 0}, ValueError, "measure_every must be at least 1, got 0"),
        ({"measure_every": 2.0}, TypeError, "measure_every must be an int"),
        ({"scale": "largest"}, ValueError, "scale must be one of"),
        ({"audit": "some"}, ValueError, "audit must be"),
        ({"eps": 0.0}, ValueError, "eps"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        dbk.OnePassDBMTL(nn.Linear(2, 2), K, **options)


def test_calls_that_make_no_sense():
    setting, x = Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    with pytest.raises(ValueError, match="expected 3 losses"):
        setting.balancer(losses[:2])
    with pytest.raises(RuntimeError, match="has no graph"):
        setting.balancer([loss.detach() for loss in losses])
    with pytest.raises(ValueError, match="must be positive"):
        setting.balancer([losses[0] - 1e6, *losses[1:]])
    with pytest.raises(RuntimeError, match=r"OnePassDBMTL has no task\(\)"):
        setting.balancer.task(0)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        setting.balancer(losses).backward(create_graph=True)
    assert all(p.grad is None for p in setting.all)
    assert setting.balancer.step == 0
    with torch.no_grad():
        value = setting.balancer(setting.losses(x))
    torch.testing.assert_close(value, sum(loss.log() for loss in setting.losses(x)), rtol=1e-5, atol=1e-5)


def test_a_reentrant_checkpoint_is_refused_where_it_cannot_be_measured():
    trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(K))
    balancer, x = dbk.OnePassDBMTL(trunk, K), torch.randn(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="re-entrant checkpoint"):
        balancer(each(heads, checkpoint(trunk, x, use_reentrant=True)))
    balancer(each(heads, trunk(x))).backward()
    with pytest.raises(RuntimeError, match="re-entrant checkpoint"):  # looks the same, down to where they meet
        balancer(each(heads, checkpoint(trunk, x, use_reentrant=True)))
    assert balancer.step == 1


def test_a_step_whose_norms_cannot_be_measured_does_not_count():
    setting, x = Setting(), torch.randn(16, 8)
    setting.step(x)
    before = copy.deepcopy(setting.balancer.state_dict())
    losses = setting.losses(x)
    failing = losses[2] * 1.0
    failing.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setting.balancer([*losses[:2], failing]).backward()
    after = setting.balancer.state_dict()
    assert after["levels"]["step"] == before["levels"]["step"] == setting.balancer.step == 1
    assert torch.equal(setting.balancer.weights, before["engine"]["buffer"]["weights"].to(torch.float32))
    setting.step(x)
    assert setting.balancer.step == 2
