"""Models of a size that people train, for ``python -m dbmtl_kernels bench --model benchmarks.backbones:NAME``.

The last number of a name is K. On a GPU all but ``qm9_11`` run under autocast to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[Callable[[], Sequence[Tensor]], list[nn.Parameter], torch.optim.Optimizer]
PATCH, IMAGE, CLASSES = 16, 224, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class VisionTransformer(nn.Module):
    """(N, 3, 224, 224) images to (N, width) features: Dosovitskiy et al., arXiv 2010.11929, without the classifier."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (IMAGE // PATCH) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.layers(x)[:, 0]


def vision(width: int, depth: int, heads: int, num_tasks: int, batch: int) -> Made:
    """A vision transformer with K heads of ten classes, and AdamW."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        trunk, ends = VisionTransformer(width, depth, heads), [nn.Linear(width, CLASSES) for _ in range(num_tasks)]
        x, y = torch.randn(batch, 3, IMAGE, IMAGE), torch.randint(0, CLASSES, (num_tasks, batch))

    def losses() -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            z = trunk(x)
            return [functional.cross_entropy(end(z), target) for end, target in zip(ends, y, strict=True)]

    shared = list(trunk.parameters())
    every = [*shared, *(p for end in ends for p in end.parameters())]
    return losses, shared, torch.optim.AdamW(every, lr=1e-5, fused=True)


vit_s_3, vit_s_11, vit_s_40 = (partial(vision, 384, 12, 6, k, 64) for k in (3, 11, 40))
vit_b_3, vit_b_11 = (partial(vision, 768, 12, 12, k, 32) for k in (3, 11))
vit_l_3 = partial(vision, 1024, 24, 16, 3, 16)


def qm9_11(molecules: int = 120, atoms: int = 18) -> Made:
    """The message-passing network of `benchmarks.claims`, on a batch of random molecules as large as those of QM9."""
    from benchmarks.claims import data, graphs

    torch.manual_seed(0)
    packed = torch.zeros(molecules, data.MOST_ATOMS, 4)
    packed[:, :atoms, 0] = torch.tensor(data.CHARGES)[torch.randint(0, len(data.CHARGES), (molecules, atoms))].float()
    packed[:, :atoms, 1:] = 1.5 * torch.randn(molecules, atoms, 3)
    packed, targets = packed.to(DEVICE), torch.randn(11, molecules).to(DEVICE)
    trunk, ends = graphs.Trunk().to(DEVICE), nn.ModuleList(nn.Linear(graphs.DIM, 1) for _ in range(11)).to(DEVICE)

    def losses() -> list[Tensor]:
        z = trunk(packed)
        return [functional.mse_loss(end(z)[:, 0], target) for end, target in zip(ends, targets, strict=True)]

    shared = list(trunk.parameters())
    return losses, shared, torch.optim.Adam([*shared, *ends.parameters()], lr=1e-3)
