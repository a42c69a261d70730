"""Office-31 and Office-Home: one domain a task, each with inputs of its own, a ResNet-18 between them.

    python examples/office.py --data FOLDER --method stl ew log uw famo db-mtl one-pass --resume
    python examples/office.py --data FOLDER --data-set office-home
    python examples/office.py --smoke                           # two steps on generated files

FOLDER has the pictures, and data_txt/{office-31,office-home}/{Domain}_{train,val,test}.txt with lines
"relative/path.jpg label"; docs/datasets.md says more. As every task has a forward pass of its own in any case, DB-MTL
takes no more backward passes than equal weighting: they run task by task, each graph freed before the next.
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
    from vision.metrics import Accuracy, Task
    from vision.networks import IMAGENET, ResNet18
    from vision.samples import write_office
    from vision.work import BEST_EPOCH, Protocol, Work
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}, which is not installed: pip install 'dbmtl-kernels[vision]'")

SIZE, SMOKE_SIZE = (224, 224), (64, 64)
CLASSES = {"office-31": 31, "office-home": 65}
TITLES = {"office-31": "Office-31", "office-home": "Office-Home"}
PARTS = ("train", "val", "test")
SPLITS = {
    "office-31": {"amazon": (1680, 552, 585), "dslr": (287, 89, 122), "webcam": (466, 149, 180)},
    "office-home": {
        "Art": (1435, 465, 527), "Clipart": (2596, 846, 923), "Product": (2635, 860, 944),
        "Real_World": (2586, 846, 925),
    },
}  # fmt: skip
PROTOCOL = Protocol("LibMTL", batch=64, epochs=100, rate=1e-4, select=BEST_EPOCH, weight_decay=1e-5, drop_last=True)


def listed(path: Path, root: Path, classes: int) -> tuple[list[Path], list[int]]:
    """Pictures and labels of a list.

    Raises:
        BenchError: the file is missing or of another format, or a label is out of range.
    """
    pictures, labels = [], []
    for number, line in enumerate(lines(path), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit() or int(label) >= classes:
            raise BenchError(f"{path}, line {number}: a path and a label below {classes} are expected, got {line!r}")
        pictures.append(root / name)
        labels.append(int(label))
    return pictures, labels


class Domains(Work):
    """The class of a picture, in three or four domains."""

    own_inputs, model, protocol = True, "resnet18", PROTOCOL

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        self.name, self.weights, self.classes = TITLES[args.data_set], args.weights, CLASSES[args.data_set]
        self.tasks = tuple(Task(domain, Accuracy.names) for domain in SPLITS[args.data_set])
        self.network()  # what it lacks is told first
        lists = folder((args.lists or folder(root) / "data_txt") / args.data_set)
        self.data = {}
        every: list[Path] = []
        for index, part in enumerate(PARTS):
            self.data[part] = []
            for domain, counts in SPLITS[args.data_set].items():
                pictures, labels = listed(lists / f"{domain}_{part}.txt", root, self.classes)
                check_size(f"{domain}, {part}", len(pictures), None if args.smoke else counts[index])
                size = SMOKE_SIZE if args.smoke else SIZE
                self.data[part].append(Pictures(pictures, torch.tensor(labels), size, *IMAGENET))
                every += pictures
        if args.check:
            check_all(check_picture, every, "checking pictures")

    def network(self) -> ResNet18:
        """A new one."""
        return ResNet18([self.classes] * len(self.tasks), self.weights)

    def loss(self, task: int, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(output, target)

    def meter(self, task: int) -> Any:
        """Accuracy."""
        return Accuracy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this example."""
    parser.add_argument("--data-set", choices=list(TITLES), default="office-31", help="(default: %(default)s)")
    parser.add_argument("--lists", type=Path, metavar="FOLDER", help="of the lists (default: data_txt in --data)")
    parser.add_argument("--one-call", action="store_true", help="db-mtl: all losses in one call, not task by task")
    parser.add_argument("--no-check", dest="check", action="store_false", help="decode no picture before training")
    parser.add_argument("--weights", help="imagenet, none, or a file (default: imagenet; with --smoke none)")


def make(args: argparse.Namespace, root: Path) -> Domains:
    """The data set."""
    if args.weights is None:
        args.weights = "none" if args.smoke else "imagenet"
    return Domains(args, root)


def write_sample(args: argparse.Namespace, root: Path) -> None:
    """A few small pictures."""
    counts = {"train": 5, "val": 3, "test": 3}
    write_office(root, args.data_set, list(SPLITS[args.data_set]), counts, CLASSES[args.data_set])


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status."""
    return run_example(__doc__ or "", make, write_sample, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
