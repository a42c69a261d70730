"""Weigher: the weights of a step. What is measured for them, when they are set, and when they are held."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.losses import loss_scale_or_none
from ..engine.step import Engine
from ..rows import placement
from ..weightings import MaxNorm
from .levels import Levels
from .step import Measurement
from .weighing import Weighing, may_look


class Weigher:
    """Sets ``stats.weights`` of an engine at the beginning of each backward, from norms measured now and then.

    Args:
        engine: its steps are counted; parameters, ranks, stats.
        levels: the norms.
        rule: scale and eps; see `reference.weights`.
    """

    def __init__(self, engine: Engine, levels: Levels, rule: MaxNorm) -> None:
        self._engine, self.levels, self._rule = engine, levels, rule
        self.forget()

    def forget(self) -> None:
        """The weights may be others by now than those set last."""
        self._set: Any = None  # whose weights these are, how they were formed, and `Steps.changes` then
        self._unfactored: Tensor | None = None  # what `Steps.factors` are multiplied with
        self._exact_from: int | None = None  # `Steps.changes` before a step of the exact form, until its norms are read
        self._left = False  # the last backward of the open step left a shared .grad
        self._sharded = placement.is_distributed(self._engine.rows.parameters)

    # --- before a backward ------------------------------------------------------------------------------------

    @property
    def rows(self) -> Any:
        """Of the engine."""
        return self._engine.rows

    def measures(self, tasks: Sequence[int]) -> bool:
        """Whether a backward of these tasks would begin a step that measures."""
        engine = self._engine
        return not (engine.steps.open or engine.frozen) and bool(self.levels.due(tasks))

    def end_if_dropped(self) -> None:
        """End a step whose gradients were thrown away, as after one that a GradScaler skipped."""
        engine = self._engine
        left = self._left and engine.steps.open and not engine.frozen
        if left and all(p.grad is None for p in engine.rows.parameters):
            engine.end_step()

    def expect_exact(self) -> None:
        """The exact form takes the next backward. Within a step its norms would not be of that alone."""
        steps = self._engine.steps
        self._exact_from = None if steps.open else steps.changes
        self._unfactored = None

    def read_exact(self) -> None:
        """The norms that the last step of the exact form found."""
        steps, stats, levels = self._engine.steps, self._engine.rows.stats, self.levels
        if self._exact_from is None or steps.changes == self._exact_from:
            return
        self._exact_from = None
        seen = [task for task, seen in enumerate(steps.seen) if seen]
        levels.begin(seen)
        levels.observe({task: stats.norms[task].clone() for task in seen})
        levels.passes -= 1  # one was the step's own

    # --- as it begins -----------------------------------------------------------------------------------------

    def begin_pass(
        self, now: Measurement, weighing: Weighing, factor: Tensor, finite: Mapping[int, bool | Tensor]
    ) -> None:
        """Measure what is due, set the weights, unless they are held, and apply them.

        Args:
            now: knows the tasks that take part, and measures.
            weighing: applies them.
            factor: of the balanced loss.
            finite: whose loss is, as tensors where only the device knows.

        Raises:
            RuntimeError: the balancer has other parameters or tasks than when this loss was made; norms are due while a
                CUDA graph is captured; two balanced losses in one backward.
        """
        engine, steps, stats = self._engine, self._engine.steps, self._engine.rows.stats
        if weighing.stats is not stats:
            raise RuntimeError("rebind(), add_task() or remove_task() between a balanced loss and its backward()")
        weighing.claim()
        mask: Tensor | None = None
        if not all(flag is True for flag in finite.values()):
            there = torch.ones_like(stats.nonfinite[0])
            flags = [finite.get(task, True) for task in range(len(stats.nonfinite))]
            mask = torch.stack([f.to(there.device) if isinstance(f, Tensor) else there & f for f in flags])
        if not engine.frozen:
            self._begin_step(now, loss_scale_or_none(factor), mask)
            if engine.attached:
                torch.autograd.Variable._execution_engine.queue_callback(partial(_look, weakref.ref(self)))
            else:
                engine.end_step()
        elif not steps.started:
            raise RuntimeError("a backward that is no update needs the weights of a step before it: there was none yet")
        weighing.arm(factor, mask)

    def _begin_step(self, now: Measurement, loss_scale: Tensor | None, finite: Tensor | None) -> None:
        """Of a step that is open already only what is missing: the norms and weights of tasks that come late."""
        engine, levels = self._engine, self.levels
        steps, stats, held = engine.steps, engine.rows.stats, engine.steps.open
        due = self._due(now.tasks, finite)
        compares = bool(due) and not held and levels.compares_next()
        assumed = levels.weights(now.tasks, self._rule.scale, self._rule.eps, finite) if compares else stats.weights
        shared = [p for p in engine.rows.parameters if p.requires_grad] if due else []
        norms, gradients = now.measure(due if shared else [], shared, engine.ranks, levels.norms, compares)
        if not held:
            steps.begin(loss_scale)
            levels.begin(now.tasks)
            stats.nonfinite.zero_()
            self._left = False
        steps.losses.update(now.values)
        levels.observe(norms)
        if finite is not None:
            bad = ~finite & ~stats.nonfinite
            stats.nonfinite_steps.add_(bad)
            stats.nonfinite.logical_or_(bad)
        factors = steps.factors()
        self._set_weights(tuple(now.tasks), bool(due), finite, held, factors)
        self._exact_from = None
        if compares:
            levels.compare(
                gradients, assumed if factors is None else assumed * assumed.new_tensor(factors), stats.weights
            )

    def _due(self, tasks: Sequence[int], finite: Tensor | None) -> list[int]:
        """Which of the tasks to measure now."""
        engine, levels = self._engine, self.levels
        if self._sharded:  # by the exact form
            return []
        due = levels.unknown(tasks) if engine.steps.open else levels.due(tasks)
        if finite is not None and may_look(finite.device):
            due = [task for task in due if finite[task]]
        if due and engine.rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "norms are due to be measured, and a CUDA graph is being captured: capture between measurements (they "
                "come in a task's steps 1, 2, 4, ..., 64, and of one task in every `measure_every` steps)"
            )
        return due

    def _set_weights(
        self,
        tasks: tuple[int, ...],
        measured: bool,
        finite: Tensor | None,
        held: bool,
        factors: list[float] | None,
    ) -> None:
        """Of the tasks present; if ``held``, of those that had none in this step."""
        levels, steps, stats, eps = self.levels, self._engine.steps, self._engine.rows.stats, self._rule.eps
        how = tasks, self._rule.scale, eps, factors
        same = not measured and finite is None and (how, steps.changes) == self._set
        steps.changes += 1
        self._set = None if finite is not None else (how, steps.changes)
        if same:
            return
        weights = levels.weights(tasks, self._rule.scale, eps, finite)
        if held:  # all have the length alpha
            before = stats.weights if self._unfactored is None else self._unfactored
            if self._unfactored is None and factors is not None:  # the exact form or a state set them: factors are in
                applied = weights.new_tensor(factors)
                before = torch.where(applied > 0, before / applied, torch.where(levels.norms > 0, weights, 0.0))
            alpha = (before * (stats.norms + eps)).nan_to_num(0.0).amax()
            late = torch.where(levels.norms.isfinite(), alpha / (levels.norms + eps), 1.0)
            late = torch.where((weights > 0) & (alpha > 0), late, weights)
            weights = torch.where(before > 0, before, late)
        self._unfactored = None if factors is None else weights
        stats.weights.copy_(weights if factors is None else weights * weights.new_tensor(factors))
        stats.norms.copy_(levels.norms)


def _look(mine: weakref.ref[Weigher]) -> None:
    """A backward is over: whether it left gradients, as `torch.autograd.grad` does not."""
    weigher = mine()
    if weigher is not None:
        weigher._left = any(p.grad is not None for p in weigher._engine.rows.parameters)
