"""A pass whose gradients are all exactly zero does not count."""

import math

import pytest
import torch
from buffers import (
    BETA,
    bits,
    defer,
    feed,
    gradients,
    make_buffer,
    parameters,
    parts_of,
    run_pass,
    same_bits,
    same_rows,
)
from buffers import zeros as zeros_of

KINDS = ["plain", "split"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_way = pytest.mark.parametrize("early", [False, True])


@each_kind
@each_way
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_zeros_leave_every_bit(kind, early, state, backend):
    params = parameters()
    buffer = make_buffer(kind, params, state=state, backend=backend)
    feed(buffer, 0, gradients(params))
    for part in parts_of(buffer):  # bits that arithmetic would not keep
        part.rows[0, :1] = -0.0
    before = bits(buffer)
    for grads in (zeros_of(params), [None, *zeros_of(params)[1:]], [None] * 4, [-g for g in zeros_of(params)]):
        for task in range(2):
            collector = feed(buffer, task, grads, early=early, skip_zeros=True)
            assert collector.empty is True
            assert not collector.fed
            assert not collector.abandon()
    assert same_bits(bits(buffer), before)
    collector = feed(buffer, 0, zeros_of(params), early=early)
    assert collector.empty is False
    assert collector.fed
    assert not same_bits(bits(buffer), before)


@each_kind
@each_way
@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("value", [1.0, 1e-45, math.nan])
def test_one_element_counts(kind, early, where, value):
    """Zeros that came before it are decayed as if they had not been held back."""
    params = parameters()
    grads = zeros_of(params)
    grads[where].view(-1)[-1] = value
    ours, theirs = (make_buffer(kind, params) for _ in range(2))
    for buffer in (ours, theirs):
        feed(buffer, 0, gradients(params))
    collector = feed(ours, 0, grads, early=early, skip_zeros=True)
    feed(theirs, 0, grads, early=early)
    assert collector.empty is False
    assert collector.fed
    if math.isnan(value):
        assert torch.isnan(ours.sums()[0])
    else:
        same_rows(bits(ours), bits(theirs))


def test_behind_the_prefix_and_not_contiguous():
    params = [torch.zeros(1000).requires_grad_(), torch.zeros(30, 40).requires_grad_()]
    buffer = make_buffer("plain", params)
    grads = [torch.zeros(1000), torch.zeros(40, 30).t()]
    assert feed(buffer, 0, grads, skip_zeros=True).empty
    grads[1][29, 39] = 1.0
    assert feed(buffer, 0, grads, skip_zeros=True).empty is False
    grads = [torch.zeros(1000), None]
    grads[0][999] = 1.0
    assert feed(buffer, 0, grads, skip_zeros=True).empty is False


@each_kind
def test_only_zeros_then_gradients_twice(kind):
    """A re-entrant checkpoint: the second gradient of a parameter is the first that counts."""
    params, grads = parameters(), None
    ours, theirs = (make_buffer(kind, params) for _ in range(2))
    for buffer, options in ((ours, {"skip_zeros": True}), (theirs, {})):
        feed(buffer, 0, gradients(params))
        collector = buffer.collector(0, BETA, **options)
        collector.add([1], [torch.zeros(200)])
        grads = gradients(params, 1)
        collector.add([1, 2], grads[1:3])
        collector.add([1], [torch.ones(200)])
        collector.finish([0, 3], [grads[0], None])
    same_rows(bits(ours), bits(theirs))


@pytest.mark.counts_calls
def test_no_more_is_looked_at_than_the_first_few_elements(monkeypatch):
    looked = []
    any_of = torch.Tensor.any
    monkeypatch.setattr(torch.Tensor, "any", lambda x, *a: looked.append(x.numel()) or any_of(x, *a))
    params = parameters()
    feed(make_buffer("split", params), 0, gradients(params), early=True, skip_zeros=True)
    assert looked == [48]  # of the last parameter, the first to come


PASSES = [  # (task, scale of the gradient, first pass of a step)
    (0, 1.0, True), (0, 0.0, True), (0, 1.0, False), (0, 0.0, False), (0, 2.0, False), (1, 0.0, True), (1, 0.0, False),
    (1, 3.0, False), (1, 1.0, True), (0, math.nan, True),
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_off_a_cpu_the_device_knows(kind, capturable, scaled):
    """The same rows as where the host looks."""
    params = parameters()
    host, device = make_buffer(kind, params), defer(make_buffer(kind, params))
    coefficients = torch.tensor(BETA, dtype=torch.float64) if capturable else BETA
    loss_scale = torch.tensor(4.0) if scaled else None
    fed = [False, False]
    for number, (task, scale, first) in enumerate(PASSES):
        grads = [g * scale for g in gradients(params, number)]
        options = {"coefficients": coefficients, "loss_scale": loss_scale, "skip_zeros": True}
        fed[task] = fed[task] and not first
        ours = feed(device, task, grads, again=not first, **options)
        theirs = feed(host, task, grads, again=fed[task], **options)
        fed[task] = fed[task] or not theirs.empty
        assert ours.empty is None
        assert theirs.empty is (scale == 0.0)
        assert [part.fed.tolist() for part in parts_of(device)] == [fed] * len(parts_of(device))
        for a, b in zip(bits(device), bits(host), strict=True):
            assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    if capturable:
        assert coefficients.tolist() == list(BETA)


@each_kind
def test_off_a_cpu_without_any_gradient(kind):
    params = [*parameters(), torch.zeros(0).requires_grad_()]
    buffer = defer(make_buffer(kind, params))
    feed(buffer, 0, gradients(params), skip_zeros=True)
    before = bits(buffer)
    feed(buffer, 0, [None] * 4 + [torch.zeros(0)], skip_zeros=True)
    assert same_bits(bits(buffer), before)


@each_kind
@each_way
def test_a_pass_again_is_not_decayed(kind, early):
    params = parameters()
    buffer = make_buffer(kind, params)
    feed(buffer, 0, gradients(params))
    before = buffer.row_of(0)
    before = [x.clone() for x in before]
    grads = gradients(params, 1)
    feed(buffer, 0, grads, early=early, again=True)
    for new, old, grad in zip(buffer.row_of(0), before, grads, strict=True):
        torch.testing.assert_close(new, old + 0.5 * grad)


@each_kind
def test_a_failed_pass_tells_whether_the_row_is_half_written(kind):
    params = parameters()
    buffer = make_buffer(kind, params)
    for options, grads, half in (({}, gradients(params), True), ({"skip_zeros": True}, zeros_of(params), False)):
        collector = buffer.collector(0, BETA, **options)
        assert not collector.abandon()
        collector.add([2], grads[2:3])
        assert collector.abandon() is half
        assert collector.fed is half
    assert not run_pass(buffer.collector(0, BETA), grads).abandon()
