"""A small transformer with two heads, its data, and the same training as a plain loop; a script for two ranks."""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import dbmtl_kernels as dbk
import torch
import torch.distributed as dist
from accelerate import Accelerator
from dbmtl_kernels.integrations.accelerate import balancing, prepare_balancer
from dbmtl_kernels.integrations.transformers import BalancedTrainer
from dbmtl_kernels.integrations.wrappers import make_balancer
from ranks import told
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from trained import parameters, seeded
from transformers import TrainingArguments

BATCH, BATCHES = 4, 14  # an epoch


class Data(Dataset):
    def __init__(self, size=BATCH * BATCHES):
        self.x = torch.randn(size, 3, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return {"x": x, "labels_a": x[0, 0], "labels_b": x[:, 1].mean()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x, labels_a, labels_b):
        z = self.encoder(x).mean(1)
        a, b = self.a(z).squeeze(1), self.b(z).squeeze(1)
        losses = [(a - labels_a).square().mean() + 0.1, 30 * (b - labels_b).square().mean() + 0.1]
        return {"losses": losses, "a": a, "b": b}


first_net = partial(seeded, Net)


class InOrder(BalancedTrainer):
    """Batches in order, so that others can have the same."""

    def get_train_dataloader(self):
        size = self.args.per_device_train_batch_size
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=size, shuffle=False))


def trainer_of(
    folder, net=Net, cls=InOrder, arguments=TrainingArguments, batch=BATCH, data=Data, shared="encoder", more=None,
    **options,
):  # fmt: skip
    given = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": batch, "num_train_epochs": 2,
        "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "save_strategy": "no",
        "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    return cls(seeded(net), arguments(**given), train_dataset=data(), shared=shared, num_tasks=2, **(more or {}))


def plain_loop(accumulate=1, clip=0.0, bf16=False, absent=False, method=dbk.DBMTL):
    """What the Trainer does, in a loop without it; the second task may be absent from every other batch."""
    net = first_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    balancer = method(net.encoder.parameters(), 2)
    balancer.attach(optimizer)
    for _ in range(2):
        batches = list(DataLoader(Data(), batch_size=BATCH))
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            parts = batches[first : first + accumulate]
            for index, part in enumerate(parts, first):
                with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                    losses = net(**part)["losses"]
                if absent and index % 2:
                    losses[1] = None
                (balancer(losses) / len(parts)).backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
    return net, balancer


def accelerate_loop(
    accumulate=1, epochs=2, save=None, resume=None, guarded=True, batch=BATCH, method=dbk.DBMTL, **options
):
    """A loop of one's own with Accelerate; saves at the end, and resumes after the first epoch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    net = first_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(Data(), batch_size=batch))
    balancer = prepare_balancer(accelerator, net, optimizer, lambda net: net.encoder.parameters(), 2, method=method)
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(resume is not None, epochs):
        for part in loader:
            with accelerator.accumulate(net):
                with balancing(net, balancer) if guarded else contextlib.nullcontext():
                    accelerator.backward(balancer(net(**part)["losses"]))
                optimizer.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return accelerator.unwrap_model(net), balancer


def sharded_loop(accumulate):
    """FSDP2, told not to reduce while it accumulates, as Accelerate and the Trainer do (on GPUs only)."""
    rank, net = dist.get_rank(), first_net()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    balancer = make_balancer(net, net, "encoder", 2, dbk.DBMTL, {})
    balancer.attach(optimizer)
    for _ in range(2):
        for index, part in enumerate(DataLoader(Data(), batch_size=BATCH)):
            last = index % accumulate == accumulate - 1
            net.set_requires_gradient_sync(last)
            mine = {name: x.chunk(2)[rank] for name, x in part.items()}
            with balancing(net):
                (balancer(net(**mine)["losses"]) / accumulate).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
    return net, balancer


def two_ranks(folder):
    results, half = {}, BATCH // 2

    def record(name, net, balancer):
        results[name] = told(parameters(net), balancer, type(balancer) is dbk.DBMTL)

    def train(name, resume=None, **options):
        options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, **options}
        trainer = trainer_of(folder / name, batch=half, **options)
        trainer.train(resume_from_checkpoint=resume)
        record(name, trainer.model, trainer.balancer)

    train("trainer", save_strategy="steps", save_steps=3)
    train("resumed", str(folder / "trainer" / "checkpoint-3"))
    record("accelerate", *accelerate_loop(7, batch=half))
    accelerate_loop(7, 1, save=folder / "state", batch=half)
    record("loaded", *accelerate_loop(7, resume=folder / "state", batch=half))
    record("sharded", *sharded_loop(7))
    train("one pass, trainer", more={"method": dbk.OnePassDBMTL})
    for guarded in (True, False):
        one = accelerate_loop(7, batch=half, method=dbk.OnePassDBMTL, guarded=guarded)
        record(f"one pass, accelerate, {guarded}", *one)
    try:
        accelerate_loop(guarded=False, batch=half)
        results["refusal"] = ""
    except RuntimeError as error:
        results["refusal"] = str(error)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_ranks(Path(sys.argv[1]))
