"""Scratch: a weighted sum of gradients that goes into no row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .collect import RowCollector
from .layout import ParameterLayout
from .ranks import Ranks


class Scratch:
    """``sum_t weight_t * g_t`` of the gradients of passes, in one whole row of its own.

    Args:
        layout: where each parameter lies in it.
        backend: "auto" or a name.
        early: see `RowCollector`.
        replicas: the ranks over which the sum is averaged.
    """

    def __init__(self, layout: ParameterLayout, backend: str, early: bool, replicas: Ranks) -> None:
        self._layout, self._backend, self._early, self._replicas = layout, backend, early, replicas
        device = layout.device
        self._row = ops.allocate(layout.row_numel, dtype=layout.wide, device=device, zero=True)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._sumsq = torch.zeros(1, dtype=wide, device=device)

    def collector(self, weight: Tensor, loss_scale: Tensor | None = None) -> RowCollector:
        """What takes the gradients of one pass.

        Args:
            weight: one number, on any device.
            loss_scale: one number that the gradients carry and the sum must not.
        """
        gain = weight.detach().to(self._sumsq).reshape(1)
        coefficients = torch.cat([torch.ones_like(gain), gain])
        return RowCollector(
            self._layout, self._row, self._sumsq, coefficients, loss_scale, self._backend, self._early
        )  # fmt: skip

    def into(self, flats: dict[torch.dtype, Tensor]) -> None:
        """Write the sum into flat tensors (see `TaskGradientBuffer.new_flats`); a collective with replicas."""
        total = self._replicas.sum(self._row, "a gradient").unsqueeze(0)
        mean = total.new_full((1,), 1.0 / self._replicas.size)
        for g in self._layout.groups:
            ops.combine_out(total[:, g.start : g.stop], mean, flats[g.dtype], False, self._backend)
