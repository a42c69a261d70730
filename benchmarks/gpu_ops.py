"""What only the GPU suite calls: `balance_` of each backend and form, and each op alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch
from dbmtl_kernels import ops
from dbmtl_kernels.bench.dense import BETA, EPS, Call, close, ours, poison
from torch import Tensor


def forms(backends: Sequence[str]) -> dict[str, Call]:
    """Ours on each backend, Triton's in both forms; in one, where DBMTL_TRITON_LAUNCHES=2 asks for that."""
    asked = os.environ.get("DBMTL_TRITON_LAUNCHES", "")
    only = asked == "2"

    def call(backend: str, launches: str, grads: Tensor, ema: Tensor) -> Tensor:
        os.environ["DBMTL_TRITON_LAUNCHES"] = launches
        try:
            return ours(grads, ema, backend)
        finally:
            os.environ["DBMTL_TRITON_LAUNCHES"] = asked

    found = {name: partial(call, name, "") for name in backends if name != "triton" or not only}
    return found | {f"{name}, two launches": partial(call, name, "2") for name in backends if name == "triton"}


def each_op(backend: str, rows: Tensor, squares: Tensor, grads: list[Tensor], segments: Tensor) -> dict[str, Call]:
    """Each op of a backend; a call returns what it wrote."""
    out, (total, *stats) = torch.full_like(rows[0], torch.nan), torch.full((3, *squares.shape), torch.nan).to(squares)
    counts = [torch.zeros(len(rows), dtype=dtype, device=rows.device) for dtype in (torch.bool, torch.int64)]
    end = (ops.Stats(squares, *stats, *counts), [out], [0], None, None, 1.0, EPS, "max", 0.0, True, False)
    given = (rows[0], total[:1], grads, segments, (BETA, 1.0 - BETA), None, backend)
    return {
        "accumulate_": lambda: ops.accumulate_(*given) or [rows[0], total[:1]],
        "balance_rows_": lambda: ops.balance_rows_(ops.BalanceRows(rows, *end), backend) or [out, *stats],
        "combine_out": lambda: ops.combine_out(rows, squares, out, False, backend) or [out],
        "gramian": lambda: [ops.gramian(rows, backend)],
    }


def check_op(name: str, rows: Tensor, squares: Tensor, grads: list[Tensor], segments: Tensor, call: Call) -> None:
    """Raise unless ``call``, one of `each_op`, gives what float64 gives; then fill that with NaN."""
    expected = each_op("eager", rows.double(), squares, [grad.double() for grad in grads], segments)[name]()
    poison(expected[0], torch.float32)
    for actual, wanted in zip(call(), expected, strict=True):
        close(actual, wanted, 1e-5, "the result")
        if actual.data_ptr() != rows.data_ptr():  # lest the next check find it
            actual.fill_(torch.nan)
