"""The multi-task network of the MultiMNIST demo, the methods compared, and their one training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import dbmtl_kernels as dbk
import torch
from multi_mnist_data import CANVAS, Pairs
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TASKS = ("left digit", "right digit", "reconstruction")
NUM_TASKS = len(TASKS)
HIGHER_IS_BETTER = (True, True, False)
NUM_CLASSES = 10
FEATURES = 384
COSINE_EVERY = 5

SINGLE_TASK = "single-task"
EQUAL_WEIGHTING = "equal weighting"
LOG_ONLY = "log only"
MAX_NORM_ONLY = "max-norm only"
DB_MTL = "DB-MTL"
MULTI_TASK_METHODS = (EQUAL_WEIGHTING, LOG_ONLY, MAX_NORM_ONLY, DB_MTL)


class MultiTaskNet(nn.Module):
    """A convolutional trunk shared by all tasks, and one head a task: two classifiers and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        side = CANVAS // 4
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        classifiers = [nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES)) for _ in range(2)]
        decoder = nn.Sequential(
            nn.Linear(FEATURES, 256),
            nn.ReLU(),
            nn.Linear(256, CANVAS * CANVAS),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, CANVAS, CANVAS)),
        )
        self.heads = nn.ModuleList([*classifiers, decoder])

    def forward(self, images: Tensor, tasks: Sequence[int] = range(NUM_TASKS)) -> list[Tensor]:
        """The output of the head of each of ``tasks``."""
        features = self.trunk(images)
        return [self.heads[task](features) for task in tasks]


def squared_error(output: Tensor, images: Tensor) -> Tensor:
    """Sum of squares of each image, mean over the batch."""
    return (output - images).square().sum() / len(images)


def task_losses(model: MultiTaskNet, pairs: Pairs, tasks: Sequence[int] = range(NUM_TASKS)) -> list[Tensor]:
    """One forward pass; the loss of each of ``tasks``."""
    targets = (pairs.left, pairs.right, pairs.images)
    losses = (F.cross_entropy, F.cross_entropy, squared_error)
    outputs = model(pairs.images, tasks)
    return [losses[task](output, targets[task]) for task, output in zip(tasks, outputs, strict=True)]


@torch.no_grad()
def evaluate(model: MultiTaskNet, pairs: Pairs, tasks: Sequence[int] = range(NUM_TASKS)) -> Tensor:
    """The metric of each of ``tasks``: accuracy of a digit in %, squared error of the reconstruction."""
    model.eval()
    totals = torch.zeros(len(tasks))
    for indices in torch.arange(len(pairs)).split(1000):
        part = pairs.batch(indices)
        targets = (part.left, part.right, part.images)
        for i, (task, output) in enumerate(zip(tasks, model(part.images, tasks), strict=True)):
            if HIGHER_IS_BETTER[task]:
                totals[i] += 100 * (output.argmax(1) == targets[task]).sum()
            else:
                totals[i] += squared_error(output, targets[task]) * len(part)
    model.train()
    return totals / len(pairs)


Objective = Callable[[list[Tensor]], Tensor]


def make_objective(method: str, model: MultiTaskNet) -> Objective:
    """What turns the K losses into the scalar whose ``backward()`` fills the gradients.

    A balancer is called like a sum: in a loop of one's own, ``balancer(losses).backward()``.
    """
    if method == DB_MTL:
        return dbk.DBMTL(model.trunk.parameters(), num_tasks=NUM_TASKS)
    if method == MAX_NORM_ONLY:
        # beta 0: each step's own gradients are balanced, so that neither the log nor the average helps
        return dbk.DBMTL(model.trunk.parameters(), num_tasks=NUM_TASKS, log_transform=False, beta=0.0, keep_rows=True)
    if method == LOG_ONLY:
        return lambda losses: torch.stack([dbk.log_transform(loss) for loss in losses]).sum()
    if method in (EQUAL_WEIGHTING, SINGLE_TASK):
        return lambda losses: torch.stack(losses).sum()
    raise ValueError(f"unknown method {method!r}")


@dataclass
class History:
    """What one run left behind.

    Attributes:
        losses: (steps, T), a column for each task trained.
        rows: what the balancer's monitor told after each step, cosines now and then; empty without a balancer.
    validation: (T,) metric of each task trained, on the validation pairs, after training.
        test: (T,) the same on the test pairs.
    """

    losses: Tensor
    rows: list[dict[str, float]]
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Settings:
    """What every run of one seed has in common."""

    splits: tuple[Pairs, Pairs, Pairs]
    epochs: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Number of steps of one run."""
        return self.epochs * (len(self.splits[0]) // self.batch_size)


def train(
    method: str,
    learning_rate: float,
    settings: Settings,
    tasks: Sequence[int] = range(NUM_TASKS),
    make: Callable[[str, MultiTaskNet], Objective] = make_objective,
) -> History:
    """Train one network with one method at one learning rate.

    Initial weights and batches depend on ``settings.seed`` alone, so they are the same for every method.

    Args:
        method: one that ``make`` knows, or `SINGLE_TASK`.
        learning_rate: of Adam at the start; it falls to zero along a cosine.
        settings: data, length and seed of the run.
        tasks: the tasks to train on; one for `SINGLE_TASK`.
        make: the objective of a method for a network; see `make_objective`.
    """
    torch.manual_seed(settings.seed)
    model = MultiTaskNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    objective = make(method, model)
    balancer = objective if isinstance(objective, dbk.GradientBalancer) else None
    train_pairs, validation_pairs, test_pairs = settings.splits
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[Tensor] = []
    rows: list[dict[str, float]] = []

    for _ in range(settings.epochs):
        order = torch.randperm(len(train_pairs), generator=generator)
        for indices in order.split(settings.batch_size)[: len(train_pairs) // settings.batch_size]:
            step_losses = task_losses(model, train_pairs.batch(indices), tasks)
            optimizer.zero_grad()
            objective(step_losses).backward()
            optimizer.step()
            scheduler.step()

            losses.append(torch.stack(step_losses).detach())
            if balancer is not None:
                rows.append(balancer.monitor().as_dict(names=TASKS, gramian=len(losses) % COSINE_EVERY == 1))

    return History(
        losses=torch.stack(losses),
        rows=rows,
        validation=evaluate(model, validation_pairs, tasks),
        test=evaluate(model, test_pairs, tasks),
    )


def train_single_tasks(learning_rate: float, settings: Settings) -> History:
    """Train one network a task, each on its task alone; their histories as one of K tasks."""
    runs = [train(SINGLE_TASK, learning_rate, settings, (task,)) for task in range(NUM_TASKS)]
    return replace(
        runs[0],
        losses=torch.cat([run.losses for run in runs], dim=1),
        validation=torch.cat([run.validation for run in runs]),
        test=torch.cat([run.test for run in runs]),
    )
