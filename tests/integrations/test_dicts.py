"""Lightning with a dict of losses, and with a balancer that is not enabled."""

import csv
from pathlib import Path

import dbmtl_kernels as dbk
import pytest
import torch
from dbmtl_kernels.integrations.lightning import GradientBalancing
from dbmtl_kernels.integrations.wrappers import make_balancer
from lightning.pytorch.loggers import CSVLogger
from lightning_job import Module, first_net, loader, parameters, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Named(Module):
    def training_step(self, batch, batch_idx):
        b, a = self.net(batch[0])
        losses = {"b": b, "a": a}
        self.seen.append(float(b.detach()))
        return self.balancer(losses if batch_idx % 2 else dict(reversed(losses.items())))


def test_a_dict_of_losses_and_what_to_watch(tmp_path):
    """In another order now and then; the log has the tasks' names, and a sum of losses to watch."""
    plain, named, logger = Module(), Named(), CSVLogger(tmp_path)
    trainer_of(tmp_path, 3, GradientBalancing("net.trunk", 2)).fit(plain, loader())
    balancing = GradientBalancing(lambda module: module.net.trunk, ["b", "a"])
    trainer_of(tmp_path, 3, balancing, logger=logger, log_every_n_steps=1).fit(named, loader())
    assert torch.equal(parameters(plain), parameters(named))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["balancer/loss/b"]) for row in rows] == pytest.approx(named.seen)
    assert all(float(row["balancer/loss"]) > 0.0 for row in rows)
    assert "balancer/norm/a" in rows[0]


def test_a_balancer_that_is_paused_trains_on_the_plain_sum(tmp_path):
    class Paused(Module):
        def on_train_start(self):
            self.balancer.enabled = False

    module, net = Paused(), first_net()
    trainer_of(tmp_path, 1, GradientBalancing("net.trunk", 2, log=False)).fit(module, loader())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for (x,) in loader():
        optimizer.zero_grad()
        sum(torch.log(loss + 1e-8) for loss in net(x)).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(module), parameters(net), rtol=0, atol=1e-6)


def test_what_a_function_may_give_as_shared():
    net = first_net()
    wanted = [id(p) for p in net.trunk.parameters()]
    for given in (
        lambda net: net.trunk,
        lambda net: dict(net.trunk.named_parameters()),
        lambda net: net.trunk.parameters(),
        "trunk",
    ):
        assert [id(p) for p in make_balancer(net, net, given, 2, dbk.DBMTL, {}).shared_parameters] == wanted
    balancer = make_balancer(net, net, lambda net: net.trunk[0].weight, 2, dbk.DBMTL, {})
    assert balancer.shared_parameters[0] is net.trunk[0].weight


@pytest.mark.parametrize("shared", ["trunk", lambda net: net.trunk, lambda net: net.trunk.named_parameters()])
def test_parameters_of_an_adapter_have_names(shared):
    net = first_net()
    balancer = make_balancer(net, net, shared, 2, dbk.DBMTL, {})
    name = next(name for name, _ in net.trunk.named_parameters())
    parameter = next(net.trunk.parameters())
    parameter.data = parameter.data.double()
    with pytest.raises(RuntimeError, match=f"shared parameter 0 .'{name}'"):
        balancer.backward([parameter.sum() + 9.0, parameter.sum() + 8.0])
