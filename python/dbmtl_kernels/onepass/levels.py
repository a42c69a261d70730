"""Levels: how long each task's gradient was when it was last measured, when to measure next, how far off that was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops.entries import Entry
from .weighing import may_look

DENSE_STEPS = 64  # of its steps up to here, a task is measured at each power of two: norms move fast at first
KEPT = 32  # errors kept of each task
FAR_OFF = 1.0  # of the 90th percentile of |log(measured / assumed)|: weights off by a factor of e


class Audit(NamedTuple):
    """How far the weights of a `OnePassDBMTL` were off, whenever a task was measured.

    Attributes:
        median: (K,) of ``|log(measured norm / assumed norm)|`` over the last 32 measurements; NaN before the second.
        p90: (K,) the 90th percentile of the same.
        measured: backward passes made to measure, of all tasks.
        saved: backward passes that `DBMTL` would have made besides.
        cosine: of the trunk's gradient with the exact one, when all tasks were measured last with ``audit="full"``;
            else NaN.
    """

    median: Tensor
    p90: Tensor
    measured: int
    saved: int
    cosine: float


class SavedLevels(NamedTuple):
    """What a checkpoint keeps of `Levels`."""

    step: int
    passes: int
    possible: int
    turn: int
    counts: list[int]
    seen: list[int]
    norms: Tensor
    errors: Tensor


class Levels:
    """Norms of task gradients, measured now and then.

    Args:
        num_tasks: K.
        measure_every: in every how many steps one task is measured, in turn.
        full_every: in every how many steps all are; 0 for never.
        together: in place of turns all are measured, in every K * ``measure_every`` steps.
        device: where the norms are kept, in float64 (float32 where there is none).

    Attributes:
        norms: (K,) as last measured, without the factor of the loss; NaN before.
        cosine: see `Audit`.
        together: see above.
    """

    def __init__(
        self, num_tasks: int, measure_every: int, full_every: int, together: bool, device: torch.device
    ) -> None:
        self.measure_every, self._full, self.together = measure_every, full_every, together
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self.norms = torch.full((num_tasks,), torch.nan, dtype=self._wide, device=device)
        self._errors = torch.full((num_tasks, KEPT), torch.nan, dtype=self._wide, device=device)
        # The task whose turn was last; in how many steps each was present, and how often measured.
        self._turn, self._seen, self._counts = num_tasks - 1, [0] * num_tasks, [0] * num_tasks
        self.step = self.passes = self._possible = 0
        self.cosine: Tensor | None = None
        self._told = False

    def begin(self, present: Sequence[int]) -> None:
        """A step begins, in which these tasks take part."""
        if self._has_turn(self.step + 1) and not self._measures_all(self.step + 1):
            self._turn = self._next(present)
        self.step += 1
        self._possible += len(present)
        for task in present:
            self._seen[task] += 1

    def due(self, present: Sequence[int]) -> list[int]:
        """Which of the tasks that take part to measure in the next step."""
        step = self.step + 1
        if self._measures_all(step):
            return list(present)
        turn = self._next(present) if self._has_turn(step) else None
        return [task for task in present if task == turn or _is_dense(self._seen[task] + 1)]

    def unknown(self, present: Sequence[int]) -> list[int]:
        """Those of the tasks that have no level yet, as far as the host can tell."""
        tells = may_look(self.norms.device)
        return [t for t in present if self._counts[t] == 0 or (tells and not bool(self.norms[t].isfinite()))]

    def compares_next(self) -> bool:
        """Whether in the next step all are measured, and compared with the exact gradient."""
        return self._full > 0 and (self.step + 1) % self._full == 0

    def _measures_all(self, step: int) -> bool:
        if self.together and step % (self.measure_every * len(self._counts)) == 0:
            return True
        return self._full > 0 and step % self._full == 0

    def _has_turn(self, step: int) -> bool:
        return not self.together and step % self.measure_every == 0

    def _next(self, present: Sequence[int]) -> int:
        count = len(self._counts)
        return min(present, key=lambda task: (task - self._turn - 1) % count)

    def observe(self, norms: Mapping[int, Tensor]) -> None:
        """What was measured. Norms of 0, or not finite, tell nothing: the old level stays."""
        for task, norm in norms.items():
            old = self.norms[task]
            norm = norm.to(old)
            usable = norm.isfinite() & (norm > 0)
            error = torch.where(usable & old.isfinite(), (norm / old).log().abs(), torch.nan)
            self._errors[task, self._counts[task] % KEPT] = error
            self.norms[task] = torch.where(usable, norm, old)
            self._counts[task] += 1
            self.passes += 1
        if norms and not self._told and min(self._counts) >= KEPT // 2 and self.step % 16 == 0:
            self._warn()

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """Let the tasks be these of the former ones, None being a new one."""
        for name in ("norms", "_errors"):
            old: Tensor = getattr(self, name)
            new = old.new_full((len(tasks), *old.shape[1:]), torch.nan)
            for index, task in enumerate(tasks):
                if task is not None:
                    new[index] = old[task]
            setattr(self, name, new)
        self._counts = [0 if task is None else self._counts[task] for task in tasks]
        self._seen = [0 if task is None else self._seen[task] for task in tasks]
        self._turn = len(tasks) - 1

    def compare(self, gradients: Mapping[int, Tensor], assumed: Tensor, exact: Tensor) -> None:
        """`cosine` of the sums of these gradients with two kinds of (K,) weights."""
        first = next(iter(gradients.values()))
        one, other = torch.zeros_like(first), torch.zeros_like(first)
        for task, grad in gradients.items():
            one.add_(grad * assumed[task].to(grad.dtype))
            other.add_(grad * exact[task].to(grad.dtype))
        self.cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)

    def weights(self, present: Sequence[int], scale: str | float, eps: float, finite: Tensor | None = None) -> Tensor:
        """(K,) scale(n) / (n_t + eps); 1 where nothing is known yet, 0 of tasks that are absent."""
        here = torch.ones_like(self.norms, dtype=torch.bool)
        if len(present) < len(here):  # to index takes an upload
            here = torch.zeros_like(here)
            here[list(present)] = True
        here = here if finite is None else here & finite
        known = self.norms < torch.inf  # NaN is not
        return torch.where(here & ~known, 1.0, reference.weights(self.norms, eps, scale, here & known))

    def audit(self) -> Audit:
        """See `Audit`; a sync."""
        median, p90 = (self._errors.nanquantile(q, dim=1) for q in (0.5, 0.9))
        cosine = float("nan") if self.cosine is None else float(self.cosine)
        return Audit(median, p90, self.passes, self._possible - self.step - self.passes, cosine)

    def _warn(self) -> None:
        far = [task for task, error in enumerate(self.audit().p90.tolist()) if error > FAR_OFF]
        if far:
            self._told = True
            warnings.warn(
                f"the gradients of task(s) {far} changed in length by more than a factor of e between measurements: "
                "their weights are far off at times (balancer.audit). DBMTL(..., beta=0.0) measures all in every step",
                RuntimeWarning,
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "turn": self._turn,
            "counts": list(self._counts),
            "seen": list(self._seen),
            "passes": self.passes,
            "possible": self._possible,
            "norms": self.norms,
            "errors": self._errors,
        }

    def read(self, entry: Entry) -> SavedLevels:
        """What `state` gave, checked.

        Raises:
            ValueError: it does not fit.
        """
        tasks, turn = len(self._counts), entry["turn"].count()
        norms = entry["norms"].tensor(self.norms, dtype=False)
        errors = entry["errors"].tensor(self._errors, dtype=False)
        if turn >= tasks:
            raise entry["turn"].error(f"task {turn}, there are {tasks}")
        counts, seen = ([each.count() for each in entry[name].entries(tasks)] for name in ("counts", "seen"))
        entry["norms"].require(norms.isnan() | (norms.isfinite() & (norms > 0)), "must be finite and > 0, or NaN")
        entry["errors"].require(~(errors < 0).any(dim=1), "must be >= 0, or NaN")
        step, passes, possible = (entry[name].count() for name in ("step", "passes", "possible"))
        return SavedLevels(step, passes, possible, turn, counts, seen, norms, errors)

    def load(self, saved: SavedLevels) -> None:
        """Take over what `read` gave."""
        self.step, self.passes, self._possible, self._turn = saved.step, saved.passes, saved.possible, saved.turn
        self._counts, self._seen = saved.counts, saved.seen
        self.norms.copy_(saved.norms)
        self._errors.copy_(saved.errors)


def _is_dense(step: int) -> bool:
    return step <= DENSE_STEPS and step & (step - 1) == 0
