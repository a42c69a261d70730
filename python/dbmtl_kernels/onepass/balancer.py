"""OnePassDBMTL: DB-MTL in one ordinary backward pass, with norms that are measured now and then."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import checkpoint
from ..balancer import uncompiled
from ..dbmtl import DBMTL
from ..engine.backward import balanced_loss as exactly_balanced_loss
from ..engine.losses import NARROW, Given, TaskLosses
from ..engine.notices import NONE
from ..ops import arguments
from ..ops.entries import Entry
from ..ops.tasks import TaskNames, TaskWeights
from ..recipe import NONFINITE, Parameters, Shared
from ..rows import dtensors, placement
from ..weightings import MaxNorm, Weighting
from .frontier import Frontier, find_frontier
from .levels import Audit, Levels
from .replicas import Replicas
from .step import HIDDEN, balanced_loss
from .weigher import Weigher
from .weighing import Weighing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

AUDITS = (None, "full")
FULL_EVERY = 100  # steps, of audit="full"
MOST_KNOWN = 256
VERSION = "one pass, 1"
MADE_ANEW = ("_weigher", "_others", "_known", "_replicas")  # not in a pickle


class OnePassDBMTL(DBMTL):
    """DB-MTL at the price of the plain sum: one ordinary backward of ``sum_t log(loss_t + eps)``.

    With theta the P shared parameters, each task's gradient is weighted where it enters the part of the graph that
    several tasks share:

        grad = sum_t w_t * g_t                       g_t = grad_theta log(loss_t + eps)
        w_t  = alpha / (n_t + eps)                   alpha = max_t n_t

    This is Algorithm 1 with beta = 0, but that n_t is the norm of g_t when it was last measured: by a backward pass of
    its own, in steps 1, 2, 4, ..., 64 of all tasks, after that of one task every ``measure_every`` steps, in turn.
    Heads get the plain gradient of the sum of the log-losses. K numbers of state, no row.

    It is the trainer's own backward: hooks, ``inputs=``, ``autograd.grad``, accumulation, plain
    DistributedDataParallel (without ``no_sync()``) and FSDP2 see one pass, as of any loss. Parameters of
    ``fully_shard`` are measured by a step of the exact form, `DBMTL` with ``beta=0.0``, of all tasks in every
    K * ``measure_every`` steps. The exact form also takes steps whose losses cannot be told apart in their graph.

    Args:
        shared_parameters: as for `GradientBalancer`: everything that two losses or more depend on.
        num_tasks: K >= 1, or the K names of the tasks.
        measure_every: at least 1; in every how many steps one task is measured.
        eps: positive, in the logarithm and added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min" of the norms, or a number.
        task_weights: K numbers >= 0, or a function from the step to them; see `GradientBalancer`.
        log_transform: balance the logs of the losses given; False takes the losses as they are.
        process_group: the ranks that hold replicas of these parameters, each with a part of the batch; None or False as
            for `GradientBalancer`.
        nonfinite: see `GradientBalancer`; "skip" and "propagate" say which factor of the loss a gradient that is not
            finite is passed on under. It is judged where it enters the shared part: what is left out are its entries
            there, while the head keeps what it got.
        audit: "full" measures all tasks every 100 steps, and compares the trunk's gradient with the exact one.
        strict: raise where losses cannot be told apart in their graph. By default the exact form takes such steps, and
            a warning says why.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradientBalancer`.

    Source: arXiv 2308.12029, Algorithm 1; the weighting in the graph is ours.
    """

    def __init__(
        self,
        shared_parameters: Parameters,
        num_tasks: int | Collection[str],
        *,
        measure_every: int = 10,
        eps: float = 1e-8,
        scale: str | float = "max",
        task_weights: TaskWeights | None = None,
        log_transform: bool = True,
        process_group: ProcessGroup | DistributedDataParallel | bool | None = None,
        nonfinite: str | None = None,
        audit: str | None = None,
        strict: bool = False,
    ) -> None:
        self._measure_every, self.strict = arguments.check_count("measure_every", measure_every), strict
        self._full = FULL_EVERY if arguments.check_choice("audit", audit, AUDITS) else 0
        shared = Shared.of(shared_parameters)
        super().__init__(
            shared, num_tasks, beta=0.0,  # type: ignore[arg-type]
            beta_sigma=0.0, eps=eps, scale=scale, task_weights=task_weights, log_transform=log_transform,
            process_group=process_group, nonfinite=nonfinite,
        )  # fmt: skip

    def _begin(self, shared: Shared, tasks: TaskNames, weighting: Weighting, frozen_ok: bool = False) -> None:
        super()._begin(shared, tasks, weighting, frozen_ok)
        self._sharded = placement.is_distributed(self._engine.rows.parameters)
        levels = Levels(tasks.num_tasks, self._measure_every, self._full, self._sharded, self._engine.rows.device)
        self._weigher = Weigher(self._engine, levels, cast(MaxNorm, weighting))
        self._others = torch.zeros((), dtype=torch.bool, device=self._engine.rows.device)
        self._forget()

    def _forget(self) -> None:
        """What is known of the graphs, and of the weights set last."""
        self._known: set[int] = set()  # hashes of frontiers' structures that were found in the whole graph
        self._ids: set[int] = set()  # of the shared parameters, as the graph has them
        self._weigher.forget()
        self._replicas = Replicas(self._engine)

    # --- a step -----------------------------------------------------------------------------------------------

    @uncompiled
    def __call__(
        self, losses: Given, *, tasks: Sequence[int | str] | None = None, retain_graph: bool = False
    ) -> Tensor:
        """A scalar to call ``backward()`` on; see `GradientBalancer.__call__` for value, arguments and errors.

        Args:
            losses: as there.
            tasks: as there.
            retain_graph: of steps that the exact form takes, keep the graphs; others ask ``backward(retain_graph=)``.

        Raises:
            ValueError: also with ``strict`` where losses cannot be told apart.
            RuntimeError: also with several ranks whose shared parameters no DistributedDataParallel averages, or one
                with ``static_graph``; a re-entrant checkpoint, which hides parameters. From ``backward()`` where norms
                are due to be measured while a CUDA graph is being captured; two balanced losses in one backward.

        Warns:
            RuntimeWarning: once, where the exact form takes the step for want of another.
        """
        eps = self._settings.eps if self._settings.log_transform else None
        present = TaskLosses(losses, tasks, self._engine.steps.tasks, eps)
        if not torch.is_grad_enabled():
            present.check_logarithms()
            return present.total()
        engine = self._engine
        if not self.enabled:
            return engine.plain(present)
        present.check_graphs(engine.parts.notices.absent)
        if self._recipe.process_group is None and not self._sharded:
            placement.refuse_unnamed_group()
        self._weigher.read_exact()
        self._weigher.end_if_dropped()
        if self._sharded and self._weigher.measures(present.tasks):
            return self._exactly(present, retain_graph)
        self._replicas.check()
        frontier = self._find(present)
        reason = self._not_in_one_pass(present, frontier)
        if reason is not None:
            self._refuse_or_tell(reason)
            return self._exactly(present, retain_graph)
        present.share(engine.ranks, engine.rows.device)
        present.check_logarithms()
        clears = any(finite is not True for finite in present.finite()) or any(
            x.dtype in NARROW for x in present.losses
        )
        weighing = Weighing(frontier, engine.rows.stats, NONFINITE[self._recipe.nonfinite], clears, self._others)
        return balanced_loss(self._weigher, present, weighing, frontier.at_root)

    @uncompiled
    def backward(self, losses: Given, *, tasks: Sequence[int | str] | None = None, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named."""
        self(losses, tasks=tasks, retain_graph=retain_graph).backward(retain_graph=retain_graph)

    def task(self, index: int | str, *, loss_scale: float | Tensor | None = None) -> AbstractContextManager[None]:
        """Not of this form: the weights of all tasks meet in one backward.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "OnePassDBMTL has no task(): it weighs all tasks in one backward. Give it all losses at once (each may be "
            "of a forward pass of its own), or use DBMTL"
        )

    def _find(self, losses: TaskLosses) -> Frontier:
        """The frontier; looked for in the whole graph if norms will be measured, or its structure is new."""
        rows = self._engine.rows
        roots = dict(zip(losses.tasks, losses.losses, strict=True))
        whole = not self._known or self._weigher.measures(losses.tasks)
        if not whole:
            found = find_frontier(roots, self._ids, whole=False)
            whole = hash(found.structure()) not in self._known
        if whole:
            self._ids = {id(p) for p in rows.parameters}
            if self._sharded:
                self._ids |= {id(inside) for p, inside in dtensors.gathered_parameters() if id(p) in self._ids}
            found = find_frontier(roots, self._ids, whole=True, held={id(p) for p in self._engine.stepped})
            self._replicas.check_heads(found.leaves_of_heads())
            if self._weigher.measures(losses.tasks):
                self._engine.parts.notices.cached(losses.losses, passes=2)
        if found.hidden:
            raise RuntimeError(HIDDEN)
        if whole and not found.trains and any(p.requires_grad for p in rows.parameters):
            if self._engine.ranks.size > 1:
                raise RuntimeError(NONE)
            self._engine.parts.notices.once("none", NONE)
        if whole and not found.strangers:
            self._known = (self._known if len(self._known) < MOST_KNOWN else set()) | {hash(found.structure())}
        return found

    # --- steps of the exact form ------------------------------------------------------------------------------

    def _not_in_one_pass(self, losses: TaskLosses, frontier: Frontier) -> str | None:
        """Why the exact form must take this step, if it must."""
        # The factor of this step is not known yet. One that makes a slope overflow is left to a GradScaler, which
        # lowers it. If such gradients are never passed on it would not: the factor of the last step tells then.
        scale = self._engine.steps.loss_scale if self._recipe.nonfinite == "skip" else None
        if losses.half and any(losses.overflows(index, scale) for index in range(len(losses.tasks))):
            return (
                "1 / loss does not fit into float16, the dtype of a loss: compute losses in float32, as autocast does "
                "(seen on a CPU only)"
            )
        if not frontier.strangers:
            return None
        return (
            f"{len(frontier.strangers)} parameter(s) are reached by several losses and are not among the shared ones, "
            f"the first of shape {tuple(frontier.strangers[0].shape)}: either they belong there, or the graph does not "
            "tell the tasks apart (one compiled model, or one tensor of predictions for all)"
        )

    def _refuse_or_tell(self, reason: str) -> None:
        if self.strict:
            raise ValueError(reason)
        if self._engine.ranks.size > 1 and not self._sharded:
            raise RuntimeError(f"{reason}. With DistributedDataParallel use DBMTL, within no_sync()")
        self._engine.parts.notices.once(
            "exact", f"{reason}. The exact form takes such steps, with a backward pass a task"
        )

    def _exactly(self, losses: TaskLosses, retain_graph: bool) -> Tensor:
        steps = self._engine.steps
        if steps.open and not (steps.fresh or self._engine.frozen):
            raise RuntimeError(
                "losses that cannot be told apart, in a second backward of one step: use DBMTL(..., keep_rows=True)"
            )
        self._engine.prepare(losses)
        loss = exactly_balanced_loss(self._engine, losses, retain_graph)
        self._weigher.expect_exact()
        return loss

    # --- what may change between steps ------------------------------------------------------------------------

    @property
    def measure_every(self) -> int:
        """In every how many steps one task is measured. To set it raises ValueError or TypeError as the class does."""
        return self._measure_every

    @measure_every.setter
    def measure_every(self, measure_every: int) -> None:
        self._measure_every = arguments.check_count("measure_every", measure_every)
        self._weigher.levels.measure_every = self._measure_every

    @property
    def beta(self) -> float:
        """0: there is no moving average. To set it, or ``beta_sigma``, raises RuntimeError."""
        return 0.0

    @beta.setter
    def beta(self, beta: float) -> None:
        raise RuntimeError("OnePassDBMTL has no moving average, and no beta: use DBMTL")

    @property
    def beta_sigma(self) -> float:
        """0; see `beta`."""
        return 0.0

    @beta_sigma.setter
    def beta_sigma(self, beta_sigma: float) -> None:
        self.beta = beta_sigma

    def add_task(self, name: str | None = None) -> int:
        """Make room for one task more, which is measured when it first comes. Returns its index, the last."""
        index = super().add_task(name)
        self._reindex([*range(index), None])
        return index

    def remove_task(self, index: int | str) -> None:
        """Forget a task; those after it move up by one. Errors as for `GradientBalancer.remove_task`."""
        index = self._engine.steps.tasks.index(index)
        kept: list[int | None] = [task for task in range(self.num_tasks) if task != index]
        super().remove_task(index)
        self._reindex(kept)

    def _reindex(self, tasks: list[int | None]) -> None:
        self._weigher.levels.reindex_tasks(tasks)
        self._forget()

    def rebind(self, shared_parameters: Parameters) -> None:
        """Go on with other shared parameters; norms are those of the last measurements until they are measured again.

        See `GradientBalancer.rebind` for errors.
        """
        super().rebind(shared_parameters)
        self._sharded = self._weigher.levels.together = placement.is_distributed(self._engine.rows.parameters)
        self._forget()

    def _described(self) -> dict[str, Any]:
        shown = super()._described()
        return {**shown, "form": "one pass", "state": f"{self.num_tasks} norms", "measure_every": self.measure_every}

    # --- what it tells ----------------------------------------------------------------------------------------

    @property
    def audit(self) -> Audit:
        """How far the weights were off when tasks were measured; a sync."""
        self._weigher.read_exact()
        return self._weigher.levels.audit()

    # --- checkpoints and copies -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit: K numbers of each kind, and the schedule."""
        self._weigher.read_exact()
        return {"version": VERSION, "levels": self._weigher.levels.state(), "engine": checkpoint.state_of(self._engine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it is of another class or version, of other parameters or number of tasks, or incomplete.
                Nothing is changed then.
        """
        self._engine.turns.refuse_inside("load_state_dict()")
        entry, levels = Entry(state), self._weigher.levels
        with checkpoint.agreed(self._engine):
            entry["version"].version(VERSION)
            saved, engine = levels.read(entry["levels"]), entry["engine"]
        order = checkpoint.load(engine, self._engine)
        levels.load(saved)
        if order is not None:
            self._engine.reindex_tasks(list(order))
            levels.reindex_tasks(order)
        self._engine.copied = False
        self._weigher.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: with its norms, and not attached."""
        state = super().__getstate__()
        for name in MADE_ANEW:
            state["attributes"].pop(name)
        return {**state, "one pass": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.load_state_dict(state["one pass"])

    def __deepcopy__(self, memo: dict[int, Any]) -> OnePassDBMTL:
        """One of the copied parameters, with these norms, not attached."""
        twin = cast(OnePassDBMTL, super().__deepcopy__(memo))
        twin.load_state_dict(self.state_dict())
        return twin
