"""HeadGradients: the gradients of parameters that are not shared, averaged over the ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..rows import dtensors
from ..rows.ranks import Ranks
from . import losses as loss_values
from .graphs import walk


class Head(NamedTuple):
    """A parameter that may get a gradient, what was in its ``.grad``, and how it was found."""

    parameter: Tensor
    before: Tensor | None
    found: str


class HeadGradients:
    """Which parameters besides the shared ones got gradients in a backward pass, and their mean over the ranks.

    Looked for in DistributedDataParallel's wrapper, in the attached optimizer, else in the graphs of the losses. What
    was in a ``.grad`` before is added to, not averaged again. DTensors are left to those who made them.

    Args:
        shared: the shared parameters.
        ranks: whose gradients are averaged.
        device: where the ranks compare notes.
    """

    def __init__(self, shared: Sequence[Tensor], ranks: Ranks, device: torch.device) -> None:
        self._shared = {id(p) for p in shared}
        self._ranks = ranks
        self._device = device
        self._wrappers: list[weakref.ref[DistributedDataParallel]] | None = None
        self._heads: dict[int, Head] = {}  # by id
        self._known = False  # some of them from a wrapper or an optimizer

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
    def averaging(
        self, touched: list[bool], candidates: Iterable[Tensor] = (), losses: Sequence[Tensor] = ()
    ) -> Iterator[None]:
        """Whatever gradients heads get inside are averaged over the ranks at the end, then added to what was there.

        Args:
            touched: for each shared parameter, whether it ever had a gradient; at the end, whether on any rank.
            candidates: parameters that may get gradients, besides those found.
            losses: whose graphs to search.

        Raises:
            RuntimeError: the ranks' heads differ; a head is hidden in a re-entrant checkpoint.
        """
        if self._ranks.size == 1:
            yield
            return
        self._heads = {}
        wrapped = [p for wrapper in self._live_wrappers() for p in wrapper.parameters()]
        others = list(candidates)
        self._known = bool(wrapped or others)
        self._watch(wrapped, "wrapper")
        self._watch(others, "optimizer")
        if not wrapped:
            self.search(losses)
        try:
            yield
            self._average(touched)
        except BaseException:
            for head in self._heads.values():
                head.parameter.grad = head.before
            raise
        finally:
            self._heads = {}

    @contextmanager
    def sharing_logs(self, task: int, expected: bool) -> Iterator[None]:
        """Inside, `functional.log_transform` is the log of the mean loss, and finds the heads in the loss's graph.

        Raises:
            RuntimeError: at the end, if one was ``expected`` and none was taken, or nothing told what the heads are;
                a DistributedDataParallel outside its ``no_sync()``.
        """
        if self._ranks.size == 1:
            yield
            return
        taken = False

        def log_of_mean(loss: Tensor, eps: float) -> Tensor:
            nonlocal taken
            taken = True
            self.refuse_synchronising_wrapper()
            self.search([loss])
            mean = self._ranks.sum(loss.detach(), f"the loss of task {task}") / self._ranks.size
            out: Tensor = loss_values.LogOfMean.apply(loss, mean, eps)  # type: ignore[no-untyped-call]
            return out

        loss_values.shared_log = log_of_mean
        try:
            yield
        finally:
            loss_values.shared_log = None
        self.refuse_synchronising_wrapper()
        if expected and not taken:
            raise RuntimeError(
                f"no log_transform(loss) inside task({task}): the log must be of the mean loss of all ranks, so it has "
                "to be called inside the context (log_transform=False balances losses as they are)"
            )
        if not taken and not self._known:
            raise RuntimeError(
                f"nothing tells which heads task({task}) gave gradients, and they must be averaged: attach the "
                "balancer to the optimizer, use DistributedDataParallel, or use balancer(losses)"
            )

    def search(self, losses: Sequence[Tensor]) -> None:
        """Watch the parameters in the graph of each loss."""
        for index, loss in enumerate(losses):
            found = walk([loss])
            if found.hidden and not self._known:
                raise RuntimeError(
                    "a re-entrant checkpoint hides which parameters its part of the graph has, and their gradients "
                    "could not be averaged: use checkpoint(..., use_reentrant=False), or attach the balancer to the "
                    "optimizer"
                )
            self._watch([p for p in found.leaves if not found.hidden and isinstance(p, nn.Parameter)], f"loss {index}")

    def _watch(self, parameters: Iterable[Tensor], where: str) -> None:
        """Set the ``.grad`` of these aside until the end of `averaging`."""
        heads = [p for p in parameters if id(p) not in self._shared and not dtensors.is_dtensor(p)]
        for index, p in enumerate(heads):
            if id(p) not in self._heads:
                self._heads[id(p)] = Head(p, p.grad, f"{where}, {index}")
                p.grad = None

    @torch.no_grad()
    def _average(self, touched: list[bool]) -> None:
        heads = [(head, head.parameter.grad) for head in self._heads.values() if head.parameter.grad is not None]
        mine = repr([(head.found, str(grad.dtype), tuple(grad.shape)) for head, grad in heads])
        complaint = f"the ranks have gradients of different heads (this one of {[tuple(g.shape) for _, g in heads]})"
        touched[:] = self._ranks.any_rank(mine, touched, self._device, complaint)
        by_kind: dict[Any, list[Tensor]] = {}
        for head, grad in heads:
            if grad.layout != torch.strided:
                raise TypeError(
                    f"a head of shape {tuple(head.parameter.shape)} has a gradient of layout {grad.layout}; only dense "
                    "ones can be averaged (sparse=False)"
                )
            wide = torch.promote_types(grad.dtype, torch.float32)  # the sum of many half precision ones might overflow
            by_kind.setdefault((grad.device, wide), []).append(grad)
        for (_, wide), grads in by_kind.items():
            flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads]) / self._ranks.size
            total = self._ranks.sum(flat, "the gradients of the heads")
            for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        for p, before, _ in self._heads.values():
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
