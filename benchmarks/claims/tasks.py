"""Kinds of tasks: the loss that is trained, the metrics that are reported, and what a constant prediction reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Measure = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets


@dataclass(frozen=True)
class Metric:
    """What is reported of a task.

    Attributes:
        of: outputs and targets to a scalar.
        sign: 1 where higher is better, else -1.
    """

    of: Measure
    sign: int = -1


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: a key of `KINDS`.
        outputs: of its head.
        factor: that its standardised targets are multiplied by.
        second: a key of `SECOND`: a further metric.
    """

    name: str
    kind: str
    outputs: int = 1
    factor: float = 1.0
    second: str = ""

    @property
    def metrics(self) -> dict[str, Metric]:
        """By the names they have in the rows: the first has that of the task."""
        first = {self.name: KINDS[self.kind].metric}
        return first | ({f"{self.name}: {self.second}": SECOND[self.second]} if self.second else {})


@dataclass(frozen=True)
class Kind:
    """Functions of a kind.

    Attributes:
        loss: of outputs and targets.
        metric: the first one.
        constant: (training targets, how many) -> outputs of a constant predictor.
    """

    loss: Measure
    metric: Metric
    constant: Callable[[Tensor, int], Tensor]


SUM_MEAN, SUM_DEVIATION = 9.0, 4.0  # about those of the sum of two digits


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.squeeze(1), targets)


def _absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs.squeeze(1), targets)


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)


def _image(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of squares of each image, mean over the images."""
    return (outputs - targets).square().sum() / len(targets)


def _sum(outputs: Tensor) -> Tensor:
    return SUM_MEAN + SUM_DEVIATION * outputs.squeeze(1)


def _sum_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.squeeze(1), (targets - SUM_MEAN) / SUM_DEVIATION)


def _sum_absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(_sum(outputs), targets)


def _sum_right(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (_sum(outputs).round() == targets).float().mean()


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(1) == targets).float().mean()


def _binary_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * ((outputs.squeeze(1) > 0) == (targets > 0.5)).float().mean()


def _commonest(targets: Tensor, size: int) -> Tensor:
    counts = torch.bincount(targets)
    return F.one_hot(counts.argmax(), len(counts)).float().expand(size, -1)


def _likelier(targets: Tensor, size: int) -> Tensor:
    return (targets.mean() - 0.5).expand(size, 1)


def _median(targets: Tensor, size: int) -> Tensor:
    return targets.median().expand(size, 1)


def _median_sum(targets: Tensor, size: int) -> Tensor:
    return _median((targets - SUM_MEAN) / SUM_DEVIATION, size)


def _mean_image(targets: Tensor, size: int) -> Tensor:
    return targets.mean(0).expand(size, *targets.shape[1:])


# A metric of an output that is not finite is not finite either, but for accuracies: see trial.measure
KINDS = {
    "class": Kind(F.cross_entropy, Metric(_accuracy, 1), _commonest),
    "binary": Kind(_binary, Metric(_binary_accuracy, 1), _likelier),
    "squares": Kind(_squares, Metric(_absolute), _median),
    "absolute": Kind(_absolute, Metric(_absolute), _median),
    "image": Kind(_image, Metric(_image), _mean_image),
    "sum": Kind(_sum_squares, Metric(_sum_absolute), _median_sum),
}
SECOND = {"absolute error": Metric(F.l1_loss), "right": Metric(_sum_right, 1)}
