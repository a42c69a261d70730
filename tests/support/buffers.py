"""Buffers of rows, fed by hand."""

import torch
from dbmtl_kernels.rows import dtensors, placement

SHAPES = ((3, 5), (200,), (1,), (4, 3, 2, 2))
BETA = (0.5, 0.5)  # decay and gain of the first gradient in a step


def parameters():
    """The last is channels-last."""
    leaves = [torch.randn(shape) for shape in SHAPES]
    leaves[3] = leaves[3].to(memory_format=torch.channels_last)
    return [leaf.requires_grad_() for leaf in leaves]


def make_buffer(kind, params, num_tasks=2, state=torch.float32, backend="auto", **options):
    """A plain buffer, or a split one: every other parameter counts as one on another device."""
    places, key = {}, dtensors.placement_key
    for p in params:
        places[id(p)] = len(places) % 2
    if kind == "split":
        dtensors.placement_key = lambda p: places[id(p)]
    try:
        return placement.place(params, num_tasks, state, backend, options.pop("process_group", False), **options)[0]
    finally:
        dtensors.placement_key = key


def parts_of(buffer):
    return getattr(buffer, "parts", [buffer])


def defer(buffer):
    """Behave as on a device that must not be waited for."""
    for each in {id(x): x for x in (buffer, *parts_of(buffer))}.values():
        each.deferred, each.early = True, False
    return buffer


def run_pass(collector, grads, early=False):
    """One pass: gradients one by one from the last to the first, or all at its end."""
    grads = dict(enumerate(grads))
    if early:
        for index in sorted(grads, reverse=True):
            collector.add([index], [grads[index]])
        grads = {}
    collector.finish(list(grads), list(grads.values()))
    return collector


def feed(buffer, task, grads, *, early=False, coefficients=BETA, loss_scale=None, **options):
    return run_pass(buffer.collector(task, coefficients, loss_scale, **options), grads, early)


def gradients(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(dtensors.local(p).shape, generator=generator) for p in params]


def zeros(params):
    return [torch.zeros(dtensors.local(p).shape) for p in params]


def bits(buffer):
    """Copies of rows, and of sums of squares."""
    buffer.settle()
    return [x.clone() for part in parts_of(buffer) for x in (part.rows, part.stats.sumsq)]


def same_bits(ours, theirs):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


def same_rows(ours, theirs):
    """Equal rows; sums of squares may have been added in another order."""
    for a, b in zip(ours, theirs, strict=True):
        if a.dim() == 2:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    return True
