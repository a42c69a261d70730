"""What two ranks do with buffers of rows fed by hand; rank 0 writes what came of it for test_buffers.py to judge.

Kinds: "ddp" are replicas, "fsdp" DTensors, "mixed" both in one split buffer, "two meshes" DTensors of two meshes.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from buffers import BETA, bits, defer, feed, gradients, parts_of, same_bits, zeros
from dbmtl_kernels.rows import dtensors, placement
from job import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard

KINDS = ("ddp", "fsdp", "mixed", "two meshes")
RESULTS = {}


def parameters(kind):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Linear(33, 4, bias=False), nn.Linear(3, 2)]
    if kind != "ddp":
        fully_shard(layers[0], mesh=mesh_of(2))
        if kind != "mixed":
            fully_shard(layers[1], mesh=mesh_of(2))
        if kind != "mixed":
            fully_shard(layers[2], mesh=mesh_of(1, 2) if kind == "two meshes" else mesh_of(2))
    return [p for layer in layers for p in layer.parameters()]


def make(kind, params, deferred=False, alone=False):
    """Plain parameters of ranks left alone are no replicas."""
    group = {"ddp": dist.group.WORLD, "mixed": dist.group.WORLD}.get(kind)
    buffer = placement.place(params, 2, torch.float32, "auto", False if alone else group)[0]
    return defer(buffer) if deferred else buffer


def tell(name, value):
    """``value`` of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    RESULTS[name] = values


def balance(buffer):
    flats = buffer.new_flats()
    buffer.balance(flats, 1e-8, "max")
    return [dtensors.local(x).clone() for x in buffer.views(flats)]


def mine(params, seed=0):
    """Of replicas each rank has other gradients, of DTensors other elements of one."""
    return gradients(params, 10 * seed + dist.get_rank())


def passes(kind, early, deferred):
    """Zeros everywhere, on one rank, of one parameter, again; beside a buffer that gets only the passes that count."""
    params = parameters(kind)
    ours, theirs = make(kind, params, deferred), make(kind, params)
    rank, fed, empties, last = dist.get_rank(), False, [], []
    for number, (what, first) in enumerate(
        [("all", True), ("none", True), ("all", False), ("rank 0", False), ("all", True), ("rank 1", False),
         ("one", True), ("none", True), ("none", False), ("nan", True)]
    ):  # fmt: skip
        grads = mine(params, number)
        if what == "none" or what == f"rank {1 - rank}":
            grads = zeros(params)
        if what == "one":  # that of rank 1, of the last parameter
            grads = zeros(params)
            grads[-1][..., :1] += rank
        if what == "nan" and rank == 1:
            grads[0].view(-1)[:1] = torch.nan
        fed = fed and not first
        known = kind == "ddp" or deferred  # known to the buffer alone
        collector = feed(ours, 1, grads, early=early, again=not first if known else fed, skip_zeros=True)
        if what != "none":
            feed(theirs, 1, grads, early=early, again=fed)
            fed = True
        empties.append(collector.empty)
        last.append(
            all(
                torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(bits(ours), bits(theirs), strict=True)
            )
        )
        if kind == "ddp" and not deferred:
            empties[-1] = (collector.empty, 1 in ours.empty_tasks)
        if deferred:
            empties[-1] = (collector.empty, [bool(part.fed[1]) for part in parts_of(ours)])
    tell(f"passes, {kind}, {early}, {deferred}", {"empty": empties, "same": last})


def never_fed(kind):
    """Zeros leave the bits of a buffer that was never fed, several of them on their way at once."""
    params = parameters(kind)
    buffer = make(kind, params)
    before = bits(buffer)
    for task in (0, 1, 0):
        feed(buffer, task, zeros(params), skip_zeros=True)
    tell(f"never fed, {kind}", same_bits(bits(buffer), before))


