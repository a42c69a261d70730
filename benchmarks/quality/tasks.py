"""Kinds of tasks: the loss that is trained, the metric that is reported, and what a constant prediction reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        kind: a key of `KINDS`.
        outputs: of its head.
        factor: that its standardised targets are multiplied by.
    """

    name: str
    kind: str
    outputs: int = 1
    factor: float = 1.0


@dataclass(frozen=True)
class Kind:
    """Functions of a kind.

    Attributes:
        loss, metric: of outputs and targets.
        constant: (training targets, how many) -> outputs of a constant predictor.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor]
    constant: Callable[[Tensor, int], Tensor]
    higher_is_better: bool = False


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.squeeze(1), targets)


def _absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs.squeeze(1), targets)


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)


def _image(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of squares of each image, mean over the images."""
    return (outputs - targets).square().sum() / len(targets)


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


def _mean_image(targets: Tensor, size: int) -> Tensor:
    return targets.mean(0).expand(size, *targets.shape[1:])


# A metric of an output that is not finite is not finite either, but for accuracies: see trial.measure
KINDS = {
    "class": Kind(F.cross_entropy, _accuracy, _commonest, higher_is_better=True),
    "binary": Kind(_binary, _binary_accuracy, _likelier, higher_is_better=True),
    "squares": Kind(_squares, _absolute, _median),
    "absolute": Kind(_absolute, _absolute, _median),
    "image": Kind(_image, _image, _mean_image),
}
