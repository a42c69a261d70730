"""Rows: allocated when needed, taken over by other buffers, begun anew; gradients that go into none."""

import copy

import dbmtl_kernels as dbk
import pytest
import torch
from buffers import BETA, bits, feed, gradients, make_buffer, parameters, parts_of, run_pass, same_bits
from dbmtl_kernels.rows.layout import ParameterLayout, describe
from torch import nn

KINDS = ["plain", "split"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_way = pytest.mark.parametrize("early", [False, True])


def stats_of(buffer):
    return [x.clone() for part in parts_of(buffer) for x in part.stats]


def balance(buffer, active=None):
    flats = buffer.new_flats()
    buffer.balance(flats, 1e-8, "max", active=active)
    return [x.clone() for x in buffer.views(flats)]


# --- allocated when needed --------------------------------------------------------------------------------------


@each_kind
def test_a_buffer_costs_nothing_before_it_is_fed(kind):
    params = parameters()
    buffer = make_buffer(kind, params)
    other = copy.deepcopy(buffer)
    for each in (buffer, other):
        each.check_unchanged()
        each.signature()
        each.settle()
        each.reindex_tasks([1, None, 0])
        each.sit_out(0, 0)
        each.drop(0)
        assert each.sums().tolist() == [0.0] * 3
        new = make_buffer("split", each.parameters[1:], 3)
        new.take_over(each)
        assert not new.allocated
        assert not each.allocated
    feed(buffer, 2, gradients(params))
    assert buffer.allocated
    assert not other.allocated
    assert [part.rows.shape[0] for part in parts_of(buffer)] == [3] * len(parts_of(buffer))
    assert copy.deepcopy(buffer).allocated


@each_kind
def test_rows_first_asked_for_in_inference_mode_can_be_fed(kind):
    params = parameters()
    buffer = make_buffer(kind, params, backend="eager")
    with torch.inference_mode():
        buffer.gramian()
    feed(buffer, 0, gradients(params))
    assert buffer.sums()[0] > 0


# --- what parameters were ---------------------------------------------------------------------------------------


@each_kind
def test_a_parameter_of_another_shape_is_refused_by_its_name(kind):
    params = [torch.zeros(4, 1).requires_grad_() for _ in range(4)]
    for names, called in ((None, ""), (["a", "b", "c", "layers.0.weight"], r" \('layers.0.weight'\)")):
        params[3].data = torch.zeros(4, 1)
        buffer = make_buffer(kind, params, names=names)
        assert buffer.names == (names or [None] * 4)
        buffer.check_unchanged()
        params[3].data = torch.ones(4, 1)  # other numbers are no change
        buffer.check_unchanged()
        params[3].data = torch.zeros(4)
        with pytest.raises(RuntimeError, match=rf"^shared parameter 3{called} of shape \(4,\) was .* shape \(4, 1\)"):
            buffer.check_unchanged()


def test_equal_strides_and_number_of_elements_do_not_suffice():
    p = torch.zeros(1, 4).requires_grad_()
    layout = ParameterLayout([p])
    p.data = torch.zeros(16).as_strided((4, 1), (4, 1))
    assert p.stride() == (4, 1)
    with pytest.raises(RuntimeError, match=r"shape \(4, 1\) was torch.float32 of shape \(1, 4\) with strides \(4, 1\)"):
        layout.check_unchanged()


def test_what_a_parameter_is_called():
    p = torch.zeros(4, 4)
    assert describe(3, p, "layers.0.weight") == "shared parameter 3 ('layers.0.weight') of shape (4, 4)"
    assert describe(3, p, None) == "shared parameter 3 of shape (4, 4)"


@each_kind
def test_frozen_parameters_of_a_copy(kind):
    params = [p.requires_grad_(False) for p in parameters()]
    with pytest.raises(ValueError, match=r"shared_parameters\[0\] of shape \(3, 5\) does not require grad"):
        make_buffer(kind, params)
    assert feed(make_buffer(kind, params, frozen_ok=True), 0, gradients(params)).fed


# --- going on with other parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("old_kind", KINDS)
@pytest.mark.parametrize("new_kind", KINDS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_rows_are_taken_over(old_kind, new_kind, state):
    params = parameters()
    old = make_buffer(old_kind, params, state=state)
    for task in range(2):
        feed(old, task, gradients(params, task))
    grads = gradients(params, 7)
    grads[0][0, 0] = torch.inf
    feed(old, 1, grads)
    balance(old)  # which finds the second task nonfinite
    feed(old, 1, gradients(params, 8))
    before = bits(old)
    fresh = torch.randn(6, 6).requires_grad_()
    kept = [3, 1, 0]
    new = make_buffer(new_kind, [params[3], fresh, params[1], params[0]], state=state)
    new.take_over(old)
    assert same_bits(bits(old), before)
    for task in range(2):
        ours, theirs = new.row_of(task), old.row_of(task)
        assert not ours.pop(1).any()
        assert all(torch.equal(a, theirs[i]) for a, i in zip(ours, kept, strict=True))
        expected = sum(theirs[i].double().square().sum() for i in kept)
        torch.testing.assert_close(new.sums()[task], expected, rtol=1e-6, atol=0)
    for part in parts_of(new):
        for name in ("norms", "weights", "nonfinite", "nonfinite_steps"):
            assert torch.equal(getattr(part.stats, name), getattr(old.stats, name))
    assert new.stats.nonfinite_steps.tolist() == [0, 1]
    everything = make_buffer(new_kind, params, state=state)
    everything.take_over(old)
    assert all(torch.equal(a, b) for a, b in zip(balance(everything), balance(old), strict=True))


def test_a_parameter_that_was_resized_begins_anew_and_memory_order_may_change():
    params = parameters()
    old = make_buffer("plain", params)
    feed(old, 0, gradients(params))
    row = [x.clone() for x in old.row_of(0)]
    params[1].data = torch.zeros(1)
    params[3].data = params[3].detach().contiguous()
    new = make_buffer("plain", params)
    new.take_over(old)
    ours = new.row_of(0)
    assert not ours[1].any()
    assert ours[3].is_contiguous()
    assert not row[3].is_contiguous()
    assert all(torch.equal(ours[i], row[i]) for i in (0, 2, 3))


# --- sitting out, and dropped -----------------------------------------------------------------------------------


@each_kind
def test_a_task_that_sits_out_begins_anew_and_is_counted(kind):
    params = parameters()
    buffer, other = make_buffer(kind, params), make_buffer(kind, params)
    for each in (buffer, other):
        feed(each, 1, gradients(params, 1))
    feed(buffer, 0, gradients(params))
    assert all(torch.equal(a, b) for a, b in zip(balance(buffer, [False, True]), balance(other), strict=True))
    for _ in range(2):  # twice is as once
        buffer.sit_out(0, 1)
    assert buffer.stats.nonfinite_steps.tolist() == [1, 0]
    assert same_bits(bits(buffer), bits(other))


@each_kind
def test_a_dropped_row_is_one_that_was_never_fed(kind):
    params = parameters()
    buffer, other = make_buffer(kind, params), make_buffer(kind, params)
    for each in (buffer, other):
        feed(each, 1, gradients(params, 1))
    collector = buffer.collector(0, BETA)
    collector.add([2], [torch.ones(1)])
    assert collector.abandon()
    buffer.drop(0)
    assert same_bits(bits(buffer), bits(other))
    assert same_bits(stats_of(buffer), stats_of(other))


# --- into no row ------------------------------------------------------------------------------------------------


@each_kind
@each_way
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_a_weighted_sum_of_gradients_that_leaves_the_rows(kind, early, state):
    params = [*parameters(), torch.zeros(5, dtype=torch.bfloat16).requires_grad_(), *parameters()]
    buffer = make_buffer(kind, params, state=state)
    feed(buffer, 0, gradients(params))
    before, stats = bits(buffer), stats_of(buffer)
    one, flats = buffer.of_one_task(), buffer.new_flats()
    for flat in flats.values():
        flat.fill_(torch.nan)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for seed, weight in enumerate((0.25, 3.0)):
        grads = [g.to(p.dtype) for g, p in zip(gradients(params, seed), params, strict=True)]
        if seed:
            grads[0] = None
        scale = torch.tensor(8.0) if seed else None
        collector = run_pass(one.collector(0, (0.0, 1.0), scale), grads, early)
        one.combine(torch.tensor([weight]), flats, accumulate=seed > 0)
        assert collector.fed
        assert not collector.abandon()
        for total, grad in zip(expected, grads, strict=True):
            if grad is not None:
                total += weight / (8.0 if seed else 1.0) * grad.double()
    for view, total, p in zip(buffer.views(flats), expected, params, strict=True):
        assert view.dtype == p.dtype
        torch.testing.assert_close(
            view.double(),
            total,
            rtol=2**-7 if p.dtype == torch.bfloat16 else 1e-6,
            atol=0.02 if state == torch.bfloat16 else 1e-7,
        )
    assert same_bits(bits(buffer), before)
    assert same_bits(stats_of(buffer), stats)


def test_room_for_one_task_allocates_no_rows():
    linear = nn.Linear(4, 4)
    buffer = make_buffer("plain", list(linear.parameters()))
    one, flats = buffer.of_one_task(), buffer.new_flats()
    grads = [torch.randn_like(p) for p in linear.parameters()]
    run_pass(one.collector(0, (0.0, 1.0)), grads)
    one.combine(torch.tensor([2.0]), flats)
    assert all(torch.equal(view, 2.0 * grad) for view, grad in zip(buffer.views(flats), grads, strict=True))
    assert not buffer.allocated


@pytest.mark.parametrize("kind", ["plain", "split"])
def test_by_default_a_state_holds_what_gradients_hold(kind):
    """A float64 parameter anywhere, and all rows are; else they are float32."""
    for dtypes, wanted in (
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
    ):
        params = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in dtypes]
        assert {part.rows.dtype for part in parts_of(make_buffer(kind, params, state=None))} == {wanted}
        assert {part.rows.dtype for part in parts_of(make_buffer(kind, params, state=torch.bfloat16))} == {
            torch.bfloat16
        }
    if hasattr(torch.Tensor, "grad_dtype"):
        params[1].grad_dtype = torch.float64
        assert make_buffer("plain", params[1:], state=None).rows.dtype == torch.float64


def test_gradients_beyond_float32_of_a_float64_model_do_not_count_as_broken():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    balancer = dbk.DBMTL([p], 2, state_dtype=None, log_transform=False, beta=0.0, keep_rows=True)
    balancer.backward([(p * 1e40).sum(), (p * 1e39).sum()])
    assert balancer.nonfinite_steps.tolist() == [0, 0]
    torch.testing.assert_close(p.grad, torch.full_like(p, 2e40))
