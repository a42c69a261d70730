"""What the balancer does to .grad, heads, steps and its state, case by case."""

import copy
import gc
import weakref

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-8


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def make(*params, num_tasks=2, **options):
    return dbk.DBMTL(params, num_tasks, **{"state_dtype": torch.float64, "beta_sigma": 0.0, **options})


def quadratics(*params, num_tasks=2):
    """Positive losses that all parameters take part in."""
    return [sum(((p - t) * (1 + 3 * t)).square().sum() for p in params) + 0.5 for t in range(num_tasks)]


def flat_gradients(losses, params, log=True):
    rows = []
    for loss in losses:
        value = torch.log(loss + EPS) if log else loss
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(grads, params, strict=True)]
            )
        )
    return torch.stack(rows).double().numpy()


def flat_grad(params):
    return torch.cat([p.grad.reshape(-1) for p in params]).double().numpy()


def close(actual, expected, rtol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# --- .grad ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_norms_weights_and_gradient(backend):
    params = [leaf(3, 4), leaf(5), leaf(1)]
    balancer = make(*params, num_tasks=3, beta=0.5, backend=backend)
    ema = np.zeros((3, 18))
    for _ in range(3):
        losses = quadratics(*params, num_tasks=3)
        expected, ema, norms = oracle.balance(flat_gradients(losses, params), ema, 0.5)
        loss = balancer(losses)
        assert float(loss.detach()) == pytest.approx(sum(float(torch.log(x.detach() + EPS)) for x in losses))
        loss.backward()
        close(flat_grad(params), expected)
        close(balancer.norms.numpy(), norms)
        close(balancer.weights.numpy(), norms.max() / (norms + EPS))
        for p in params:
            p.grad = None
    assert balancer.step == 3


def test_no_log_transform():
    p = leaf(6)
    losses = quadratics(p)
    expected, _, _ = oracle.balance(flat_gradients(losses, [p], log=False), np.zeros((2, 6)), 0.0)
    balancer = make(p, log_transform=False, beta=0.0)
    loss = balancer(losses)
    assert float(loss.detach()) == pytest.approx(float(sum(losses).detach()))
    loss.backward()
    close(flat_grad([p]), expected)


def test_heads_get_the_plain_gradient():
    p, heads = leaf(4), [leaf(4) for _ in range(2)]
    losses = [(p * h).sum().square() + 1 for h in heads]
    expected = torch.autograd.grad(sum(torch.log(x + EPS) for x in losses), heads, retain_graph=True)
    heads[0].grad = torch.ones_like(heads[0])
    make(p)(losses).backward()
    close(heads[0].grad.numpy(), 1 + expected[0].numpy())
    close(heads[1].grad.numpy(), expected[1].numpy())


def test_grads_are_views_of_one_flat_tensor_padded_to_128_bytes():
    params = [leaf(3, 4, dtype=torch.float32), leaf(1, dtype=torch.float32), leaf(33, dtype=torch.float32)]
    balancer = dbk.DBMTL(params, 2)
    balancer(quadratics(*params)).backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in params}
    assert len(storages) == 1
    assert [p.grad.storage_offset() for p in params] == [0, 32, 64]
    assert balancer.buffer.rows.shape == (2, 128)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_existing_grad_is_added_to_in_place(steps):
    p, q = leaf(5), leaf(3)
    balancer, twin = make(p, q), make(p, q)
    mine = torch.randn(5, dtype=torch.float64)
    p.grad = mine
    total = mine.numpy().copy()
    for _ in range(steps):
        losses = quadratics(p, q)
        balancer(losses).backward()
        kept, p.grad, q.grad = (p.grad, q.grad), None, None
        twin(quadratics(p, q)).backward()
        total += p.grad.numpy()
        p.grad, q.grad = kept
    assert p.grad is mine
    close(p.grad.numpy(), total)


