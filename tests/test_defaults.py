"""Nothing depends on PyTorch's default device and dtype: "meta" stands for a device that is not the model's."""

import copy
import pickle
from contextlib import contextmanager

import dbmtl_kernels as dbk
import defaults
import pytest
import torch
from dbmtl_kernels import __main__ as command
from torch import nn

FILES = sorted(str(path.relative_to(defaults.PACKAGE)) for path in defaults.PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_every_factory_names_its_device_and_dtype(file):
    assert defaults.without_defaults((defaults.PACKAGE / file).read_text()) == []


CALLS = """
torch.zeros(3)
torch.zeros(3, dtype=torch.float32)
torch.tensor([1.0], device=x.device)
torch.where(x, torch.nan, 0.0)
torch.Generator()
x.new_zeros(3), torch.zeros_like(x), torch.where(x, y, 0.0), torch.Generator("cpu"), torch.stack([x])
torch.zeros(3, dtype=torch.float32, device=x.device)
"""


def test_factories_without_are_found():
    assert [line for line, _ in defaults.without_defaults(CALLS)] == [2, 3, 4, 5, 6]


@contextmanager
def foreign():
    with torch.device("meta"), defaults.default_dtype(torch.float64):
        yield


@contextmanager
def usual():
    yield


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.x = torch.randn(2, 4)

    def losses(self):
        return [head(self.trunk(self.x)).square().mean() for head in self.heads]

    def grads(self):
        return [p.grad.clone() for p in self.parameters()]


def trained(balancer, model):
    """Backward in its forms, and what there is to read."""
    balancer(model.losses()).backward()
    balancer.backward([model.losses()[0], None, model.losses()[2]])
    (balancer(model.losses()) * 0.5).backward()
    with torch.no_grad():
        value = balancer(model.losses())
    return [*model.grads(), value, balancer.norms, balancer.weights, balancer.nonfinite_steps]


def by_rows(model, **options):
    balancer = dbk.DBMTL(model.trunk.parameters(), 3, **options)
    out = trained(balancer, model)
    for task, loss in enumerate(model.losses()):
        with balancer.task(task, loss_scale=4.0):
            dbk.log_transform(loss).backward()
    with balancer.no_update():
        balancer.backward(model.losses())
    balancer.backward([loss * factor for loss, factor in zip(model.losses(), (1.0, torch.nan, 1.0), strict=True)])
    return [*out, *model.grads(), balancer.weights]


def what_a_monitor_tells(model):
    balancer = dbk.DBMTL(model.trunk, 3)
    balancer.backward(model.losses())
    monitor = balancer.monitor()
    numbers = torch.tensor(list(monitor.as_dict(gramian=True).values()), dtype=torch.float64, device="cpu")
    return [monitor.gramian, monitor.cosine, numbers]


def by_a_gramian(model):
    weighting = dbk.GradNorm(3)
    out = trained(dbk.GradientBalancer(model.trunk.parameters(), 3, weighting=weighting), model)
    return [*out, *weighting.state_dict().values()]


def in_one_pass(model):
    return trained(dbk.OnePassDBMTL(model.trunk.parameters(), 3), model)


def copied_and_loaded(model):
    balancer = dbk.DBMTL(model.trunk, 3)
    balancer.backward(model.losses())
    again = dbk.DBMTL(model.trunk, 3)
    again.load_state_dict(copy.deepcopy(balancer.state_dict()))
    again.backward(model.losses())
    other = pickle.loads(pickle.dumps(balancer))
    return [*model.grads(), again.norms, other.norms, copy.deepcopy(balancer).norms]


def changed(model):
    balancer = dbk.DBMTL(model.trunk.parameters(), 3)
    balancer.backward(model.losses())
    balancer.rebind([model.trunk.weight])
    assert balancer.add_task() == 3
    balancer.remove_task(1)
    balancer.backward(model.losses())
    return [*model.grads(), balancer.norms]


def one_matrix(model):
    grads, ema = torch.randn(3, 7, dtype=torch.float32, device="cpu"), model.x.new_zeros(3, 7)
    return [*dbk.balance_(grads, ema), ema]


WAYS = {
    "rows": by_rows,
    "eager": lambda model: by_rows(model, backend="eager"),
    "capturable": lambda model: by_rows(model, capturable=True),
    "one row": lambda model: trained(dbk.DBMTL(model.trunk.parameters(), 3, beta=0.0), model),
    "one pass": in_one_pass,
    "Gramian": by_a_gramian,
    "monitor": what_a_monitor_tells,
    "copies": copied_and_loaded,
    "changes": changed,
    "op": one_matrix,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_under_foreign_defaults(way):
    results = []
    for defaults_of in (usual, foreign):
        torch.manual_seed(0)
        model = Model()
        with defaults_of():
            results.append(WAYS[way](model))
    for ours, wanted in zip(*reversed(results), strict=True):
        assert ours.device.type == "cpu"
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_the_command_checks_what_is_there():
    with foreign():
        assert command._largest_error("native", torch.device("cpu")) < 1e-5


def test_the_scales_of_a_loss_go_where_parameters_of_modules_go():
    with foreign():
        scales = dbk.IMTLLoss(3).scales
    assert (scales.device.type, scales.dtype) == ("meta", torch.float32)


def test_the_run_under_foreign_defaults_changes_calls_of_the_package_alone():
    """What `make test-all` does with DBMTL_FOREIGN_DEFAULTS=1, also in a backward pass."""
    seen = []
    source = """
def make(*_):
    seen.append(torch.where(torch.zeros(1, dtype=bool, device="cpu"), 1.0, 2.0).dtype)
    seen.append(torch.zeros(1).device.type)
"""
    code = compile(source, str(defaults.PACKAGE / "made_up.py"), "exec")
    names = {"torch": torch, "seen": seen}
    exec(code, names)
    leaf = torch.zeros(1, requires_grad=True)
    leaf.register_hook(names["make"])
    with defaults.foreign_to_the_package():
        assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).dtype == torch.float32
        names["make"]()
        (2 * leaf).sum().backward()
    assert seen == [torch.float64, "meta"] * 2
