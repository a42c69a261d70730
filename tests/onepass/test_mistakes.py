"""Programs that would train on wrong gradients without a word: each is right, refused, or told."""

import copy
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from torch import nn
from zoo import K, Setting, each, grads


def weighted(losses, shared, weights):
    """sum_t weights[t] * grad log(loss_t + eps)."""
    total = [torch.zeros_like(p) for p in shared]
    for loss, weight in zip(losses, weights, strict=True):
        for out, grad in zip(total, torch.autograd.grad((loss + 1e-8).log(), shared, retain_graph=True), strict=True):
            out += weight * grad
    return total


def close(some, others):
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- within a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["absent", "not finite"])
def test_a_task_that_first_comes_in_a_later_micro_batch_has_its_length(first):
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    for _ in range(4):
        setting.step(x)
    setting.balancer.attach(setting.optimizer)
    setting.optimizer.zero_grad()
    losses = setting.losses(x)
    setting.balancer([*losses[:2], None if first == "absent" else losses[2] * float("nan")]).backward()
    held = setting.balancer.weights
    assert held[2] == 0
    for p in setting.shared:
        p.grad.zero_()
    losses = setting.losses(x)
    expected = weighted(
        losses, setting.shared, [*held[:2], held[0] * setting.balancer.norms[0] / setting.balancer.norms[2]]
    )
    setting.balancer(losses).backward()
    assert torch.equal(setting.balancer.weights[:2], held[:2])
    close(grads(setting.shared), expected)


def test_a_task_that_was_never_measured_is_within_a_step_too():
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    setting.balancer.attach(setting.optimizer)
    losses = setting.losses(x)
    setting.balancer([*losses[:2], None]).backward()
    assert setting.balancer.norms.isnan().tolist() == [False, False, True]
    setting.balancer([None, None, setting.losses(x)[2]]).backward()
    norms, weights = setting.balancer.norms, setting.balancer.weights
    torch.testing.assert_close(weights * norms, norms[:2].amax().expand(K))
    assert setting.balancer.step == 1


def test_a_step_that_was_thrown_away_ends():
    setting = Setting(measure_every=1)
    setting.balancer.attach(setting.optimizer)
    for _ in range(3):
        setting.balancer(setting.losses(setting.batch())).backward()
        setting.optimizer.zero_grad()  # as after a step that a GradScaler skipped
    assert setting.balancer.step == 3


def test_a_second_point_of_a_step_has_its_weights():
    setting, x = Setting(measure_every=1), torch.randn(16, 8)
    with setting.balancer.no_update(), pytest.raises(RuntimeError, match="needs the weights of a step before it"):
        setting.balancer(setting.losses(x)).backward()
    setting.step(x)
    weights = setting.balancer.weights
    setting.optimizer.zero_grad()
    with setting.balancer.no_update():
        losses = setting.losses(x)
        expected = weighted(losses, setting.shared, weights)
        setting.balancer(losses).backward()
    close(grads(setting.shared), expected)
    assert setting.balancer.step == 1
    assert torch.equal(setting.balancer.weights, weights)