def test_grads_left_over_are_added_to_as_autograd_would():
    p, q = leaf(5), leaf(3)
    balancer, twin = make(p, q), make(p, q)
    total = np.zeros(8)
    for _ in range(3):
        balancer(quadratics(p, q)).backward()
        kept, p.grad, q.grad = (p.grad, q.grad), None, None
        twin(quadratics(p, q)).backward()
        total += flat_grad([p, q])
        p.grad, q.grad = kept
        close(flat_grad([p, q]), total)


def test_none_gradients_count_as_zeros_and_untouched_parameters_stay_none():
    a, b, never = leaf(4), leaf(3), leaf(2)
    balancer = make(a, b, never, beta=0.5)
    losses = [a.square().sum() + 1, (a.sum() - 3).square() + b.square().sum() + 1]
    rows = flat_gradients(losses, [a, b])
    expected, ema, _ = oracle.balance(rows, np.zeros((2, 7)), 0.5)
    balancer(losses).backward()
    close(flat_grad([a, b]), expected)
    assert never.grad is None

    a.grad = b.grad = None  # b takes no part now, and is written from its EMA all the same
    losses = [a.square().sum() + 1, (a.sum() - 3).square() + 1]
    rows = flat_gradients(losses, [a, b])
    expected, _, _ = oracle.balance(rows, ema, 0.5)
    balancer(losses).backward()
    assert np.abs(expected[4:]).max() > 0
    close(flat_grad([a, b]), expected)
    assert never.grad is None


def test_a_parameter_frozen_later_is_left_alone():
    a, b = leaf(4), leaf(3)
    balancer = make(a, b, beta=0.5)
    balancer(quadratics(a, b)).backward()
    a.grad = b.grad = None
    a.requires_grad_(False)
    balancer(quadratics(a, b)).backward()
    assert a.grad is None
    assert b.grad is not None


def test_tied_parameters():
    embedding, out = nn.Embedding(6, 4).double(), nn.Linear(4, 6, bias=False).double()
    out.weight = embedding.weight
    params = list({*embedding.parameters(), *out.parameters()})
    assert len(params) == 1

    def losses():
        z = out(embedding(torch.arange(6)))
        return [z.square().mean() + 1, (z.sum() - 2).square() + 1]

    expected, _, _ = oracle.balance(flat_gradients(losses(), params), np.zeros((2, 24)), 0.9)
    make(*params)(losses()).backward()
    close(flat_grad(params), expected)


def test_mixed_parameter_dtypes_keep_their_dtypes_in_one_storage():
    params = [leaf(3, dtype=torch.float32), leaf(70, dtype=torch.bfloat16), leaf(5, dtype=torch.float64)]
    params += [leaf(2, 2, dtype=torch.float16), leaf(9, dtype=torch.float32)]
    balancer = dbk.DBMTL(params, 2, beta=0.0)
    losses = quadratics(*[p.float() for p in params])
    expected, _, _ = oracle.balance(flat_gradients(losses, params), np.zeros((2, 91)), 0.0)
    balancer(losses).backward()
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]
    assert len({p.grad.untyped_storage().data_ptr() for p in params}) == 1
    for p in params:
        assert p.grad.data_ptr() % 128 == params[0].grad.data_ptr() % 128
    close(flat_grad(params), expected, rtol=2e-2)
    close(flat_grad([params[0], params[4]]), np.concatenate([expected[:3], expected[-9:]]), rtol=1e-5)


def test_channels_last_weights_keep_their_strides():
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last).double()
    params = list(conv.parameters())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)

    def losses():
        z = conv(x)
        return [z.square().mean(), (z - 1).abs().mean()]

    expected, _, _ = oracle.balance(flat_gradients(losses(), params), np.zeros((2, 224)), 0.9)
    balancer = make(*params)
    balancer(losses()).backward()
    assert conv.weight.grad.stride() == conv.weight.stride()
    close(flat_grad(params), expected)
    conv.weight.grad = None
    assert balancer.buffer.layout.dense == [True, True]


