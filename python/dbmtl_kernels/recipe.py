"""What a balancer is made of, and what of it may be set; another can be made of it: a pickle, a copy, or rebound."""

from __future__ import annotations

import copy
import io
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine.bookkeeping import Settings, Steps
from .engine.step import Engine
from .ops import arguments
from .ops.tasks import TaskNames, TaskWeights, check_task_weights
from .rows import placement
from .rows.split import SplitTaskGradientBuffer
from .weightings import Weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

NONFINITE = {None: 1.0, "skip": math.inf, "propagate": -1.0}  # the factor above which NaN is passed on
ZERO_GRADIENTS = {"absent": True, "count": False}
# Attributes of a balancer that a copy does not take along.
OWN = ("_engine", "_attachment", "_shared", "_was_enabled")


# Shared parameters as people hold them.
Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | Tensor | nn.Module


class Shared(NamedTuple):
    """The shared parameters; their names and module where one was given."""

    parameters: list[Tensor]
    names: list[str] | None
    module: weakref.ref[nn.Module] | None

    @classmethod
    def of(cls, given: Parameters | Shared) -> Shared:
        """What the user gave."""
        if (type(given).__module__, type(given).__qualname__) == (cls.__module__, cls.__qualname__):  # reloaded or not
            return given  # type: ignore[return-value]
        if isinstance(given, Tensor):
            return cls([given], None, None)
        if not isinstance(given, nn.Module):
            listed: list[Any] = list(given.items() if isinstance(given, Mapping) else given)
            if not listed or not all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in listed):
                return cls(listed, None, None)
            return cls([p for _, p in listed], [name for name, _ in listed], None)
        named = [(name, p) for name, p in given.named_parameters() if p.requires_grad]
        return cls([p for _, p in named], [name for name, _ in named], weakref.ref(given))

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Shared:
        """Of a pickle."""
        module = state["module"]
        return cls(state["parameters"], state["names"], None if module is None else weakref.ref(module))

    def copied(self, memo: dict[int, Any]) -> Shared:
        """Those of a deep copy."""
        module = None if self.module is None else self.module()
        twin = None if module is None else weakref.ref(copy.deepcopy(module, memo))
        return Shared([copy.deepcopy(p, memo) for p in self.parameters], self.names, twin)


class Recipe(NamedTuple):
    """Options of a balancer, as it was given them."""

    state_dtype: torch.dtype | None
    backend: str
    process_group: ProcessGroup | DistributedDataParallel | bool | None
    capturable: bool
    nonfinite: str | None
    zero_gradients: str
    keep_rows: bool

    def engine(
        self, shared: Shared, tasks: TaskNames, weighting: Weighting, settings: Settings, frozen_ok: bool
    ) -> Engine:
        """One of these parameters that has done nothing yet; ``frozen_ok`` if they may be frozen."""
        rows, ranks = placement.place(
            shared.parameters, tasks.num_tasks, *self._how(), shared.names, frozen_ok, one_row=not self.keep_rows
        )
        steps = Steps(tasks, settings, rows.device if self.capturable else None)
        engine = Engine(
            rows, ranks, steps, weighting,
            group_unnamed=self.process_group is None and not placement.is_distributed(rows.parameters),
            skip_zeros=ZERO_GRADIENTS[self.zero_gradients], propagate_above=NONFINITE[self.nonfinite],
        )  # fmt: skip
        engine.module = shared.module
        return engine

    def rebind(self, engine: Engine, shared: Shared, num_tasks: int) -> None:
        """Let the engine go on with these; parameters that stay keep their part of the rows."""
        engine.refuse_within("a change of parameters")
        rows, ranks = placement.place(
            shared.parameters, num_tasks, *self._how(), shared.names, one_row=not self.keep_rows
        )
        old = engine.rows
        rows.take_over(old)
        touched = {id(p) for p, seen in zip(old.parameters, engine.grads.touched, strict=True) if seen}
        engine.ranks, engine.module = ranks, shared.module
        engine.use(rows)
        engine.grads.touched[:] = [id(p) in touched for p in rows.parameters]

    def _how(self) -> tuple[torch.dtype | None, str, ProcessGroup | DistributedDataParallel | bool | None]:
        return self.state_dtype, self.backend, self.process_group


