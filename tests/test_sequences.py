"""Random sequences of everything a training loop does, against a simulation that keeps plain K x P matrices."""

import copy
import random

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch

EPS = 1e-8
SIZES = (6, 40)


class Simulation:
    """DB-MTL in NumPy, and what everybody else put in .grad."""

    def __init__(self, num_tasks, beta, sigma):
        self.m = np.zeros((num_tasks, sum(SIZES)))
        self.beta, self.sigma, self.k = beta, sigma, 0
        self.open = False
        self.others = np.zeros(sum(SIZES))
        self.balanced = np.zeros(sum(SIZES))

    def feed(self, rows, factor):
        """rows: {task: gradient of the log-loss}."""
        if not self.open:
            self.open, self.k, self.seen, self.broken, self.unit = True, self.k + 1, set(), set(), factor
        beta = self.beta / self.k**self.sigma
        for task, row in rows.items():
            decay = 1.0 if task in self.seen else beta
            self.m[task] = decay * self.m[task] + (1 - beta) * row * factor / self.unit
            self.seen.add(task)
            if not np.isfinite(self.m[task]).all():
                self.broken.add(task)

    def balance(self):
        used = [t for t in sorted(self.seen) if t not in self.broken]
        norms = {t: np.linalg.norm(self.m[t]) for t in used}
        alpha = max(norms.values(), default=0.0)
        single = len(self.m) == 1
        self.balanced = sum(
            (self.m[t] * (1.0 if single else alpha / (norms[t] + EPS)) for t in used), np.zeros(sum(SIZES))
        )
        self.balanced = self.balanced * self.unit
        for t in self.broken:
            self.m[t] = 0.0
        if self.broken and self.unit > 1:
            self.balanced = np.full(sum(SIZES), np.nan)


def play(seed, backend):
    dice = random.Random(seed)
    torch.manual_seed(seed)
    num_tasks = dice.choice([1, 2, 4])
    beta, sigma = dice.choice([0.0, 0.5, 0.9]), dice.choice([0.0, 0.5])
    params = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in SIZES]
    options = {"beta": beta, "beta_sigma": sigma, "state_dtype": torch.float64, "backend": backend}
    balancer = dbk.DBMTL(params, num_tasks, **options)
    optimizer = torch.optim.SGD(params, lr=0.01)
    attached = dice.random() < 0.5
    handle = balancer.attach(optimizer) if attached else None
    simulation = Simulation(num_tasks, beta, sigma)

    def make_losses():
        poison = dice.randrange(num_tasks) if dice.random() < 0.1 else None
        losses = []
        for t in range(num_tasks):
            loss = sum((p - dice.uniform(-1, 1) * (1 + t)).square().sum() for p in params) + 0.3
            losses.append(loss * float("nan") if t == poison else loss)
        grads = [torch.autograd.grad(torch.log(x + EPS), params, retain_graph=True) for x in losses]
        return losses, {t: np.concatenate([g.numpy() for g in gs]) for t, gs in enumerate(grads)}

    def regularise():
        weight = dice.uniform(0.5, 2)
        (weight * sum(p.sum() for p in params)).backward()
        simulation.others = simulation.others + weight

    for _ in range(6):
        in_place = dice.random() < 0.3
        if dice.random() < 0.8 or not np.isfinite(simulation.others).all():
            optimizer.zero_grad(set_to_none=not in_place)
            simulation.others = np.zeros(sum(SIZES))
        for _ in range(dice.choice([1, 1, 3])):
            if dice.random() < 0.3:
                regularise()
            factor = dice.choice([1.0, 1.0, 0.25, 1024.0]) if not simulation.open else dice.choice([1.0, 0.25])
            losses, rows = make_losses()
            if dice.random() < 0.3:
                tasks = sorted(dice.sample(range(num_tasks), dice.randint(1, num_tasks)))
                for t in tasks:
                    with balancer.task(t, loss_scale=factor):
                        (dbk.log_transform(losses[t]) * factor).backward()
                simulation.feed({t: rows[t] for t in tasks}, factor)
                balancer.balance()
            else:
                (balancer(losses) * factor).backward()
                simulation.feed(rows, factor)
            simulation.balance()
            expected = simulation.others + simulation.balanced
            actual = torch.cat([p.grad for p in params]).numpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9 * np.nanmax(np.abs([*expected, 1.0])))
            assert torch.isfinite(balancer.buffer.rows).all()
            if not attached:  # the step is over: what is in .grad is everybody's
                simulation.open, simulation.others = False, expected
            if dice.random() < 0.2:
                state = copy.deepcopy(balancer.state_dict())
                balancer = dbk.DBMTL(params, num_tasks, **options)
                balancer.load_state_dict(state)
                if handle is not None:
                    handle.remove()
                    handle = balancer.attach(optimizer)
            if not np.isfinite(expected).all():
                break
        total = simulation.others + (simulation.balanced if attached else 0.0)
        if not np.isfinite(total).all():  # as a GradScaler does: no step, and the gradients go
            optimizer.zero_grad()
            simulation.others, simulation.open = np.zeros(sum(SIZES)), False
            continue
        optimizer.step()
        simulation.open, simulation.others = False, total
    assert balancer.step == simulation.k


@pytest.mark.parametrize("backend", ["native", "triton", "cuda", "eager"])
@pytest.mark.parametrize("block", range(8))
def test_sequences(block, backend):
    for seed in range(20 * block, 20 * block + 20):
        try:
            play(seed, backend)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