def test_a_parameter_that_is_a_strided_view_of_something_larger():
    p = torch.randn(4, 6, dtype=torch.float64)[:, ::2].detach().requires_grad_()
    assert not p.is_contiguous()
    losses = quadratics(p)
    expected, _, _ = oracle.balance(flat_gradients(losses, [p]), np.zeros((2, 12)), 0.9)
    make(p)(losses).backward()
    close(flat_grad([p]), expected)


# --- graphs ---------------------------------------------------------------------------------------------------


def test_retain_graph_lets_a_regulariser_share_the_graph():
    p = leaf(5)
    z = p * 2
    losses = [z.square().sum() + 1, (z.sum() - 1).square() + 1]
    rows = flat_gradients(losses, [p])
    expected, _, _ = oracle.balance(rows, np.zeros((2, 5)), 0.9)
    (penalty,) = torch.autograd.grad(z.abs().sum(), p, retain_graph=True)
    (make(p)(losses, retain_graph=True) + z.abs().sum()).backward()
    close(p.grad.numpy(), expected + penalty.numpy())


def test_graphs_are_freed_and_nothing_is_kept_alive():
    p = leaf(5)
    balancer = make(p)
    losses = quadratics(p)
    nodes = [weakref.ref(x) for x in losses]
    loss = balancer(losses)
    loss.backward()
    del losses
    gc.collect()
    assert all(node() is None for node in nodes)
    loss2 = balancer(quadratics(p))
    ref = weakref.ref(loss2)
    del loss2
    assert ref() is None


def test_each_task_grad_is_let_go_before_the_next_pass():
    p = leaf(1000)
    balancer = make(p, num_tasks=3)
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(p.grad)
            return grad

    losses = [Watch.apply(x) for x in quadratics(p, num_tasks=3)]
    balancer(losses).backward()
    assert seen == [None, None, None]


def test_under_no_grad_only_the_value():
    p = leaf(3)
    balancer = make(p)
    with torch.no_grad():
        value = balancer(quadratics(p))
    assert not value.requires_grad
    assert balancer.step == 0


def test_reentrant_checkpointing_meets_a_parameter_twice():
    layer = nn.Linear(300, 300).double()
    x = torch.randn(4, 300, dtype=torch.float64).requires_grad_()

    def losses():
        z = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
        return [z.square().mean() + 1, (z - 1).square().sum()]

    plain = layer(layer(x))
    rows = flat_gradients([plain.square().mean() + 1, (plain - 1).square().sum()], list(layer.parameters()))
    expected, ema, norms = oracle.balance(rows, np.zeros((2, 90300)), 0.9)
    expected, _, norms = oracle.balance(rows, ema, 0.9)
    balancer = make(*layer.parameters())
    for _ in range(2):
        layer.zero_grad()
        # A re-entrant checkpoint cannot be backpropagated twice: one graph for each task.
        with balancer.task(0):
            torch.log(losses()[0] + EPS).backward()
        with balancer.task(1):
            torch.log(losses()[1] + EPS).backward()
        balancer.balance()
    close(flat_grad(list(layer.parameters())), expected)
    close(balancer.norms.numpy(), norms)

    fresh = make(*layer.parameters())
    for _ in range(2):
        layer.zero_grad()
        fresh([losses()[0], losses()[1]]).backward()
    close(flat_grad(list(layer.parameters())), expected)
    close(fresh.norms.numpy(), norms)


def test_a_failing_backward_gives_the_grads_back():
    p = leaf(4)
    balancer = make(p)
    p.grad = torch.ones(4, dtype=torch.float64)
    loss = p.square().sum() + 1
    loss.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        balancer([loss, loss]).backward()
    assert balancer.step == 0
    close(p.grad.numpy(), 1 + 2 * p.detach().numpy())


