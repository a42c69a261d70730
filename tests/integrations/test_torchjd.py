"""DBMTLAggregator in TorchJD's own machinery; which TorchJD will do."""

import copy
import importlib
import importlib.metadata
import io
import subprocess
import sys

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.integrations import torchjd as adapters
from dbmtl_kernels.integrations.torchjd import DBMTLAggregator
from problems import close, flat_grad, leaf, quadratics
from torch import nn
from torchjd import Stateful
from torchjd.aggregation import WeightedAggregator, Weighting
from torchjd.autojac import backward, jac_to_grad, mtl_backward


def matrices(count, m=3, n=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([0.1, 1.0, 30.0])[:m, None]
    return [(torch.randn(m, n, generator=generator) * scales).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("scale", ["max", "mean", "median", "min", 0.3])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)],
)
def test_the_vectors_and_weights_are_algorithm_1(dtype, rtol, scale):
    aggregator = DBMTLAggregator(beta=0.5, beta_sigma=0.5, scale=scale)
    ema = np.zeros((3, 50))
    captured = []
    aggregator.weighting.register_forward_hook(lambda _, __, weights: captured.append(weights))
    for step, matrix in enumerate(matrices(4, dtype=dtype), 1):
        expected, ema, norms = oracle.balance(matrix.double().numpy(), ema, 0.5 / step**0.5, scale=scale)
        vector = aggregator(matrix)
        assert vector.dtype == dtype
        close(vector.double().numpy(), expected, rtol)
        close(captured[-1].numpy(), oracle.alpha(norms, scale) / (norms + 1e-8), 1e-12 if rtol < 1e-6 else 1e-5)
    assert aggregator.weighting.ema.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_dtypes(state_dtype):
    aggregator = DBMTLAggregator(beta=0.5, beta_sigma=0.0, state_dtype=state_dtype)
    ema = np.zeros((3, 50))
    for matrix in matrices(4):
        expected, ema, _ = oracle.balance(matrix.double().numpy(), ema, 0.5)
        vector = aggregator(matrix)
        assert vector.dtype == torch.float32
        close(vector.numpy(), expected, 2e-2 if state_dtype == torch.bfloat16 else 1e-5)
        assert aggregator.weighting.ema.dtype == state_dtype


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh()).double(), nn.ModuleList(nn.Linear(8, 1) for _ in range(3)).double()


def test_jac_to_grad_does_what_our_engine_does():
    runs = []
    for ours in (True, False):
        trunk, heads = net()
        parameters = list(trunk.parameters())
        optimizer = torch.optim.SGD([*parameters, *heads.parameters()], lr=0.01)
        balancer = dbk.DBMTL(parameters, 3, beta=0.5, state_dtype=torch.float64)
        aggregator = DBMTLAggregator(beta=0.5)
        generator = torch.Generator().manual_seed(1)
        weights = []
        for _ in range(10):
            x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
            z = trunk(x)
            losses = [(head(z) - 3.0**t).square().mean() for t, head in enumerate(heads)]
            optimizer.zero_grad()
            if ours:
                balancer(losses).backward()
                weights.append(balancer.weights)
            else:
                mtl_backward([dbk.log_transform(loss) for loss in losses], features=z)
                weights.append(jac_to_grad(parameters, aggregator))
                assert weights[-1].shape == (3,)
            optimizer.step()
        runs.append((flat_grad(parameters), torch.stack(weights).numpy(), flat_grad(list(heads.parameters()))))
    for a, b in zip(*runs, strict=True):
        close(a, b)


def test_what_torchjd_takes_it_for():
    aggregator = DBMTLAggregator()
    assert isinstance(aggregator, WeightedAggregator)
    assert isinstance(aggregator, Stateful)
    assert isinstance(aggregator.weighting, Weighting)
    assert repr(aggregator).startswith("DBMTLAggregator(beta=0.9, beta_sigma=0.5, eps=1e-08, scale='max'")
    p = leaf(6)
    backward(quadratics(p), inputs=[p])
    with pytest.raises(ValueError, match="optimize_gramian_computation=True"):
        jac_to_grad([p], aggregator, optimize_gramian_computation=True)  # the weights are not those of J's Gramian


def test_one_call_of_the_dense_op_a_step(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments[1].data_ptr())
        return dbk.balance_(*arguments, **options)

    monkeypatch.setattr(adapters, "balance_", counted)
    aggregator = DBMTLAggregator()
    for matrix in matrices(3):
        aggregator(matrix)
    assert len(calls) == 3
    assert set(calls) == {aggregator.weighting.ema.data_ptr()}


def test_a_hook_that_returns_other_weights_changes_the_vector():
    p = leaf(6)
    aggregator = DBMTLAggregator(beta=0.5)
    aggregator.weighting.register_forward_hook(lambda _, __, w: w.flip(0))
    for _ in range(2):
        p.grad = None
        backward(quadratics(p), inputs=[p])
        weights = jac_to_grad([p], aggregator)
        close(p.grad.numpy(), (weights @ aggregator.weighting.ema).numpy())


def test_a_matrix_with_a_graph_and_inference_mode():
    matrix = matrices(1)[0].requires_grad_()
    aggregator, other = DBMTLAggregator(), DBMTLAggregator()
    vector = aggregator(matrix)
    assert not vector.requires_grad
    assert aggregator.weighting.ema.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(other(matrix.detach()), vector)


