"""What a monitor says of a step, against NumPy; loggers of all kinds."""

import copy

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import close, flat_gradients, leaf, make, overflowing, quadratics, state_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter


def opposed(p, directions):
    """Losses whose gradients are multiples of the given directions."""
    return [(p * torch.tensor(d, dtype=p.dtype)).sum().exp() for d in directions]


def cosines(rows):
    norms = np.linalg.norm(rows, axis=1)
    return rows @ rows.T / np.outer(norms, norms)


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_against_numpy(num_tasks):
    params = [leaf(40), leaf(3, 7)]
    balancer = make(*params, num_tasks=num_tasks, beta=0.5)
    monitor = balancer.monitor()
    rows = np.zeros((num_tasks, 61))
    for step in (1, 2, 3):
        targets = torch.randn(num_tasks, 61, dtype=torch.float64)
        losses = [
            sum((p - t.view_as(p)).square().sum() for p, t in zip(params, target.split([40, 21]), strict=True))
            for target in targets
        ]
        rows = 0.5 * rows + 0.5 * flat_gradients(losses, params)
        balancer(losses).backward()
        expected = cosines(rows)
        close(monitor.gramian.numpy(), rows @ rows.T)
        close(monitor.cosine.numpy(), expected)
        close(monitor.norms.numpy(), np.linalg.norm(rows, axis=1))
        assert int(monitor.conflicts) == (expected[np.triu_indices(num_tasks, 1)] < 0).sum()
        assert monitor.step == step
        assert torch.equal(monitor.weights, balancer.weights)
        assert monitor.nonfinite_steps.tolist() == [0] * num_tasks


def test_conflicts_and_a_zero_gradient():
    p = leaf(2)
    balancer = make(p, num_tasks=4, beta=0.0, keep_rows=True)
    monitor = balancer.monitor()
    balancer(opposed(p, [(1.0, 0.0), (-1.0, 0.1), (0.0, 0.0), (0.0, -2.0)])).backward()
    cosine = monitor.cosine
    assert cosine[2].tolist() == [0.0] * 4
    assert cosine.diagonal().tolist() == [1.0, 1.0, 0.0, 1.0]
    assert monitor.conflicts.dtype == torch.int64
    assert monitor.conflicts.shape == ()
    assert int(monitor.conflicts) == 2  # 0 and 1, 1 and 3
    p.grad = None
    balancer(opposed(p, [(1.0, 0.0), (1.0, 0.0), (2.0, 1e-9), (3.0, 0.0)])).backward()
    assert int(monitor.conflicts) == 0
    assert float(monitor.cosine.max()) <= 1.0


def test_float32_rows_of_great_and_small_norms():
    """Norms whose product float32 could not hold; beyond, the Gramian itself overflows and says so."""
    p = leaf(2, dtype=torch.float32)
    balancer = dbk.DBMTL([p], 3, beta=0.0, log_transform=False, keep_rows=True)
    monitor = balancer.monitor()
    balancer([(p * s).sum() for s in (1e-15, -1e18, 3e18)]).backward()
    close(monitor.cosine.numpy(), np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1.0]]), rtol=1e-6)
    p.grad = None
    balancer([(p * s).sum() for s in (1.0, -1.0, 1e25)]).backward()
    assert monitor.cosine.isnan().tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_a_task_that_is_not_finite():
    p = leaf(6)
    balancer = make(p, num_tasks=3, beta=0.5)
    monitor = balancer.monitor()
    balancer.backward(quadratics(p, num_tasks=3))
    scalars, counts = monitor.scalars(), balancer.nonfinite_steps
    losses = quadratics(p, num_tasks=3)
    balancer([losses[0], overflowing(losses[1]), losses[2]]).backward()
    assert scalars["nonfinite_steps/1"] == 0  # what was read stays
    assert counts.tolist() == [0, 0, 0]
    assert monitor.nonfinite_steps.tolist() == [0, 1, 0]
    assert monitor.weights[1] == 0.0
    assert not monitor.norms[1].isfinite()
    assert monitor.cosine[1].tolist() == [0.0, 0.0, 0.0]
    numbers = monitor.as_dict(gramian=True)
    assert numbers["nonfinite_steps/1"] == 1.0
    assert not np.isfinite(numbers["norm/1"])
    assert np.isfinite(numbers["cosine/0-2"])


