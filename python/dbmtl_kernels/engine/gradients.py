"""SharedGradients: the one owner of the ``.grad`` of the shared parameters."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..rows import dtensors
from ..rows.collect import FLUSH_BYTES, RowCollector
from ..rows.placement import Buffer
from ..rows.ranks import Ranks
from ..rows.rows import Flats
from ..rows.split import SplitCollector
from .balance import BalancedGradient


class Stash(NamedTuple):
    """What `SharedGradients.stash_grads` took away.

    Attributes:
        grads: for each parameter what others put into its ``.grad``, to be added to; None for nothing.
        balanced: ``.grad`` held a balanced gradient of the open step besides.
        dropped: it had held one, and the caller has thrown it away: no optimizer step will follow it.
    """

    grads: list[Tensor | None]
    balanced: bool
    dropped: bool


class SharedGradients:
    """The ``.grad`` of the shared parameters before, during and after the backward passes of a step.

    Whose a ``.grad`` is, is known from where it is stored and who wrote it in this step:

    - during the passes `stash_grads` has set it aside, so that all it holds is one task's gradient;
    - `write_grads` puts the balanced gradient there. It lives in one flat tensor that is reused from step to step, each
      ``.grad`` being a view of it. What others had put there is added to, in place, as autograd would;
    - what `write_grads` left in each is recorded until the step ends. The next balanced gradient of the step takes its
      place; whatever else is there (a regulariser's gradient, say) stays, whether it came before or in between.

    Args:
        rows: knows the parameters and their layout.
        balanced: what is written.
        ranks: those that must come to the same conclusions about ``.grad``.

    Attributes:
        touched: whether any task ever had a gradient of the parameter.
        written: whether ``.grad`` holds a balanced gradient of the open step.
    """

    def __init__(self, rows: Buffer, balanced: BalancedGradient, ranks: Ranks) -> None:
        self._rows, self._balanced, self._ranks = rows, balanced, ranks
        self._parameters = rows.parameters
        self.touched = [False] * len(self._parameters)
        self.written = False
        self._collected_any = False  # since `stash_grads`
        self._distributed = any(dtensors.is_dtensor(p) for p in self._parameters)
        self._collector: RowCollector | SplitCollector | None = None  # of the pass that runs
        self._handles: list[RemovableHandle | None] = []  # of the hooks, made when first needed
        self._arrived: list[int] = []  # parameters whose gradient the pass has made and the collector has not got yet
        self._bytes = 0  # of those
        self._sizes = [p.nbytes for p in self._parameters]
        self._flats: Flats = {}
        self._views: list[Tensor] = []
        # What was written in this step: the tensor left in .grad (None where nothing of ours is), its version then, and
        # whether it held nothing else.
        self._left: list[Tensor | None] = [None] * len(self._parameters)
        self._versions = [-1] * len(self._parameters)
        self._only_ours = [False] * len(self._parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: its parameters are others, and have no hooks yet."""
        return {**self.__dict__, "_handles": [], "_collector": None}

    # --- before the passes ------------------------------------------------------------------------------------

    def stash_grads(self) -> Stash:
        """Take every ``.grad`` away."""
        grads = [p.grad for p in self._parameters]
        balanced, dropped = self.written, False
        if balanced:
            dropped = self._was_dropped(grads)
            if not dropped:
                grads = self._without_balanced(grads)
            self.forget()
        self._collected_any = False
        for p in self._parameters:
            if p.grad is not None:
                p.grad = None
        return Stash(grads, balanced and not dropped, dropped)

    def restore_grads(self, grads: list[Tensor | None]) -> None:
        """Put back what `stash_grads` took away."""
        for p, grad in zip(self._parameters, grads, strict=True):
            p.grad = grad

    def forget(self) -> None:
        """What is in ``.grad`` is the caller's from now on; nothing of it is kept alive here."""
        if self.written:
            self.written = False
            self._left = [None] * len(self._parameters)

    # --- during a pass ----------------------------------------------------------------------------------------

    def hook(self) -> None:
        """Let gradients be collected while a pass makes them, where rows want that.

        Hooks stay, and are idle between passes. Each is the last of its parameter, so that a user's see the gradient.
        """
        if not self._rows.early:
            return
        mine, handles = weakref.ref(self), self._handles
        if not handles:
            handles += [None] * len(self._parameters)
            weakref.finalize(self, _remove, handles)
        for index, p in enumerate(self._parameters):
            handle, hooks = handles[index], p._post_accumulate_grad_hooks
            if handle is not None and hooks and next(reversed(hooks)) == handle.id:
                continue
            if handle is not None:
                handle.remove()
                handles[index] = None
            if p.requires_grad:  # may have been frozen since
                handles[index] = p.register_post_accumulate_grad_hook(partial(_on_grad, mine, index))

    def collect_into(self, collector: RowCollector | SplitCollector) -> None:
        """The pass that runs from now on is that of this row."""
        self._collector = collector
        self._arrived, self._bytes = [], 0

    @torch.no_grad()
    def finish_collecting(self) -> None:
        """The pass is over: what is left in ``.grad`` goes to its row too."""
        collector, self._collector = self._collector, None
        assert collector is not None
        collector.finish(*self._take(range(len(self._parameters))))

    def stop_collecting(self) -> None:
        """No pass runs, whatever became of it: hooks are idle."""
        self._collector = None

    def _flush(self) -> None:
        """What has come so far goes to the row, while it is in cache."""
        assert self._collector is not None
        self._collector.add(*self._take())

    def _take(self, rest: Iterable[int] = ()) -> tuple[list[int], list[Tensor | None]]:
        """The gradients that have arrived, and those of ``rest`` that are there; no longer in ``.grad``, each once."""
        found: list[int] = []
        grads: list[Tensor | None] = []
        arrived, self._arrived, self._bytes = self._arrived, [], 0
        for number, index in enumerate(chain(arrived, rest)):
            p = self._parameters[index]
            grad = p.grad
            if grad is None:
                if number < len(arrived) and index not in found:
                    raise RuntimeError(
                        f"the gradient of shared parameter {index} of shape {tuple(p.shape)} was taken out of .grad "
                        "during the backward pass, by a hook (an optimizer that steps in backward?): it cannot be "
                        "balanced"
                    )
                continue
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"shared parameter {index} of shape {tuple(p.shape)} has a gradient of layout {grad.layout}; "
                    "only dense ones can be balanced (sparse=False)"
                )
            p.grad = None
            self.touched[index] = self._collected_any = True
            if grad.requires_grad:
                grad = grad.detach()
            found.append(index)
            grads.append(dtensors.local_gradient(p, grad) if self._distributed else grad)
        return found, grads

    def check_collected(self, all_tasks: bool) -> None:
        """Raise RuntimeError if no shared parameter had a gradient in the passes of a step.

        Plain parameters that had one before may go without, and where not ``all_tasks`` were there. In a process of
        its own it is only a warning.
        """
        if self._collected_any or not (self._distributed or (all_tasks and not any(self.touched))):
            return
        complaint = "no shared parameter got a gradient in this step: are they those of the model that gave the losses?"
        if self._distributed or self._ranks.size > 1:
            raise RuntimeError(
                f"{complaint} fully_shard puts others in their place (make the balancer after it), and with "
                "set_requires_gradient_sync(False) keeps the gradients of all tasks in one sum (leave it True)"
            )
        warnings.warn(complaint, RuntimeWarning, stacklevel=2)

    # --- after the passes -------------------------------------------------------------------------------------

    def write_grads(self, grads: list[Tensor | None]) -> None:
        """Leave ``grads`` plus the balanced gradient in every ``.grad``.

        Parameters that no task ever touched, or that were frozen since, get ``grads`` back as it was.
        """
        if not self._flats:
            self._flats = self._rows.new_flats()
            self._views = self._rows.views(self._flats)
        views, touched = self._views, self.touched
        # Nobody set these to None: what others put there lies in our flat tensor.
        ours = [index for index, grad in enumerate(grads) if grad is not None and grad is views[index]]
        if ours:
            for index in ours:
                if not (touched[index] and self._parameters[index].requires_grad):
                    grads[index] = views[index].clone()
            for index, view in enumerate(views):
                if grads[index] is not view:
                    view.zero_()
        self._balanced.compute(self._flats, bool(ours))
        left, versions, only_ours = self._left, self._versions, self._only_ours
        for index, (p, grad, view) in enumerate(zip(self._parameters, grads, views, strict=True)):
            if not (touched[index] and p.requires_grad):
                p.grad, left[index] = grad, None
                continue
            new = view if grad is None or grad is view else grad.add_(view)
            p.grad = left[index] = new
            versions[index] = new._version
            only_ours[index] = grad is None
        self.written = True

    def was_dropped(self) -> bool:
        """Whether the balanced gradient last written was thrown away by the caller; see `Stash`."""
        return self.written and self._was_dropped([p.grad for p in self._parameters])

    def resume(self, touched: list[bool], written: bool) -> bool:
        """Take over what a checkpoint tells; what is in ``.grad`` now is what was left there, if anything was.

        Returns:
            whether a balanced gradient was left there and is gone: no optimizer step will follow it.
        """
        self.forget()
        self.touched[:] = touched
        grads = [p.grad if seen else None for p, seen in zip(self._parameters, touched, strict=True)]
        self.written = written and any(grad is not None for grad in grads)
        if self.written:
            self._left = grads
            self._versions = [-1 if grad is None else grad._version for grad in grads]
            self._only_ours = [False] * len(grads)
        return written and not self.written

    def _was_dropped(self, grads: list[Tensor | None]) -> bool:
        """Whether nothing is left of what was written; values are looked at only where they changed."""
        changed, any_left = [], False
        for grad, left, version in zip(grads, self._left, self._versions, strict=True):
            if left is None:
                continue
            any_left = True
            if grad is not left:
                continue
            if left._version == version:
                return False
            changed.append(dtensors.local(left))
        if not changed:
            return any_left
        device = self._rows.device
        some = torch.stack([grad.any().to(device) for grad in changed])
        bad = torch.stack([(~grad.isfinite()).any().to(device) for grad in changed])
        # A DTensor's shards may differ in this from rank to rank; the verdict may not.
        some, bad = self._ranks.sum(torch.stack([some, bad]).to(torch.float32), "what became of .grad") > 0
        overflowed = bool(self._balanced.overflow().any())
        return not bool((some & (bad if overflowed else torch.ones_like(bad))).any())

    def _without_balanced(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """What is in ``.grad`` besides the balanced gradient last written."""
        rest = list(grads)
        mixed = []
        for index, (grad, left) in enumerate(zip(grads, self._left, strict=True)):
            if left is None or grad is not left:
                continue
            rest[index] = None
            if not (self._only_ours[index] and left._version == self._versions[index]):
                mixed.append(index)
        if mixed:
            before = self._balanced.recompute()
            for index in mixed:
                grad = grads[index]
                assert grad is not None
                rest[index] = grad.sub_(before[index])
        return rest


def _on_grad(owner: weakref.ref[SharedGradients], index: int, _: Tensor) -> None:
    """The hook of parameter ``index``: does nothing while no pass of its owner runs."""
    grads = owner()
    if grads is not None and grads._collector is not None:
        grads._arrived.append(index)
        grads._bytes += grads._sizes[index]
        if grads._bytes >= FLUSH_BYTES:
            grads._flush()


def _remove(handles: list[RemovableHandle | None]) -> None:
    for handle in handles:
        if handle is not None:
            handle.remove()
