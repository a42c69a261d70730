"""Where parameters lie in a row."""

import pytest
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.rows.layout import ParameterLayout
from dbmtl_kernels.rows.rows import TaskGradientBuffer
from torch import nn


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float64, torch.float32)])
def test_segments_are_aligned_and_apart(state, dtypes):
    params = [
        nn.Parameter(torch.zeros(n, dtype=dtypes[i % len(dtypes)])) for i, n in enumerate((1, 32, 33, 0, 7, 1000))
    ]
    layout = ParameterLayout(params, state)
    end = 0
    for offset, numel in sorted(layout.segments.tolist()):
        assert offset >= end
        assert offset * state.itemsize % 128 == 0
        end = offset + numel
    assert layout.row_numel >= end
    assert layout.row_numel * state.itemsize % 128 == 0
    assert layout.numel == 1073
    for group in layout.groups:
        for p, (offset, numel) in zip(params, layout.segments.tolist(), strict=True):
            if p.dtype == group.dtype:
                assert group.start <= offset
                assert offset + numel <= group.stop
                assert (offset - group.start) * p.dtype.itemsize % 128 == 0


def test_padding_costs_little_for_large_models():
    params = [
        nn.Parameter(torch.zeros(64, 3, 7, 7)),
        *(nn.Parameter(torch.zeros(256, 256)) for _ in range(20)),
    ]
    layout = ParameterLayout(params)
    assert layout.row_numel <= 1.001 * layout.numel


def test_buffer_keeps_padding_zero_and_writes_every_element():
    params = [nn.Parameter(torch.zeros(n)) for n in (5, 33, 1)]
    buffer = TaskGradientBuffer(ParameterLayout(params), 2)
    for task in range(2):
        segments, grads = buffer.layout.segments, [torch.full((p.numel(),), task + 1.0) for p in params]
        ops.accumulate_(buffer.rows[task], buffer.stats.sumsq[task : task + 1], grads, segments, (0.9, 0.1))
    assert buffer.rows.sum() == pytest.approx(39 * 0.1 + 39 * 0.2)
    assert buffer.stats.sumsq.sqrt().tolist() == pytest.approx([0.1 * 39**0.5, 0.2 * 39**0.5])
    flats = buffer.new_flats()
    flats[torch.float32].fill_(float("nan"))  # what is not written shows
    buffer.combine(torch.tensor([1.0, 2.0]), flats)
    for view in buffer.layout.views(flats):
        torch.testing.assert_close(view, torch.full_like(view, 0.5))
    assert torch.isfinite(flats[torch.float32]).all()
