"""`balance_` goes past PyTorch's dispatcher where nobody looks at operations, and only there."""

import dbmtl_kernels as dbk
import older
import pytest
import torch
from dbmtl_kernels import functional, ops
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "dbmtl_kernels.balance_.default"


@pytest.fixture
def direct(monkeypatch):
    """The calls that went past the dispatcher."""
    seen, balance_ = [], ops.balance_
    monkeypatch.setattr(functional.ops, "balance_", lambda *args: (seen.append(args), balance_(*args))[1])
    return seen


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def problem():
    return torch.randn(3, 40), torch.randn(3, 40)


@older.sets_compare
@pytest.mark.counts_calls
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_past_the_dispatcher(direct, backend):
    grads, ema = problem()
    expected = dbk.reference.balance(grads, ema)
    for enter in (torch.enable_grad, torch.no_grad):
        with enter():
            mine = ema.clone().requires_grad_()
            version = mine._version
            grad, norms = dbk.balance_(grads.clone().requires_grad_(), mine, backend=backend)
        torch.testing.assert_close((grad, mine.detach(), norms), tuple(expected))
        assert not grad.requires_grad
        assert not norms.requires_grad
        assert mine._version > version
    assert len(direct) == 2
    torch.testing.assert_close(dbk.balance_(grads.T.contiguous().T, ema, backend=backend)[0], expected[0])
    assert len(direct) == 3


def test_whoever_looks_sees_the_op(direct):
    grads, ema = problem()

    def run(grads, ema):
        return dbk.balance_(grads, ema)[0]

    for mode in (Dispatched(), Called()):
        with mode:
            run(grads, ema)
        assert any("balance_" in name for name in mode.seen)
    for pre_dispatch in (False, True):
        assert NAME in str(make_fx(run, pre_dispatch=pre_dispatch)(grads, ema).code).replace("torch.ops.", "")
    with FakeTensorMode():
        assert run(*problem()).shape == (40,)
    with enable_python_dispatcher():
        run(grads, ema)
    with pytest.raises(RuntimeError, match="functionalizing"):  # which does not take ops that write to an argument
        torch.func.functionalize(run)(grads, ema)
    with torch.profiler.profile() as profiler:
        run(grads, ema)
    assert any("balance_" in event.key for event in profiler.key_averages())
    traced = torch.jit.trace(run, (grads, ema.clone()), check_trace=False)
    assert "balance_" in str(traced.graph)
    torch.compile(run, backend="eager", fullgraph=True)(grads, ema)
    assert direct == []


class Subclass(torch.Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs)


def test_a_tensor_that_is_not_its_memory(direct):
    """Lazily negated, zeros without memory, a subclass: the dispatcher knows what to do."""
    grads, ema = problem()
    for given, same in ((torch._neg_view(grads), -grads), (torch._efficientzerotensor(3, 40), torch.zeros(3, 40))):
        expected, mine = dbk.reference.balance(same, ema), ema.clone()
        torch.testing.assert_close(dbk.balance_(given, mine)[0], expected[0])
        torch.testing.assert_close(mine, expected[1])
    dbk.balance_(grads.as_subclass(Subclass), ema)
    assert Subclass.seen > 0
    for backend in ("auto", "native"):
        assert dbk.balance_(grads.to("meta"), ema.to("meta"), backend=backend)[0].shape == (40,)
    assert direct == []


def test_a_gradient_without_memory():
    """Zeros may have none; a subclass that holds its numbers elsewhere is no zeros."""
    segments = torch.tensor([[0, 40]])
    for backend in ("native", "eager"):
        row, sumsq = torch.ones(40), torch.zeros(1, dtype=torch.float64)
        with pytest.raises(TypeError, match=r"grads\[0\] has no memory of its own: TwoTensor"):
            ops.accumulate_(
                row, sumsq, [TwoTensor(torch.ones(40), torch.ones(40))], segments, (0.5, 0.5), None, backend
            )
        assert torch.equal(row, torch.ones(40))
        ops.accumulate_(row, sumsq, [torch._efficientzerotensor(40)], segments, (0.5, 0.5), None, backend)
        assert torch.equal(row, torch.full((40,), 0.5))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch 2.7: no such tag")
def test_no_graph_of_torch_compile_holds_the_counters():
    tags = torch.ops.dbmtl_kernels.balance_.default.tags
    assert torch.Tag.cudagraph_unsafe in tags


@older.sets_compare
@pytest.mark.counts_calls
def test_inference_and_autocast(direct):
    with torch.inference_mode():
        grads, ema = problem()
        expected = dbk.reference.balance(grads, ema)[0]
        torch.testing.assert_close(dbk.balance_(grads, ema)[0], expected)
    grads, ema = problem()
    expected = dbk.reference.balance(grads, ema)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dbk.balance_(grads, ema)[0], expected)
    assert len(direct) == 1
