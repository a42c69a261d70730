"""HeadGradients: the gradients of parameters that are not shared, averaged over the ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import dtensors
from .losses import LogOfMean, shared_log
from .world import World


class HeadGradients:
    """Which parameters besides the shared ones got gradients in a backward pass, and their mean over the ranks.

    Looked for in the graphs of the losses, in DistributedDataParallel's wrapper and in the attached optimizer. What
    was in a ``.grad`` before is added to, not averaged again. DTensors are left to those who made them.

    Args:
        shared: the shared parameters.
        world: the ranks.
    """

    def __init__(self, shared: Sequence[Tensor], world: World) -> None:
        self._shared = {id(p) for p in shared}
        self._parameters = list(shared)
        self._world = world
        self._wrappers: list[weakref.ref[DistributedDataParallel]] | None = None
        self._before: dict[int, tuple[Tensor, Tensor | None]] | None = None  # by id: the head, its .grad before

    def refuse_synchronising_wrapper(self) -> None:
        """Raise RuntimeError if the forward pass of a DistributedDataParallel is or was not inside its ``no_sync()``.

        It would reduce the gradients of the first backward pass only, in the background.
        """
        for wrapper in self._live_wrappers():
            # Within its forward pass (Lightning runs the training step there) what the last one said does not count.
            within = wrapper is DistributedDataParallel._get_active_ddp_module()
            if wrapper.require_backward_grad_sync if within else wrapper.require_forward_param_sync:
                raise RuntimeError(
                    "DistributedDataParallel would reduce the first task's gradients and no other's: run its forward "
                    "pass (and the backward) inside `with model.no_sync():`, DBMTL averages the gradients itself "
                    "(dbmtl_kernels.integrations does so for Lightning, Accelerate and the Hugging Face Trainer)"
                )

    @contextmanager
    def averaging(self, candidates: Iterable[Tensor] = (), losses: Sequence[Tensor] = ()) -> Iterator[None]:
        """Whatever gradients heads get inside are averaged over the ranks at the end, then added to what was there.

        Args:
            candidates: parameters that may get gradients, besides those found.
            losses: whose graphs to search.

        Raises:
            RuntimeError: the ranks' heads differ; a head is hidden in a re-entrant checkpoint.
        """
        if self._world.size == 1:
            yield
            return
        self._before = {}
        known: list[Tensor] = [p for wrapper in self._live_wrappers() for p in wrapper.parameters()]
        known += candidates
        self.watch(known)
        self.search(losses, complete=bool(known))
        try:
            yield
            self._average()
        except BaseException:
            for head, grad in self._before.values():
                head.grad = grad
            raise
        finally:
            self._before = None

    @contextmanager
    def sharing_logs(self, task: int, expected: bool) -> Iterator[None]:
        """Inside, `functional.log_transform` is the log of the mean loss, and finds the heads in the loss's graph.

        Raises:
            RuntimeError: at the end, if one was ``expected`` and none was taken.
        """
        if self._world.size == 1:
            yield
            return
        taken = False

        def log_of_mean(loss: Tensor, eps: float) -> Tensor:
            nonlocal taken
            taken = True
            self.search([loss])
            mean = self._world.sum(loss.detach(), f"the loss of task {task}") / self._world.size
            out: Tensor = LogOfMean.apply(loss, mean, eps)  # type: ignore[no-untyped-call]
            return out

        token = shared_log.set(log_of_mean)
        try:
            yield
        finally:
            shared_log.reset(token)
        if expected and not taken:
            raise RuntimeError(
                f"no log_transform(loss) inside task({task}): the log must be of the mean loss of all ranks, so it has "
                "to be called inside the context (log_transform=False balances losses as they are)"
            )

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Set the ``.grad`` of these aside until the end of `averaging`."""
        assert self._before is not None
        for p in parameters:
            if id(p) not in self._shared and id(p) not in self._before and not dtensors.is_dtensor(p):
                self._before[id(p)] = (p, p.grad)
                p.grad = None

    def search(self, losses: Sequence[Tensor], complete: bool = False) -> None:
        """Watch every parameter in the graphs; ``complete``: the heads are known from elsewhere too."""
        found = leaves(losses)
        if found is None and not complete:
            raise RuntimeError(
                "a re-entrant checkpoint hides which parameters its part of the graph has, and their gradients could "
                "not be averaged: use checkpoint(..., use_reentrant=False), or attach the balancer to the optimizer"
            )
        self.watch(found or ())

    @torch.no_grad()
    def _average(self) -> None:
        assert self._before is not None
        heads = [(p, p.grad) for p, _ in self._before.values() if p.grad is not None]
        for p, grad in heads:
            if grad.layout != torch.strided:
                raise TypeError(
                    f"a head of shape {tuple(p.shape)} has a gradient of layout {grad.layout} (sparse=False)"
                )
        if self._before:
            device = next(iter(self._before.values()))[0].device
            shapes = repr([(str(p.dtype), tuple(p.shape)) for p, _ in heads])
            self._world.check_same(shapes, device, f"the ranks have gradients of different heads (this one {shapes})")
        by_kind: dict[Any, list[Tensor]] = {}
        for _, grad in heads:
            wide = torch.promote_types(grad.dtype, torch.float32)  # the sum of many half precision ones might overflow
            by_kind.setdefault((grad.device, wide), []).append(grad)
        for (_, wide), grads in by_kind.items():
            flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads]) / self._world.size
            total = self._world.sum(flat, "the gradients of the heads")
            for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        for p, before in self._before.values():
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)

    def _live_wrappers(self) -> list[DistributedDataParallel]:
        """The DistributedDataParallel modules that hold shared parameters. Looked for once, it takes 0.1 s."""
        if self._wrappers is None:
            modules = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
            self._wrappers = [
                weakref.ref(module) for module in modules if any(id(p) in self._shared for p in module.parameters())
            ]
        return [module for ref in self._wrappers if (module := ref()) is not None]


def leaves(losses: Sequence[Tensor]) -> list[Tensor] | None:
    """The leaf tensors in the graphs of the losses, in an order that depends on the graphs alone.

    None if some are hidden from view, inside a re-entrant checkpoint.
    """
    found: dict[int, Tensor] = {}
    hidden = False
    seen: set[Any] = set()
    pending = [loss.grad_fn for loss in reversed(losses)]
    for loss in losses:
        if loss.grad_fn is None and loss.requires_grad:
            found[id(loss)] = loss
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        hidden = hidden or "CheckpointFunction" in node.name()
        pending.extend(previous for previous, _ in reversed(node.next_functions))
    return None if hidden else list(found.values())
