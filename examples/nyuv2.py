"""NYUv2 (segmentation, depth, normals) and Cityscapes (segmentation, depth): the paper's tables, one command a row.

    python examples/nyuv2.py --data FOLDER --method stl ew log uw famo db-mtl one-pass --resume
    python examples/nyuv2.py --data FOLDER --data-set cityscapes
    python examples/nyuv2.py --data FOLDER --model deeplab      # LibMTL's protocol, as in DB-MTL's paper
    python examples/nyuv2.py --smoke                            # two steps on generated files

FOLDER has {train,val}/{image,label,depth,normal}/{i}.npy; docs/datasets.md says more. ``--model mtan`` is the network
of the tables of Nash-MTL, FAMO and others ("SegNet" there), ``segnet`` the same without attention.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import torch
    from dbmtl_kernels.bench.results import BenchError
    from torch import Tensor
    from torch.nn import functional
    from vision.command import run_example
    from vision.files import Arrays, check_size, folder
    from vision.metrics import Depth, Normals, Segmentation, Task
    from vision.networks import MTAN, WIDTHS, DeepLab, Network, SegNet
    from vision.samples import write_arrays
    from vision.work import LAST_EPOCHS, Protocol, Work
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}, which is not installed: pip install 'dbmtl-kernels[vision]'")

TASKS = (Task("segmentation", Segmentation.names), Task("depth", Depth.names), Task("normal", Normals.names))
SIZES = {"nyuv2": (288, 384), "cityscapes": (128, 256)}
SMOKE_SIZE, SMOKE_COUNTS = (32, 64), {"train": 5, "val": 3}
CLASSES = {"nyuv2": 13, "cityscapes": 7}
TITLES = {"nyuv2": "NYUv2", "cityscapes": "Cityscapes"}
SPLITS = {"nyuv2": {"train": 795, "val": 654}, "cityscapes": {"train": 2975, "val": 500}}

_MTAN = Protocol("MTAN", batch=2, epochs=200, rate=1e-4, select=LAST_EPOCHS, halve_at=100, augment=True, pooled=False)
_LIBMTL = Protocol(
    "LibMTL", batch=8, epochs=200, rate=1e-4, select=LAST_EPOCHS, weight_decay=1e-5, halve_at=100,
    drop_last=True,
)  # fmt: skip
PROTOCOLS = {
    ("nyuv2", "mtan"): replace(
        _MTAN,
        others={
            "EW": 5.59, "sum of logs": 4.39, "UW": 4.05, "FAMO": -4.10, "GO4Align": -6.08, "LDC-MTL": -4.40,
            "NTKMTL-SR": -5.35, "Nash-MTL": -4.04, "FairGrad": -4.66, "NTKMTL": -6.99, "DB-MTL": -5.36,
        },
    ).with_figures(TASKS, (0.3830, 0.6376, 0.6754, 0.2780, 25.01, 19.21, 0.3014, 0.5720, 0.6915)),
    ("nyuv2", "libmtl"): _LIBMTL,
    ("cityscapes", "mtan"): replace(
        _MTAN,
        batch=8,
        others={
            "EW": 22.60, "sum of logs": 14.11, "UW": 5.89, "FAMO": 8.13, "GO4Align": 8.11, "LDC-MTL": -0.57,
            "NTKMTL-SR": 3.84, "Nash-MTL": 6.82, "FairGrad": 5.18, "NTKMTL": 1.92,
        },
    ).with_figures(TASKS[:2], (0.7401, 0.9316, 0.0125, 27.77)),
    ("cityscapes", "libmtl"): replace(_LIBMTL, batch=64).with_figures(TASKS[:2], (0.6906, 0.9154, 0.01282, 43.53)),
}  # fmt: skip


class Scenes(Work):
    """Pixels with a class, a depth and, in NYUv2, a normal."""

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        data_set, self.model = args.data_set, args.model
        self.name, self.weights, self.classes = TITLES[data_set], args.weights, CLASSES[data_set]
        self.tasks = TASKS if data_set == "nyuv2" else TASKS[:2]
        self.protocol = PROTOCOLS[data_set, args.protocol]
        if args.augment is not None:
            self.protocol = replace(self.protocol, augment=args.augment)
        self.size = SMOKE_SIZE if args.smoke else SIZES[data_set]
        self.widths = tuple(width // 16 for width in WIDTHS) if args.smoke else WIDTHS
        self.network()  # what it lacks is told first
        label = "label" if data_set == "nyuv2" or (root / "train" / "label").is_dir() else "label_7"
        kinds = ["image", label, "depth", "normal"][: 1 + len(self.tasks)]
        self.data = {}
        folder(root)
        for split, known in (("train", "train"), ("val", "test")):
            augment = known == "train" and self.protocol.augment
            arrays = Arrays(root / split, kinds, self.size, self.classes, augment)
            check_size(f"{self.name}, {split}", len(arrays), None if args.smoke else SPLITS[data_set][split])
            self.data[known] = [arrays]

    def network(self) -> Network:
        """A new one."""
        outputs = (self.classes, 1, 3)[: len(self.tasks)]
        if self.model == "deeplab":
            return DeepLab(outputs, self.weights)
        return (MTAN if self.model == "mtan" else SegNet)(outputs, self.widths)

    def loss(self, task: int, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, mean absolute error, 1 - mean cosine: of pixels that have a label, depth or normal."""
        if task == 0:
            return functional.cross_entropy(output, target, ignore_index=-1)
        valid = target.sum(1, keepdim=True) != 0
        each = (output - target).abs() if task == 1 else -output * target
        mean = torch.where(valid, each, 0.0).sum() / valid.sum().clamp_min(1)
        return mean if task == 1 else 1 + mean

    def meter(self, task: int) -> Any:
        """The metrics of a task."""
        return (lambda: Segmentation(self.classes), lambda: Depth(self.protocol.pooled),
                lambda: Normals(self.protocol.pooled))[task]()  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this example."""
    parser.add_argument("--data-set", choices=list(TITLES), default="nyuv2", help="(default: %(default)s)")
    parser.add_argument(
        "--model", choices=["mtan", "segnet", "deeplab"], default="mtan",
        help="MTAN's network on SegNet; SegNet; DeepLab on ResNet-50, which needs torchvision (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--protocol", choices=["mtan", "libmtl"], help="(default: libmtl with deeplab, else mtan)")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="(default: the protocol's)")
    parser.add_argument(
        "--weights", help="of deeplab: imagenet, none, or a file (default: imagenet; with --smoke none)"
    )


def make(args: argparse.Namespace, root: Path) -> Scenes:
    """The data set."""
    args.protocol = args.protocol or ("libmtl" if args.model == "deeplab" else "mtan")
    if args.model != "deeplab":
        if args.weights is not None:
            raise BenchError(f"--weights is of --model deeplab; {args.model} begins at random")
        args.weights = ""
    args.weights = ("none" if args.smoke else "imagenet") if args.weights is None else args.weights
    return Scenes(args, root)


def write_sample(args: argparse.Namespace, root: Path) -> None:
    """A few small images."""
    kinds = ["image", "label", "depth", "normal"] if args.data_set == "nyuv2" else ["image", "label", "depth"]
    write_arrays(root, SMOKE_COUNTS, kinds, SMOKE_SIZE, CLASSES[args.data_set])


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status."""
    return run_example(__doc__ or "", make, write_sample, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
