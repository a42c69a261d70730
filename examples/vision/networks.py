"""The networks of the protocols. Each is called with inputs and the tasks asked for, and has ``shared`` and ``heads``.

`MTAN` and `SegNet` are written from the paper of MTAN (Liu, Johns, Davison, arXiv 1803.10704); what is of torchvision
is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (64, 128, 256, 512, 512)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Network(nn.Module):
    """A shared part and a head for each task."""

    shared: nn.Module
    heads: nn.ModuleList

    def forward(self, inputs: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        """The output of each of ``tasks``."""
        features = self.shared(inputs)
        return [self.heads[task](features) for task in tasks]


def _conv(width: int, out: int, layers: int = 1) -> nn.Sequential:
    found: list[nn.Module] = []
    for _ in range(layers):
        found += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*found)


def _prediction(width: int, out: int, unit: bool) -> nn.Sequential:
    layers = [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, out, 1)]
    return nn.Sequential(*layers, Unit()) if unit else nn.Sequential(*layers)


class Unit(nn.Module):
    """Vectors of length 1 along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W)."""
        return functional.normalize(x, dim=1)


class SegNetTrunk(nn.Module):
    """SegNet: five levels of convolutions down and up again, with unpooling where the maxima were.

    Args:
        widths: channels of the five levels.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        above = (widths[0], *widths[:-1])  # what a level going up hands on
        self.down = nn.ModuleList(_conv(i, o) for i, o in zip((3, *widths[:-1]), widths, strict=True))
        self.down_more = nn.ModuleList(_conv(w, w, 1 if level < 2 else 2) for level, w in enumerate(widths))
        self.up = nn.ModuleList(_conv(i, o) for i, o in zip(widths, above, strict=True))
        self.up_more = nn.ModuleList(_conv(w, w, 1 if level < 2 else 2) for level, w in enumerate(above))

    def levels(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Of each level, finest first: the first and the last features going down; what comes in going up, and goes on.

        Height and width must be divisible by 32.
        """
        down, places = [], []
        for first, more in zip(self.down, self.down_more, strict=True):
            one = first(x)
            two = more(one)
            x, where = functional.max_pool2d(two, 2, return_indices=True)
            down.append((one, two))
            places.append(where)
        up = []
        for level in reversed(range(len(self.up))):
            unpooled = functional.max_unpool2d(x, places[level], 2)
            x = self.up_more[level](self.up[level](unpooled))
            up.append((unpooled, x))
        return down, up[::-1]

    def forward(self, x: Tensor) -> Tensor:
        """Features of the finest level."""
        return self.levels(x)[1][0][1]


class SegNet(Network):
    """SegNet with two convolutions a task on its last features.

    Args:
        outputs: channels of each task; 3 are a unit vector.
        widths: channels of the five levels.
    """

    def __init__(self, outputs: Sequence[int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.shared = SegNetTrunk(widths)
        self.heads = nn.ModuleList(_prediction(widths[0], out, out == 3) for out in outputs)
        _xavier(self)


class MTANTrunk(nn.Module):
    """What the tasks of `MTAN` share: SegNet, and the convolutions between the levels of attention."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.segnet = SegNetTrunk(widths)
        above = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(_conv(i, o) for i, o in zip(widths, (*widths[1:], widths[-1]), strict=True))
        self.up = nn.ModuleList(_conv(i, o) for i, o in zip(widths, above, strict=True))


class MTANHead(nn.Module):
    """A task's attention at every level of SegNet, and its two last convolutions."""

    def __init__(self, widths: Sequence[int], out: int) -> None:
        super().__init__()
        above = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(
            self.attention(w if level == 0 else 2 * w, w) for level, w in enumerate(widths)
        )  # beyond the finest level, what came from the level before besides
        self.up = nn.ModuleList(self.attention(w + o, o) for w, o in zip(widths, above, strict=True))
        self.last = _prediction(widths[0], out, out == 3)

    @staticmethod
    def attention(width: int, out: int) -> nn.Sequential:
        """A mask between 0 and 1."""
        return nn.Sequential(
            nn.Conv2d(width, out, 1), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 1), nn.BatchNorm2d(out),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, trunk: MTANTrunk, levels: Any) -> Tensor:
        """The task's output."""
        down, up = levels
        x: Tensor | None = None
        for mask, between, (one, two) in zip(self.down, trunk.down, down, strict=True):
            seen = one if x is None else torch.cat([one, x], 1)
            x = functional.max_pool2d(between(mask(seen) * two), 2)
        assert x is not None
        for level in reversed(range(len(up))):
            unpooled, features = up[level]
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = self.up[level](torch.cat([unpooled, trunk.up[level](x)], 1)) * features
        return self.last(x)


