"""The trunks of the price list, and a model of one with K heads.

Learning rates are 0: weights stay, and the work of each step is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Backward = Callable[[Sequence[Tensor]], object]
# What seconds are of: of the wall, or of the processor, which a neighbour on the machine disturbs less.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Block(nn.Module):
    """Two convolutions of 3 x 3 with batch norm, and what they are added to."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        same = stride == 1 and inside == outside
        self.beside: nn.Module = nn.Identity()
        if not same:
            self.beside = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.beside(x))


def resnet18() -> nn.Module:
    """18 layers, on images of 3 x 32 x 32."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    for inside, outside in pairwise((64, 64, 128, 256, 512)):
        layers += [Block(inside, outside, 1 if outside == 64 else 2), Block(outside, outside, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(*widths: int) -> nn.Module:
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))


class Transformer(nn.Module):
    """Encoder layers; the mean over the sequence."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class Trunk(NamedTuple):
    """A trunk, what it takes, and how it is trained.

    Attributes:
        make: makes it.
        inputs: the shape of one input.
        width: of its output.
        batch: inputs a step.
        optimizer: makes an optimizer of parameters.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    width: int
    batch: int
    optimizer: Callable[..., torch.optim.Optimizer]

    def parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.make().parameters())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)


def mlp_of(width: int) -> Trunk:
    """4 * width ** 2 parameters and some."""
    return Trunk(lambda: mlp(width, 2 * width, 2 * width, width)[:-1], (width,), width, 128, adamw)


BY_P = ("MLP, width 128", "MLP, width 256", "MLP, width 1024")  # for the growth with P
TRUNKS = {
    "MLP": mlp_of(512),
    "ResNet-18": Trunk(resnet18, (3, 32, 32), 512, 8, sgd),
    "transformer": Trunk(lambda: Transformer(192, 4), (32, 192), 192, 4, adamw),
    **{name: mlp_of(int(name.split()[-1])) for name in BY_P},
    "tiny": Trunk(lambda: mlp(8, 8), (8,), 8, 4, sgd),  # for tests
}


class Times(NamedTuple):
    """Seconds of the parts of a step."""

    forward: float
    backward: float
    optimizer: float


class Model:
    """A trunk and K heads of 10 classes, one batch, and the optimizer."""

    def __init__(self, trunk: str, num_tasks: int, clock: str = "wall") -> None:
        torch.manual_seed(0)
        made = TRUNKS[trunk]
        self.trunk, self.num_tasks, self._clock = made.make(), num_tasks, CLOCKS[clock]
        self.heads = nn.ModuleList(nn.Linear(made.width, 10) for _ in range(num_tasks))
        self.x = torch.randn(made.batch, *made.inputs)
        self.y = torch.randint(0, 10, (num_tasks, made.batch))
        self.shared, self.own = list(self.trunk.parameters()), list(self.heads.parameters())
        self.features: Tensor
        self.optimizer = made.optimizer([*self.shared, *self.own])
        for _ in range(2):  # the optimizer makes its state, and oneDNN its kernels
            self.step(lambda losses: sum(losses).backward())  # type: ignore[union-attr]
        self.optimizer.zero_grad()
        del self.features  # lest it be freed, and counted, later

    def losses(self) -> list[Tensor]:
        """One a task; what they are computed from is left in ``features``."""
        self.features = self.trunk(self.x)
        return [functional.cross_entropy(head(self.features), y) for head, y in zip(self.heads, self.y, strict=True)]

    def step(self, backward: Backward) -> Times:
        """Forward, ``backward``, optimizer."""
        now = self._clock
        began = now()
        self.optimizer.zero_grad()
        losses = self.losses()
        forward = now()
        backward(losses)
        middle = now()
        self.optimizer.step()
        return Times(forward - began, middle - forward, now() - middle)