def test_an_exception_inside_a_task_leaves_everything_as_it_was():
    p = leaf(4)
    balancer = make(p)
    p.grad = mine = torch.ones(4, dtype=torch.float64)

    def body():
        with balancer.task(0):
            p.square().sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert p.grad is mine
    assert (mine == 1).all()
    assert (balancer.buffer.rows == 0).all()
    with balancer.task(0):
        p.square().sum().backward()
    balancer.balance()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_reentrant_checkpoint_decays_what_is_reached_once(backend):
    first, shared, last = (nn.Linear(5, 5).double() for _ in range(3))
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()

    def loss(reentrant):
        z = first(x)
        for _ in range(2):
            z = checkpoint(shared, z, use_reentrant=True) if reentrant else shared(z)
        return (z - 1).square().mean() + 1

    results = []
    for reentrant in (False, True):
        params = [*first.parameters(), *shared.parameters(), *last.parameters()]
        balancer = make(*params, num_tasks=2, beta=0.5, backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = None
            balancer([loss(reentrant), loss(reentrant) + last(x).square().mean()]).backward()
        results.append((flat_grad(params), balancer.norms.numpy()))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])


def test_a_failure_in_a_later_task_counts_nothing_twice():
    p = leaf(4)
    balancer = make(p, beta=0.0)

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    losses = quadratics(p)
    with pytest.raises(ZeroDivisionError):
        balancer([losses[0], Fail.apply(losses[1])]).backward()
    assert p.grad is None
    expected, _, norms = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), expected)
    close(balancer.norms.numpy(), norms)


@pytest.mark.parametrize("how", ["task", "call"])
def test_a_failure_in_a_longer_step_keeps_the_balanced_gradient(how):
    p = leaf(4)
    balancer = make(p, beta=0.0)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    balancer(quadratics(p)).backward()
    before = p.grad.clone()

    def fail():
        if how == "task":
            with balancer.task(0):
                raise ZeroDivisionError
        loss = p.square().sum() + 1
        torch.autograd.grad(loss, p)  # frees the graph
        balancer([loss, loss]).backward()

    with pytest.raises((ZeroDivisionError, RuntimeError)):
        fail()
    close(p.grad.numpy(), before.numpy())
    assert balancer.step == 1
    balancer(quadratics(p)).backward()
    close(p.grad.numpy(), 2 * before.numpy(), rtol=1e-7)  # eps weighs half as much on the sum of two


def test_losses_that_never_reach_the_shared_parameters():
    p, q = leaf(4), leaf(3)
    balancer = make(p)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    balancer.attach(optimizer)
    for _ in range(3):
        balancer(quadratics(q)).backward()
    assert balancer.step == 1
    assert p.grad is None


def test_a_frozen_parameters_old_grad_is_left_alone():
    a, b = leaf(4), leaf(3)
    balancer = make(a, b)
    balancer(quadratics(a, b)).backward()
    a.requires_grad_(False)
    old = a.grad.clone()
    b.grad = None
    balancer(quadratics(a, b)).backward()
    assert torch.equal(a.grad, old)


def test_detaching_ends_the_step():
    p = leaf(4)
    balancer = make(p)
    handle = balancer.attach(torch.optim.SGD([p], lr=0.1))
    balancer(quadratics(p)).backward()
    handle.remove()
    p.grad = None
    balancer(quadratics(p)).backward()
    assert balancer.step == 2


def test_a_first_factor_of_zero_does_not_set_the_unit():
    p = leaf(4)
    balancer = make(p, beta=0.0)
    balancer.attach(torch.optim.SGD([p], lr=0.1))
    (balancer(quadratics(p)) * 0.0).backward()
    assert (p.grad == 0).all()
    (balancer(quadratics(p)) * 0.5).backward()
    expected, _, _ = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 4)), 0.0)
    close(p.grad.numpy(), 0.5 * expected)


# --- tasks and steps ------------------------------------------------------------------------------------------


def test_tasks_left_out_keep_their_state_and_have_no_say():
    p = leaf(6)
    balancer = make(p, num_tasks=3, beta=0.5)
    balancer(quadratics(p, num_tasks=3)).backward()
    rows = balancer.buffer.rows.clone()
    p.grad = None
    losses = quadratics(p, num_tasks=3)
    for task in (2, 0):
        with balancer.task(task):
            dbk.log_transform(losses[task]).backward()
    balancer.balance()
    assert torch.equal(balancer.buffer.rows[1], rows[1])
    grads = flat_gradients(quadratics(p, num_tasks=3), [p])[[0, 2]]
    expected, _, norms = oracle.balance(grads, rows[[0, 2], :6].numpy(), 0.5)
    close(p.grad.numpy(), expected)
    assert balancer.weights[1] == 0
    close(balancer.weights[[0, 2]].numpy(), norms.max() / (norms + EPS))


