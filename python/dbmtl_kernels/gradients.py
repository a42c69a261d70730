"""SharedGradients: takes the ``.grad`` of the shared parameters away, hands a task's over, writes the balanced one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import dtensors
from .balanced import BalancedGradient
from .buffer import Flats
from .placement import Buffer
from .updates import Update
from .world import World

Kept = list[Tensor | None]


class SharedGradients:
    """The ``.grad`` of the shared parameters before, during and after the backward passes of a step.

    The balanced gradient lives in one flat tensor that is reused from step to step; each ``.grad`` is a view of it.
    A ``.grad`` that somebody else put there is kept aside during the passes and added to afterwards, in place, as
    autograd would. Within an open step a later balanced gradient takes the place of an earlier one; whatever else is
    in ``.grad`` (a regulariser's gradient, say) stays, whether it came before or in between.

    Args:
        buffer: knows the parameters and their layout.
        balanced: what is written.
        world: the ranks that must come to the same conclusions about ``.grad``.

    Attributes:
        touched: whether any task ever had a gradient of the parameter.
        written: whether ``.grad`` holds a balanced gradient of the step now open.
    """

    def __init__(self, buffer: Buffer, balanced: BalancedGradient, world: World) -> None:
        self._buffer = buffer
        self._balanced = balanced
        self._world = world
        self._parameters = buffer.parameters
        self.touched = [False] * len(self._parameters)
        self.written = False
        self._released = False  # whether there was any gradient since `take`
        self._distributed = any(dtensors.is_dtensor(p) for p in self._parameters)
        self._flats: Flats = {}
        self._views: list[Tensor] = []
        # What was left in .grad at the last write: the very tensors, their versions, and whether nothing but the
        # balanced gradient was in them.
        self._left: Kept = [None] * len(self._parameters)
        self._versions = [-1] * len(self._parameters)
        self._pure = [False] * len(self._parameters)

    def take(self) -> tuple[Kept, bool]:
        """Take every ``.grad`` away before the backward passes.

        Returns:
            what must be added to, per parameter, and whether the balanced gradient last written was thrown away by
            the caller (``zero_grad``), which means that no optimizer step will follow it.
        """
        kept = [p.grad for p in self._parameters]
        self._released = dropped = False
        if self.written:
            dropped = self._was_dropped(kept)
            kept = kept if dropped else self._without_balanced(kept)
        self.let_go()
        for p in self._parameters:
            p.grad = None
        return kept, dropped

    def let_go(self) -> None:
        """What is in ``.grad`` is the caller's from now on; nothing of it is kept alive here."""
        self.written = False
        self._left = [None] * len(self._parameters)

    def resume(self, touched: list[bool], written: bool) -> bool:
        """Take over the books of a state_dict; what is in ``.grad`` now is what was left there, if anything was.

        Returns:
            whether a balanced gradient was left there and is gone: no optimizer step will follow it.
        """
        self.let_go()
        self.touched = list(touched)
        gone = written and all(p.grad is None for p in self._parameters)
        if written and not gone:
            self._remember([False] * len(self._parameters))
            self.written = True
        return gone

    def hand_over(self, update: Update) -> None:
        """Give ``update`` what is left in ``.grad`` after a backward pass, and finish it."""
        grads = [None if p.grad is None else self._release(index) for index, p in enumerate(self._parameters)]
        update.finish(grads)

    @contextmanager
    def handing_over(self) -> Iterator[Callable[[Update], None]]:
        """While inside, each ``.grad`` goes to the current update as soon as a backward pass has made it.

        Yields:
            a function that makes an update the current one. `hand_over` is still due after each pass.
        """
        current: list[Update] = []

        def follow(update: Update) -> None:
            current[:] = [update]

        def hook_of(index: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                current[0].add(index, self._release(index))

            return hook

        handles = []
        if self._buffer.early:
            for index, p in enumerate(self._parameters):
                if p.requires_grad:  # may have been frozen since
                    handles.append(p.register_post_accumulate_grad_hook(hook_of(index)))
        try:
            yield follow
        finally:
            for handle in handles:
                handle.remove()

    def _release(self, index: int) -> Tensor:
        p = self._parameters[index]
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise TypeError(
                f"shared parameter {index} of shape {tuple(p.shape)} has a gradient of layout {grad.layout}; "
                "only dense ones can be balanced (sparse=False)"
            )
        self.touched[index] = True
        p.grad = None
        self._released = True
        return dtensors.local_gradient(p, grad.detach())

    def dropped(self) -> bool:
        """Whether the balanced gradient last written was thrown away by the caller; see `take`."""
        return self.written and self._was_dropped([p.grad for p in self._parameters])

    def check_released(self, all_tasks: bool) -> None:
        """Raise RuntimeError if no shared parameter has a gradient after the backward passes of a step.

        Plain parameters that had one before may go without, and where not ``all_tasks`` were there. In a process of
        its own it is only a warning.
        """
        if self._released or not (self._distributed or (all_tasks and not any(self.touched))):
            return
        complaint = "no shared parameter got a gradient in this step: are they those of the model that gave the losses?"
        if self._distributed or self._world.size > 1:
            raise RuntimeError(
                f"{complaint} fully_shard puts others in their place (make the balancer after it), and with "
                "set_requires_gradient_sync(False) keeps the gradients of all tasks in one sum (leave it True)"
            )
        warnings.warn(complaint, RuntimeWarning, stacklevel=2)

    def put_back(self, kept: Kept) -> None:
        """Undo `take`."""
        for p, grad in zip(self._parameters, kept, strict=True):
            p.grad = grad

    def write(self, kept: Kept) -> None:
        """Leave ``kept`` plus the balanced gradient in every ``.grad``.

        Parameters that no task ever touched, or that were frozen since, get ``kept`` back as it was.
        """
        if not self._flats:
            self._flats = self._buffer.new_flats()
            self._views = self._buffer.views(self._flats)
        wanted = [touched and p.requires_grad for touched, p in zip(self.touched, self._parameters, strict=True)]
        ours = [grad is view for grad, view in zip(kept, self._views, strict=True)]
        for index, grad in enumerate(kept):
            if ours[index] and not wanted[index] and grad is not None:
                kept[index], ours[index] = grad.clone(), False
        if any(ours):  # nobody set them to None: add to what they hold
            for view, mine in zip(self._views, ours, strict=True):
                if not mine:
                    view.zero_()
        self._balanced.into(self._flats, any(ours))
        for index, (p, grad, view) in enumerate(zip(self._parameters, kept, self._views, strict=True)):
            if not wanted[index]:
                p.grad = grad
            elif grad is None or ours[index]:
                p.grad = view
            else:
                p.grad = grad.add_(view)
        self._remember([grad is None for grad in kept])
        self.written = True

    def _remember(self, pure: list[bool]) -> None:
        self._left = [p.grad for p in self._parameters]
        self._versions = [-1 if grad is None else grad._version for grad in self._left]
        self._pure = pure

    def _unchanged(self, index: int, grad: Tensor) -> bool:
        return grad is self._left[index] and grad._version == self._versions[index]

    def _was_dropped(self, kept: Kept) -> bool:
        """Whether nothing is left of what was written; values are looked at only where they changed."""
        changed = []
        left = [i for i, grad in enumerate(self._left) if grad is not None and self.touched[i]]
        for index in left:
            grad = kept[index]
            if grad is None or grad is not self._left[index]:
                continue
            if self._unchanged(index, grad):
                return False
            changed.append(dtensors.local(grad))
        if not changed:
            return bool(left)
        device = self._buffer.device
        some = torch.stack([grad.any().to(device) for grad in changed])
        bad = torch.stack([(~grad.isfinite()).any().to(device) for grad in changed])
        # A DTensor's shards may differ in this from rank to rank; the verdict may not.
        some, bad = self._world.sum(torch.stack([some, bad]).to(torch.float32), "what became of .grad") > 0
        return not bool((some & (bad if self._balanced.spoiled() else torch.ones_like(bad))).any())

    def _without_balanced(self, kept: Kept) -> Kept:
        """What is in ``.grad`` besides the balanced gradient last written."""
        holding = [
            touched and grad is not None and grad is left
            for touched, grad, left in zip(self.touched, kept, self._left, strict=True)
        ]
        mixed = [
            held and grad is not None and not (self._pure[index] and self._unchanged(index, grad))
            for index, (held, grad) in enumerate(zip(holding, kept, strict=True))
        ]
        before: list[Tensor] = []
        if any(mixed):
            flats = self._buffer.new_flats()
            self._balanced.again(flats)
            before = self._buffer.views(flats)
        rest: Kept = []
        for index, grad in enumerate(kept):
            if grad is None or not holding[index]:
                rest.append(grad)
            elif mixed[index]:
                rest.append(grad.sub_(before[index]))
            else:
                rest.append(None)
        return rest
