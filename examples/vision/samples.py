"""Small data sets of the formats that the examples read, for their ``--smoke`` and the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .files import pillow


def write_arrays(
    root: Path, counts: Mapping[str, int], kinds: Sequence[str], size: tuple[int, int], classes: int
) -> None:
    """ROOT/{train,val}/KIND/{i}.npy: a plane cut into classes; some pixels have no label, depth or normal."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in kinds:
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            label = np.broadcast_to(np.arange(size[1]) * classes // size[1], size).astype(np.float32).copy()
            image = random.random((*size, 3), dtype=np.float32) * 0.1 + label[..., None] / classes
            depth = 1 + label[..., None] / classes + 0.1 * random.random((*size, 1), dtype=np.float32)
            normal = random.standard_normal((*size, 3)).astype(np.float32) + np.float32([0, 0, 3])
            normal = (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)
            label[0], depth[-1], normal[:, :2] = -1, 0, 0
            found = {"image": image, "label": label, "label_7": label, "depth": depth, "normal": normal}
            for kind in kinds:
                np.save(root / split / kind / f"{i}.npy", found[kind])


def write_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    """Noise, as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow().fromarray(pixels).save(path)


def write_celeba(root: Path, counts: Mapping[str, int], names: Sequence[str]) -> None:
    """Eval/list_eval_partition.txt, Anno/list_attr_celeba.txt, Img/img_align_celeba/."""
    random = np.random.default_rng(0)
    partition, attributes = [], []
    for split, count in counts.items():
        for _ in range(count):
            name = f"{len(partition) + 1:06}.jpg"
            write_picture(root / "Img" / "img_align_celeba" / name, (27, 22), len(partition))
            partition.append(f"{name} {split}")
            attributes.append(" ".join([f"{name} ", *(f"{x:2d}" for x in random.choice([-1, 1], len(names)))]))
    for path, text in (
        (root / "Eval" / "list_eval_partition.txt", partition),
        (root / "Anno" / "list_attr_celeba.txt", [str(len(attributes)), " ".join(names) + " ", *attributes]),
    ):
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(text) + "\n")


def write_office(root: Path, data_set: str, domains: Sequence[str], counts: Mapping[str, int], classes: int) -> None:
    """data_txt/SET/DOMAIN_SPLIT.txt with lines "relative/path.jpg label", and the pictures."""
    lists = root / "data_txt" / data_set
    lists.mkdir(parents=True)
    for domain in domains:
        for split, count in counts.items():
            lines = []
            for i in range(count):
                label = (i * 7) % classes
                name = f"{domain}/class {label}/{split}_{i:04}.jpg"
                write_picture(root / name, (20, 30), i)
                lines.append(f"{name} {label}\n")
            (lists / f"{domain}_{split}.txt").write_text("".join(lines))