def test_attached_a_step_lasts_until_the_optimizer_steps():
    p = leaf(6)
    balancer = make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.01)
    handle = balancer.attach(optimizer)
    ema = np.zeros((2, 6))
    for _ in range(3):
        optimizer.zero_grad()
        total = np.zeros((2, 6))
        for micro in range(3):
            losses = [x * (1 + micro) for x in quadratics(p)]
            total += flat_gradients(losses, [p])
            balancer(losses).backward()
            so_far, after, _ = oracle.balance(total, ema, 0.5)
            close(p.grad.numpy(), so_far)
        ema = after
        optimizer.step()
    assert balancer.step == 3
    handle.remove()
    for _ in range(2):
        balancer(quadratics(p)).backward()
    assert balancer.step == 5


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_regulariser_beside_accumulated_backwards_stays(when, zero):
    p, q = leaf(6), leaf(40)
    balancer = make(p, q, beta=0.5)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    balancer.attach(optimizer)
    for step in range(1, 3):
        optimizer.zero_grad(set_to_none=zero)
        if when == "before":
            (3 * (p.square().sum() + q.sum())).backward()
        for micro in range(3):
            balancer(quadratics(p, q)).backward()
            if when == "between":
                (p.square().sum() + q.sum()).backward()
            assert balancer.step == step, micro
        losses = quadratics(p, q)
        rows = 3 * flat_gradients(losses, [p, q])
        ema = np.zeros((2, 46))
        for _ in range(step):
            expected, ema, _ = oracle.balance(rows, ema, 0.5)
        penalty = np.concatenate([6 * p.detach().numpy(), np.full(40, 3.0)])
        close(flat_grad([p, q]), expected + penalty)
        optimizer.step()


@pytest.mark.parametrize("extra_at", [0, 1, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("zero", [True, False])
def test_what_is_added_once_stays_through_later_backwards(zero, first, extra_at):
    """The extra comes in one place only; two steps, so that .grad may be our own zeroed view at the start."""
    p, q = leaf(6), leaf(40)
    balancer = make(p, q, beta=0.5)
    optimizer = torch.optim.SGD([p, q], lr=0.0)
    balancer.attach(optimizer)
    ema = np.zeros((2, 46))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=zero)
        for micro in range(4):
            if first and micro == extra_at:
                (p.sum() + 2 * q.sum()).backward()
            balancer(quadratics(p, q)).backward()
            if not first and micro == extra_at:
                (p.sum() + 2 * q.sum()).backward()
        expected, ema, _ = oracle.balance(4 * flat_gradients(quadratics(p, q), [p, q]), ema, 0.5)
        close(flat_grad([p, q]), expected + np.concatenate([np.ones(6), np.full(40, 2.0)]))
        optimizer.step()
    assert balancer.step == 2


def test_attached_without_zero_grad_gradients_add_up():
    p = leaf(6)
    balancer = make(p, beta=0.0)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    one, _, _ = oracle.balance(flat_gradients(quadratics(p), [p]), np.zeros((2, 6)), 0.0)
    for total in (2, 4, 6):
        for _ in range(2):
            balancer(quadratics(p)).backward()
        close(p.grad.numpy(), total * one, rtol=1e-7)  # eps weighs half as much on the sum of two
        optimizer.step()


@pytest.mark.parametrize("zero", [True, False])
def test_a_thrown_away_step_followed_by_a_regulariser(zero):
    """The regulariser's fresh .grad must not pass for ours, nor lose our non-finite gradient's value."""
    p = leaf(6, dtype=torch.float32)
    balancer = dbk.DBMTL([p], 2, beta_sigma=0.0)
    optimizer = torch.optim.SGD([p], lr=1e-3)
    balancer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
    moved = []
    for step in range(6):
        before = p.detach().clone()
        optimizer.zero_grad(set_to_none=zero)
        scaler.scale(p.square().sum()).backward()
        losses = quadratics(p)
        if step == 2:
            losses[1] = losses[1] * float("inf")
        scaler.scale(balancer(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(p.detach(), before))
    assert moved == [True, True, False, True, True, True]
    assert scaler.get_scale() == 32768.0
    assert balancer.step == 6
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("zero", [True, False])
def test_a_step_that_was_skipped_ends_when_its_gradients_are_zeroed(zero):
    p = leaf(6)
    balancer = make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.01)
    balancer.attach(optimizer)
    for step in range(1, 4):  # a GradScaler that found an overflow calls no step()
        optimizer.zero_grad(set_to_none=zero)
        balancer(quadratics(p)).backward()
        assert balancer.step == step


def test_accumulation_with_tasks_attached():
    p = leaf(6)
    balancer, twin = make(p, beta=0.5), make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.01)
    balancer.attach(optimizer)
    for _ in range(2):
        for task, loss in enumerate(quadratics(p)):
            with balancer.task(task):
                dbk.log_transform(loss).backward()
        balancer.balance()
    assert balancer.step == 1
    mine, p.grad = p.grad.clone(), None
    twin.attach(torch.optim.SGD([p], lr=0.01))
    for _ in range(2):
        twin(quadratics(p)).backward()
    close(mine.numpy(), p.grad.numpy())


