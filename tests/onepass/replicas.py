"""Ranks of one DistributedDataParallel model that OnePassDBMTL trains: its parameters, how ranks differ, refusals."""

import json
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import K, Model, a_block_of_one_task

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()


def mine(x):
    return x.chunk(size)[rank]


def trained(unused):
    model = Model()
    balancer = dbk.OnePassDBMTL(model.trunk, K, process_group=dist.group.WORLD, measure_every=3)
    parameters = model.train_on(balancer, DistributedDataParallel(model, find_unused_parameters=unused), mine)
    here = torch.cat([parameters, balancer.weights, balancer.norms])
    others = [torch.empty_like(here) for _ in range(size)]
    dist.all_gather(others, here)
    return {"identical": all(torch.equal(here, other) for other in others), "parameters": parameters.tolist()}


def sharded():
    model = Model()
    for layer in (model.trunk[0], model.trunk[2], *model.heads, model):
        fully_shard(layer)
    balancer = dbk.OnePassDBMTL(model.trunk, K, measure_every=10)
    start = [p.full_tensor() for p in model.parameters()]
    parameters = model.train_on(balancer, model, mine)
    moved = [not torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), start, strict=True)]
    here = torch.cat([parameters, balancer.weights, balancer.norms])
    others = [torch.empty_like(here) for _ in range(size)]
    dist.all_gather(others, here)
    return {
        "identical": all(torch.equal(here, other) for other in others),
        "parameters": parameters.tolist(),
        "measured": balancer.audit.measured,
        "moved": all(moved),
    }


class Several(Model):
    """Gives predictions among other things."""

    def forward(self, x):
        z = self.trunk(x)
        first, second, third = [head(z) for head in self.heads]
        return {"epoch": 3, "first": first, "none": None, "second": second, "third": (third, z.detach()), "z": z}


def predictions_among_other_outputs():
    """Of a wrapper that looks for unused parameters: the trunk's gradient, relative to that by the weights."""
    model = Several()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    balancer = dbk.OnePassDBMTL(model.trunk, K, process_group=dist.group.WORLD)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(forward):
        out = forward(x)
        predictions = out["first"], out["second"], out["third"][0]
        return [(y - t).square().mean() * 10**t + 0 * out["z"].sum() for t, y in enumerate(predictions)]

    balancer(losses(wrapped)).backward()
    expected = 0.0
    for weight, loss in zip(balancer.weights, losses(model), strict=True):
        grads = torch.autograd.grad((loss + 1e-8).log(), list(model.trunk.parameters()), retain_graph=True)
        expected = expected + weight * torch.cat([grad.reshape(-1) for grad in grads])
    found = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()])
    assert balancer.weights.max() > 1.2
    return float((found - expected).norm() / expected.norm())


def held_back():
    """A sharded model told not to reduce but in the last backward of a step, against one that always does."""
    found = []
    for holds_back in (False, True):
        model = Model()
        for layer in (model.trunk[0], model.trunk[2], *model.heads, model):
            fully_shard(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        balancer = dbk.OnePassDBMTL(model.trunk, K, measure_every=1000)
        balancer.attach(optimizer)
        for step in range(7):
            parts = 1 if step in (0, 1, 3) else 3  # norms are measured in steps 1, 2, 4
            for part in range(parts):
                model.set_requires_gradient_sync(part == parts - 1 or not holds_back)
                generator = torch.Generator().manual_seed(10 * step + part)
                x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
                (balancer(model(mine(x))) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert balancer.step == 7
        found.append(torch.cat([p.full_tensor().reshape(-1) for p in model.parameters()]))
    return float((found[0] - found[1]).abs().max())


def sharded_trunk(model):
    for layer in (model.trunk[0], model.trunk[2]):
        fully_shard(layer)
    return model


def part_of_the_trunk(model):
    model.trunk[0] = DistributedDataParallel(model.trunk[0])
    return model


def block_of_one_task():
    """Of a sharded trunk, a layer that one task alone reaches: largest difference to the same model, not sharded."""
    found = []
    for shard in (False, True):
        torch.manual_seed(4)
        trunk, heads, losses, _ = a_block_of_one_task()
        model = torch.nn.ModuleList([trunk, heads]).double()
        for layer in (*trunk, *heads) if shard else ():
            fully_shard(layer)
        group = None if shard else False
        balancer = dbk.OnePassDBMTL(trunk.parameters(), K, process_group=group, measure_every=1000)
        for step in range(3):
            model.zero_grad()
            generator = torch.Generator().manual_seed(step)
            balancer(losses(torch.randn(16, 8, generator=generator, dtype=torch.float64))).backward()
        grads = [p.grad.full_tensor() if shard else p.grad for p in model.parameters()]
        found.append(torch.cat([grad.reshape(-1) for grad in grads]))
        assert balancer.weights.max() > 1.5
    return float((found[0] - found[1]).abs().max())


def refusal(call, some=None, group=dist.group.WORLD):
    model = Model()
    wrapped = call(model)
    try:
        balancer = dbk.OnePassDBMTL(model.trunk, K, process_group=group)
        losses = wrapped(mine(torch.ones(8, 8, dtype=torch.float64)))
        for _ in range(3):
            balancer(losses if some is None else some(losses))
            balancer._engine.steps.begin(None)  # as if it had been backpropagated
            balancer._engine.end_step()
            balancer._weigher.levels.begin(range(K))
    except RuntimeError as error:
        return str(error)
    return "not refused"


def thawed():
    """A layer that the wrapper leaves out, frozen in the first step only."""
    layers, frozen = [], iter([True, False, False])

    def wrapped(model):
        layers.append(model.trunk[0])
        names = ["trunk.0.weight", "trunk.0.bias"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model)

    def given(losses):
        layers[0].requires_grad_(not next(frozen))
        return losses

    return refusal(wrapped, given)


def absent(losses):
    return [None, *losses[1:]] if rank == 0 else losses


result = {
    "trained": [trained(unused) for unused in (False, True)],
    "sharded": sharded(),
    "block": block_of_one_task(),
    "predictions": predictions_among_other_outputs(),
    "held back": held_back(),
    "plain heads": refusal(sharded_trunk, group=None),
    "part of the trunk": refusal(part_of_the_trunk),
    "thawed": thawed(),
    "unnamed group": refusal(DistributedDataParallel, group=None),
    "no wrapper": refusal(lambda model: model),
    "static graph": refusal(lambda model: DistributedDataParallel(model, static_graph=True)),
    "absent on one rank": refusal(DistributedDataParallel, absent),
}
(folder / f"{rank}.json").write_text(json.dumps(result))
dist.barrier()