@pytest.mark.parametrize("capturable", [False, True])
def test_the_gramian_is_that_of_the_rows_as_they_are(capturable):
    """Read once per step; a new one after a backward, a task, a load or a change of tasks."""
    p = leaf(6)
    balancer, optimizer = make(p, beta=0.5, capturable=capturable), torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    monitor = balancer.monitor()

    def check():
        rows = state_of(balancer).rows.numpy()
        close(monitor.gramian.numpy(), rows @ rows.T)
        monitor.gramian.fill_(7.0)  # a copy
        close(monitor.gramian.numpy(), rows @ rows.T)
        kept = monitor._gramian[1]
        _ = monitor.gramian
        assert (monitor._gramian[1] is kept) != capturable  # replays of a CUDA graph would go unseen
        assert monitor.as_dict()["step"] == monitor.step == balancer.step

    balancer(quadratics(p)).backward()
    check()
    state = copy.deepcopy(balancer.state_dict())
    balancer([3 * x for x in quadratics(p)]).backward()
    check()
    with balancer.task(1):
        dbk.log_transform((p - 7).square().sum()).backward()
        check()
    check()
    balancer.balance()
    check()
    balancer.load_state_dict(state)
    check()
    p.grad = None
    balancer(quadratics(p)).backward()
    optimizer.step()
    balancer.add_task()
    assert monitor.gramian.shape == (3, 3)
    check()


