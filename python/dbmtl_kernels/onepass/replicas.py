"""Replicas: several ranks whose gradients DistributedDataParallel averages, and what would keep it from that."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..engine.step import Engine
from ..rows import dtensors, placement
from ..rows.placement import synchronises


class Replicas:
    """Looks whether every step has a backward whose gradients are averaged; nothing to do for one rank, or FSDP2.

    Looked at is each backward, and each step of an optimizer that is attached.

    Args:
        engine: of the balancer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._sharded = placement.is_distributed(engine.rows.parameters)
        self._idle = engine.ranks.size == 1 or self._sharded
        self._local = self._averaged = False  # what backwards the open step had
        self._looked: tuple[list[Any], set[int]] = [], set()  # wrappers, and ids of what they average
        if not self._idle:
            for register, after in (
                (register_optimizer_step_pre_hook, False),
                (register_optimizer_step_post_hook, True),
            ):
                weakref.finalize(self, register(partial(_at_step, weakref.ref(self), after)).remove)

    def check(self) -> None:
        """Before a backward.

        Raises:
            RuntimeError: no wrapper has them all; one with ``static_graph``; one inside ``no_sync()``, and no optimizer
                is attached whose step would end a step of several backwards.
        """
        engine = self._engine()
        if self._idle or engine is None:
            return
        wrappers = engine.heads.wrappers.find() or engine.heads.wrappers.find(again=True)
        held = self._held_by(wrappers)
        if not all(id(p) in held for p in engine.rows.parameters if p.requires_grad):
            raise RuntimeError(
                "no DistributedDataParallel holds all of the shared parameters, and OnePassDBMTL leaves it to that to "
                "average gradients over the ranks: wrap the model"
            )
        if any(x.static_graph for x in wrappers):
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) expects one pass a step, and measuring takes more"
            )
        averaged = all(map(synchronises, wrappers))
        if not averaged and not engine.attached:
            raise RuntimeError(
                "OnePassDBMTL leaves it to DistributedDataParallel to average gradients over the ranks, and this one "
                "is inside its no_sync(): leave that, or attach the balancer to the optimizer to accumulate"
            )
        self._averaged, self._local = self._averaged or averaged, True

    def check_heads(self, heads: Iterable[Tensor]) -> None:
        """Raise RuntimeError if nobody averages the gradients of one of these parameters, of a single task each."""
        engine = self._engine()
        if engine is None or engine.ranks.size == 1:
            return
        if self._sharded:
            held = {id(inside) for _, inside in dtensors.gathered_parameters()}
        else:
            held = self._held_by(engine.heads.wrappers.find() or engine.heads.wrappers.find(again=True))
        what = "fully_shard" if self._sharded else "DistributedDataParallel"
        for p in heads:
            if isinstance(p, nn.Parameter) and id(p) not in held and not dtensors.is_dtensor(p):
                raise RuntimeError(
                    f"a head of shape {tuple(p.shape)} is in no {what}: nothing averages its gradient over the ranks. "
                    "Wrap the whole model (DBMTL averages heads itself)"
                )

    def _held_by(self, wrappers: Iterable[DistributedDataParallel]) -> set[int]:
        """Ids of the parameters whose gradients they average; walking through a model is not for every step."""
        refs = [weakref.ref(x) for x in wrappers]
        if refs != self._looked[0]:
            self._looked = refs, _held(wrappers)
        return self._looked[1]

    def at_step(self, optimizer: Optimizer) -> None:
        """The backwards of a step are over, if this optimizer is attached.

        Raises:
            RuntimeError: none was averaged.
        """
        engine = self._engine()
        if engine is None or optimizer not in engine.attached:
            return
        local, averaged = self._local, self._averaged
        self._local = self._averaged = False
        if local and not averaged:
            raise RuntimeError(
                "optimizer.step() after backwards that were all inside no_sync(): nothing averaged the gradients over "
                "the ranks. Leave the last one of a step out of it"
            )


def _at_step(mine: weakref.ref[Replicas], after: bool, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step or, of one that is given a closure, after it: the last backward is in there."""
    replicas, closure = mine(), kwargs.get("closure", args[1] if len(args) > 1 else None)
    if replicas is not None and callable(closure) == after:
        replicas.at_step(optimizer)


def _held(wrappers: Iterable[DistributedDataParallel]) -> set[int]:
    """Ids of the parameters whose gradients they average."""
    return {id(p) for x in wrappers for name, p in x.module.named_parameters() if name not in x.parameters_to_ignore}