def test_a_row_that_is_not_finite_heals():
    aggregator = DBMTLAggregator(beta=0.5, beta_sigma=0.0)
    first, second, third = matrices(3)
    aggregator(first)
    second[1, 7] = float("nan")
    assert aggregator(second).isfinite().all()
    assert not aggregator.weighting.ema[1].any()
    assert aggregator(third).isfinite().all()
    close(aggregator.weighting.ema[1].numpy(), 0.5 * third[1].numpy(), 1e-6)


def test_a_single_row_and_a_row_of_zeros():
    row = matrices(1, m=1)[0]
    assert torch.equal(DBMTLAggregator(beta=0.0)(row), row[0])
    matrix = matrices(1)[0]
    matrix[0] = 0.0
    expected, _, _ = oracle.balance(matrix.double().numpy(), np.zeros((3, 50)), 0.0)
    close(DBMTLAggregator(beta=0.0)(matrix).numpy(), expected, 1e-5)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_aggregator_goes_on_bit_for_bit(state_dtype):
    options = {"beta": 0.9, "beta_sigma": 0.3, "state_dtype": state_dtype}
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "aggregator": DBMTLAggregator(**options)})
    first, second = matrices(6)[:3], matrices(6)[3:]
    for matrix in first:
        model["aggregator"](matrix)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.ModuleDict({"layer": nn.Linear(2, 2), "aggregator": DBMTLAggregator(**options)})
    other.load_state_dict(state)
    for matrix in second:
        assert torch.equal(other["aggregator"](matrix), model["aggregator"](matrix))
    assert torch.equal(other["aggregator"].weighting.ema, model["aggregator"].weighting.ema)
    assert other["aggregator"].weighting.step == 6
    other.load_state_dict(nn.ModuleDict({"layer": nn.Linear(2, 2), "aggregator": DBMTLAggregator()}).state_dict())
    assert other["aggregator"].weighting.ema is None  # that of one which has seen nothing
    assert other["aggregator"].weighting.step == 0


def test_a_state_in_another_dtype_is_refused():
    narrow, wide = DBMTLAggregator(state_dtype=torch.bfloat16), DBMTLAggregator()
    matrix = matrices(1)[0]
    narrow(matrix)
    wide(matrix)
    before = wide.weighting.ema.clone()
    with pytest.raises(ValueError, match=r"an EMA in torch\.bfloat16, this aggregator keeps it in torch\.float32"):
        wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.weighting.ema, before)


def test_a_copy_and_a_reset():
    aggregator = DBMTLAggregator()
    first, second = matrices(2)
    start = aggregator(first)
    copied = copy.deepcopy(aggregator)
    assert torch.equal(copied(second), aggregator(second))
    aggregator.reset()
    assert torch.equal(aggregator(first), start)
    aggregator.reset()
    assert aggregator(torch.randn(2, 7)).shape == (7,)


def test_refused_matrices_leave_the_state():
    aggregator = DBMTLAggregator()
    first, second = matrices(2)
    for bad in (torch.ones(2, 4, dtype=torch.int64), torch.ones(0, 4)):
        with pytest.raises((TypeError, ValueError), match="grads"):
            aggregator(bad)
    assert aggregator.weighting.ema is None
    aggregator(first)
    expected = copy.deepcopy(aggregator)(second)
    with pytest.raises(ValueError, match=r"shape \(3, 49\) and the EMA \(3, 50\): call reset\(\)"):
        aggregator(second[:, 1:])
    with pytest.raises(ValueError, match=r"shape \(2, 50\) and the EMA \(3, 50\): call reset\(\)"):
        aggregator(second[1:])
    with pytest.raises(ValueError, match=r"a matrix in torch\.float64 needs an EMA in torch\.float64.*reset\(\)"):
        aggregator(second.double())
    with pytest.raises(ValueError, match="dimension 2"):
        aggregator(second[0])
    aggregator.weighting.backend = "nothing"
    with pytest.raises(ValueError, match="nothing"):
        aggregator(second)
    aggregator.weighting.backend = "auto"
    assert torch.equal(aggregator(second), expected)
    assert aggregator.weighting.step == 2


def test_refused_arguments():
    for options, kind, message in (
        ({"beta": 1.0}, ValueError, "beta must be"),
        ({"beta_sigma": -1.0}, ValueError, "beta_sigma must be"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"scale": "most"}, ValueError, "scale must be"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype must be"),
    ):
        with pytest.raises(kind, match=message):
            DBMTLAggregator(**options)


@pytest.mark.parametrize("found", ["0.17.2", "0.9", None])
def test_a_torchjd_too_old_is_named(found, monkeypatch):
    def version(name):
        assert name == "torchjd"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, adapters.__name__)
    with pytest.raises(ImportError, match=rf"needs torchjd >= 0\.18, found {found or 'none'}"):
        importlib.import_module(adapters.__name__)


@pytest.mark.parametrize("found", ["0.18.0", "0.18.0.dev3", "0.19", "1.0.1"])
def test_newer_ones_will_do(found, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    adapters._check_version()


def test_the_package_does_not_import_torchjd():
    program = "import sys, dbmtl_kernels, dbmtl_kernels.integrations; print('torchjd' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