def other_parameters(kind):
    params = parameters(kind)
    old = make(kind, params)
    for task in range(2):
        feed(old, task, mine(params, task))
    balance(old)
    same = make(kind, params)
    same.take_over(old)
    rows = [[x.clone() for x in old.row_of(task)] for task in range(2)]
    found = {
        "rows": same_bits(bits(same)[::2], bits(old)[::2]),
        "stats": torch.equal(same.stats.norms, old.stats.norms),
        "balanced": all(map(torch.equal, balance(same), balance(old))),
    }
    fresh = nn.Linear(9, 2, bias=False).weight
    kept = params[3:] + params[:1]
    new = make(kind, kept if kind in ("fsdp", "two meshes") else [*kept, fresh])
    new.take_over(old)
    at = [next(i for i, q in enumerate(params) if q is p) for p in kept]
    for task in range(2):
        row = new.row_of(task)
        found[f"task {task}"] = all(torch.equal(a, rows[task][i]) for a, i in zip(row[: len(at)], at, strict=True))
        found[f"fresh {task}"] = not any(x.any() for x in row[len(kept) :])
    found["sums"] = bool((new.sums() > 0).all())
    unfed = make(kind, params)
    unfed.take_over(make(kind, params))
    found["not allocated"] = not unfed.allocated
    tell(f"taken over, {kind}", found)


def to_another_kind():
    """Replicas left alone, and back: each has the whole rows then."""
    params = parameters("ddp")
    replicas = make("ddp", params)
    for task in range(2):
        feed(replicas, task, mine(params, task))
    alone, again = make("ddp", params, alone=True), make("ddp", params)
    alone.take_over(replicas)
    again.take_over(alone)
    torch.testing.assert_close(alone.sums(), replicas.sums(), rtol=1e-6, atol=0)
    rows = [torch.cat([x.reshape(-1) for x in each.row_of(1)]) for each in (replicas, alone, again)]
    tell("to another kind", [same_bits(bits(again)[:1], bits(replicas)[:1]), *map(rows[0].equal, rows)])


def sits_out_and_dropped(kind):
    params = parameters(kind)
    ours, theirs = make(kind, params), make(kind, params)
    for buffer in (ours, theirs):
        feed(buffer, 0, mine(params))
    feed(ours, 1, mine(params, 1))  # on its way, if of replicas
    ours.drop(1)
    dropped = same_bits(bits(ours), bits(theirs))
    feed(ours, 1, mine(params, 1))
    ours.sit_out(1, 1)
    same = all(map(torch.equal, balance(ours), balance(theirs)))
    tell(
        f"sits out, {kind}",
        [dropped, same, same_bits(bits(ours), bits(theirs)), ours.stats.nonfinite_steps.tolist() == [0, 1]],
    )


def into_no_row(kind):
    params = parameters(kind)
    buffer = make(kind, params)
    feed(buffer, 0, mine(params))
    before, one, flats = bits(buffer), buffer.of_one_task(), buffer.new_flats()
    expected = [torch.zeros_like(g) for g in mine(params)]
    for seed, weight in ((1, 0.5), (2, 2.0)):
        grads = mine(params, seed)
        one.collector(0, (0.0, 1.0)).finish(list(range(len(grads))), list(grads))
        one.settle()
        one.combine(torch.tensor([weight]), flats, accumulate=seed > 1)
        for total, grad, p in zip(expected, grads, params, strict=True):
            mean = grad.clone()
            if not dtensors.is_dtensor(p):
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            total += weight * mean
    close = [
        torch.allclose(dtensors.local(a), b, atol=1e-6) for a, b in zip(buffer.views(flats), expected, strict=True)
    ]
    tell(f"into no row, {kind}", [all(close), same_bits(bits(buffer), before)])


def failed(kind):
    """A pass that fails leaves nothing where its gradients were on their way."""
    params = parameters(kind)
    buffer = make(kind, params)
    feed(buffer, 0, mine(params))
    before = bits(buffer)
    collector = buffer.collector(0, BETA)
    if kind == "ddp":
        collector.add([1], mine(params)[1:2])
    half = collector.abandon()
    tell(f"failed, {kind}", [not half, same_bits(bits(buffer), before)])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for kind in KINDS:
            for deferred in (False, True):
                for early in (False, True) if kind == "ddp" and not deferred else (False,):
                    passes(kind, early, deferred)
            for function in (never_fed, other_parameters, sits_out_and_dropped, into_no_row, failed):
                function(kind)
        to_another_kind()
    RESULTS["deprecated"] = [text for text in map(str, (one.message for one in said)) if "is deprecated" in text]
    if dist.get_rank() == 0:
        Path(sys.argv[1], "results.json").write_text(json.dumps(RESULTS))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
