"""CelebA: 40 attributes of a face from one network, a table of the paper's rivals that DB-MTL is missing in.

    python examples/celeba.py --data FOLDER --method stl ew log uw famo db-mtl one-pass --resume
    python examples/celeba.py --smoke                           # two steps on generated files

FOLDER has Eval/list_eval_partition.txt, Anno/list_attr_celeba.txt and Img/img_align_celeba/; see docs/datasets.md.
Adam at 3e-4, batches of 256, 15 epochs; F1 of each attribute on the test part, of the epoch whose mean F1 on the
validation part is best.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    from dbmtl_kernels.bench.results import BenchError
    from torch import Tensor
    from torch.nn import functional
    from vision.command import run_example
    from vision.files import Pictures, check_all, check_picture, check_size, folder, lines
    from vision.metrics import F1, Task
    from vision.networks import NineLayers
    from vision.samples import write_celeba
    from vision.work import BEST_EPOCH, Protocol, Work
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}, which is not installed: pip install 'dbmtl-kernels[vision]'")

NUM_TASKS, SIZE = 40, (64, 64)
SPLITS = {"train": ("0", 162_770), "val": ("1", 19_867), "test": ("2", 19_962)}
PROTOCOL = Protocol(
    "FAMO", batch=256, epochs=15, rate=3e-4, select=BEST_EPOCH,
    others={
        "EW": 4.15, "sum of logs": 7.20, "UW": 3.23, "FAMO": 1.21, "GO4Align": 0.88, "LDC-MTL": -1.31,
        "NTKMTL-SR": 0.23, "Nash-MTL": 2.84, "FairGrad": 0.37, "NTKMTL": -0.77,
    },
)  # fmt: skip


def attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Names of the attributes, and of each picture 0 or 1 for each.

    Raises:
        BenchError: the file is missing, cut off, or of another format.
    """
    head, *found = lines(path)
    names = found[0].split() if found else []
    if not head.strip().isdigit() or len(names) != NUM_TASKS:
        raise BenchError(f"{path}: a count and a line of {NUM_TASKS} names are expected first, got {len(names)} names")
    labels: dict[str, list[int]] = {}
    for number, line in enumerate(found[1:], 3):
        name, *values = line.split()
        if len(values) != NUM_TASKS or not set(values) <= {"-1", "1"}:
            raise BenchError(f"{path}, line {number}: {NUM_TASKS} values of -1 or 1 are expected")
        labels[name] = [int(value == "1") for value in values]
    if len(labels) != int(head):
        raise BenchError(f"{path} says it has {int(head)} pictures and has {len(labels)}: cut off?")
    return names, labels


def partition(path: Path, labels: dict[str, list[int]]) -> dict[str, list[str]]:
    """The pictures of each split.

    Raises:
        BenchError: the file is missing, or does not go with the labels.
    """
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    by_code = {code: split for split, (code, _) in SPLITS.items()}
    for number, line in enumerate(lines(path), 1):
        name, _, code = line.strip().partition(" ")
        if code not in by_code or name not in labels:
            raise BenchError(f"{path}, line {number}: a labelled picture and 0, 1 or 2 are expected, got {line!r}")
        found[by_code[code]].append(name)
    if sum(map(len, found.values())) != len(labels):
        raise BenchError(f"{path} has {sum(map(len, found.values()))} pictures, and {len(labels)} are labelled")
    for split, names in found.items():
        if not names:
            raise BenchError(f"{path} has no pictures for {split}")
    return found


class Faces(Work):
    """40 binary labels of a picture."""

    name, model, protocol = "CelebA", "nine layers", PROTOCOL

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        names, labels = attributes(folder(root) / "Anno" / "list_attr_celeba.txt")
        parts = partition(root / "Eval" / "list_eval_partition.txt", labels)
        pictures = folder(root / "Img" / "img_align_celeba")
        self.tasks = tuple(Task(name, F1.names) for name in names)
        self.width = 8 if args.smoke else 64
        self.data = {}
        if args.check:
            check_all(check_picture, [pictures / name for name in labels], "checking pictures")
        for split, found in parts.items():
            check_size(f"CelebA, {split}", len(found), None if args.smoke else SPLITS[split][1])
            answers = torch.tensor([labels[name] for name in found], dtype=torch.float32)
            self.data[split] = [Pictures([pictures / name for name in found], answers, SIZE)]

    def network(self) -> NineLayers:
        """A new one."""
        return NineLayers(NUM_TASKS, self.width)

    def targets(self, collated: Tensor) -> list[Tensor]:
        """By attribute."""
        return list(collated.unbind(1))

    def loss(self, task: int, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy."""
        return functional.binary_cross_entropy_with_logits(output.flatten(), target)

    def meter(self, task: int) -> Any:
        """F1."""
        return F1()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this example."""
    parser.add_argument("--no-check", dest="check", action="store_false", help="decode no picture before training")


def write_sample(args: argparse.Namespace, root: Path) -> None:
    """A few small pictures."""
    names = [f"Attribute_{i}" for i in range(NUM_TASKS)]
    write_celeba(root, {"0": 5, "1": 4, "2": 4}, names)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status."""
    return run_example(__doc__ or "", Faces, write_sample, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
