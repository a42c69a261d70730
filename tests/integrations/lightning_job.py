"""A LightningModule of two unequal tasks, its data, and the same training as a plain loop; a script for two ranks."""

import json
import sys
from functools import partial
from pathlib import Path

import dbmtl_kernels as dbk
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from dbmtl_kernels.integrations.lightning import GradientBalancing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from problems import overflowing
from ranks import leave, told
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from trained import parameters, seeded

BATCH, BATCHES = 12, 6  # an epoch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))])

    def forward(self, x):
        z = self.trunk(x)
        return [
            ((head(z) - (t + 1) * x[:, t : t + 1]).square().mean() + 0.1) * 10**t for t, head in enumerate(self.heads)
        ]


first_net = partial(seeded, Net)
one_pass = partial(dbk.OnePassDBMTL, measure_every=1000)  # sharded parameters are measured in other steps later on


def loader(rank=0, size=1):
    """An epoch in order; of several ranks each has its part of every batch."""
    x = torch.randn(BATCHES, size, BATCH // size, 7, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x[:, rank].reshape(-1, 7)), batch_size=BATCH // size)


class Module(pl.LightningModule):
    def __init__(self, poison=()):
        super().__init__()
        self.net = first_net()
        self.poison = poison  # batches, counted from the start of training, with a loss that overflows
        self.seen = []

    def training_step(self, batch, batch_idx):
        losses = self.net(batch[0])
        if self.current_epoch * BATCHES + batch_idx in self.poison:
            losses[1] = overflowing(losses[1])
        self.seen.append(float(losses[0].detach()))
        return self.balancer(losses)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.balancer(self.net(batch[0])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer_of(folder, epochs, *callbacks, **options):
    given = {
        "default_root_dir": folder, "max_epochs": epochs, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0, "callbacks": list(callbacks), **options,
    }  # fmt: skip
    return pl.Trainer(**given)


def fit(
    folder, epochs=2, *callbacks, resume=None, module=None, rank=0, size=1, validate=False, method=dbk.DBMTL, **options
):
    """The module and its callback, trained; with ``validate`` a validation after every epoch."""
    module = Module() if module is None else module
    balancing = GradientBalancing("net.trunk", 2, method=method)
    trainer = trainer_of(folder, epochs, balancing, *callbacks, **options)
    trainer.fit(module, loader(rank, size), loader(rank, size) if validate else None, ckpt_path=resume)
    return module, balancing, trainer


def checkpointing(folder):
    """A checkpoint after every epoch."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


class Sharded(Module):
    """Its net is sharded, for Lightning's ModelParallelStrategy."""

    units = ("trunk",)

    def configure_model(self):
        if not isinstance(self.net.trunk[0].weight, DTensor):
            for module in (*map(self.net.get_submodule, self.units), self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


class ShardedWhole(Sharded):
    """As a single unit, whose parameters stay gathered after a forward pass that no backward follows."""

    units = ()


class Refused(Module):
    """Makes its own balancer, and nothing else that several ranks need."""

    def on_fit_start(self):
        self.balancer = dbk.DBMTL(self.net.trunk.parameters(), 2, process_group=dist.group.WORLD)


def two_ranks(folder):
    ranks = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    # Lightning starts the other rank from here, when the first Trainer is made.
    trainer = trainer_of(folder, 1, **ranks)
    rank = trainer.global_rank
    results = {}

    def job(name, epochs=2, *callbacks, **options):
        module, balancing, _ = fit(folder, epochs, *callbacks, rank=rank, size=2, **{**ranks, **options})
        rows = not isinstance(balancing.balancer, dbk.OnePassDBMTL)
        results[name] = {**told(parameters(module), balancing.balancer, rows), "left": hasattr(module, "balancer")}

    def jobs(wrapper, saves, options, others):
        job(f"{wrapper}plain", **options())
        job(f"{wrapper}accumulated", accumulate_grad_batches=3, **options())
        job(f"{wrapper}other", **others)
        job(f"{wrapper}saved", 1, checkpointing(saves), enable_checkpointing=True, **options())
        job(f"{wrapper}resumed", resume=saves / "epoch=0.ckpt", **options())

    def sharded(cls=Sharded):
        return {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "module": cls()}

    for accumulate in (1, 3):
        job(f"one pass, {accumulate}", accumulate_grad_batches=accumulate, method=one_pass)
    job("one pass, sharded", method=one_pass, **sharded())
    jobs("", folder, dict, {"strategy": "ddp_find_unused_parameters_true"})
    jobs("sharded, ", folder / "fsdp", sharded, {"validate": True, **sharded(ShardedWhole)})
    results["refusal"] = ""
    try:
        trainer_of(folder, 1, **ranks).fit(Refused(), loader(rank, 2))
    except RuntimeError as error:
        results["refusal"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()  # the one who started the other waits for it


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_ranks(Path(sys.argv[1]))
    leave()
