"""DB-MTL in NumPy float64, written from Algorithm 1 of arXiv 2308.12029; imports nothing of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

Array = np.ndarray


def alpha(norms: Array, scale: str | float = "max") -> float:
    """The paper's alpha strategies."""
    if not isinstance(scale, str):
        return float(scale)
    return float({"max": np.max, "mean": np.mean, "median": np.median, "min": np.min}[scale](norms))


def balance(
    grads: Array, ema: Array, beta: float = 0.9, eps: float = 1e-8, scale: str | float = "max"
) -> tuple[Array, Array, Array]:
    """One step on K x P matrices: (balanced gradient, new ema, norms), all float64.

    With one task the balanced gradient is the EMA itself (alpha and the norm cancel).
    """
    new = beta * ema.astype(np.float64) + (1.0 - beta) * grads.astype(np.float64)
    norms = np.sqrt((new * new).sum(axis=1))
    if len(norms) == 1 and isinstance(scale, str):
        return new[0].copy(), new, norms
    weights = alpha(norms, scale) / (norms + eps)
    out = np.zeros(new.shape[1])
    for weight, row in zip(weights, new, strict=True):
        out += weight * row
    return out, new, norms


class Training:
    """The state of a training run, fed with the gradients of the log-losses.

    A step begins with the first `feed` and ends with `end`. In between it may be fed several times (micro-batches, or
    tasks one by one) and balanced after each.
    """

    def __init__(
        self, num_tasks: int, size: int, beta: float = 0.9, sigma: float = 0.5, eps: float = 1e-8,
        scale: str | float = "max", propagate_above: float = 1.0,
    ) -> None:  # fmt: skip
        self.rows = np.zeros((num_tasks, size))
        self.balanced = np.zeros(size)
        self.beta, self.sigma, self.eps, self.scale = beta, sigma, eps, scale
        self.propagate_above = propagate_above
        self.step = 0
        self.open = False
        self.unit = 1.0
        self.seen: set[int] = set()
        self.nonfinite: set[int] = set()

    def feed(self, grads: Mapping[int, Array] | Sequence[Array] | Array, factor: float = 1.0) -> None:
        """Add gradients of all tasks, or of some by index.

        ``factor`` is what their loss was multiplied by (a share of the batch, a loss scale). That of the first feed is
        the unit: the state does not hold it, the balanced gradient carries it.
        """
        if not self.open:
            self.open, self.step, self.unit = True, self.step + 1, factor
            self.seen, self.nonfinite = set(), set()
        beta = self.beta / self.step**self.sigma
        for task, grad in grads.items() if isinstance(grads, Mapping) else enumerate(grads):
            decay = 1.0 if task in self.seen else beta
            self.rows[task] = decay * self.rows[task] + (1.0 - beta) * grad * (factor / self.unit)
            self.seen.add(task)
            if not np.isfinite(self.rows[task]).all():
                self.nonfinite.add(task)

    def balance(self) -> Array:
        """The balanced gradient of what was fed in this step.

        A task that was not finite is left out of the whole step and starts again from zero. If the gradients carry a
        factor above ``propagate_above`` (a loss scale), the result is NaN then, so that a GradScaler skips the step.
        """
        self.rows[list(self.nonfinite)] = 0.0
        used = sorted(self.seen - self.nonfinite)
        if self.nonfinite & self.seen and self.unit > self.propagate_above:
            self.balanced = np.full(self.rows.shape[1], np.nan)
        elif not used:
            self.balanced = np.zeros(self.rows.shape[1])
        elif len(self.rows) == 1 and isinstance(self.scale, str):
            self.balanced = self.unit * self.rows[0]
        else:
            norms = np.linalg.norm(self.rows[used], axis=1)
            self.balanced = self.unit * (alpha(norms, self.scale) / (norms + self.eps)) @ self.rows[used]
        return self.balanced

    def end(self) -> None:
        self.open = False

    def update(self, grads: Array, nonfinite: Collection[int] = (), factor: float = 1.0) -> Array:
        """A whole step: feed all tasks, those of ``nonfinite`` with NaN, balance, end."""
        grads = np.array(grads, dtype=np.float64)
        grads[list(nonfinite)] = np.nan
        self.feed(grads, factor)
        self.end()
        return self.balance()

    def reindex(self, tasks: Sequence[int | None]) -> None:
        """Keep the rows of these tasks in this order; None is a new one."""
        self.rows = np.stack([np.zeros(self.rows.shape[1]) if t is None else self.rows[t] for t in tasks])
