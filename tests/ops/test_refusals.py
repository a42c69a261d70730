"""What the ops refuse: the type of the error, that its message holds the offending value, that nothing was written."""

import copy

import dbmtl_kernels as dbk
import pytest
import torch
from cases import new_stats, step_of
from dbmtl_kernels import ops

F64 = torch.float64
# changes of arguments that are fine, error, message
BALANCE = {
    "shape": ({"ema": torch.ones(3, 5)}, ValueError, r"\(3, 4\) and \(3, 5\)"),
    "one dimension": ({"grads": torch.ones(4), "ema": torch.ones(4)}, ValueError, r"got \(4,\)"),
    "no task": ({"grads": torch.ones(0, 4), "ema": torch.ones(0, 4)}, ValueError, r"got \(0, 4\)"),
    "dtype family": ({"grads": torch.ones(3, 4).double()}, TypeError, "float64.*float32"),
    "dtype family, ema": ({"ema": torch.ones(3, 4).double()}, TypeError, "float32.*float64"),
    "integer grads": ({"grads": torch.ones(3, 4).int()}, TypeError, "grads.*int32"),
    "fp16 ema": ({"grads": torch.ones(3, 4).half(), "ema": torch.ones(3, 4).half()}, TypeError, "ema.*float16"),
    "device": ({"grads": torch.ones(3, 4, device="meta")}, RuntimeError, "meta.*cpu"),
    "non-contiguous ema": ({"ema": torch.ones(4, 3).T}, ValueError, r"contiguous.*\(1, 3\)"),
    "ema of every second column": ({"ema": torch.ones(3, 8)[:, ::2]}, ValueError, r"contiguous.*\(8, 2\)"),
    "beta": ({"beta": 1.0}, ValueError, "beta.*1.0"),
    "eps": ({"eps": 0.0}, ValueError, "eps.*0.0"),
    "scale": ({"scale": "sum"}, ValueError, "'sum'"),
    "scale type": ({"scale": None}, TypeError, "NoneType"),
    "backend": ({"backend": "nope"}, ValueError, "'nope'"),
}
ACCUMULATE = {
    "row dtype": ({"row": torch.ones(10).half()}, TypeError, "row.*float16"),
    "row strides": ({"row": torch.ones(20)[::2]}, ValueError, "contiguous"),
    "sumsq": ({"sumsq": torch.ones(2, dtype=F64)}, ValueError, r"\(2,\)"),
    "sumsq dtype": ({"sumsq": torch.ones(1)}, TypeError, "sumsq must be one of torch.float64, got torch.float32"),
    "loss scale": ({"loss_scale": torch.ones(3)}, ValueError, r"\(3,\)"),
    "segments short": ({"segments": torch.tensor([[0, 4]])}, ValueError, r"\(2, 2\).*\(1, 2\)"),
    "segments outside": ({"segments": torch.tensor([[0, 4], [4, 7]])}, ValueError, r"\[4, 11\).*10"),
    "segments negative": ({"segments": torch.tensor([[-1, 4], [4, 6]])}, ValueError, r"\[-1, 3\)"),
    "segments that overlap": ({"segments": torch.tensor([[3, 7], [0, 4]])}, ValueError, r"\[0, 4\) and \[3, 10\)"),
    "grad size": ({"grads": [torch.ones(5), None]}, ValueError, r"grads\[0\] has 5.*4"),
    "grad dtype": ({"grads": [torch.ones(4).int(), None]}, TypeError, r"grads\[0\].*int32"),
    "grad device": ({"grads": [torch.ones(4, device="meta"), None]}, RuntimeError, r"grads\[0\].*meta.*cpu"),
    "sparse grad": ({"grads": [torch.ones(4).to_sparse(), None]}, TypeError, r"grads\[0\].*sparse"),
    "coefficients dtype": (
        {"coefficients": torch.ones(2)}, TypeError, "coefficients must be one of torch.float64, got torch.float32",
    ),
    "integer coefficients": ({"coefficients": torch.ones(2, dtype=torch.int64)}, TypeError, "coefficients.*int64"),
    "three coefficients": ({"coefficients": torch.ones(3, dtype=F64)}, ValueError, r"coefficients.*shape \(3,\)"),
    "matrix of coefficients": ({"coefficients": torch.ones(1, 2, dtype=F64)}, ValueError, r"coefficients.*\(1, 2\)"),
    "strided coefficients": (
        {"coefficients": torch.ones(4, dtype=F64)[::2]}, ValueError, r"coefficients must be contiguous.*strides \(2,\)",
    ),
    "coefficients device": (
        {"coefficients": torch.ones(2, dtype=F64, device="meta")}, RuntimeError, "coefficients is on meta but row.*cpu",
    ),
    "backend": ({"backend": "x"}, ValueError, "'x'"),
}  # fmt: skip
ROWS = {
    "rows of one dimension": ({"rows": torch.ones(4)}, ValueError, r"\(K, P\), got \(4,\)"),
    "no task": ({"rows": torch.ones(0, 4)}, ValueError, r"K >= 1, got \(0, 4\)"),
    "rows dtype": ({"rows": torch.ones(3, 4).half()}, TypeError, "rows.*float16"),
    "columns apart": ({"rows": torch.ones(4, 3).T}, ValueError, r"contiguous.*\(1, 3\)"),
    "rows that overlap": ({"rows": torch.ones(1, 4).expand(3, 4)}, ValueError, r"overlap.*\(0, 1\)"),
    "stats of another size": ({"stats": new_stats(2)}, ValueError, r"sumsq must be contiguous of shape \(3,\).*\(2,\)"),
    "norms dtype": ({"stats": new_stats(3)._replace(norms=torch.ones(3))}, TypeError, "norms.*got torch.float32"),
    "nonfinite dtype": (
        {"stats": new_stats(3)._replace(nonfinite=torch.zeros(3, dtype=torch.int32))}, TypeError, "nonfinite.*int32",
    ),
    "nonfinite_steps dtype": (
        {"stats": new_stats(3)._replace(nonfinite_steps=torch.zeros(3))}, TypeError, "nonfinite_steps.*float32",
    ),
    "stats device": (
        {"stats": new_stats(3)._replace(weights=torch.zeros(3, dtype=F64, device="meta"))}, RuntimeError, "weights.*me",
    ),
    "active size": ({"active": torch.ones(2, dtype=torch.bool)}, ValueError, r"active.*\(3,\), got \(2,\)"),
    "active dtype": ({"active": torch.ones(3)}, TypeError, "active.*float32"),
    "loss scale": ({"loss_scale": torch.ones(2)}, ValueError, r"loss_scale.*\(2,\)"),
    "propagate_above NaN": ({"propagate_above": float("nan")}, ValueError, "propagate_above must not be NaN, got nan"),
    "propagate_above None": ({"propagate_above": None}, TypeError, "propagate_above must be a number, got None"),
    "propagate_above str": ({"propagate_above": "inf"}, TypeError, "propagate_above must be a number, got 'inf'"),
    "eps": ({"eps": -1.0}, ValueError, "eps.*-1.0"),
    "scale": ({"scale": "sum"}, ValueError, "'sum'"),
    "constant": ({"scale": "constant", "constant": float("nan")}, ValueError, "constant must be finite, got nan"),
    "no outs": ({"outs": [], "starts": []}, ValueError, "1 to 4 each, got 0 and 0"),
    "starts": ({"starts": [0, 1]}, ValueError, "got 1 and 2"),
    "out dtype": ({"outs": [torch.ones(4).int()]}, TypeError, r"outs\[0\].*int32"),
    "out strides": ({"outs": [torch.ones(8)[::2]]}, ValueError, r"outs\[0\] must be 1-D and contiguous"),
    "out too long": ({"starts": [1]}, ValueError, r"outs\[0\] is of columns \[1, 5\) of rows of 4"),
    "out device": ({"outs": [torch.ones(4, device="meta")]}, RuntimeError, r"outs\[0\].*meta.*cpu"),
    "backend": ({"backend": "x"}, ValueError, "'x'"),
}  # fmt: skip
COMBINE = {
    "number of weights": ({"weights": torch.ones(2)}, ValueError, r"\(3,\), got \(2,\)"),
    "integer weights": ({"weights": torch.ones(3).long()}, TypeError, "int64"),
    "weights device": ({"weights": torch.ones(3, device="meta")}, RuntimeError, "meta"),
    "rows strides": ({"rows": torch.ones(4, 3).T}, ValueError, "contiguous"),
    "rows dtype": ({"rows": torch.ones(3, 4).half()}, TypeError, "float16"),
    "out size": ({"out": torch.ones(5)}, ValueError, r"\(4,\), got \(5,\)"),
    "out dtype": ({"out": torch.ones(4).int()}, TypeError, "int32"),
}
GRAMIAN = {
    "one dimension": ({"rows": torch.ones(4)}, ValueError, r"\(K, P\), got \(4,\)"),
    "dtype": ({"rows": torch.ones(3, 4).half()}, TypeError, "float16"),
}


