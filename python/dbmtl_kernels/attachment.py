"""Attachment: a balancer and the optimizers whose step ends a step of it. Neither keeps the other alive."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .engine.step import Engine

# The engines attached to each optimizer. A reload of this module goes on with those that are.
_ATTACHED: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Engine]] = globals().get(
    "_ATTACHED", weakref.WeakKeyDictionary()
)


class Attachment:
    """What `GradientBalancer.attach` returns: ``remove()`` detaches, and so does leaving it as a context manager.

    Args:
        engine: of the balancer.
        optimizers: any, also those that Lightning or Accelerate has wrapped.
        closures_update: each call of a closure within ``step(closure)`` is an update.

    Raises:
        RuntimeError: attached already.
        ValueError: one of the optimizers holds none of the shared parameters.

    Warns:
        UserWarning: shared parameters that none of them holds; another balancer of the same parameters is attached.
    """

    def __init__(self, engine: Engine, optimizers: Sequence[Optimizer], closures_update: bool) -> None:
        if engine.attached:
            raise RuntimeError("already attached to an optimizer; call balancer.detach() first")
        if not optimizers:
            raise ValueError("attach() takes one optimizer or several, got none")
        plain = [_unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in plain:
            if not _held(engine, [optimizer]):
                raise ValueError(f"{type(optimizer).__name__} holds none of the shared parameters")
        check_held(engine, plain)
        self._engine = weakref.ref(engine)
        handles: list[Any] = []
        for optimizer in plain:
            before = partial(_before_step, self._engine, closures_update)
            handles.append(optimizer.register_step_pre_hook(before))
            handles.append(optimizer.register_step_post_hook(partial(_after_step, self._engine)))
            _ATTACHED.setdefault(optimizer, weakref.WeakSet()).add(engine)
        self._removed = weakref.finalize(engine, _remove, handles)
        engine.optimizers = [weakref.ref(optimizer) for optimizer in plain]

    def remove(self, discard: bool = False) -> None:
        """Detach; once is enough, more does no harm.

        Args:
            discard: throw away what tasks wait for a balance.

        Raises:
            RuntimeError: tasks wait for a balance, or the context of one is open.
        """
        engine = self._engine()
        if engine is None or not self._removed.alive:
            return
        if not discard:
            engine.turns.refuse_inside("detach()")
            engine.steps.refuse_unbalanced("detach()")
        engine.discard_waiting()
        self._removed()
        for optimizer in engine.attached:
            _ATTACHED[optimizer].discard(engine)
        engine.optimizers = []
        engine.end_step()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.remove(discard=kind is not None)  # an error of ours would hide the one that is raised


def watch_optimizers(engine: Engine) -> None:
    """Let every optimizer that holds shared parameters, attached or not, be refused while it would not see their
    gradient: in a backward pass, or when tasks wait for a balance.
    """
    handle = register_optimizer_step_pre_hook(partial(_check_step, weakref.ref(engine)))
    weakref.finalize(engine, handle.remove)


def _check_step(ref: weakref.ref[Engine], optimizer: Optimizer, *_: Any) -> None:
    engine = ref()
    if engine is None or not (engine.busy or engine.steps.pending):
        return
    if not _held(engine, [optimizer]):
        return
    name = type(optimizer).__name__
    engine.turns.refuse_inside(f"{name}.step()")
    if engine.busy:
        raise RuntimeError(
            f"{name}.step() within the backward pass of a single task (in a hook of the parameters?): the other tasks' "
            "gradients are not known yet. Remove that hook, and step after the backward"
        )
    engine.steps.refuse_unbalanced(f"{name}.step()")


def _before_step(ref: weakref.ref[Engine], closures_update: bool, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """An attached optimizer is about to step: a closure that is called more than once is no further update."""
    engine = ref()
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if engine is None or not callable(closure) or closures_update:
        return None
    engine.end_if_dropped()
    counted = _Closure(ref, closure)
    return (args, {**kwargs, "closure": counted}) if "closure" in kwargs else ((args[0], counted, *args[2:]), kwargs)


def _after_step(ref: weakref.ref[Engine], optimizer: Optimizer, *_: Any) -> None:
    engine = ref()
    if engine is not None:
        engine.steps.refuse_unbalanced(f"the end of {type(optimizer).__name__}.step()")
        engine.end_step()


class _Closure:
    """A closure, as called within one step of an optimizer. After the call that fed the step, others are evaluations at
    other points, and not further updates.
    """

    def __init__(self, engine: weakref.ref[Engine], closure: Callable[[], Any]) -> None:
        self._engine, self._closure = engine, closure
        self._fed = False

    def __call__(self) -> Any:
        engine = self._engine()
        if engine is None:
            return self._closure()
        before, count = engine.frozen, engine.steps.changes
        try:
            try:
                engine.frozen = before or self._fed
                return self._closure()
            finally:
                engine.frozen = before
        finally:  # once more, should an interrupt have come just there
            engine.frozen = before
            self._fed = self._fed or (engine.steps.changes > count and not engine.steps.empty)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Of Lightning's and Accelerate's wrappers, that which they wrap."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _held(engine: Engine, optimizers: Sequence[Optimizer]) -> set[int]:
    """Indices of the shared parameters that the optimizers hold."""
    ids = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {index for index, p in enumerate(engine.rows.parameters) if id(p) in ids}


def check_held(engine: Engine, optimizers: Sequence[Optimizer]) -> None:
    """The warnings of `Attachment`."""
    held = _held(engine, optimizers)
    rest = [
        engine.rows.describe(index)
        for index, p in enumerate(engine.rows.parameters)
        if index not in held and p.requires_grad
    ]
    if rest:
        warnings.warn(
            f"no attached optimizer holds {', '.join(rest[:5])}{', ...' if len(rest) > 5 else ''}: attach all that "
            "step shared parameters, attach(first, second); if the model has others now, balancer.rebind(parameters)",
            UserWarning,
            stacklevel=4,
        )
    mine = {id(p) for p in engine.rows.parameters}
    for optimizer in optimizers:
        for other in _ATTACHED.get(optimizer, ()):
            if other is not engine and mine & {id(p) for p in other.rows.parameters}:
                warnings.warn(
                    f"another balancer of the same parameters is attached to this {type(optimizer).__name__}: both "
                    "would write their .grad. Call detach() on the old one",
                    UserWarning,
                    stacklevel=4,
                )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
