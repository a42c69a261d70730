"""A training loop and its simulation in float64: what `tests/engine/moves.py` moves."""

import random
from typing import NamedTuple

import dbmtl_kernels as dbk
import numpy as np
import oracle
import torch
from problems import EPS, leaf, state_of

ABOVE = {None: 1.0, "skip": np.inf, "propagate": -1.0}  # NaN is passed on under larger factors
MOST_TASKS = 5


class Pass(NamedTuple):
    """A loss, and what its backward pass does: the gradient of its log, over the shared parameters and the heads."""

    task: int
    loss: torch.Tensor
    kind: str  # "finite", "zero" gradient, "nan" loss, "overflow" of the gradient
    row: np.ndarray
    reached: list[bool]
    heads: np.ndarray


class Simulation(oracle.Training):
    """Besides the state: ``others`` and ``ours``, for each parameter what is in .grad (None: nothing)."""

    def __init__(self, sizes, num_tasks, beta, sigma, scale, above, absent):
        super().__init__(num_tasks, sum(sizes), beta, sigma, scale=scale, propagate_above=above)
        self.absent = absent  # a gradient of zeros does not count
        self.sizes = list(sizes)
        self.weights, self.nonfinite_steps = np.zeros(num_tasks), np.zeros(num_tasks, dtype=int)
        self.norms = np.zeros(num_tasks)  # at the last balance
        self.lengths = {}  # of each task's first gradient since then that was no update
        self.others, self.ours = [None] * len(sizes), [None] * len(sizes)
        self.touched, self.frozen = [False] * len(sizes), [False] * len(sizes)
        self.heads = np.zeros(2 * MOST_TASKS + 3)
        self.out, self.counted, self.pending = set(), set(), set()
        self.spilled = set()  # not finite at a balance cut off: rows are zeros by then, and the next balance tells
        self.written = False  # .grad holds the balanced gradient of the open step
        self.blind = False  # zeroed in place since: what is added now would not be noticed (docs/gradients.md)
        self.complete = False  # balance() has been done by the last task()
        self.copied = False  # a copy without its averages, that has not trained; None: perhaps
        self.balanced_once = False  # something was balanced in the open step

    def parts(self, flat):
        return np.split(flat, np.cumsum(self.sizes)[:-1])

    def add(self, index, values):
        before = self.others[index]
        self.others[index] = values.copy() if before is None else before + values

    # --- an attempt -------------------------------------------------------------------------------------------

    def take(self):
        """What `SharedGradients.stash_grads` does."""
        for index, ours in enumerate(self.ours):
            if ours is not None and self.frozen[index]:
                self.add(index, ours)  # what is there is the caller's
            elif ours is not None and np.isnan(ours).any() and self.others[index] is not None:
                self.others[index] = np.full(self.sizes[index], np.nan)  # NaN minus NaN
        self.ours = [None] * len(self.sizes)
        self.written = self.blind = False

    def begin(self, factor):
        if not self.open:
            self.feed({}, factor)
            self.out, self.counted, self.balanced_once = set(), set(), False
        self.complete = False
        self.lengths = {}

    def passes(self, passes, factor, times=1):
        """Rows, bookkeeping and heads; a task that sits out leaves nothing in heads."""
        self.take()
        self.begin(factor)
        for one in passes:
            if one.kind == "nan":
                if not self.absent:
                    self.feed({one.task: 0 * one.row}, factor)  # until the balance
                self.seen.add(one.task)
                if one.task not in self.nonfinite:  # else that was found at a balance, and stays to be passed on
                    self.out.add(one.task)
                continue
            self.touched = [a or b for a, b in zip(self.touched, one.reached, strict=True)]
            if one.row.any() or not self.absent:
                self.feed({one.task: one.row * times}, factor)
            if one.kind != "overflow" or self.unit > self.propagate_above:
                self.heads += one.heads * factor * times

    def write(self, attached):
        bad = self.nonfinite | self.out
        self.nonfinite_steps[sorted(bad - self.counted)] += 1
        self.counted |= bad
        self.rows[sorted(self.out)] = 0.0
        self.norms = np.linalg.norm(self.rows, axis=1)
        self.norms[sorted(self.spilled)] = np.inf
        self.spilled = set()
        seen, self.seen = self.seen, self.seen - self.out
        parts = self.parts(self.balance())
        used = sorted(self.seen - self.nonfinite)
        self.seen = seen
        self.weights = np.zeros(len(self.rows))
        if used:
            norms = np.linalg.norm(self.rows[used], axis=1)
            only = len(self.rows) == 1
            self.weights[used] = 1.0 if only else oracle.alpha(norms, self.scale) / (norms + self.eps)
        wanted = [seen and not cold for seen, cold in zip(self.touched, self.frozen, strict=True)]
        self.ours = [part if want else None for part, want in zip(parts, wanted, strict=True)]
        self.written, self.pending, self.balanced_once = True, set(), True
        if not attached:
            self.end()

    def evaluate(self, passes, factor, by_task=False):
        """No update: each task has the share that it had in the last balance, rows stay as they are."""
        total = np.zeros(sum(self.sizes))
        if not by_task and all(one.kind == "nan" for one in passes):
            return
        for one in passes:
            if one.kind == "nan":
                continue
            self.touched = [a or b for a, b in zip(self.touched, one.reached, strict=True)]
            if one.kind == "overflow":
                if factor > self.propagate_above:
                    self.heads += one.heads * factor
                    total[:] = np.nan
                continue
            self.heads += one.heads * factor
            length = np.linalg.norm(one.row)
            last = self.norms[one.task]
            first = self.lengths.get(one.task, length if self.beta or not 0 < last < np.inf else last)
            if length > 0 and self.weights[one.task] != 0:
                total += self.weights[one.task] * last / first * factor * one.row
            if first > 0:
                self.lengths[one.task] = first
        for index, part in enumerate(self.parts(total)):
            if self.touched[index] and not self.frozen[index]:
                self.add(index, part)
        now = [
            (a, b) for a, b, cold in zip(self.others, self.ours, self.frozen, strict=True) if not (cold or b is None)
        ]
        cold = any(b is not None and b.any() for b, cold in zip(self.ours, self.frozen, strict=True) if cold)
        if self.written and now and not cold and not any(a.any() or b.any() for a, b in now):
            self.end()  # zeros, and changed in place: the same as zeroed
            self.blind = True

    def fail(self, fed):
        """An attempt that failed after it fed these."""
        written = self.written
        self.take()
        for task in fed:
            self.rows[task] = 0.0
        self.seen -= set(fed)
        self.pending -= set(fed)
        self.spilled -= set(fed)
        self.nonfinite -= set(fed) - self.counted  # what no balance has found yet is gone
        if written:
            self.write(attached=True)

    # --- between steps ----------------------------------------------------------------------------------------

    def end(self):
        super().end()
        for index, ours in enumerate(self.ours):
            if ours is not None:
                self.add(index, ours)
        self.ours = [None] * len(self.sizes)
        self.pending = set()
        self.written = self.blind = False

    def drop(self, none):
        """zero_grad: a step whose gradient is thrown away is over. Whether one was."""
        over = any(ours is not None for ours in self.ours)
        grads = self.grads()
        if over:
            self.end()
        self.others = [None if none or grad is None else np.zeros_like(grad) for grad in grads]
        self.heads[:] = 0.0
        self.blind = (over or self.blind) and not none
        return over

    def grads(self):
        return [a if b is None else b if a is None else a + b for a, b in zip(self.others, self.ours, strict=True)]

    def resume(self, present):
        """Another balancer goes on, where these parameters have a .grad."""
        self.complete, self.lengths = False, {}
        self.others = [x if has else None for x, has in zip(self.others, present, strict=True)]
        left = any(ours is not None for ours in self.ours)
        self.ours = [x if has else None for x, has in zip(self.ours, present, strict=True)]
        if any(ours is not None for ours in self.ours):
            for index, ours in enumerate(self.ours):
                if ours is not None and self.others[index] is None:
                    self.others[index] = np.zeros_like(ours)
        elif self.written:
            self.written = False
            if left and not self.pending:  # it is gone
                self.end()

    def reindex(self, tasks):
        super().reindex(tasks)
        self.lengths = {}
        for name in ("weights", "norms", "nonfinite_steps"):
            before = getattr(self, name)
            setattr(self, name, np.array([0 if t is None else before[t] for t in tasks], dtype=before.dtype))

    def rebind(self, places, sizes):
        """The parameters are those of these places now; None is a new one."""
        rows = [self.parts(row) for row in self.rows]
        self.rows = np.stack([
            np.concatenate([np.zeros(n) if at is None else row[at] for at, n in zip(places, sizes, strict=True)])
            for row in rows
        ])  # fmt: skip
        self.sizes = list(sizes)
        self.others = [None if at is None else self.others[at] for at in places]
        self.ours = [None] * len(places)
        self.touched = [at is not None and self.touched[at] for at in places]
        self.frozen = [at is not None and self.frozen[at] for at in places]