def balance_rows_(backend="auto", **arguments):
    ops.balance_rows_(step_of(**arguments), backend)


def fine(op):
    return {
        dbk.balance_: {"grads": torch.ones(3, 4), "ema": torch.ones(3, 4)},
        ops.accumulate_: {
            "row": torch.ones(10), "sumsq": torch.ones(1, dtype=F64), "grads": [torch.ones(4), None],
            "segments": torch.tensor([[0, 4], [4, 6]]), "coefficients": (0.5, 0.5),
        },
        balance_rows_: {"rows": torch.ones(3, 4), "stats": new_stats(3), "outs": [torch.ones(4)]},
        ops.combine_out: {"rows": torch.ones(3, 4), "weights": torch.ones(3), "out": torch.ones(4)},
        ops.gramian: {"rows": torch.ones(3, 4)},
    }[op]  # fmt: skip


CASES = [
    pytest.param(op, *case, id=f"{op.__name__}-{name}")
    for op, cases in (
        (dbk.balance_, BALANCE), (ops.accumulate_, ACCUMULATE), (balance_rows_, ROWS), (ops.combine_out, COMBINE),
        (ops.gramian, GRAMIAN),
    )
    for name, case in cases.items()
]  # fmt: skip


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [] if value.is_meta else [value.to_dense()]
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize(("op", "changes", "kind", "message"), CASES)
def test_refused(op, changes, kind, message):
    arguments = fine(op) | changes
    before = copy.deepcopy(tensors([*arguments.values()]))
    with pytest.raises(kind, match=message):
        op(**arguments)
    assert all(map(torch.equal, before, tensors([*arguments.values()])))


@pytest.mark.parametrize("op", [dbk.balance_, ops.accumulate_, balance_rows_, ops.combine_out, ops.gramian])
def test_what_is_not_changed_is_fine(op):
    op(**fine(op))


@pytest.mark.parametrize("constant", [float("nan"), float("inf"), -float("inf")])
def test_the_torch_op_refuses_a_constant_that_is_no_number(constant):
    arguments = fine(dbk.balance_)
    with pytest.raises(ValueError, match="constant must be finite"):
        torch.ops.dbmtl_kernels.balance_(*arguments.values(), 0.9, 1e-8, "constant", constant, "eager")
    assert (arguments["ema"] == 1).all()
