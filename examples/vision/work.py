"""What an example says of its data set, and what the loop asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .metrics import Metrics, Task
from .networks import Network

LAST_EPOCHS, BEST_EPOCH = "mean of the last 10 epochs", "best mean validation metric"


@dataclass(frozen=True)
class Protocol:
    """How a table's figures are made.

    Attributes:
        name: whose it is.
        batch: inputs of a step; of a task where each has its own.
        epochs: passes over the training data.
        rate: of Adam.
        select: which epoch's test metrics count, `LAST_EPOCHS` or `BEST_EPOCH`.
        weight_decay: of Adam.
        halve_at: the rate is halved after every so many epochs; None leaves it.
        drop_last: leave out a last batch that is not full.
        augment: scale and flip training images at random.
        pooled: depth and normal metrics are of all pixels together; else of each batch, averaged.
        stl: published figures of single-task networks, if there are.
        others: published Delta_m of other methods under this protocol.
    """

    name: str
    batch: int
    epochs: int
    rate: float
    select: str
    weight_decay: float = 0.0
    halve_at: int | None = None
    drop_last: bool = False
    augment: bool = False
    pooled: bool = True
    stl: Metrics | None = None
    others: Mapping[str, float] = field(default_factory=dict)

    def with_figures(self, tasks: Sequence[Task], figures: Sequence[float]) -> Protocol:
        """With the published figures of single-task networks, in the order of tasks and metrics."""
        rest = iter(figures)
        return replace(self, stl={task.name: {name: next(rest) for name in task.metrics} for task in tasks})


class Work:
    """A data set with its tasks. An example derives from it.

    Attributes:
        name: of the data set.
        tasks: in order.
        protocol: what is done unless the command line says otherwise.
        data: for "train", "test" and maybe "val" a data set for all tasks, or one for each.
        own_inputs: each task has inputs of its own, and so a data set.
        model: name of the network.
        smoke: generated data.
    """

    name: str
    tasks: tuple[Task, ...]
    protocol: Protocol
    data: dict[str, list[Dataset[Any]]]
    own_inputs = False
    model: str
    smoke = False

    def network(self) -> Network:
        """A new one, with weights of the current seed."""
        raise NotImplementedError

    def loss(self, task: int, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a task, a scalar."""
        raise NotImplementedError

    def meter(self, task: int) -> Any:
        """An empty meter of a task: of `metrics`."""
        raise NotImplementedError

    def targets(self, collated: Any) -> list[Tensor]:
        """What was collated of the samples' second parts, by task."""
        return list(collated)

    def losses(self, network: Network, batch: Batch, tasks: Sequence[int]) -> list[Tensor]:
        """One loss for each of ``tasks``: of one forward pass, or of one a task where inputs are its own."""
        if self.own_inputs:
            outputs = [network(batch.inputs[task], [task])[0] for task in tasks]
        else:
            outputs = network(batch.inputs[0], tasks)
        return [self.loss(t, output, batch.targets[t]) for t, output in zip(tasks, outputs, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Inputs, one for all tasks or by task, and targets by task."""

    inputs: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]


@dataclass(frozen=True)
class Loading:
    """How batches are made of samples."""

    batch: int
    drop_last: bool
    workers: int
    device: torch.device

    def check(self, work: Work) -> None:
        """Raises BenchError: a batch that must be full is more than there are training samples of a task."""
        for data in work.data["train"]:
            count = len(data)  # type: ignore[arg-type]
            if self.drop_last and count < self.batch:
                raise BenchError(f"--batch {self.batch} is more than the {count} training samples of a task")

    def loader(self, data: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
        """Batches of a data set; what is shuffled is for training."""
        return DataLoader(
            data, self.batch, shuffle=shuffle, drop_last=shuffle and self.drop_last, num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def training(self, work: Work, tasks: Sequence[int]) -> tuple[int, Iterator[Batch]]:
        """How many batches an epoch has, and these: tasks with few of their own begin anew till the last is through."""
        if not work.own_inputs:
            loader = self.loader(work.data["train"][0], shuffle=True)
            return len(loader), (self._shared(work, x, collated) for x, collated in loader)
        loaders = {task: self.loader(work.data["train"][task], shuffle=True) for task in tasks}
        length = max(len(loader) for loader in loaders.values())
        return length, self._in_turn(loaders, length)

    def _in_turn(self, loaders: Mapping[int, DataLoader[Any]], length: int) -> Iterator[Batch]:
        iterators = {task: iter(loader) for task, loader in loaders.items()}
        for _ in range(length):
            pairs = {}
            for task, loader in loaders.items():
                pair = next(iterators[task], None)
                if pair is None:
                    iterators[task] = iter(loader)
                    pair = next(iterators[task])
                pairs[task] = [x.to(self.device, non_blocking=True) for x in pair]
            yield Batch({task: x for task, (x, _) in pairs.items()}, {task: y for task, (_, y) in pairs.items()})

    def _shared(self, work: Work, inputs: Tensor, collated: Any) -> Batch:
        parts = collated if isinstance(collated, list) else [collated]
        moved = [part.to(self.device, non_blocking=True) for part in parts]
        targets = work.targets(moved if isinstance(collated, list) else moved[0])
        return Batch({0: inputs.to(self.device, non_blocking=True)}, dict(enumerate(targets)))

    @torch.no_grad()
    def measure(self, work: Work, network: Network, split: str, tasks: Sequence[int]) -> dict[str, dict[str, float]]:
        """The metrics of each of ``tasks`` on a split."""
        network.eval()
        meters = {task: work.meter(task) for task in tasks}
        if work.own_inputs:
            for task in tasks:
                for x, y in self.loader(work.data[split][task], shuffle=False):
                    meters[task].add(network(x.to(self.device), [task])[0], y.to(self.device))
        else:
            for x, collated in self.loader(work.data[split][0], shuffle=False):
                batch = self._shared(work, x, collated)
                for task, output in zip(tasks, network(batch.inputs[0], tasks), strict=True):
                    meters[task].add(output, batch.targets[task])
        return {work.tasks[task].name: meter.values() for task, meter in meters.items()}
