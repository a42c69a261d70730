"""Steps in which only some tasks take part, and tasks that come and go between steps."""

import copy

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import (
    EPS,
    assert_same_state,
    close,
    flat_gradients,
    leaf,
    make,
    overflowing,
    quadratics,
    rows_of,
    state_of,
)

WAYS = ["None", "tasks=", "tasks= and None", "task()"]


def backward(balancer, losses, tasks, way="tasks=", factor=1.0):
    if way == "None":
        given = [loss if task in tasks else None for task, loss in enumerate(losses)]
        (balancer(given) * factor).backward()
    elif way == "tasks=":
        (balancer([losses[task] for task in tasks], tasks=tasks) * factor).backward()
    elif way == "tasks= and None":
        absent = [task for task in range(len(losses)) if task not in tasks][:1]
        given = [None for _ in absent] + [losses[task] for task in tasks]
        (balancer(given, tasks=[*absent, *tasks]) * factor).backward()
    else:
        for task in tasks:
            with balancer.task(task, loss_scale=factor):
                (dbk.log_transform(losses[task]) * factor).backward()
        balancer.balance()


def step_as_the_oracle(balancer, exact, p, tasks, way, factor):
    """Absent rows keep their bits; a task has a say from its first gradient in a step on."""
    losses, before = quadratics(p, num_tasks=len(exact.rows)), state_of(balancer).rows.clone()
    grads = flat_gradients(losses, [p])
    backward(balancer, losses, tasks, way, factor)
    exact.feed({task: grads[task] for task in tasks}, factor)
    absent = [task for task in range(len(exact.rows)) if task not in tasks]
    assert torch.equal(state_of(balancer).rows[absent], before[absent])
    close(p.grad.numpy(), exact.balance())
    close(rows_of(balancer), exact.rows)
    seen, norms = sorted(exact.seen), np.linalg.norm(exact.rows, axis=1)
    close(balancer.weights[seen].numpy(), norms[seen].max() / (norms[seen] + EPS))
    assert [task for task, weight in enumerate(balancer.weights) if weight != 0] == seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tasks", [[0], [2], [1, 2], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_absent_tasks_keep_their_rows_and_have_no_say(tasks, way, factor):
    p = leaf(6)
    balancer, exact = make(p, num_tasks=4, beta=0.7, beta_sigma=0.5), oracle.Training(4, 6, 0.7, 0.5)
    for present, by, scale in (([0, 1, 2, 3], "None", 1.0), ([0, 1, 2, 3], "None", 1.0), (tasks, way, factor)):
        p.grad = None
        step_as_the_oracle(balancer, exact, p, present, by, scale)
        exact.end()
    assert balancer.step == 3


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_with_different_tasks(way):
    """Attached: a task counts with all its micro-batches."""
    p = leaf(6)
    balancer, exact = make(p, num_tasks=4, beta=0.8, beta_sigma=0.5), oracle.Training(4, 6, 0.8, 0.5)
    optimizer = torch.optim.SGD([p], lr=0.01)
    balancer.attach(optimizer)
    for step, parts in enumerate([([0, 1], [1, 2], [0]), ([2], [2, 3]), ([0, 1, 2, 3], [3], [1])], start=1):
        optimizer.zero_grad()
        for number, tasks in enumerate(parts):
            step_as_the_oracle(balancer, exact, p, tasks, way, 1.0 + number)
        optimizer.step()
        exact.end()
        assert balancer.step == step


def test_a_task_first_seen_at_step_1000():
    """Its row is (1 - beta_k) g, small where beta_k is large; the max-norm weight makes up for that."""
    p = leaf(6)
    balancer, fresh = (make(p, num_tasks=3, beta=0.9, beta_sigma=0.25) for _ in range(2))
    exact = oracle.Training(3, 6, 0.9, 0.25)
    balancer.backward([x / 100 for x in quadratics(p)], tasks=[0, 1])
    p.grad = None
    state = copy.deepcopy(balancer.state_dict())
    state["steps"]["step"] = exact.step = 999
    fresh.load_state_dict(state)
    exact.rows = rows_of(fresh)
    assert (exact.rows[2] == 0).all()
    step_as_the_oracle(fresh, exact, p, [0, 1, 2], "None", 1.0)
    assert fresh.step == 1000
    close(float(fresh.weights[2] * fresh.norms[2]), float(fresh.norms.max()), rtol=1e-6)


