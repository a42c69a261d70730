"""IMTLLoss: losses brought to one scale by factors that are learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks


class IMTLLoss(nn.Module):
    """Impartial multi-task learning, the loss side (IMTL-L): ``exp(s_t) * loss_t - s_t`` with learnable s_t.

    Give the results to a balancer with ``log_transform=False``, and ``parameters()`` to the optimizer. The minimiser is
    ``s_t = -log(loss_t)``, where the gradient of the shared parameters is that of ``log(loss_t)``: the log
    transformation is this method with s_t at its best in every step. The constant -1 makes the minimum itself
    ``log(loss_t)``.

    Args:
        num_tasks: K.

    Attributes:
        scales: (K,) float32, the s_t; zeros at the start.

    Source: Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), section 3.2; arXiv 2308.12029, section on
    the equivalence.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.zeros(checks.check_num_tasks(num_tasks)))

    def forward(self, losses: Sequence[Tensor | None]) -> list[Tensor | None]:
        """K scalars, or None where a task is absent, to as many, in float32 at least.

        Raises:
            ValueError: the number of losses is not K.
        """
        if len(losses) != self.scales.numel():
            raise ValueError(f"expected {self.scales.numel()} losses, got {len(losses)}")
        return [
            None if loss is None else torch.exp(s) * loss.to(torch.promote_types(loss.dtype, s.dtype)) - s - 1.0
            for loss, s in zip(losses, self.scales, strict=True)
        ]