class MTAN(Network):
    """Multi-task attention network: `SegNet`, from which each task takes what it attends to.

    Args:
        outputs: channels of each task; 3 are a unit vector.
        widths: channels of the five levels.
    """

    def __init__(self, outputs: Sequence[int], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.shared = MTANTrunk(widths)
        self.heads = nn.ModuleList(MTANHead(widths, out) for out in outputs)
        _xavier(self)

    def forward(self, inputs: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        """The output of each of ``tasks``, at every pixel."""
        levels = self.shared.segnet.levels(inputs)
        return [self.heads[task](self.shared, levels) for task in tasks]


def _xavier(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


# --- of torchvision ----------------------------------------------------------------------------------------------


def torchvision_models() -> Any:
    """The module torchvision.models.

    Raises:
        BenchError: torchvision is not installed, or does not load beside this torch.
    """
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise BenchError(
            "this network needs torchvision, which is not installed: pip install 'dbmtl-kernels[vision]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        raise BenchError(f"torchvision does not load beside torch {torch.__version__} ({error})") from error
    return models


def resnet(name: str, weights: str, dilated: bool = False) -> nn.Sequential:
    """A ResNet of torchvision up to its last features.

    Args:
        name: "resnet18" or "resnet50".
        weights: "imagenet", which torchvision fetches; "none"; or a file of a state_dict.
        dilated: keep an eighth of the resolution, by dilation of the last two of four stages.

    Raises:
        BenchError: torchvision is missing, or the file or what is in it does not fit.
    """
    make = getattr(torchvision_models(), name)
    options = {"replace_stride_with_dilation": [False, True, True]} if dilated else {}
    whole = make(weights="IMAGENET1K_V1" if weights == "imagenet" else None, **options)
    if weights not in ("imagenet", "none"):
        try:
            whole.load_state_dict(torch.load(Path(weights), weights_only=True, map_location="cpu"))
        except Exception as error:  # whatever a file of something else raises
            raise BenchError(f"{weights} has no weights of {name} ({type(error).__name__}: {error})") from error
    return nn.Sequential(
        *(child for child_name, child in whole.named_children() if child_name not in ("avgpool", "fc"))
    )


class DeepLab(Network):
    """A dilated ResNet-50, and for each task torchvision's DeepLab head: atrous pyramid pooling and a convolution.

    Args:
        outputs: channels of each task; 3 are a unit vector.
        weights: as for `resnet`.
    """

    def __init__(self, outputs: Sequence[int], weights: str) -> None:
        super().__init__()
        head = torchvision_models().segmentation.deeplabv3.DeepLabHead
        self.shared = resnet("resnet50", weights, dilated=True)
        self.heads = nn.ModuleList(head(2048, out) for out in outputs)

    def forward(self, inputs: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        """The output of each of ``tasks``, at every pixel."""
        size = inputs.shape[-2:]
        small = super().forward(inputs, tasks)
        found = [functional.interpolate(x, size, mode="bilinear", align_corners=True) for x in small]
        return [functional.normalize(x, dim=1) if x.shape[1] == 3 else x for x in found]


class ResNet18(Network):
    """ResNet-18, a hidden layer of 512 with batch norm and dropout, and a linear layer a task.

    Args:
        outputs: classes of each task.
        weights: as for `resnet`.
    """

    def __init__(self, outputs: Sequence[int], weights: str) -> None:
        super().__init__()
        hidden = nn.Linear(512, 512)
        nn.init.normal_(hidden.weight, 0.0, 0.005)
        nn.init.constant_(hidden.bias, 0.1)
        self.shared = nn.Sequential(
            resnet("resnet18", weights), nn.AdaptiveAvgPool2d(1), nn.Flatten(), hidden, nn.BatchNorm1d(512), nn.ReLU(),
            nn.Dropout(0.5),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(512, out) for out in outputs)


# --- CelebA ------------------------------------------------------------------------------------------------------


class NineLayers(Network):
    """Seven convolutions and two linear layers, with batch norm, and a linear layer a task.

    Args:
        num_tasks: attributes.
        width: channels of the first layer; of the last eight times as many.
    """

    def __init__(self, num_tasks: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, convolutions in enumerate((1, 2, 2, 2)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                out = width * 2**stage
                layers += [nn.Conv2d(before, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                before = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for _ in range(2):
            layers += [nn.Linear(before, before, bias=False), nn.BatchNorm1d(before), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(before, 1) for _ in range(num_tasks))
