"""What a balancer is made of, so that another can be made of it: for a pickle, a copy, or other parameters."""

from __future__ import annotations

import copy
import io
import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .engine.bookkeeping import Steps
from .engine.step import Engine
from .rows import placement
from .weightings import Weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NONFINITE = {None: 1.0, "skip": math.inf, "propagate": -1.0}  # the factor above which NaN is passed on
ZERO_GRADIENTS = {"absent": True, "count": False}
# Attributes of a balancer that a copy does not take along.
OWN = ("_engine", "_attachment", "_shared")


class Shared(NamedTuple):
    """The shared parameters; their names and module where one was given."""

    parameters: list[Tensor]
    names: list[str] | None
    module: weakref.ref[nn.Module] | None

    @classmethod
    def of(cls, given: Iterable[Tensor] | nn.Module) -> Shared:
        """What the user gave."""
        if not isinstance(given, nn.Module):
            return cls(list(given), None, None)
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

    state_dtype: torch.dtype
    backend: str
    process_group: ProcessGroup | bool | None
    capturable: bool
    nonfinite: str | None
    zero_gradients: str
    keep_rows: bool

    def engine(
        self, shared: Shared, num_tasks: int, weighting: Weighting, betas: tuple[float, float], frozen_ok: bool
    ) -> Engine:
        """One of these parameters that has done nothing yet; ``frozen_ok`` if they may be frozen."""
        rows, ranks = placement.place(
            shared.parameters, num_tasks, *self._how(), shared.names, frozen_ok, one_row=not self.keep_rows
        )
        steps = Steps(num_tasks, *betas, rows.device if self.capturable else None)
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

    def _how(self) -> tuple[torch.dtype, str, ProcessGroup | bool | None]:
        return self.state_dtype, self.backend, self.process_group


def pickled(attributes: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """What `GradientBalancer.__getstate__` gives.

    The state is in bytes: torch.multiprocessing would have a process that is spawned share the tensors.

    Raises:
        RuntimeError: several ranks share the rows.
    """
    if engine.ranks.size > 1 or not engine.rows.local:
        raise RuntimeError("a balancer of several ranks cannot be pickled: save its state_dict (docs/training.md)")
    shared: Shared = attributes["_shared"]
    has_run = engine.rows.allocated or engine.parts.balanced.one is not None
    return {
        "attributes": {name: value for name, value in attributes.items() if name not in OWN},
        "parameters": shared.parameters,
        "names": shared.names,
        "module": None if shared.module is None else shared.module(),
        "num_tasks": engine.steps.num_tasks,
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
    kept = {name: value for name, value in attributes.items() if name not in OWN}
    recipe: Recipe = kept.pop("_recipe")
    return {**copy.deepcopy(kept, memo), "_recipe": recipe}