def test_the_value_is_the_sum_over_the_tasks_present():
    p = leaf(6)
    balancer = make(p, num_tasks=3)
    losses = quadratics(p, num_tasks=3)
    expected = sum(float(torch.log(losses[task].detach() + EPS)) for task in (0, 2))
    assert float(balancer([losses[2], losses[0]], tasks=[2, 0]).detach()) == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        value = balancer([losses[0], None, losses[2]])
    assert not value.requires_grad
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert balancer.step == 0


@pytest.mark.parametrize(
    ("given", "tasks", "error", "message"),
    [
        ([None, None, None], None, ValueError, "every loss is None"),
        ([None, None], [0, 2], ValueError, "every loss is None"),
        ([], [], ValueError, "at least one task"),
        ([0, 1], None, ValueError, r"expected 3 losses \(num_tasks\), got 2"),
        ([0, 1, 2, 2], None, ValueError, r"expected 3 losses \(num_tasks\), got 4"),
        ([0, 1, 2], [0, 2], ValueError, r"expected 2 losses \(tasks=\[0, 2\]\), got 3"),
        ([0], [0, 2], ValueError, r"expected 2 losses \(tasks=\[0, 2\]\), got 1"),
        ([0, 0], [2, 2], ValueError, r"tasks=\[2, 2\] names a task twice"),
        ([0, 1], [0, 3], ValueError, "task index 3 is out of range for 3 tasks"),
        ([0, 1], [0, -1], ValueError, "task index -1 is out of range for 3 tasks"),
        ([0, 1], [0, True], TypeError, "the task index must be an int, got bool"),
        ([0, 1], [0, 1.0], TypeError, "the task index must be an int, got float"),
    ],
    ids=str,
)
def test_what_is_refused_changes_nothing(given, tasks, error, message):
    p = leaf(6)
    balancer = make(p, num_tasks=3)
    balancer(quadratics(p, num_tasks=3)).backward()
    state, grad = copy.deepcopy(balancer.state_dict()), p.grad.clone()
    losses = quadratics(p, num_tasks=3)
    given = [None if x is None else losses[x] for x in given]
    for call in (balancer, balancer.backward):
        with pytest.raises(error, match=message):
            call(given, tasks=tasks)
    with torch.no_grad(), pytest.raises(error, match=message):
        balancer(given, tasks=tasks)
    assert_same_state(balancer.state_dict(), state)
    assert torch.equal(p.grad, grad)


def test_the_loss_refused_is_named_by_its_task():
    p = leaf(6)
    balancer = make(p, num_tasks=3)
    good = quadratics(p, num_tasks=3)[0]
    with pytest.raises(ValueError, match=r"the loss of task 2 must be a scalar, got shape \(2,\)"):
        balancer([good, good * torch.ones(2)], tasks=[0, 2])
    with pytest.raises(RuntimeError, match="the loss of task 2 has no graph"):
        balancer([good, good.detach()], tasks=[0, 2])
    with pytest.raises(ValueError, match=r"the loss of task 1 is -1\.0: a loss must be positive"):
        balancer([None, good * 0 - 1, good])