class Several(torch.optim.Optimizer):
    """Calls a closure several times within a step, each at another point, as LBFGS does."""

    calls = 1

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure=None):
        loss = None
        for _ in range(self.calls if closure else 1):
            with torch.enable_grad():
                loss = closure() if closure else None
            for p in self.param_groups[0]["params"]:
                if p.grad is not None and p.grad.isfinite().all():
                    p.data -= 1e-3 * p.grad
        return loss


class Loop:
    """Shared parameters of which some take part in no loss, or only in some; a head for each task, and one for all.

    With ``one_row`` the balancer has one row for all tasks, and refuses a second backward in a step.
    """

    def __init__(self, dice: random.Random, backend, one_row=False):
        self.one_row = one_row
        torch.manual_seed(dice.randrange(100))
        self.params = [torch.nn.Parameter(leaf(6).detach()), leaf(3), leaf(40)]
        self.uses = ["all", "none", "wide"]
        self.heads = [leaf(2) for _ in range(MOST_TASKS)] + [leaf(3)]
        beta, sigma, scale = dice.choice([0.5, 0.0, 0.9]), dice.choice([0.0, 0.5]), dice.choice(["max", "max", "mean"])
        beta = 0.0 if one_row else beta
        nonfinite, zeros = dice.choice([None, None, "skip", "propagate"]), dice.choice(["absent", "absent", "count"])
        tasks = dice.randint(1, 4)
        self.options = {
            "beta": beta, "beta_sigma": sigma, "state_dtype": torch.float64, "backend": backend,
            "nonfinite": nonfinite, "zero_gradients": zeros, "scale": scale, "keep_rows": not one_row,
        }  # fmt: skip
        self.balancer = dbk.DBMTL(self.params, tasks, **self.options)
        sizes = [p.numel() for p in self.params]
        self.model = Simulation(sizes, tasks, beta, sigma, scale, ABOVE[nonfinite], zeros == "absent")
        self.handle = None
        self.make_optimizers(dice)
        if dice.random() < 0.7:
            self.attach()
        self.said = []  # warnings

    @property
    def attached(self):
        return self.handle is not None

    @property
    def tasks(self):
        return len(self.model.rows)

    def make_optimizers(self, dice):
        if dice.random() < 0.5:
            self.optimizers = [Several([*self.params, *self.heads])]
        else:
            self.optimizers = [Several([*self.params[:1], *self.heads]), torch.optim.SGD(self.params[1:], lr=1e-3)]

    def attach(self):
        self.handle = self.balancer.attach(*self.optimizers)

    def zero_grad(self, none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=none)
        return self.model.drop(none)

    def passes(self, dice, tasks=None, kinds=("finite",), narrow=None):
        """Losses of these tasks, each of one of the kinds, and what their backward passes do."""
        narrow = dice.random() < 0.2 if narrow is None else narrow
        used = [use == "all" or (use == "wide" and not narrow) for use in self.uses]
        reached = [use and p.requires_grad for use, p in zip(used, self.params, strict=True)]
        out = []
        for task in range(self.tasks) if tasks is None else tasks:
            kind = dice.choice(kinds)
            if kind == "overflow" and not any(reached):
                kind = "finite"
            at = round(dice.uniform(-1, 1), 3) * (1 + task)
            shared = [p for p, use in zip(self.params, used, strict=True) if use]
            mine = [self.heads[task], self.heads[-1]]
            if kind == "zero":
                loss = sum((p * 0).sum() for p in shared) + 0.3
            else:
                loss = sum((p - at).square().sum() for p in shared) + 0.3
            loss = loss + sum((h - at).square().sum() for h in mine)
            slope = 2.0 / (float(loss.detach()) + EPS)
            parts = [
                slope * (p.detach().numpy() - at) if has and kind != "zero" else np.zeros(p.numel())
                for p, has in zip(self.params, reached, strict=True)
            ]
            heads = np.zeros(2 * MOST_TASKS + 3)
            heads[2 * task : 2 * task + 2] = slope * (mine[0].detach().numpy() - at)
            heads[-3:] = slope * (mine[1].detach().numpy() - at)
            if kind == "nan":
                loss = loss * float("nan")
            if kind == "overflow":
                where = dice.choice([i for i, has in enumerate(reached) if has])
                p = self.params[where]
                loss = loss + (p - p.detach()).sum().sqrt()  # the gradient of the heads stays finite
                parts[where] = np.full(len(parts[where]), np.inf)
            out.append(Pass(task, loss, kind, np.concatenate(parts), reached, heads))
        return out

    def warned(self, words):
        """Whether one said so since the last look."""
        found = [str(one.message) for one in self.said if words in str(one.message)]
        self.said.clear()
        return found

    def check(self, model=None):
        """Everything that can be read is what the simulation has."""
        model = model or self.model
        for index, (p, expected) in enumerate(zip(self.params, model.grads(), strict=True)):
            if expected is None or p.grad is None:
                assert expected is None, f"parameter {index} has no .grad"
                assert p.grad is None, f"parameter {index} has a .grad"
                continue
            close(p.grad.numpy(), expected, 1e-7, f".grad of parameter {index}")
        heads = [torch.zeros_like(h) if h.grad is None else h.grad for h in self.heads]
        close(torch.cat(heads).detach().numpy(), model.heads, 1e-7, "heads")
        buffer = state_of(self.balancer)
        if self.one_row:
            assert not buffer.allocated
        elif buffer.allocated:
            segments = [buffer.rows[:, o : o + n] for o, n in buffer.layout.segments.tolist()]
            close(torch.cat(segments, dim=1).numpy(), model.rows, 1e-9, "rows")
        else:
            assert not model.rows.any()
        finite = np.isfinite(model.rows).all(axis=1)
        assert all(finite[task] or task in model.pending for task in range(len(finite)))  # until it is balanced
        assert self.balancer.step == model.step, "step"
        assert self.balancer.num_tasks == len(model.rows)
        shown = np.where(self.balancer.norms.numpy() > 0, model.weights, 0.0)  # of nothing there is no weight
        close(self.balancer.weights.numpy(), shown, 1e-9, "weights")
        ours, norms = (np.where(np.isfinite(x), x, np.inf) for x in (self.balancer.norms.numpy(), model.norms))
        used = (model.weights > 0) | (not self.one_row)  # without rows there is nothing to measure anew
        close(ours[used], norms[used], 1e-9, "norms")  # -inf or NaN in a row are inf
        assert self.balancer.nonfinite_steps.tolist() == model.nonfinite_steps.tolist(), "nonfinite_steps"
        assert not self.balancer._engine.busy
        assert self.balancer._engine.turns._turn == {}, "locked"
        steps = self.balancer._engine.steps
        assert steps.pending == model.pending, "pending"
        assert steps.complete == model.complete, "complete"
        assert not (model.open and steps.open) or steps.fresh != model.balanced_once, "balanced"


def close(actual, expected, rtol, what):
    finite = expected[np.isfinite(expected)]
    bound = 1e-2 * rtol * np.abs([*finite.ravel(), 1.0]).max()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=bound, err_msg=what)