def test_closures_of_one_step():
    setting, x = Setting(measure_every=1), torch.randn(16, 8)
    optimizer = torch.optim.LBFGS(setting.all, max_iter=4)
    setting.balancer.attach(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = setting.balancer(setting.losses(x))
        loss.backward()
        calls.append(setting.balancer.weights)
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert setting.balancer.step == 1
    assert all(torch.equal(calls[0], other) for other in calls)


# --- one backward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_two_balanced_losses_in_one_backward_are_refused(same):
    setting, x = Setting(), torch.randn(16, 8)
    setting.step(x)
    other = setting.balancer if same else Setting().balancer
    losses = setting.losses(x)
    both = setting.balancer([*losses[:2], None]) + (other if same else dbk.OnePassDBMTL(setting.trunk, K))(
        [None, *losses[1:]]
    )
    with pytest.raises(RuntimeError, match="two balanced losses of OnePassDBMTL in one backward pass"):
        both.backward()


@pytest.mark.parametrize("kind", ["head", "loss"])
def test_something_else_that_goes_through_a_task_is_told(kind):
    setting, x = Setting(), torch.randn(16, 8)
    outputs = [head(setting.trunk(x)) for head in setting.heads]
    losses = [(out - t).square().mean() for t, out in enumerate(outputs)]
    more = outputs[0].abs().mean() if kind == "head" else losses[1]
    with pytest.warns(RuntimeWarning, match="something besides the losses given"):
        (setting.balancer(losses) + more).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (setting.balancer(setting.losses(x)) + setting.trunk(x).square().mean()).backward()  # through nobody's part


def test_a_regulariser_of_the_trunk_is_added_as_it_is():
    setting, x = Setting(), torch.randn(16, 8)
    (setting.balancer(setting.losses(x)) + sum(p.square().sum() for p in setting.shared)).backward()
    expected = weighted(setting.losses(x), setting.shared, setting.balancer.weights)
    close(grads(setting.shared), [a + 2 * p.detach() for a, p in zip(expected, setting.shared, strict=True)])


@pytest.mark.parametrize("take", [list, lambda s: s.unbind(), lambda s: [s[i] for i in range(K)]])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_stacked_losses_one_of_which_is_not_finite(take, factor):
    setting, x = Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    losses[1] = losses[1] * float("nan")
    (setting.balancer(list(take(torch.stack(losses)))) * factor).backward()
    assert (setting.heads[1].weight.grad == 0).all()
    assert all(p.grad.isfinite().all() for p in setting.shared)
    assert setting.balancer.norms.isfinite().tolist() == [True, False, True]


def test_a_constant_among_stacked_losses():
    setting, x = Setting(), torch.randn(16, 8)
    losses = setting.losses(x)
    setting.balancer(torch.stack([losses[0], torch.tensor(2.0), losses[2]])).backward()
    losses = setting.losses(x)
    expected = weighted([losses[0], losses[2]], setting.shared, setting.balancer.weights[[0, 2]])
    close(grads(setting.shared), expected)


def test_a_stack_that_another_loss_uses_too():
    shared = [nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))]
    z = shared[0] * 2
    s = torch.stack([z[0] ** 2, z[1] * 5, z[2] ** 2])
    balancer = dbk.OnePassDBMTL(shared, 2)
    losses = [s[0], s[1] + s[2]]
    balancer(losses).backward(retain_graph=True)
    assert balancer.weights[1] > 2
    close(grads(shared), weighted(losses, shared, balancer.weights))