def test_the_loss_scale_stays_out_of_the_state():
    p = leaf(6)
    plain, scaled, by_task = make(p), make(p), make(p)
    for factor in (1.0, 1024.0, 0.25):
        plain(quadratics(p)).backward()
        expected, p.grad = p.grad.clone(), None
        (scaled(quadratics(p)) * factor).backward()
        close(p.grad.numpy(), factor * expected.numpy())
        p.grad = None
        for task, loss in enumerate(quadratics(p)):
            with by_task.task(task, loss_scale=factor):
                (dbk.log_transform(loss) * factor).backward()
        by_task.balance()
        close(p.grad.numpy(), factor * expected.numpy())
        p.grad = None
        close(scaled.buffer.rows.numpy(), plain.buffer.rows.numpy())
        close(by_task.buffer.rows.numpy(), plain.buffer.rows.numpy())


def test_half_precision_losses():
    p = leaf(6, dtype=torch.float16)
    balancer = dbk.DBMTL([p], 2)
    loss = balancer([(p.float() * s).square().sum().half() + 1 for s in (1, 2)])
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(p.grad).all()
    assert p.grad.dtype == torch.float16
    zero = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    dbk.DBMTL([zero], 2)([zero.square().sum() + 1, zero.square().sum() + 1]).backward()
    assert (zero.grad == 0).all()


# --- what is not finite ---------------------------------------------------------------------------------------


def poisoned(p, poison):
    good, bad = quadratics(p)
    return [good, bad * torch.tensor(poison, dtype=torch.float64)]


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nonfinite_task_heals(poison, backend):
    p = leaf(6)
    balancer = make(p, beta=0.5, backend=backend)
    balancer(quadratics(p)).backward()
    row = balancer.buffer.rows[0].clone()
    p.grad = None
    balancer(poisoned(p, poison)).backward()
    grads = flat_gradients(quadratics(p), [p])
    expected, _, _ = oracle.balance(grads[:1], row[None, :6].numpy(), 0.5)
    close(p.grad.numpy(), expected, rtol=1e-7)  # the oracle leaves a single task unscaled: eps is not in it
    assert balancer.nonfinite_steps.tolist() == [0, 1]
    assert balancer.weights[1] == 0
    assert not torch.isfinite(balancer.norms[1])
    assert torch.isfinite(balancer.buffer.rows).all()
    p.grad = None
    balancer(quadratics(p)).backward()
    close(balancer.buffer.rows[1, :6].numpy(), 0.5 * flat_gradients(quadratics(p), [p])[1])
    assert torch.isfinite(p.grad).all()
    assert balancer.nonfinite_steps.tolist() == [0, 1]


