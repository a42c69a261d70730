"""Pickles, deep copies, saved modules and spawned processes go on as the original does, and share nothing with it."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import dbmtl_kernels as dbk
import pytest
import torch
from problems import assert_same_state, state_of
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Net(nn.Module):
    """A balancer that is part of its model."""

    def __init__(self, whole=False, **options):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.balancer = dbk.DBMTL(self.trunk if whole else self.trunk.parameters(), 3, **options)

    def losses(self, x):
        z = self.trunk(x)
        return [(head(z) - t).square().mean() for t, head in enumerate(self.heads)]

    def backward(self, x, tasks=(0, 1, 2)):
        self.zero_grad()
        losses = self.losses(x)
        self.balancer([losses[t] for t in tasks], tasks=list(tasks)).backward()


def saved(net):
    torch.save(net, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def deep(net):
    twin = copy.deepcopy(net)
    twin.balancer.load_state_dict(net.balancer.state_dict())
    return twin


WAYS = {"pickle": lambda net: pickle.loads(pickle.dumps(net)), "torch.save": saved, "deepcopy": deep}
KINDS = {
    "plain": {},
    "module": {"whole": True},
    "bf16": {"state_dtype": torch.bfloat16},
    "float64": {"state_dtype": torch.float64, "beta_sigma": 0.0},
    "capturable": {"capturable": True},
    "eager": {"backend": "eager"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_bit_for_bit(way, kind):
    """In the middle of training; of the middle of a step too, whose tasks wait for a balance."""
    net, xs = Net(**KINDS[kind]), torch.randn(6, 4, 6)
    for x in xs[:2]:
        net.backward(x)
    with net.balancer.task(1):
        dbk.log_transform(net.losses(xs[2])[1]).backward()
    twin = WAYS[way](net)
    storages = {p.untyped_storage().data_ptr() for each in (net, twin) for p in each.parameters()}
    assert len(storages) == 2 * len(list(net.parameters()))
    assert twin.balancer._engine.rows.rows.data_ptr() != net.balancer._engine.rows.rows.data_ptr()
    assert_same_state(net.balancer.state_dict(), twin.balancer.state_dict())
    for each in (net, twin):
        each.zero_grad()
        each.balancer.balance()
    for x in xs[3:]:
        for each in (net, twin):
            each.backward(x)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert_same_state(net.balancer.state_dict(), twin.balancer.state_dict())
    net.backward(xs[0], tasks=(0, 2))  # alone
    assert not torch.equal(net.balancer.norms, twin.balancer.norms)


def test_gradients_follow_the_batch_after_a_pickle():
    """Views that do not alias the flat tensor any more would hold what the first batch gave, for ever."""
    net = Net()
    net.backward(torch.randn(4, 6))
    back = pickle.loads(pickle.dumps(net))
    seen = []
    for _ in range(2):
        back.backward(torch.randn(4, 6))
        seen.append(back.trunk[0].weight.grad.clone())
    assert not torch.equal(*seen)


def test_a_frozen_copy_can_be_copied_again_and_thawed():
    net = Net()
    net.backward(torch.randn(4, 6))
    averaged = AveragedModel(net)
    averaged.requires_grad_(False)
    again = pickle.loads(pickle.dumps(copy.deepcopy(averaged))).module
    assert again.balancer.shared_parameters[0] is again.trunk[0].weight
    assert again.balancer.step == 0
    again.requires_grad_(True)
    again.backward(torch.randn(4, 6))
    assert again.trunk[0].weight.grad is not None


def test_a_deep_copy_is_not_attached_costs_nothing_and_says_so_when_it_trains():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.balancer.attach(optimizer)
    net.backward(torch.randn(4, 6))
    twin = copy.deepcopy(net)
    assert not twin.balancer._engine.attached
    assert not state_of(twin.balancer).allocated
    assert twin.balancer.norms.tolist() == [0.0] * 3
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.balancer.attach(own)
    with pytest.warns(RuntimeWarning, match=r"deep copy.*load_state_dict\(original.state_dict\(\)\)"):
        twin.backward(torch.randn(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(twin)).backward(torch.randn(4, 6))  # has trained: its averages are its own
    fresh = copy.deepcopy(Net())  # nothing to lose, nothing to say
    fresh.backward(torch.randn(4, 6))
    assert net.balancer._engine.attached == [optimizer]


def test_shallow_copies_share_parameters_and_no_rows():
    net = Net()
    net.backward(torch.randn(4, 6))
    other = copy.copy(net.balancer)
    assert other.shared_parameters[0] is net.trunk[0].weight
    before = state_of(net.balancer).rows.clone()
    net.zero_grad()
    other.backward(net.losses(torch.randn(4, 6)))
    assert torch.equal(state_of(net.balancer).rows, before)


def test_options_attributes_and_weightings_are_copied():
    p = torch.randn(5, requires_grad=True)
    balancer = dbk.GradientBalancer(
        [p], 2, weighting=dbk.GradNorm(2), beta=0.3, nonfinite="skip", zero_gradients="count"
    )
    balancer.note = ["mine"]
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert type(twin) is dbk.GradientBalancer
        assert (twin.beta, twin.eps, twin.note) == (0.3, balancer.eps, ["mine"])
        assert twin._recipe == balancer._recipe
        assert twin.weighting is not balancer.weighting
    assert pickle.loads(pickle.dumps(dbk.DBMTL([p], 2, scale="mean"))).scale == "mean"


def in_another_process(net, x, results):
    """The parameters are shared, as torch.multiprocessing has it; the rows are not."""
    for _ in range(3):
        net.backward(x)
    results.put(net.balancer.step)


@pytest.mark.slow
def test_a_spawned_process_has_rows_of_its_own():
    net, x = Net(), torch.randn(4, 6)
    net.backward(x)
    rows = state_of(net.balancer).rows.clone()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=in_another_process, args=(net, x, results))
    process.start()
    assert results.get() == 4
    process.join()
    assert torch.equal(state_of(net.balancer).rows, rows)
    assert net.balancer.step == 1


def test_an_old_balancer_lets_its_rows_go_while_the_optimizer_lives():
    """A notebook's cell run again."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rows = []
    for _ in range(3):
        net.balancer = dbk.DBMTL(net.trunk.parameters(), 3)
        net.balancer.attach(optimizer)
        net.backward(torch.randn(4, 6))
        rows.append(weakref.ref(state_of(net.balancer).rows))
        optimizer.step()
    gc.collect()
    assert [row() is not None for row in rows] == [False, False, True]
    assert len(optimizer._optimizer_step_post_hooks) == 1
    balancer = weakref.ref(net.balancer)
    del net.balancer
    gc.collect()
    assert balancer() is None
    assert not optimizer._optimizer_step_post_hooks