class Reads(TorchDispatchMode):
    """Counts what would wait for a device: a number taken out of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_until_it_is_read():
    p = leaf(6)
    balancer = make(p)
    balancer(quadratics(p)).backward()
    monitor = balancer.monitor()
    with Reads() as reads:
        _ = monitor.norms, monitor.weights, monitor.gramian, monitor.cosine, monitor.conflicts, monitor.nonfinite_steps
        scalars = monitor.scalars(gramian=True)
        assert reads.count == 0
        assert float(scalars["norm/0"]) > 0
        assert reads.count == 1
    assert {name: float(x) for name, x in scalars.items()} == monitor.as_dict(gramian=True)


def test_as_dict():
    p = leaf(6)
    balancer = make(p, num_tasks=3)
    monitor = balancer.monitor()
    for _ in range(2):
        p.grad = None
        balancer(quadratics(p, num_tasks=3)).backward()
    numbers = monitor.as_dict("b/", ["depth", "normal", "edge"], gramian=True)
    assert all(type(x) is float for x in numbers.values())
    assert numbers["b/step"] == 2.0
    for t, name in enumerate(("depth", "normal", "edge")):
        assert numbers[f"b/norm/{name}"] == float(balancer.norms[t])
        assert numbers[f"b/weight/{name}"] == float(balancer.weights[t])
        assert numbers[f"b/nonfinite_steps/{name}"] == 0.0
    assert numbers["b/cosine/depth-edge"] == float(monitor.cosine[0, 2])
    assert numbers["b/cosine/normal-edge"] == float(monitor.cosine[1, 2])
    assert numbers["b/conflicts"] == float(monitor.conflicts)
    losses = [numbers[f"b/loss/{name}"] for name in ("depth", "normal", "edge")]
    assert losses == balancer.losses.tolist()
    assert numbers["b/loss"] == pytest.approx(sum(losses))
    assert len(numbers) == 1 + 9 + 4 + 1 + 3
    assert set(monitor.as_dict()) == {"step", "loss"} | {
        f"{what}/{t}" for what in ("norm", "weight", "nonfinite_steps", "loss") for t in range(3)
    }


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_names_must_be_one_for_each_task(names):
    balancer = make(leaf(6))
    for function in (balancer.monitor().as_dict, balancer.monitor().scalars):
        with pytest.raises(ValueError, match=r"names must be 2 different names.*'a'"):
            function(names=names)


def test_tensorboard(tmp_path):
    p = leaf(6)
    balancer = make(p)
    monitor = balancer.monitor()
    expected = []
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            p.grad = None
            balancer([(step + 1) * x for x in quadratics(p)]).backward()
            p.data.mul_(0.9)
            monitor.write(writer, names=["a", "b"], gramian=True)
            monitor.write(writer, step=100 + step, prefix="other/")
            expected.append(monitor.as_dict("balancer/", ["a", "b"], gramian=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(expected[0]) < set(events.Tags()["scalars"])
    for name in expected[0]:
        written = events.Scalars(name)
        assert [event.step for event in written] == [1, 2, 3]
        assert [event.value for event in written] == pytest.approx([numbers[name] for numbers in expected], rel=1e-6)
    assert [event.step for event in events.Scalars("other/norm/0")] == [100, 101, 102]
    assert "other/conflicts" not in events.Tags()["scalars"]


@pytest.mark.parametrize("scale", ["max", 3.0])
@pytest.mark.parametrize("keep_rows", [True, False])
def test_a_task_whose_gradient_is_zero_shows_no_weight(scale, keep_rows):
    """And alpha / (0 + eps) in the state, with which .grad is what it was."""
    p = leaf(3)
    balancer = make(p, num_tasks=3, beta=0.0, scale=scale, zero_gradients="count", keep_rows=keep_rows)
    balancer.backward([(p - 3.0).square().sum(), (p * 0.0).sum() + 1.0, (p + 1.0).square().sum()])
    assert balancer.norms[1] == 0.0
    shown = balancer.monitor().as_dict()
    assert shown["weight/1"] == balancer.weights[1] == balancer.monitor().scalars()["weight/1"] == 0.0
    assert (balancer.weights[[0, 2]] > 0.0).all()
    assert torch.equal(balancer.weights[[0, 2]], state_of(balancer).stats.weights[[0, 2]])


def test_a_weight_that_another_weighting_gave_to_a_zero_gradient_is_shown():
    p = leaf(3)
    balancer = dbk.GradientBalancer([p], 2, weighting=dbk.EqualWeights(), zero_gradients="count")
    balancer.backward([(p - 3.0).square().sum(), (p * 0.0).sum() + 1.0])
    assert balancer.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("num_tasks", [16, 17, 500])
def test_a_logger_gets_every_pair_of_few_tasks_and_a_summary_of_each_of_many(num_tasks):
    p = leaf(7)
    balancer = make(p, num_tasks=num_tasks, beta=0.5)
    directions = torch.randn(num_tasks, 7, dtype=torch.float64)
    balancer.backward([(p * d).sum().exp() for d in directions])
    monitor = balancer.monitor()
    numbers, cosine = monitor.as_dict(gramian=True), cosines(directions.numpy())
    assert {name: float(x) for name, x in monitor.scalars(gramian=True).items()} == numbers
    assert numbers["conflicts"] == (cosine[np.triu_indices(num_tasks, 1)] < 0).sum()
    pairs = [name for name in numbers if name.startswith("cosine/")]
    if num_tasks <= 16:
        assert len(pairs) == num_tasks * (num_tasks - 1) // 2
        assert len(numbers) == 4 * num_tasks + 3 + len(pairs)
        return
    assert len(numbers) == 6 * num_tasks + 3
    others = cosine[~np.eye(num_tasks, dtype=bool)].reshape(num_tasks, -1)
    close([numbers[f"cosine_mean/{t}"] for t in range(num_tasks)], others.mean(1), 1e-6)
    close([numbers[f"cosine_min/{t}"] for t in range(num_tasks)], others.min(1), 1e-6)


def test_a_finite_norm_beyond_float32_is_told_as_the_largest():
    p = torch.ones(4, requires_grad=True)
    balancer = dbk.DBMTL([p], 2, beta=0.0, keep_rows=True, log_transform=False)
    balancer.backward([(p * torch.tensor([3e38, -3e38, 3e38, -3e38])).sum(), p.sum()])
    assert balancer.norms.tolist() == [torch.finfo(torch.float32).max, 2.0]
    assert balancer.nonfinite_steps.tolist() == [0, 0]
