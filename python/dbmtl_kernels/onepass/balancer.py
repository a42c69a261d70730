"""OnePassDBMTL: DB-MTL in one ordinary backward pass, with norms that are measured now and then."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..dbmtl import DBMTL
from ..engine.losses import Given, TaskLosses
from ..ops import arguments
from ..recipe import NONFINITE, Shared
from ..rows import placement
from .frontier import Frontier, Weighing, find_frontier, root_of
from .levels import Audit, Levels
from .step import HIDDEN, Measurement, balanced_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AUDITS = (None, "full")
FULL_EVERY = 100  # steps, of audit="full"
VERSION = "one pass, 1"
OWN = ("_shared", "_ranks", "_known", "_weighing", "_exact", "_weighed", "_handle", "_open")  # what a copy makes anew


class OnePassDBMTL:
    """DB-MTL at the price of the plain sum: one ordinary backward of ``sum_t log(loss_t + eps)``.

    With theta the P shared parameters, each task's gradient is weighted where it enters the part of the graph that
    several tasks share::

        grad = sum_t w_t * g_t                       g_t = grad_theta log(loss_t + eps)
        w_t  = alpha / (n_t + eps)                   alpha = max_t n_t

    This is Algorithm 1 with beta = 0, but that n_t is the norm of g_t when it was last measured: by a backward pass of
    its own, in steps 1, 2, 4, ..., 64 of all tasks, after that of one task every ``measure_every`` steps, in turn.
    Heads get the plain gradient of the sum of the log-losses. K numbers of state, no K x P buffer.

    It is the trainer's own backward: hooks, ``inputs=``, ``autograd.grad``, accumulation and plain
    DistributedDataParallel (without ``no_sync()``) see one pass, as of any loss.

    Args:
        shared_parameters: leaf tensors, or a module for all its parameters that require grad. Everything that two
            losses or more depend on.
        num_tasks: K >= 1.
        measure_every: >= 1; in every how many steps one task is measured.
        eps: > 0, in the logarithm and added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min" of the norms, or a number.
        log_transform: balance the logs of the losses given; False takes the losses as they are.
        process_group: the ranks that hold replicas of these parameters, each with a part of the batch; None or False as
            for `GradientBalancer`.
        nonfinite: see `GradientBalancer`; "skip" and "propagate" say which factor of the loss a gradient that is not
            finite is passed on under. It is judged where it enters the shared part: what is left out are its entries
            there, while the head keeps what it got.
        audit: "full" measures all tasks every 100 steps, and compares the trunk's gradient with the exact one.
        strict: raise where losses cannot be told apart in their graph. By default the exact form, `DBMTL` with
            ``beta=0.0``, takes such steps, and a warning says why.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradientBalancer`.

    Source: arXiv 2308.12029, Algorithm 1; the weighting in the graph is ours.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module,
        num_tasks: int,
        *,
        measure_every: int = 10,
        eps: float = 1e-8,
        scale: str | float = "max",
        log_transform: bool = True,
        process_group: ProcessGroup | bool | None = None,
        nonfinite: str | None = None,
        audit: str | None = None,
        strict: bool = False,
    ) -> None:
        self.num_tasks = arguments.check_num_tasks(num_tasks)
        self.measure_every = arguments.check_count("measure_every", measure_every)
        self.eps, self.scale = arguments.check_eps(eps), arguments.check_scale(scale)
        self.log_transform, self.strict = log_transform, strict
        self._above = NONFINITE[arguments.check_choice("nonfinite", nonfinite, NONFINITE)]
        self._group = process_group
        full = FULL_EVERY if arguments.check_choice("audit", audit, AUDITS) else 0
        self._begin(Shared.of(shared_parameters))
        self._levels = Levels(self.num_tasks, self.measure_every, full, self._device)
        self._weights = torch.zeros_like(self._levels.norms)
        self._nonfinite = torch.zeros(self.num_tasks, dtype=torch.int64, device=self._device)

    def _begin(self, shared: Shared) -> None:
        """With these parameters; also of a copy."""
        given, self._ranks = placement.check_replicas(shared.parameters, self._group)
        self._shared, self._ids, self._device = shared, {id(p) for p in given}, given[0].device
        self._known: set[Any] = set()  # structures of frontiers that were found in the whole graph
        self._weighing: Weighing | None = None  # of the last step
        self._weighed: list[int] = []  # whose weights these are
        self._exact: DBMTL | None = None
        self._handle: Any = None
        self._open = False

    # --- a step -----------------------------------------------------------------------------------------------

    def __call__(self, losses: Given, *, tasks: Sequence[int] | None = None) -> Tensor:
        """A scalar to call ``backward()`` on; see `GradientBalancer.__call__` for value, arguments and errors.

        Raises:
            ValueError: also with ``strict`` where losses cannot be told apart.
            RuntimeError: also with several ranks whose shared parameters no DistributedDataParallel averages, or one
                with ``static_graph``. From ``backward()`` where norms are due to be measured and cannot be: a
                re-entrant checkpoint hides parameters, or a CUDA graph is being captured.

        Warns:
            RuntimeWarning: once, where the exact form takes the step.
        """
        present = TaskLosses(losses, tasks, self.num_tasks, self.eps if self.log_transform else None)
        if not torch.is_grad_enabled():
            present.check_logarithms()
            return present.total()
        present.check_graphs()
        if self._group is None:
            placement.refuse_unnamed_group()
        frontier = self._find(present)
        if frontier.strangers:
            return self._exactly(present, frontier)
        present.share(self._ranks, self._device)
        present.check_logarithms()
        self._nonfinite += self._seen()
        self._weighing = Weighing(self._weights, self._above)
        self._weighing.watch(frontier)
        return balanced_loss(self, present, self._weighing, frontier.at_root)

    def backward(self, losses: Given, *, tasks: Sequence[int] | None = None) -> None:
        """``balancer(losses).backward()``, named."""
        self(losses, tasks=tasks).backward()

    def task(self, index: int, **_: Any) -> None:
        """Not of this form: the weights of all tasks meet in one backward.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "OnePassDBMTL has no task(): it weighs all tasks in one backward. Give it all losses at once (each may be "
            "of a forward pass of its own), or use DBMTL"
        )

    def set_weights(self, now: Measurement, finite: Tensor | None) -> None:
        """A backward pass begins: measure what is due, and set the weights, unless they are held.

        Args:
            now: knows the tasks that take part, and measures.
            finite: (K,) bool, whose loss is, where only the device knows.
        """
        if self._open:
            return
        self._open = self._handle is not None
        levels, scale, eps = self._levels, self.scale, self.eps
        due = levels.begin(now.tasks)
        if due and self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "norms are due to be measured, and a CUDA graph is being captured: capture between measurements (they "
                f"come in steps 1, 2, 4, ..., 64, and every {self.measure_every} steps)"
            )
        assumed = levels.weights(now.tasks, scale, eps, finite) if levels.is_full() else self._weights
        norms: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        for task in due:
            grads = now.gradients(task, self._shared.parameters, self._ranks)
            norms[task] = now.norm(grads, levels.norms)
            if levels.is_full():
                gradients[task] = torch.cat([g.reshape(-1).to(self._device) for g in grads])
        levels.observe(norms)
        if due or finite is not None or now.tasks != self._weighed:
            self._weights.copy_(levels.weights(now.tasks, scale, eps, finite))
            self._weighed = now.tasks
        if gradients:
            levels.compare(gradients, assumed, self._weights)

    def _find(self, losses: TaskLosses) -> Frontier:
        """The frontier; looked for in the whole graph if norms will be measured, or its structure is new."""
        roots = {task: root_of(loss) for task, loss in zip(losses.tasks, losses.losses, strict=True)}
        whole = not self._known or (not self._open and self._levels.measures_next())
        found = find_frontier(roots, self._ids, whole)
        if not whole and found.structure() not in self._known:
            found = find_frontier(roots, self._ids, whole=True)
        if found.hidden:
            raise RuntimeError(HIDDEN)
        if not found.strangers:
            if not self._known and self._ranks.size > 1:
                self._check_wrapper()
            self._known.add(found.structure())
        return found

    def _check_wrapper(self) -> None:
        """Raise RuntimeError unless a DistributedDataParallel averages the gradients, in every backward as it comes."""
        wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        wrappers = [x for x in wrappers if any(id(p) in self._ids for p in x.parameters())]
        if not wrappers:
            raise RuntimeError(
                "no DistributedDataParallel holds the shared parameters, and OnePassDBMTL leaves it to that to average "
                "gradients over the ranks: wrap the model"
            )
        if any(x.static_graph for x in wrappers):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) expects one pass a step, and measuring takes more"
            )

    def _exactly(self, losses: TaskLosses, frontier: Frontier) -> Tensor:
        reason = (
            f"{len(frontier.strangers)} parameter(s) are reached by several losses and are not among the shared ones, "
            f"the first of shape {tuple(frontier.strangers[0].shape)}: either they belong there, or the graph does not "
            "tell the tasks apart (one compiled model, or one tensor of predictions for all)"
        )
        if self.strict:
            raise ValueError(reason)
        if self._exact is None:
            warnings.warn(
                f"{reason}. The exact form takes such steps, with a backward pass a task", RuntimeWarning, stacklevel=3
            )
            self._exact = DBMTL(
                self._shared.parameters, self.num_tasks, beta=0.0, eps=self.eps, scale=self.scale,
                log_transform=self.log_transform, process_group=self._group,
            )  # fmt: skip
        return self._exact(losses.losses, tasks=losses.tasks)

    # --- accumulation -----------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer.step()`` end a step, for gradient accumulation: until then weights are held.

        Raises:
            RuntimeError: attached already.
            ValueError: it holds none of the shared parameters.
        """
        if self._handle is not None:
            raise RuntimeError("already attached to an optimizer; call balancer.detach() first")
        plain = getattr(optimizer, "optimizer", optimizer)  # of Lightning or Accelerate
        if not any(id(p) in self._ids for group in plain.param_groups for p in group["params"]):
            raise ValueError(f"{type(plain).__name__} holds none of the shared parameters")
        self._handle = plain.register_step_post_hook(partial(_end_step, weakref.ref(self)))
        weakref.finalize(self, self._handle.remove)

    def detach(self) -> None:
        """Undo `attach`; the step is over. Does nothing if not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle, self._open = None, False

    def rebind(self, shared_parameters: Iterable[Tensor] | nn.Module) -> None:
        """Go on with other shared parameters; norms are those of the last measurements until they are measured again.

        Raises:
            ValueError, TypeError: as for the class.
        """
        handle = self._handle
        self._begin(Shared.of(shared_parameters))
        self._handle = handle

    # --- what it tells ----------------------------------------------------------------------------------------

    @property
    def shared_parameters(self) -> list[Tensor]:
        """In the order given."""
        return list(self._shared.parameters)

    @property
    def step(self) -> int:
        """Number of steps begun; a replayed CUDA graph does not count."""
        return self._levels.step

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the task gradients, each as last measured, a copy; NaN before."""
        return self._levels.norms.clone()

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients in the last backward, a copy."""
        return self._weights.clone()

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many backwards each task's loss, or its gradient at the frontier, was not finite."""
        return self._nonfinite + self._seen()

    @property
    def audit(self) -> Audit:
        """How far the weights were off when tasks were measured; a sync."""
        return self._levels.audit()

    def _seen(self) -> Tensor:
        return torch.zeros_like(self._nonfinite) if self._weighing is None else self._weighing.flags.to(torch.int64)

    # --- checkpoints and copies -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit: K numbers of each kind, and the schedule."""
        return {
            "version": VERSION, "weights": self._weights, "nonfinite_steps": self.nonfinite_steps, "open": self._open,
            "levels": self._levels.state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it is of another class or version, of another number of tasks, or incomplete. Nothing is changed
                then.
        """
        if state.get("version") != VERSION:
            raise ValueError(f"state_dict has version {state.get('version')!r}, this is version {VERSION!r}")
        _check_like(state, self.state_dict(), "")
        self._levels.load(state["levels"])
        self._weights.copy_(state["weights"])
        self._nonfinite.copy_(state["nonfinite_steps"])
        self._weighed = []
        self._weighing, self._open = None, bool(state["open"]) and self._handle is not None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: with its norms, and not attached."""
        if self._ranks.size > 1:
            raise RuntimeError("a balancer of several ranks cannot be pickled: save its state_dict")
        module = None if self._shared.module is None else self._shared.module()
        kept = {name: value for name, value in self.__dict__.items() if name not in OWN}
        return {**kept, "_nonfinite": self.nonfinite_steps, "given": (*self._shared[:2], module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters, names, module = state.pop("given")
        self.__dict__.update(state)
        self._begin(Shared(parameters, names, None if module is None else weakref.ref(module)))


def _end_step(mine: weakref.ref[OnePassDBMTL], *_: Any) -> None:
    balancer = mine()
    if balancer is not None:
        balancer._open = False


def _check_like(state: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError unless ``state`` has the entries of ``own``, tensors and lists of the same size."""
    for key, mine in own.items():
        name = f"{prefix}{key}"
        if key not in state:
            raise ValueError(f"state_dict lacks {name}")
        theirs = state[key]
        if isinstance(mine, Mapping):
            if not isinstance(theirs, Mapping):
                raise ValueError(f"state_dict has {name} of type {type(theirs).__name__}")
            _check_like(theirs, mine, f"{name}.")
        elif isinstance(mine, Tensor):
            if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
                raise ValueError(f"state_dict has {name} that is not a tensor of shape {tuple(mine.shape)}")
        elif key == "counts" and (not isinstance(theirs, list) or len(theirs) != len(mine)):
            raise ValueError(f"state_dict has {name} that is not a list of {len(mine)}")
