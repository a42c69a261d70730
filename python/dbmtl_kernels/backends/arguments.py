"""What `ops` hands to a backend. Checked by then: sizes, dtypes and devices agree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# As dbmtl_dtype in csrc/include/dbmtl.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Decay and gain of an EMA update: two numbers, or (2,) float64 on the row's device, read when the kernel runs.
Coefficients = tuple[float, float] | Tensor


class Stats(NamedTuple):
    """What is known of K rows: (K,) each, contiguous, on the rows' device, updated in place.

    ``sumsq``, ``norms`` and ``weights`` are float64 (float32 on a device that has no float64), ``nonfinite`` is bool,
    ``nonfinite_steps`` int64.
    """

    sumsq: Tensor
    norms: Tensor
    weights: Tensor
    nonfinite: Tensor
    nonfinite_steps: Tensor


class BalanceRows(NamedTuple):
    """The arguments of `ops.balance_rows_`, which says what each is."""

    rows: Tensor
    stats: Stats
    outs: list[Tensor]
    starts: list[int]
    active: Tensor | None
    loss_scale: Tensor | None
    propagate_above: float
    eps: float
    scale: str
    constant: float
    fresh: bool
    accumulate: bool


class Gradients(NamedTuple):
    """The gradients of one task as kernels read them, one for each segment.

    Attributes:
        tensors: contiguous; None for zeros.
        addresses: of their first elements; 0 for None, and where the device has none.
        dtypes: the number of each dtype in `DTYPES`; for None that of another gradient, if there is one.
    """

    tensors: list[Tensor | None]
    addresses: list[int]
    dtypes: bytes
