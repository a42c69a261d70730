"""The protocols' own metrics, and the two averages of relative changes against single-task networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class Task:
    """A task, and of each of its metrics whether higher is better."""

    name: str
    metrics: Mapping[str, bool]


class Segmentation:
    """Mean intersection over union, and pixel accuracy, of all pixels whose label is a class.

    Classes that neither a label nor a prediction has are left out of the mean. (Whole test sets have all.)
    """

    names: ClassVar[dict[str, bool]] = {"mIoU": True, "pixel accuracy": True}

    def __init__(self, classes: int) -> None:
        self.classes, self.matrix = classes, torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, output: Tensor, label: Tensor) -> None:
        """A batch: (B, classes, H, W) scores, (B, H, W) labels, negative where there is none."""
        known = label >= 0
        pairs = self.classes * label[known].long() + output.argmax(1)[known]
        self.matrix += torch.bincount(pairs, minlength=self.classes**2).reshape(self.classes, -1).cpu()

    def values(self) -> dict[str, float]:
        """The metrics of all batches."""
        matrix = self.matrix.double()
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        overlap = (hits / union)[union > 0]
        return {"mIoU": overlap.mean().item(), "pixel accuracy": (hits.sum() / matrix.sum()).item()}


class _Averaged:
    """Values of pixels: pooled over all batches, or taken of each batch and averaged, as MTAN's code does."""

    names: ClassVar[dict[str, bool]]

    def __init__(self, pooled: bool) -> None:
        self.pooled, self.batches = pooled, list[Tensor]()

    def of(self, pixels: Tensor) -> Tensor:
        """Metrics of (values, pixels)."""
        raise NotImplementedError

    def put(self, pixels: Tensor) -> None:
        """A batch; one without a valid pixel has no say."""
        if pixels.shape[-1]:
            self.batches.append(pixels.cpu() if self.pooled else self.of(pixels).double().cpu())

    def values(self) -> dict[str, float]:
        """The metrics of all batches."""
        if not self.batches:
            return dict.fromkeys(self.names, math.nan)
        found = self.of(torch.cat(self.batches, -1)) if self.pooled else torch.stack(self.batches).mean(0)
        return dict(zip(self.names, found.tolist(), strict=True))


class Depth(_Averaged):
    """Absolute and relative error, of pixels whose true depth is not 0."""

    names: ClassVar[dict[str, bool]] = {"absolute error": False, "relative error": False}

    def add(self, output: Tensor, depth: Tensor) -> None:
        """A batch: (B, 1, H, W) both."""
        valid = depth != 0
        error = (output - depth)[valid].abs()
        self.put(torch.stack([error, error / depth[valid]]))

    def of(self, pixels: Tensor) -> Tensor:
        """Means."""
        return pixels.double().mean(-1)


class Normals(_Averaged):
    """Angles in degrees between unit vectors: mean, median, and how many are within three bounds.

    Pixels whose true normal's components sum to 0 count as without one, as in MTAN's code.
    """

    names: ClassVar[dict[str, bool]] = {
        "mean angle": False,
        "median angle": False,
        "within 11.25": True,
        "within 22.5": True,
        "within 30": True,
    }

    def add(self, output: Tensor, normal: Tensor) -> None:
        """A batch: (B, 3, H, W) both, of length 1."""
        cosine = (output * normal).sum(1)[normal.sum(1) != 0]
        self.put(torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))[None])

    def of(self, pixels: Tensor) -> Tensor:
        """Mean, median (of an even number the mean of the two in the middle), shares."""
        angles = pixels[0].sort().values
        last = len(angles) - 1
        median = (angles[last // 2] + angles[(last + 1) // 2]) / 2
        within = [(angles < bound).double().mean() for bound in (11.25, 22.5, 30)]
        return torch.stack([angles.double().mean(), median.double(), *within])


class Accuracy:
    """Share of inputs whose class is predicted."""

    names: ClassVar[dict[str, bool]] = {"accuracy": True}

    def __init__(self) -> None:
        self.hits = self.count = 0

    def add(self, output: Tensor, label: Tensor) -> None:
        """A batch: (B, classes) scores, (B,) labels."""
        self.hits += int((output.argmax(1) == label).sum())
        self.count += len(label)

    def values(self) -> dict[str, float]:
        """The metric of all batches."""
        return {"accuracy": self.hits / self.count}


class F1:
    """Harmonic mean of precision and recall of the label 1; 0 where no hit was made."""

    names: ClassVar[dict[str, bool]] = {"F1": True}

    def __init__(self) -> None:
        self.hits = self.said = self.true = 0

    def add(self, output: Tensor, label: Tensor) -> None:
        """A batch: (B, 1) logits, (B,) labels of 0 and 1."""
        said, true = output.flatten() > 0, label > 0.5
        self.hits += int((said & true).sum())
        self.said += int(said.sum())
        self.true += int(true.sum())

    def values(self) -> dict[str, float]:
        """The metric of all batches."""
        return {"F1": 2 * self.hits / (self.said + self.true) if self.hits else 0.0}


def gains(tasks: Sequence[Task], metrics: Metrics, base: Metrics) -> list[list[float]]:
    """Per task and metric, by how many per cent it is better than ``base``; NaN where ``base`` is 0."""
    return [
        [
            100 * (1 if higher else -1) * (metrics[task.name][name] / base[task.name][name] - 1)
            if base[task.name][name]
            else math.nan
            for name, higher in task.metrics.items()
        ]
        for task in tasks
    ]


def delta_m(tasks: Sequence[Task], metrics: Metrics, base: Metrics) -> float:
    """Mean over all metrics of how many per cent they are worse than ``base``: lower is better."""
    found = [gain for of_task in gains(tasks, metrics, base) for gain in of_task]
    return -sum(found) / len(found)


def delta_p(tasks: Sequence[Task], metrics: Metrics, base: Metrics) -> float:
    """Mean over tasks of the mean over their metrics of how many per cent they are better: higher is better."""
    found = [sum(of_task) / len(of_task) for of_task in gains(tasks, metrics, base)]
    return sum(found) / len(found)