class Adjustable:
    """What may be set of a balancer, each checked; in force from the next step on, and in a checkpoint.

    A captured CUDA graph keeps the numbers that it was captured with.
    """

    _engine: Engine
    _recipe: Recipe
    _settings: Settings
    _was_enabled: bool | None = None  # before `paused`; a copy made inside goes on with it

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise AttributeError for what is fixed when a balancer is made, and for a name that is nearly a setting's."""
        if not (name.startswith("_") or hasattr(self, name)):
            ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
            if name in Recipe._fields:
                raise AttributeError(f"{name} is fixed when a balancer is made: make another, and load the state_dict")
            if name == "scale":
                raise AttributeError("scale is set of the weighting: balancer.weighting.scale, where it has one")
            settings = [f.name for f in fields(Settings)]
            near = get_close_matches(name, [*settings, *Recipe._fields, "scale"], n=1, cutoff=0.75)
            if ours and near:  # a class of the user's has names of its own
                raise AttributeError(f"there is no {name!r} to set: is it {near[0]!r}?")
        super().__setattr__(name, value)

    @property
    def beta(self) -> float:
        """Forgetting rate in [0, 1). To set it raises ValueError as the class does; above 0 it takes ``keep_rows``."""
        return self._settings.beta

    @beta.setter
    def beta(self, beta: float) -> None:
        beta = arguments.check_beta(beta)
        if beta > 0.0 and not self._recipe.keep_rows:
            raise ValueError(f"beta={beta} needs a row for each task: make the balancer with keep_rows=True")
        self._settings.beta = beta

    @property
    def beta_sigma(self) -> float:
        """Decay exponent >= 0. To set it raises ValueError as the class does."""
        return self._settings.beta_sigma

    @beta_sigma.setter
    def beta_sigma(self, beta_sigma: float) -> None:
        self._settings.beta_sigma = arguments.check_beta_sigma(beta_sigma)

    @property
    def eps(self) -> float:
        """> 0, in the logarithm. To set it raises ValueError as the class does."""
        return self._settings.eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._settings.eps = arguments.check_eps(eps)

    @property
    def task_weights(self) -> TaskWeights | None:
        """K factors >= 0 of the weights, or a function from the step to them; None for all 1.

        A list is in a checkpoint, a function is not. To set it raises ValueError or TypeError as the class does.
        """
        return self._settings.task_weights

    @task_weights.setter
    def task_weights(self, weights: TaskWeights | None) -> None:
        capturable, num_tasks = self._recipe.capturable, self._engine.steps.num_tasks
        given = weights is None or (callable(weights) and not capturable)
        self._settings.task_weights = weights if given else check_task_weights(weights, num_tasks, capturable)

    @property
    def log_transform(self) -> bool:
        """Whether the logs of the losses are balanced. To set it to what is no bool raises TypeError."""
        return self._settings.log_transform

    @log_transform.setter
    def log_transform(self, log_transform: bool) -> None:
        if not isinstance(log_transform, bool):
            raise TypeError(f"log_transform must be True or False, got {log_transform!r}")
        self._settings.log_transform = log_transform

    @property
    def enabled(self) -> bool:
        """Whether losses are balanced. With False ``balancer(losses)`` is their plain sum; see `paused`."""
        return self._settings.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._engine.turns.refuse_inside("enabled")
        self._settings.enabled = bool(enabled)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is balanced: for an evaluation, a warm-up, or an ablation with the same line of code.

        ``balancer(losses)`` is the plain sum of the losses (of the log-losses), an ordinary tensor; `task` and
        `balance` do nothing. No average, norm or count changes. Of several ranks nobody but DistributedDataParallel
        averages gradients then: leave its ``no_sync()``.
        """
        before, outer = self.enabled, self._was_enabled
        self.enabled, self._was_enabled = False, before if outer is None else outer
        try:
            yield
        finally:
            self._settings.enabled, self._was_enabled = before, outer

    def _described(self) -> dict[str, Any]:
        """What `__repr__` shows."""
        engine, settings = self._engine, self._settings
        rows, tasks, num_ranks = engine.rows, engine.steps.tasks, engine.ranks.size
        P = sum(p.numel() for p in rows.parameters)
        shown: dict[str, Any] = {
            "num_tasks": tasks.names or tasks.num_tasks,
            "parameters": len(rows.parameters),
            "P": P,
        }
        if settings.beta > 0.0:
            shown |= {"beta": settings.beta, "beta_sigma": settings.beta_sigma}
        if settings.task_weights is not None:
            shown["task_weights"] = settings.task_weights
        layout = (rows.parts[0] if isinstance(rows, SplitTaskGradientBuffer) else rows).layout
        form, dtype, count = "one row for all tasks", layout.wide, 1
        if self._recipe.keep_rows:
            form, dtype, count = "a row for each task", layout.state_dtype, tasks.num_tasks
        shown |= {
            "form": f"{form} ({str(dtype)[6:]})", "state": f"{count * P * dtype.itemsize / num_ranks / 1e6:.1f} MB",
            "device": str(rows.device),
        }  # fmt: skip
        if num_ranks > 1:
            shown["ranks"] = num_ranks
        shown |= {"step": engine.steps.started, "attached": bool(engine.attached)}
        return shown if settings.enabled else {**shown, "enabled": False}

    def __repr__(self) -> str:
        """K, P, the form, memory, ranks, and what it has done."""
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in self._described().items())})"


def _kept(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in attributes.items() if name not in OWN}
    if (enabled := attributes.get("_was_enabled")) is not None:
        kept["_settings"] = replace(kept["_settings"], enabled=enabled)
    return kept


def pickled(attributes: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """What `GradientBalancer.__getstate__` gives.

    The state is in bytes: torch.multiprocessing would have a process that is spawned share the tensors.

    Raises:
        RuntimeError: several ranks share the rows.
    """
    from . import checkpoint

    if engine.ranks.size > 1 or not engine.rows.local:
        raise RuntimeError("a balancer of several ranks cannot be pickled: save its state_dict (docs/training.md)")
    shared: Shared = attributes["_shared"]
    has_run = engine.rows.allocated or engine.parts.balanced.one is not None
    return {
        "attributes": _kept(attributes),
        "parameters": shared.parameters,
        "names": shared.names,
        "module": None if shared.module is None else shared.module(),
        "tasks": engine.steps.tasks,
        "copied": engine.copied,
        "kept": _bytes_of((engine.weighting, checkpoint.state_of(engine) if has_run else None)),
    }


def kept_in(state: dict[str, Any]) -> tuple[Weighting, dict[str, Any] | None]:
    """The weighting in a pickle, and the state_dict of one that has run."""
    weighting, kept = torch.load(io.BytesIO(state["kept"]), weights_only=False)
    return weighting, kept


def _bytes_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def copied_attributes(attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Those that a deep copy takes along; ranks stay the same."""
    kept = _kept(attributes)
    recipe: Recipe = kept.pop("_recipe")
    return {**copy.deepcopy(kept, memo), "_recipe": recipe}
