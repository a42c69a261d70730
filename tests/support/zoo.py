"""Small models of three tasks whose graphs meet in different ways: (trunk, heads, losses of x, a batch)."""

import dbmtl_kernels as dbk
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

K = 3


def linear_heads(width=16):
    return nn.ModuleList(nn.Linear(width, 1) for _ in range(K))


def each(heads, features):
    """A squared error a task, of features of its own or of the same."""
    features = features if isinstance(features, list | tuple) else [features] * K
    return [(head(z) - i).square().mean() * 10**i for i, (head, z) in enumerate(zip(heads, features, strict=True))]


def rows(*shape):
    return lambda: torch.randn(*shape)


def mlp(form=list, trunk=None):
    trunk = trunk or nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    heads = linear_heads()
    return trunk, heads, lambda x: form(each(heads, trunk(x))), rows(16, 8)


def stacked():
    return mlp(torch.stack)


def stacked_and_indexed():
    return mlp(lambda losses: [torch.stack(losses)[i] for i in range(-K, 0)])


def stacked_and_unbound():
    return mlp(lambda losses: torch.stack(losses).unbind())


def convolutions():
    trunk = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16)
    )
    heads = linear_heads()
    return trunk, heads, lambda x: each(heads, trunk(x)), rows(16, 1, 8, 8)


def recurrent(kind):
    trunk, heads = kind(8, 16, batch_first=True), linear_heads()

    def losses(x):
        z = trunk(x)[0]
        return each(heads, [z[:, -1 - i] for i in range(K)])

    return trunk, heads, losses, rows(16, 5, 8)


def gru():
    return recurrent(nn.GRU)


def lstm():
    return recurrent(nn.LSTM)


def transformer():
    trunk, heads = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), linear_heads()

    def losses(x):
        torch.manual_seed(5)  # dropout
        return each(heads, trunk(x).mean(1))

    return trunk, heads, losses, rows(16, 5, 16)


def dropout_and_dicts():
    trunk = nn.ModuleDict({"low": nn.Linear(8, 32), "high": nn.Linear(32, 16)})
    heads = linear_heads()

    def losses(x):
        torch.manual_seed(5)
        out = {"low": nn.functional.dropout(trunk["low"](x["x"]).relu(), 0.3)}
        out["high"] = nn.functional.dropout(trunk["high"](out["low"]), 0.3)
        return {"losses": each(heads, out["high"])}["losses"]

    return trunk, heads, losses, lambda: {"x": torch.randn(16, 8)}


def taps_of_a_residual_trunk():
    trunk, heads = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)]), linear_heads()

    def losses(x):
        a = trunk[0](x).relu()
        b = a + trunk[1](a).relu()
        return each(heads, [a, b, b + trunk[2](b).relu()])

    return trunk, heads, losses, rows(16, 8)


def a_block_of_one_task():
    trunk, heads = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16)]), linear_heads()

    def losses(x):
        a = trunk[0](x).relu()
        return each(heads, [a, a, trunk[1](a)])

    return trunk, heads, losses, rows(16, 8)


def tied_to_a_head():
    trunk, heads = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)]), linear_heads()

    def losses(x):
        z = trunk[0](trunk[1](trunk[0](x).relu()).relu())
        first, *others = each(heads, z)
        return [first + (z @ trunk[0].weight).square().mean(), *others]

    return trunk, heads, losses, rows(16, 8)


def tied_heads():
    trunk = nn.ModuleDict({"body": nn.Linear(8, 16), "head": nn.Linear(16, 1)})  # that of two tasks
    heads = nn.ModuleList([nn.Linear(16, 1)])

    def losses(x):
        z = trunk["body"](x).relu()
        return each([trunk["head"], trunk["head"], heads[0]], [z, z.square(), z])

    return trunk, heads, losses, rows(16, 8)


def checkpointed():
    trunk, heads = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)), linear_heads()
    return trunk, heads, lambda x: each(heads, checkpoint(trunk, x, use_reentrant=False)), rows(16, 8)


def a_forward_pass_a_task():
    trunk, heads = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)), linear_heads()
    return trunk, heads, lambda x: each(heads, [trunk(part) for part in x]), rows(K, 16, 8)


def mmoe():
    trunk = nn.ModuleList(nn.Linear(8, 16) for _ in range(4))
    gates, towers = nn.ModuleList(nn.Linear(8, 4) for _ in range(K)), linear_heads()

    def losses(x):
        experts = torch.stack([expert(x).relu() for expert in trunk], 1)
        return each(towers, [(gate(x).softmax(-1)[..., None] * experts).sum(1) for gate in gates])

    return trunk, nn.ModuleList([gates, towers]), losses, rows(16, 8)


def message_passing():
    trunk, heads = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16)]), linear_heads()
    source, target = torch.randint(0, 16, (2, 40))

    def losses(x):
        z = trunk[0](x).relu()
        return each(heads, torch.zeros_like(z).index_add(0, target, trunk[1](z)[source]))

    return trunk, heads, losses, rows(16, 8)


def adapters():
    base = nn.Linear(8, 16).requires_grad_(False)
    trunk, heads = nn.ModuleList([nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)]), linear_heads()
    return trunk, heads, lambda x: each(heads, (base(x) + trunk[1](trunk[0](x))).relu()), rows(16, 8)


def all_is_shared():
    trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, K))
    return trunk, nn.ModuleList(), lambda x: (trunk(x) - torch.arange(K)).square().mean(0), rows(16, 8)


def a_loss_made_of_another():
    trunk, heads = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)), nn.ModuleList()

    def losses(x):
        first = trunk(x).square().mean()
        return [first, first * 2 + trunk(x).abs().mean(), trunk(x + 1).square().mean()]

    return trunk, heads, losses, rows(16, 8)


ZOO = [
    mlp, stacked, stacked_and_indexed, stacked_and_unbound, convolutions, gru, lstm, transformer, dropout_and_dicts,
    tied_heads, taps_of_a_residual_trunk, a_block_of_one_task, tied_to_a_head, checkpointed, a_forward_pass_a_task,
    mmoe, message_passing, adapters, all_is_shared, a_loss_made_of_another,
]  # fmt: skip


class Model(nn.Module):
    """The MLP as a module that gives losses, and its training from a fixed start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.trunk, self.heads, _, _ = mlp()
        self.double()

    def forward(self, x):
        return each(self.heads, self.trunk(x))

    def train_on(self, balancer, call, part, steps=100):
        """``part`` of each batch of eight."""
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-4)
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            balancer(call(part(x))).backward()
            optimizer.step()
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.parameters()]
        return torch.cat([p.detach().reshape(-1) for p in whole])


class Setting:
    """The MLP of the zoo, with an optimizer."""

    def __init__(self, **options):
        torch.manual_seed(1)
        self.trunk, self.heads, self.losses, self.batch = mlp()
        self.shared = list(self.trunk.parameters())
        self.all = [*self.shared, *self.heads.parameters()]
        self.balancer = dbk.OnePassDBMTL(self.trunk, K, **options)
        self.optimizer = torch.optim.SGD(self.all, lr=1e-3)

    def step(self, x=None, **options):
        self.optimizer.zero_grad()
        self.balancer(self.losses(self.batch() if x is None else x), **options).backward()
        self.optimizer.step()


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
