"""DBMTLAggregator in TorchJD's own machinery; which TorchJD will do."""

import copy
import importlib
import importlib.metadata
import io
import sys

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.integrations import torchjd as adapters
from dbmtl_kernels.integrations.torchjd import DBMTLAggregator
from problems import close, leaf, quadratics
from torch import nn
from torchjd import Stateful
from torchjd.aggregation import WeightedAggregator, Weighting
from torchjd.autojac import backward, jac_to_grad


def matrices(count, m=3, n=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([0.1, 1.0, 30.0])[:m, None]
    return [(torch.randn(m, n, generator=generator) * scales).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("scale", ["max", "mean", "median", "min", 0.3])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "rtol", "of_weights"),
    [
        (torch.float64, torch.float32, 1e-12, 1e-12),
        (torch.float32, torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2, 1e-5),
        (torch.float16, torch.float32, 1e-2, 1e-5),
        (torch.float32, torch.bfloat16, 2e-2, 2e-2),
        (torch.float32, torch.float64, 1e-5, 1e-5),
    ],
)
def test_the_vectors_and_weights_are_algorithm_1(dtype, state_dtype, rtol, of_weights, scale):
    aggregator = DBMTLAggregator(beta=0.5, beta_sigma=0.5, scale=scale, state_dtype=state_dtype)
    ema = np.zeros((3, 50))
    captured = []
    aggregator.weighting.register_forward_hook(lambda _, __, weights: captured.append(weights))
    for step, matrix in enumerate(matrices(4, dtype=dtype), 1):
        expected, ema, norms = oracle.balance(matrix.double().numpy(), ema, 0.5 / step**0.5, scale=scale)
        vector = aggregator(matrix)
        assert vector.dtype == dtype
        close(vector.double().numpy(), expected, rtol)
        close(captured[-1].numpy(), oracle.alpha(norms, scale) / (norms + 1e-8), of_weights)
    assert aggregator.weighting.ema.dtype == (torch.float64 if dtype == torch.float64 else state_dtype)


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
    assert calls == 3 * [aggregator.weighting.ema.data_ptr()]


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
    aggregator = DBMTLAggregator()
    vector = aggregator(matrix)
    assert not vector.requires_grad
    assert aggregator.weighting.ema.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(DBMTLAggregator()(matrix.detach()), vector)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_aggregator_goes_on_bit_for_bit(state_dtype):
    def model(**options):
        return nn.ModuleDict({"layer": nn.Linear(2, 2), "aggregator": DBMTLAggregator(**options)})

    one, other = (model(beta=0.9, beta_sigma=0.3, state_dtype=state_dtype) for _ in range(2))
    for matrix in matrices(6)[:3]:
        one["aggregator"](matrix)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for matrix in matrices(6)[3:]:
        assert torch.equal(other["aggregator"](matrix), one["aggregator"](matrix))
    weighting = other["aggregator"].weighting
    assert torch.equal(weighting.ema, one["aggregator"].weighting.ema)
    assert weighting.step == 6
    other.load_state_dict(model().state_dict())
    assert weighting.ema is None  # that of one which has seen nothing
    assert weighting.step == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", -1, r"\['step'\]: must be from 0"), ("step", None, r"\['step'\]: must be an integer"),
        ("ema", 3.0, r"\['ema'\]: must be a matrix"), ("ema", torch.ones(3), r"\['ema'\]: must be a matrix"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_changes_nothing(key, value, message):
    aggregator = DBMTLAggregator()
    aggregator(matrices(1)[0])
    ema = aggregator.weighting.ema.clone()
    with pytest.raises(ValueError, match=message):
        aggregator.load_state_dict({"weighting._extra_state": {"step": 7, "ema": torch.ones(2, 2), key: value}})
    assert aggregator.weighting.step == 1
    assert torch.equal(aggregator.weighting.ema, ema)


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


def seen(**options):
    """An aggregator that knows a matrix."""
    aggregator = DBMTLAggregator(**options)
    aggregator(matrices(2)[0])
    return aggregator


WIDE = r"a matrix in torch\.float64 needs an EMA in torch\.float64.*reset\(\)"
NARROW = r"an EMA in torch\.bfloat16, this aggregator keeps it in torch\.float32"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda given, matrix: given(matrix[:, 1:]), r"shape \(3, 49\) and the EMA \(3, 50\): call reset\(\)"),
        (lambda given, matrix: given(matrix[1:]), r"shape \(2, 50\) and the EMA \(3, 50\): call reset\(\)"),
        (lambda given, matrix: given(matrix.double()), WIDE),
        (lambda given, matrix: given(matrix[0]), "dimension 2"),
        (lambda given, matrix: setattr(given.weighting, "backend", "nothing") or given(matrix), "nothing"),
        (lambda given, _: given.load_state_dict(seen(state_dtype=torch.bfloat16).state_dict()), NARROW),
    ],
)
def test_what_is_refused_leaves_the_state(call, message):
    aggregator, matrix = seen(), matrices(2)[1]
    expected = copy.deepcopy(aggregator)(matrix)
    with pytest.raises(ValueError, match=message):
        call(aggregator, matrix)
    aggregator.weighting.backend = "auto"
    assert torch.equal(aggregator(matrix), expected)
    assert aggregator.weighting.step == 2


@pytest.mark.parametrize(
    ("options", "matrix", "kind", "message"),
    [
        ({"beta": 1.0}, torch.ones(2, 4), ValueError, "beta must be"),
        ({"beta_sigma": -1.0}, torch.ones(2, 4), ValueError, "beta_sigma must be"),
        ({"eps": 0.0}, torch.ones(2, 4), ValueError, "eps must be"),
        ({"scale": "most"}, torch.ones(2, 4), ValueError, "scale must be"),
        ({"state_dtype": torch.float16}, torch.ones(2, 4), TypeError, "state_dtype must be"),
        ({}, torch.ones(2, 4, dtype=torch.int64), (TypeError, ValueError), "grads"),
        ({}, torch.ones(0, 4), (TypeError, ValueError), "grads"),
    ],
)
def test_arguments_and_first_matrices_that_are_refused(options, matrix, kind, message):
    aggregator = None
    with pytest.raises(kind, match=message):  # noqa: PT012
        aggregator = DBMTLAggregator(**options)
        aggregator(matrix)
    assert (aggregator is None) == bool(options)
    assert aggregator is None or aggregator.weighting.ema is None


@pytest.mark.parametrize("found", ["0.17.2", "0.9", None, "0.18.0", "0.18.0.dev3", "0.19", "1.0.1"])
def test_a_torchjd_too_old_is_named(found, monkeypatch):
    def version(name):
        assert name == "torchjd"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, adapters.__name__)
    if found in ("0.17.2", "0.9", None):
        with pytest.raises(ImportError, match=rf"needs torchjd >= 0\.18, found {found or 'none'}"):
            importlib.import_module(adapters.__name__)
    else:
        adapters._check_version()