@pytest.mark.parametrize("shape", ["rows", "one row"])
def test_losses_cut_from_a_matrix(shape):
    setting, x = Setting(), torch.randn(16, 8)
    matrix = torch.stack([torch.stack([loss]) for loss in setting.losses(x)], 1 if shape == "one row" else 0)
    losses = [matrix[:, t] if shape == "one row" else matrix[t] for t in range(K)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exact form may take it
        setting.balancer(losses).backward()
    close(
        grads(setting.shared),
        weighted([loss.reshape(()) for loss in setting.losses(x)], setting.shared, setting.balancer.weights),
    )


# --- what is reached ----------------------------------------------------------------------------------------------


def test_a_backward_that_was_split_is_told():
    setting, x = Setting(), torch.randn(16, 8)
    z = setting.trunk(x).detach().requires_grad_()
    with pytest.warns(RuntimeWarning, match="no shared parameter got a gradient from any task"):
        setting.balancer(each(setting.heads, z)).backward()


def test_a_frozen_trunk_leaves_heads_their_gradient():
    setting, x = Setting(), torch.randn(16, 8)
    setting.trunk.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = setting.losses(x)
        setting.balancer(losses).backward()
    own = list(setting.heads.parameters())
    close(grads(own), torch.autograd.grad(sum((loss + 1e-8).log() for loss in setting.losses(x)), own))
    setting.trunk.requires_grad_(True)
    setting.optimizer.zero_grad()
    setting.balancer(setting.losses(x)).backward()
    close(grads(setting.shared), weighted(setting.losses(x), setting.shared, setting.balancer.weights))


def test_an_embedding_with_sparse_gradients():
    torch.manual_seed(0)
    table, heads = nn.Embedding(10, 4, sparse=True), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    dense = copy.deepcopy(table)
    dense.sparse = False
    index = torch.tensor([1, 3, 3, 7])
    for one in (table, dense):
        balancer = dbk.OnePassDBMTL(one, 2)
        balancer([head(one(index)).square().mean() for head in heads]).backward()
    assert table.weight.grad.is_sparse
    close([table.weight.grad.to_dense()], [dense.weight.grad])


# --- changes between ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["rebind", "add_task", "remove_task"])
def test_a_balancer_that_changed_between_a_loss_and_its_backward_is_refused(change):
    setting, x = Setting(), torch.randn(16, 8)
    loss = setting.balancer(setting.losses(x))
    if change == "rebind":
        setting.balancer.rebind(setting.trunk)
    else:
        getattr(setting.balancer, change)(*([1] if change == "remove_task" else []))
    with pytest.raises(RuntimeError, match="between a balanced loss and its backward"):
        loss.backward()
    assert all(p.grad is None for p in setting.all)


def test_an_exact_step_whose_backward_comes_late_leaves_no_stale_weights():
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    for _ in range(4):
        setting.step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = setting.balancer([None, *matrix_losses(setting, x)[1:]])
    setting.balancer(setting.losses(x)).backward()
    first.backward()
    setting.optimizer.zero_grad()
    setting.balancer(setting.losses(x)).backward()
    assert (setting.balancer.weights > 0).all()
    close(grads(setting.shared), weighted(setting.losses(x), setting.shared, setting.balancer.weights))


def matrix_losses(setting, x):
    """Those that cannot be told apart."""
    return (torch.cat([head(setting.trunk(x)) for head in setting.heads], 1) - torch.arange(K)).square().mean(0)


def test_an_exact_micro_batch_teaches_no_factor():
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    for _ in range(5):
        setting.step(x)
    setting.balancer.attach(setting.optimizer)
    setting.optimizer.zero_grad()
    norms, factor = setting.balancer.norms, 1024.0
    (setting.balancer(setting.losses(x)) * factor).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (setting.balancer([*matrix_losses(setting, x)[:2], None]) * factor).backward()
    for p in setting.all:
        p.grad /= factor
    setting.optimizer.step()
    setting.step(x)
    assert torch.equal(setting.balancer.norms, norms)
    assert setting.balancer.step == setting.balancer._weigher.levels.step == 7


def test_a_head_that_begins_with_zeros_and_comes_late():
    setting, x = Setting(measure_every=1000), torch.randn(16, 8)
    nn.init.zeros_(setting.heads[2].weight)
    for _ in range(70):
        setting.balancer([*setting.losses(x)[:2], None]).backward()
    for _ in range(2):  # in its first step the gradient of what is shared is zero
        setting.step(x)
    assert setting.balancer.norms[2] > 0
    weights, norms = setting.balancer.weights, setting.balancer.norms
    torch.testing.assert_close(weights * norms, norms.amax().expand(K), rtol=1e-4, atol=0)


# --- other kinds of leaves ----------------------------------------------------------------------------------------


def test_a_plain_tensor_that_tasks_share_and_the_optimizer_holds():
    setting, x = Setting(), torch.randn(16, 8)
    log_vars = torch.zeros(K, requires_grad=True)
    optimizer = torch.optim.SGD([*setting.all, log_vars], lr=1e-3)
    setting.balancer.attach(optimizer)

    def losses():
        return [loss * (-log_vars[t]).exp() + log_vars[t] + 1 for t, loss in enumerate(setting.losses(x))]

    with pytest.warns(RuntimeWarning, match="The exact form takes such steps"):
        setting.balancer(losses()).backward()
    (expected,) = torch.autograd.grad(sum((loss + 1e-8).log() for loss in losses()), log_vars)
    close([log_vars.grad], [expected])


def test_gradients_asked_for_within_a_step_hold_the_weights():
    setting = Setting(measure_every=1)
    setting.balancer.attach(setting.optimizer)
    held = []
    for _ in range(3):
        torch.autograd.grad(setting.balancer(setting.losses(setting.batch())), setting.all)
        held.append(setting.balancer.weights)
    assert setting.balancer.step == 1
    assert torch.equal(held[0], held[2])


def test_ragged_batches():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    parts = [torch.randn(n, 4) for n in (2, 5, 3)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for _ in range(2):
        trunk.zero_grad()
        balancer = dbk.OnePassDBMTL(trunk, 2)
        z = trunk(x).relu()
        losses = [(head(z).values() - t).square().mean() for t, head in enumerate(heads)]
        balancer(losses).backward()
    shared, whole = list(trunk.parameters()), torch.cat(parts)
    again = [(head(trunk(whole).relu()) - t).square().mean() for t, head in enumerate(heads)]
    close(grads(shared), weighted(again, shared, balancer.weights))
