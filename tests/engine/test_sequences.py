"""Random sequences of everything a training loop does, against the oracle of a training run."""

import copy
import random

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from problems import EPS, rows_of

SIZES = (6, 40)


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
    exact = oracle.Training(num_tasks, sum(SIZES), beta, sigma)
    others = np.zeros(sum(SIZES))  # what everybody else put in .grad

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
        return weight

    for _ in range(6):
        in_place = dice.random() < 0.3
        if dice.random() < 0.8 or not np.isfinite(others).all():
            optimizer.zero_grad(set_to_none=not in_place)
            others = np.zeros(sum(SIZES))
        for _ in range(dice.choice([1, 1, 3])):
            if dice.random() < 0.3:
                others = others + regularise()
            factor = dice.choice([1.0, 1.0, 0.25, 1024.0]) if not exact.open else dice.choice([1.0, 0.25])
            losses, rows = make_losses()
            if dice.random() < 0.3:
                tasks = sorted(dice.sample(range(num_tasks), dice.randint(1, num_tasks)))
                for t in tasks:
                    with balancer.task(t, loss_scale=factor):
                        (dbk.log_transform(losses[t]) * factor).backward()
                exact.feed({t: rows[t] for t in tasks}, factor)
                balancer.balance()
            else:
                (balancer(losses) * factor).backward()
                exact.feed(rows, factor)
            exact.balance()
            expected = others + exact.balanced
            actual = torch.cat([p.grad for p in params]).numpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9 * np.nanmax(np.abs([*expected, 1.0])))
            np.testing.assert_allclose(rows_of(balancer), exact.rows, rtol=1e-7, atol=1e-9)
            if not attached:  # the step is over: what is in .grad is everybody's
                exact.end()
                others = expected
            if dice.random() < 0.2:
                state = copy.deepcopy(balancer.state_dict())
                balancer = dbk.DBMTL(params, num_tasks, **options)
                balancer.load_state_dict(state)
                if handle is not None:
                    handle.remove()
                    handle = balancer.attach(optimizer)
            if not np.isfinite(expected).all():
                break
        total = others + (exact.balanced if attached else 0.0)
        if not np.isfinite(total).all():  # as a GradScaler does: no step, and the gradients go
            optimizer.zero_grad()
            exact.end()
            others = np.zeros(sum(SIZES))
            continue
        optimizer.step()
        exact.end()
        others = total
    assert balancer.step == exact.step


CELLS = [*(("native", range(40 * block, 40 * block + 40)) for block in range(4)), ("eager", range(20))]
CELLS += [("triton", range(4)), ("cuda", range(4))]


@pytest.mark.parametrize(("backend", "seeds"), CELLS, ids=lambda x: str(getattr(x, "start", x)))
def test_sequences(seeds, backend):
    for seed in seeds:
        try:
            play(seed, backend)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
