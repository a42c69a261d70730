"""The networks: a trunk that all tasks share, and a head a task."""

from __future__ import annotations

from torch import Tensor, nn

from .tasks import Task


class Network(nn.Module):
    """A trunk that all tasks share, and a head a task."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """The output of each head."""
        features = self.trunk(inputs)
        return [head(features) for head in self.heads]


def cnn(inputs: Tensor, tasks: tuple[Task, ...], *, norm: bool) -> Network:
    """Two strided convolutions and a linear layer, with batch norm or without; linear heads and a decoder."""
    side, features = inputs.shape[-1] // 4, 128

    def block(layer: nn.Module, normed: nn.Module) -> list[nn.Module]:
        return [layer, normed, nn.ReLU()] if norm else [layer, nn.ReLU()]

    trunk = nn.Sequential(
        *block(nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=not norm), nn.BatchNorm2d(8)),
        *block(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=not norm), nn.BatchNorm2d(16)),
        nn.Flatten(),
        *block(nn.Linear(16 * side * side, features, bias=not norm), nn.BatchNorm1d(features)),
    )
    heads: list[nn.Module] = []
    for task in tasks:
        if task.kind == "image":
            pixels = inputs.shape[1:].numel()
            heads.append(nn.Sequential(nn.Linear(features, pixels), nn.Sigmoid(), nn.Unflatten(1, inputs.shape[1:])))
        else:
            heads.append(nn.Linear(features, task.outputs))
    return Network(trunk, heads)


def mlp(inputs: Tensor, tasks: tuple[Task, ...], *, width: int, dropout: float = 0.0) -> Network:
    """Two hidden layers in the trunk, one in each head."""
    trunk = nn.Sequential(
        nn.Linear(inputs.shape[1], width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
    )  # fmt: skip
    return Network(trunk, [nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, t.outputs)) for t in tasks])
