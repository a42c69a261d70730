"""HeadGradients: the ``.grad`` of parameters that are not shared, task by task, averaged over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..rows import dtensors, placement
from ..rows.ranks import Ranks
from . import losses as loss_values
from .graphs import Meeting, meet, meet_at_once, walk

# Stands for the tasks that a gradient may be of, where only the graph could tell and it was not searched so far.
SEVERAL = -2


class Head(NamedTuple):
    """A parameter that may get a gradient, what was in its ``.grad``, how it was found, and its new gradients."""

    parameter: Tensor
    before: Tensor | None
    found: tuple[str, int]
    parts: list[tuple[int, Tensor]]  # task and gradient, in the order of the passes


class HeadGradients:
    """What the backward pass of each task adds to parameters besides the shared ones.

    Every head is set aside before the passes, so that what a task added is known by itself: a task that sits out
    leaves nothing, and a step that fails leaves ``.grad`` as it was. Heads are looked for in the graphs of the losses,
    in attached optimizers, and in DistributedDataParallel's wrapper. Of several ranks the new gradients are averaged;
    what was in a ``.grad`` before is added to, not averaged again. DTensors are averaged by those who made them.

    Args:
        shared: the shared parameters.
        ranks: whose gradients are averaged.
        device: where the ranks compare notes.
    """

    def __init__(self, shared: Sequence[Tensor], ranks: Ranks, device: torch.device) -> None:
        self._shared = {id(p) for p in shared}
        self._ranks = ranks
        self._device = device
        self.wrappers = placement.Wrappers(self._shared, ranks)
        # Not shared, but reached by several tasks, when last looked for.
        self._common: list[weakref.ref[Tensor]] | None = None
        self._heads: dict[int, Head] = {}  # by id
        # Those that one task alone was seen to reach, by task, and the rest: a pass looks at few of them.
        self._own: dict[int, list[Head]] = {}
        self._rest: list[Head] = []
        self._known = False  # some of them from a wrapper or an optimizer
        self.devices: set[torch.device] | None = None  # of those that the last step found

    # --- finding them -----------------------------------------------------------------------------------------

    def refuse_synchronising_wrapper(self) -> None:
        """Raise RuntimeError if the forward pass of a DistributedDataParallel is or was not inside its ``no_sync()``.

        It would reduce the gradients of the first backward pass only, in the background. One that the user named is
        told not to (`begin`), unless it is of ``static_graph``, which reduces in any case.
        """
        named = self.wrappers.named
        if named is None and any(map(placement.synchronises, self.wrappers.find())):
            raise RuntimeError(
                "DistributedDataParallel would reduce the first task's gradients and no other's: name it, "
                "process_group=model, or run its forward pass (and the backward) inside `with model.no_sync():`, DBMTL "
                "averages the gradients itself (dbmtl_kernels.integrations does so for Lightning, Accelerate and the "
                "Hugging Face Trainer)"
            )
        if named is not None and named.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) expects one backward pass a step, and there is one for "
                "each task"
            )

    def refuse_without_average(self, shared: Sequence[Tensor]) -> None:
        """Raise RuntimeError unless gradients are averaged, by DistributedDataParallel or of DTensors by FSDP2."""
        if self._ranks.size == 1 or dtensors.is_dtensor(shared[0]):
            return
        wrappers = self.wrappers.find()
        if not wrappers or not all(map(placement.synchronises, wrappers)):
            raise RuntimeError(
                "the balancer is not enabled, and then DistributedDataParallel has to average the gradients of the "
                "ranks: run its forward pass (and the backward) outside of no_sync()"
            )

    def begin(
        self, stepped: Sequence[Tensor], losses: Sequence[Tensor], whole: bool, tasks: Sequence[int] = ()
    ) -> Meeting | None:
        """Set the ``.grad`` of all heads aside.

        Args:
            stepped: parameters that attached optimizers hold.
            losses: whose graphs to search.
            whole: search the graphs to their ends.
            tasks: that the losses are of.

        Returns:
            what the search found, if it went to the ends.

        Raises:
            RuntimeError: with several ranks, a head is hidden in a re-entrant checkpoint.
        """
        self._heads, self._own, self._rest = {}, {}, []
        if (named := self.wrappers.named) is not None:
            # As if its last forward pass had been inside no_sync().
            named.reducer._reset_state()
        wrapped = []
        if self._ranks.size > 1:
            wrapped = [p for wrapper in self.wrappers.find() for p in wrapper.parameters()]
            self._watch(wrapped, "wrapper")
        if stepped:
            self._watch(stepped, "optimizer")
        self._known = bool(wrapped or stepped)
        found = None
        if losses and not (wrapped and self._holds_all(losses, whole)):
            found = self.search(losses, whole)
        common = [p for ref in self._common or () if (p := ref()) is not None]
        self._watch(common, "graph")
        self.devices = {head.parameter.device for head in self._heads.values()}
        own = {} if found is None else dict(zip(map(id, found.leaves), found.tasks, strict=True))
        own.update({id(p): None for p in common})
        self._rest = []
        for key, head in self._heads.items():
            index = own.get(key)
            (self._rest if index is None else self._own.setdefault(tasks[index], [])).append(head)
        return found if whole else None

    def _holds_all(self, losses: Sequence[Tensor], whole: bool) -> bool:
        """Whether every head found is known already, and not one of a wrapper of a part of the model."""
        leaves = meet(losses, self._shared, whole).leaves
        return all(id(p) in self._heads for p in leaves if isinstance(p, nn.Parameter))

    def search(self, losses: Sequence[Tensor], whole: bool = True) -> Meeting | None:
        """Watch the leaves in the graph of each loss, as far as the losses do not share it, or to the end.

        Returns:
            what was found, of one rank.
        """
        if self._ranks.size > 1:  # in an order that is the same on each of them
            for index, loss in enumerate(losses):
                reached = walk([loss])
                if reached.hidden and not self._known:
                    raise RuntimeError(
                        "a re-entrant checkpoint hides which parameters its part of the graph has, and their gradients "
                        "could not be averaged: use checkpoint(..., use_reentrant=False), or attach the balancer to "
                        "the optimizer"
                    )
                leaves = [] if reached.hidden else reached.leaves
                self._watch([p for p in leaves if isinstance(p, nn.Parameter)], f"loss {index}")
            return None
        found = meet(losses, self._shared, whole)
        further = not (whole or found.leaves) and (self._common is None or meet_at_once(losses))
        if further:
            found = meet(losses, self._shared, whole=True)
        self._watch(found.leaves, "graph")
        if whole or further:
            self._common = [weakref.ref(p) for p in found.common]
        return found

    def search_all(self, losses: Sequence[Tensor]) -> None:
        """Watch every leaf that gets a gradient, where gradients will be smaller by a factor that is to be undone.

        Raises:
            RuntimeError: a leaf is hidden in a re-entrant checkpoint; of several ranks, one that is no head.
        """
        reached = walk(losses)
        missing = [p for p in reached.leaves if id(p) not in self._shared and id(p) not in self._heads]
        if reached.hidden or (missing and self._ranks.size > 1):
            what = "a re-entrant checkpoint hides its leaves" if reached.hidden else "a leaf is no head of the model"
            raise RuntimeError(
                f"1 / loss does not fit into float16, the dtype of a loss, and {what}, whose gradients would be too "
                "small: compute losses in float32, as autocast does"
            )
        self._watch(missing, "graph")
        self._own, self._rest = {}, list(self._heads.values())

    @contextmanager
    def sharing_logs(self, task: int, expected: bool) -> Iterator[list[int]]:
        """Inside, `functional.log_transform` finds the heads in the loss's graph, and is the log of the mean loss.

        A loss on a CPU that is not finite is cut off from its graph. A wrapper that the user named is in ``no_sync()``.

        Yields:
            a list, to which the task is added then.

        Raises:
            RuntimeError: of several ranks, at the end: if one was ``expected`` and none was taken, or nothing told what
                the heads are; a DistributedDataParallel outside its ``no_sync()``.
        """
        several, taken = self._ranks.size > 1, False
        spoilt: list[int] = []

        def log_of(loss: Tensor, eps: float) -> Tensor:
            nonlocal taken
            taken = True
            mean = loss
            if several:
                self.refuse_synchronising_wrapper()
                mean = self._ranks.sum(loss.detach(), f"the loss of task {task}") / self._ranks.size
            if mean.device.type == "cpu" and loss.requires_grad and not bool(mean.isfinite().all()):
                spoilt.append(task)
                return torch.log(mean.detach() + eps).requires_grad_()
            if loss.requires_grad:
                self.search([loss])
            if not several:
                return torch.log(loss + eps)
            out: Tensor = loss_values.LogOfMean.apply(loss, mean, eps)  # type: ignore[no-untyped-call]
            return out

        named = self.wrappers.named
        try:
            try:
                loss_values.shared_log = loss_values.SharedLog(log_of, several)
                with nullcontext() if named is None else named.no_sync():
                    yield spoilt
            finally:
                loss_values.shared_log = None
        finally:  # once more, should an interrupt have come just there
            loss_values.shared_log = None
        if not several:
            return
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

    def _watch(self, parameters: Iterable[Tensor], where: str) -> None:
        shared, heads, index = self._shared, self._heads, 0
        for p in parameters:
            if id(p) in shared:
                continue
            if id(p) not in heads:
                heads[id(p)] = head = Head(p, p.grad, (where, index), [])
                self._rest.append(head)
                p.grad = None
            index += 1

    @property
    def found(self) -> bool:
        """Whether any head is known."""
        return bool(self._heads)

    # --- their gradients --------------------------------------------------------------------------------------

    def collect(self, task: int, smaller: Tensor | None = None) -> None:
        """A pass is over: what is in the heads' ``.grad`` is of this task, ``smaller`` by that factor."""
        for head in chain(self._own.get(task, ()), self._rest):
            grad = head.parameter.grad
            if grad is not None:
                if smaller is not None:
                    grad.div_(smaller.to(grad.device))
                head.parts.append((task, grad))
                head.parameter.grad = None

    def collect_rest(self) -> None:
        """All passes are over: gradients where none was expected are of the tasks together; look further next time."""
        for head in chain.from_iterable(self._own.values()):
            if head.parameter.grad is not None:
                head.parts.append((SEVERAL, head.parameter.grad))
                head.parameter.grad, self._common = None, None

    @torch.no_grad()
    def clear(self, keep: dict[int, Tensor]) -> None:
        """Set new gradients to zero where a task sits out, as only the device knows: bools, by task."""
        by_task: dict[int, dict[torch.dtype, list[Tensor]]] = {}
        for head in self._heads.values():
            for task, grad in head.parts:
                values = dtensors.as_integers(grad)
                by_task.setdefault(task, {}).setdefault(values.dtype, []).append(values)
        for task, flag in keep.items():
            for of in (task, SEVERAL):
                for dtype, some in by_task.get(of, {}).items():
                    torch._foreach_mul_(some, flag.to(some[0].device, dtype))

    @torch.no_grad()
    def average(self, touched: list[bool], out: Collection[int]) -> None:
        """Of several ranks, the mean of the new gradients, without those of the tasks ``out``.

        Args:
            touched: for each shared parameter, whether it ever had a gradient; afterwards, whether on any rank.
            out: tasks that sit out.

        Raises:
            RuntimeError: the ranks' heads differ.
        """
        if self._ranks.size == 1:
            return
        heads: list[tuple[Head, Tensor]] = []
        for head in self._heads.values():
            parts = [grad for task, grad in head.parts if task not in out]
            if parts and not dtensors.is_dtensor(head.parameter):
                total = parts[0]
                for grad in parts[1:]:
                    total.add_(grad)
                head.parts[:] = [(-1, total)]
                heads.append((head, total))
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

    @torch.no_grad()
    def put(self, out: Collection[int]) -> None:
        """Add the new gradients to what was in ``.grad``, without those of the tasks ``out``.

        In the order of the passes, in place, as autograd would. May be called again where it was interrupted.
        """
        left_out = {*out, SEVERAL} if out else out
        for head in self._heads.values():
            p, parts = head.parameter, head.parts
            if p.grad is None and head.before is not None:
                p.grad = head.before
            while parts:
                if parts[0][0] in left_out:
                    parts.pop(0)
                elif p.grad is None:
                    p.grad = parts.pop(0)[1]
                elif p.grad.layout == torch.strided or parts[0][1].layout != torch.strided:
                    p.grad.add_(parts.pop(0)[1])
                else:
                    p.grad = parts.pop(0)[1] + p.grad
        self._heads, self._own, self._rest = {}, {}, []

    def restore(self) -> None:
        """Put back what was in ``.grad``, without the new gradients."""
        for head in self._heads.values():
            head.parameter.grad = head.before
        self._heads, self._own, self._rest = {}, {}, []