def test_tasks_may_be_any_sequence_of_indices():
    p = leaf(6)
    results = []
    for tasks in ([0, 2], (0, 2), range(0, 3, 2), torch.tensor([0, 2]), np.array([0, 2])):
        balancer = dbk.DBMTL([p], np.int64(3), state_dtype=torch.float64)
        assert type(balancer.num_tasks) is int
        p.grad = None
        losses = quadratics(p, num_tasks=3)
        balancer.backward(torch.stack([losses[0], losses[2]]), tasks=tasks)
        results.append(p.grad.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    with balancer.task(np.int64(1)):
        dbk.log_transform(quadratics(p)[1]).backward()
    balancer.balance()
    assert (balancer.norms > 0.0).all()
    balancer.remove_task(np.int32(0))
    assert balancer.num_tasks == 2


def per_task(balancer):
    return [state_of(balancer).rows, *state_of(balancer).stats]


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_new_task_leaves_the_others_alone(state_dtype):
    p, q = leaf(6, dtype=torch.float32), leaf(40, dtype=torch.float32)
    balancer = dbk.DBMTL([p, q], 2, state_dtype=state_dtype)
    for poison in (1.0, float("nan")):
        losses = quadratics(p, q)
        balancer([losses[0], losses[1] * poison]).backward()
    before = [x.clone() for x in per_task(balancer)]
    assert balancer.add_task() == 2
    assert balancer.num_tasks == 3
    assert balancer.step == 2
    for now, old in zip(per_task(balancer), before, strict=True):
        assert now.dtype == old.dtype
        assert torch.equal(now[:2].nan_to_num(), old.nan_to_num())
        assert (now[2] == 0).all()
    assert balancer.norms.shape == balancer.weights.shape == balancer.nonfinite_steps.shape == (3,)
    assert state_of(balancer).gramian().shape == (3, 3)
    p.grad = q.grad = None
    balancer(quadratics(p, q, num_tasks=3)).backward()
    grads = flat_gradients(quadratics(p, q, num_tasks=3), [p, q])
    row = torch.cat([state_of(balancer).rows[2, :6], state_of(balancer).rows[2, -64:][:40]]).double().numpy()
    close(row, (1 - 0.9 / 3**0.5) * grads[2], rtol=1e-6 if state_dtype == torch.float64 else 1e-2)
    assert balancer.nonfinite_steps.tolist() == [0, 1, 0]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_without_a_task_training_goes_on_as_if_it_had_never_been(index):
    p = leaf(6)
    balancer, twin = make(p, num_tasks=3, beta_sigma=0.5), make(p, num_tasks=2, beta_sigma=0.5)
    rest = [task for task in range(3) if task != index]
    for _ in range(2):
        balancer(quadratics(p, num_tasks=3)).backward()
        twin([quadratics(p, num_tasks=3)[task] for task in rest]).backward()
    before = [x.clone() for x in per_task(balancer)]
    balancer.remove_task(index)
    assert balancer.num_tasks == 2
    for now, old in zip(per_task(balancer), before, strict=True):
        assert torch.equal(now, old[rest])
    for engine in (balancer, twin):
        p.grad = None
        engine([quadratics(p, num_tasks=3)[task] for task in rest]).backward()
        engine.result = p.grad.clone()
    assert torch.equal(balancer.result, twin.result)
    assert_same_state(balancer.state_dict()["buffer"], twin.state_dict()["buffer"])


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("zero", [True, False])
def test_a_step_thrown_away_does_not_stand_in_the_way_of_a_new_task(zero, overflow):
    """A GradScaler skipped optimizer.step() at the end of an epoch, and the next epoch has a task more."""
    p = leaf(6)
    balancer = make(p)
    optimizer = torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    (balancer([overflowing(x) if overflow else x for x in quadratics(p)]) * 2.0).backward()
    with pytest.raises(RuntimeError, match="within a step"):
        balancer.add_task()
    optimizer.zero_grad(set_to_none=zero)
    assert balancer.add_task() == 2
    balancer(quadratics(p, num_tasks=3)).backward()
    optimizer.step()
    assert balancer.step == 2


def test_a_state_dict_fits_the_number_of_tasks_it_was_made_with():
    p = leaf(6)
    balancer = make(p)
    balancer(quadratics(p)).backward()
    early = copy.deepcopy(balancer.state_dict())
    balancer.add_task()
    balancer(quadratics(p, num_tasks=3)).backward()
    state = copy.deepcopy(balancer.state_dict())
    for other, wrong in ((make(p), state), (make(p, num_tasks=4), state), (balancer, early)):
        untouched = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"other num_tasks\?"):
            other.load_state_dict(wrong)
        assert_same_state(other.state_dict(), untouched)
    make(p, num_tasks=3).load_state_dict(state)
    balancer.remove_task(2)
    balancer.load_state_dict(early)
    assert_same_state(balancer.state_dict(), early)