def test_an_overflow_under_a_loss_scale_reaches_the_scaler():
    p = leaf(6)
    balancer = make(p)
    (balancer(poisoned(p, float("inf"))) * 65536.0).backward()
    assert not torch.isfinite(p.grad).any()
    assert torch.isfinite(balancer.buffer.rows).all()
    p.grad = None
    (balancer(quadratics(p)) * 32768.0).backward()
    assert torch.isfinite(p.grad).all()
    p.grad = None
    (balancer(poisoned(p, float("inf"))) / 4).backward()  # an accumulation factor: nobody would catch a NaN
    assert torch.isfinite(p.grad).all()


def test_a_nonfinite_micro_batch_spoils_its_task_for_the_whole_step_only():
    p = leaf(6)
    balancer = make(p, beta=0.5)
    optimizer = torch.optim.SGD([p], lr=0.0)
    balancer.attach(optimizer)
    for losses in (quadratics(p), poisoned(p, float("nan")), quadratics(p)):
        balancer(losses).backward()
    assert balancer.weights[1] == 0
    assert balancer.nonfinite_steps.tolist() == [0, 1]
    assert torch.isfinite(p.grad).all()
    assert (balancer.buffer.rows[1] == 0).all()
    optimizer.step()
    optimizer.zero_grad()
    balancer(quadratics(p)).backward()
    assert balancer.weights[1] > 0


def test_grad_scaler_backs_off_and_recovers():
    """The real torch.amp.GradScaler on the CPU, attached and not."""
    for attached in (False, True):
        p = leaf(6, dtype=torch.float32)
        balancer = dbk.DBMTL([p], 2)
        optimizer = torch.optim.SGD([p], lr=1e-3)
        if attached:
            balancer.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
        for step in range(12):
            before = p.detach().clone()
            optimizer.zero_grad()
            losses = quadratics(p)
            if step in (4, 5):
                losses[1] = losses[1] * float("inf")
            scaler.scale(balancer(losses)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert torch.isfinite(p).all()
            assert torch.equal(p.detach(), before) == (step in (4, 5))
        assert scaler.get_scale() == 16384.0
        assert balancer.nonfinite_steps.tolist() == [0, 2]
        assert balancer.step == 12


def test_state_dict_in_the_middle_of_an_accumulated_step():
    def run(interrupt):
        torch.manual_seed(5)
        p = leaf(6)
        balancer = make(p, beta=0.5)
        optimizer = torch.optim.SGD([p], lr=0.1)
        balancer.attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                balancer([x * (1 + micro) for x in quadratics(p)]).backward()
                if interrupt and step == 1 and micro == 1:
                    state = copy.deepcopy(balancer.state_dict())
                    balancer = make(p, beta=0.5)
                    balancer.load_state_dict(state)
                    optimizer = torch.optim.SGD([p], lr=0.1)
                    balancer.attach(optimizer)
            optimizer.step()
        return p.detach(), balancer.state_dict()

    (p, state), (q, other) = run(False), run(True)
    assert torch.equal(p, q)
    for key, value in state.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_narrower_states_stay_close(state_dtype):
    params = [leaf(30, 10, dtype=torch.float32), leaf(10, dtype=torch.float32)]
    balancer = dbk.DBMTL(params, 2, state_dtype=state_dtype, beta_sigma=0.0)
    ema = np.zeros((2, 310))
    for _ in range(5):
        losses = quadratics(*params)
        expected, ema, _ = oracle.balance(flat_gradients(losses, params), ema, 0.9)
        balancer(losses).backward()
        close(flat_grad(params), expected, rtol=1e-5 if state_dtype == torch.float32 else 2e-2)
        for p in params:
            p.grad = None
    assert balancer.buffer.rows.dtype == state_dtype
    assert balancer.buffer.gramian().diagonal().sqrt().numpy() == pytest.approx(balancer.norms.numpy(), rel=1e-4)
