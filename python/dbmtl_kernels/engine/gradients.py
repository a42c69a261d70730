"""SharedGradients: the one owner of the ``.grad`` of the shared parameters."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from ..rows import dtensors
from ..rows.collect import FLUSH_BYTES, RowCollector
from ..rows.layout import FlatGradient
from ..rows.placement import Buffer
from ..rows.ranks import Ranks
from ..rows.rows import Flats
from ..rows.split import SplitCollector
from .balance import BalancedGradient
from .notices import Notices


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


class Due(NamedTuple):
    """What `SharedGradients.put_grads` is to leave in ``.grad``: each of ``grads`` plus its part of ``views``.

    Attributes:
        wanted: where; elsewhere ``grads`` as it is.
        added: where it was added in place already.
        ours: it is the balanced gradient of the open step, to be recorded.
    """

    grads: list[Tensor | None]
    views: list[Tensor]
    wanted: list[bool]
    added: dict[int, Tensor]
    ours: bool


class SharedGradients:
    """The ``.grad`` of the shared parameters before, during and after the backward passes of a step.

    Whose a ``.grad`` is, is known from where it is stored and who wrote it in this step:

    - during the passes `stash_grads` has set it aside, so that all it holds is one task's gradient;
    - `put_grads` puts the balanced gradient there. It lives in one flat tensor that is reused from step to step, each
      ``.grad`` being a part of it. What others had put there is added to, in place, as autograd would;
    - what `put_grads` left in each is recorded until the step ends. The next balanced gradient of the step takes its
      place; whatever else is there (a regulariser's gradient, say) stays, whether it came before or in between.

    An interrupt at any line leaves ``.grad`` as it was, or with the whole of what was to be written.

    Args:
        rows: knows the parameters and their layout.
        balanced: what is written.
        ranks: those that must come to the same conclusions about ``.grad``.
        notices: what is said once.

    Attributes:
        aside: what was taken away and not yet given back; None outside of a step.
        due: what is to be left in ``.grad`` and is not yet.
        undefined: where an interrupt now would leave in ``.grad`` nobody knows what.
        touched: whether any task ever had a gradient of the parameter.
        collected: whether one had, since `stash_grads`.
        written: whether ``.grad`` holds a balanced gradient of the open step.
    """

    def __init__(self, rows: Buffer, balanced: BalancedGradient, ranks: Ranks, notices: Notices) -> None:
        self._rows, self._balanced, self._ranks, self._notices = rows, balanced, ranks, notices
        self._parameters = rows.parameters
        # Of less than is collected at a time nothing is gained by hooks, which take some 5 us each.
        self._early = rows.early and sum(p.nbytes for p in rows.parameters) >= FLUSH_BYTES
        self.aside: Stash | None = None
        self.touched, self.collected = ([False] * len(self._parameters) for _ in range(2))
        self.written = False
        self._distributed = any(dtensors.is_dtensor(p) for p in self._parameters)
        self._collector: RowCollector | SplitCollector | None = None  # of the pass that runs
        self._handles: list[RemovableHandle | None] = [None] * len(self._parameters)  # of the hooks
        weakref.finalize(self, _remove, self._handles)
        self._arrived: list[int] = []  # parameters whose gradient the pass has made and the collector has not got yet
        self._bytes = 0  # of those
        self.flat = FlatGradient(rows)
        self.due: Due | None = None
        self.undefined: set[int] = set()
        # What was written in this step: the tensor left in .grad (None where nothing of ours is), what `_mark` gave
        # then, and whether it held nothing else.
        self._left: list[Tensor | None] = [None] * len(self._parameters)
        self._marks, self._only_ours = [(0, 0)] * len(self._parameters), [0] * len(self._parameters)

    # --- before the passes ------------------------------------------------------------------------------------

    def stash_grads(self, keep: bool = False) -> Stash:
        """Take every ``.grad`` away, to `aside`.

        Args:
            keep: a balanced gradient that is there stays in what was taken away, and on record.

        Raises:
            RuntimeError: a balanced gradient of the open step was replaced by another tensor.
        """
        grads = [p.grad for p in self._parameters]
        record = self.written, self._left
        subtracted: dict[int, Tensor] = {}
        try:
            rest, balanced, dropped = grads, self.written and not keep, False
            if balanced:
                dropped = self._was_dropped(grads)
                if not dropped:
                    rest = self._without_balanced(grads, subtracted)
                elif any(None not in both and both[0] is not both[1] for both in zip(grads, self._left, strict=True)):
                    self._notices.replaced()
                self.forget()
            self.collected = [False] * len(grads)
            for p in self._parameters:
                if p.grad is not None:
                    p.grad = None
            self.aside = stash = Stash(rest, balanced and not dropped, dropped)
        except BaseException:
            self.aside, (self.written, self._left) = None, record
            for index, (p, grad) in enumerate(zip(self._parameters, grads, strict=True)):
                p.grad = grad.add_(subtracted[index]) if grad is not None and index in subtracted else grad
            raise
        return stash

    def restore_grads(self) -> None:
        """Put back what `stash_grads` took away."""
        if self.aside is None:
            return
        self.drop_undefined()
        for p, grad in zip(self._parameters, self.aside.grads, strict=True):
            p.grad = grad
        self.aside = self.due = None

    def drop_undefined(self) -> None:
        """Of what was set aside, forget what an interrupted `compute_grads` left half added to, and say so."""
        assert self.aside is not None
        for index in self.undefined:
            self.aside.grads[index] = None
        self._notices.lost_grads(sorted(self.undefined))
        self.undefined = set()

    def forget(self) -> None:
        """What is in ``.grad`` is the caller's from now on; nothing of it is kept alive here."""
        if self.written:
            self.written, self._left = False, [None] * len(self._parameters)

    # --- during a pass ----------------------------------------------------------------------------------------

    def hook(self) -> None:
        """Watch what becomes of ``.grad`` in the passes, and collect while they run, where rows want that.

        Hooks stay, and are idle between passes. Each is the last of its parameter, so that a user's see the gradient,
        and one that takes it away is found. Where nothing is collected early, only parameters with other hooks get one.
        """
        early, mine, handles = self._early, weakref.ref(self), self._handles
        for index, p in enumerate(self._parameters):
            handle, hooks = handles[index], p._post_accumulate_grad_hooks
            if not (hooks or early) or (handle is not None and hooks and next(reversed(hooks)) == handle.id):
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

    def finish_collecting(self) -> None:
        """The pass is over: what is left in ``.grad`` goes to its row too."""
        collector, self._collector = self._collector, None
        if collector is not None:
            collector.finish(*self._take(range(len(self._parameters))))

    def stop_collecting(self) -> None:
        """No pass runs, whatever became of it: hooks are idle."""
        self._collector = None

    def _take(self, rest: Iterable[int] = ()) -> tuple[list[int], list[Tensor | None]]:
        """The gradients that have arrived, and those of ``rest`` that are there; no longer in ``.grad``, each once."""
        found, grads = list[int](), list[Tensor | None]()
        arrived, self._arrived, self._bytes = self._arrived, [], 0
        for number, index in enumerate(chain(arrived, rest)):
            p = self._parameters[index]
            grad = p.grad
            if grad is None:
                if number < len(arrived) and index not in found:
                    self._refuse_taken(index)
                continue
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"{self._rows.describe(index)} has a gradient of layout {grad.layout}; only dense ones can be "
                    "balanced (sparse=False)"
                )
            p.grad = None
            if index in self.flat.of_any_dtype and not self.collected[index]:
                self.flat.dtypes[index] = grad.dtype
            self.touched[index] = self.collected[index] = True
            grad = grad.detach() if grad.requires_grad else grad
            grads.append(dtensors.local_gradient(p, grad) if self._distributed else grad)
            found.append(index)
        return found, grads

    def _refuse_taken(self, index: int) -> None:
        raise RuntimeError(
            f"the gradient of {self._rows.describe(index)} was taken out of .grad during the backward pass, by a hook "
            "(an optimizer that steps in backward?): it cannot be balanced. Remove the hook, step after the backward"
        )

    # --- after the passes -------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute_grads(self, sums: Tensor | None, named: Collection[int] | None) -> None:
        """Compute the balanced gradient, for `put_grads` to add to what was set aside.

        Parameters that no task ever touched, or that were frozen since, will get what was set aside as it was.

        Args:
            sums: (K,) sums of squares of the rows, if they are known.
            named: ids of the parameters to write to; None for all.
        """
        assert self.aside is not None
        grads, flat, views = self.aside.grads, self.flat, self.flat.views()
        wanted = [
            seen and p.requires_grad and (named is None or id(p) in named)
            for p, seen in zip(self._parameters, self.touched, strict=True)
        ]
        # Nobody set these to None: what others put there lies in our flat tensor.
        ours = {index for index, view in enumerate(views) if wanted[index] and grads[index] is view}
        for index, grad in enumerate(grads):
            if grad is not None and index not in ours:
                grads[index] = flat.kept(grad)
        for index, view in enumerate(views if ours else ()):
            if index not in ours:
                view.zero_()
        self.undefined = ours
        self._balanced.compute(flat.flats, bool(ours), sums)
        increment_version([*views, *flat.locals])  # a graph that saved one must not use it unawares
        self.due, self.undefined = Due(grads, views, wanted, {}, True), set()

    def take_grads(self, flats: Flats) -> None:
        """Let `put_grads` add ``flats``, which are then the caller's."""
        assert self.aside is not None
        wanted = [seen and p.requires_grad for p, seen in zip(self._parameters, self.touched, strict=True)]
        self.due = Due(self.aside.grads, self._rows.views(flats), wanted, {}, False)

    @torch.no_grad()
    def put_grads(self) -> None:
        """Leave in every ``.grad`` what is due. Called again after an interrupt it adds nothing twice."""
        if (due := self.due) is None:
            return
        left, marks, only_ours, dtypes = self._left, self._marks, self._only_ours, self.flat.dtypes
        for index, (p, grad, view) in enumerate(zip(self._parameters, due.grads, due.views, strict=True)):
            if not due.wanted[index]:
                p.grad = grad
                left[index] = None if due.ours else left[index]
                continue
            if grad is None or grad is view:
                new = view.to(dtypes[index]) if index in dtypes else view
            elif index in due.added:
                new = grad
            else:
                new = due.added[index] = grad.add_(view)
            p.grad = new
            if due.ours:
                left[index], only_ours[index] = new, int(grad is None)
                marks[index] = new._version, 0 if self._distributed else new.data_ptr()  # as `_mark`
        self.written, self.aside, self.due = self.written or due.ours, None, None

    def was_dropped(self) -> bool:
        """Whether the balanced gradient last written was thrown away by the caller; see `Stash`."""
        return self.written and self._was_dropped([p.grad for p in self._parameters])

    @property
    def left(self) -> list[int]:
        """For each parameter, 1 if a balanced gradient of the open step was left in its ``.grad``."""
        return [int(self.written and left is not None) for left in self._left]

    def resume(self, touched: list[bool], left: list[bool] | None) -> bool:
        """Take over what a checkpoint tells; what is in ``.grad`` now is what was left there, if anything was.

        Returns:
            whether a balanced gradient was left there and is gone: no optimizer step will follow it.
        """
        self.forget()
        self.touched[:] = touched
        if left is None:
            return False
        grads = [p.grad if ours else None for p, ours in zip(self._parameters, left, strict=True)]
        self.written = any(grad is not None for grad in grads)
        if self.written:
            self._left, self._only_ours = grads, [0] * len(grads)
            self._marks = [(-1, 0) if grad is None else self._mark(grad) for grad in grads]
        return any(left) and not self.written

    def _mark(self, grad: Tensor) -> tuple[int, int]:
        """What another write changes: the version; where it has other memory (``.grad.data = ...``), the address."""
        return grad._version, 0 if self._distributed else grad.data_ptr()

    def _was_dropped(self, grads: list[Tensor | None]) -> bool:
        """Whether nothing is left of what was written; values are looked at only where they changed."""
        changed, any_left = [], False
        for grad, left, mark in zip(grads, self._left, self._marks, strict=True):
            any_left = any_left or left is not None
            if left is None or grad is not left:
                continue
            if self._mark(left) == mark:
                return False
            changed.append(dtensors.local(left))
        if not changed:
            return any_left
        device = self._rows.device
        some = torch.stack([grad.any().to(device) for grad in changed])
        bad = torch.stack([(~grad.isfinite()).any().to(device) for grad in changed])
        # A DTensor's shards may differ in this from rank to rank; the verdict may not.
        some, bad = self._ranks.sum(torch.stack([some, bad]).to(torch.float32), "what became of .grad") > 0
        return not bool((some & (bad if self._balanced.overflow().any() else torch.ones_like(bad))).any())

    def _without_balanced(self, grads: list[Tensor | None], subtracted: dict[int, Tensor]) -> list[Tensor | None]:
        """What is in ``.grad`` besides the balanced gradient last written; what is subtracted in place is told."""
        rest = list(grads)
        mixed = []
        for index, (grad, left) in enumerate(zip(grads, self._left, strict=True)):
            if left is None or grad is None or not self._parameters[index].requires_grad:  # frozen: it is the caller's
                continue
            if grad is not left:
                raise RuntimeError(
                    f"the .grad of {self._rows.describe(index)} was replaced within a step, and may hold the balanced "
                    "gradient or not: change it in place, or set all to None (zero_grad) to begin the step anew"
                )
            rest[index] = None
            if not (self._only_ours[index] and self._mark(left) == self._marks[index]):
                mixed.append(index)
        if mixed:
            before = self._balanced.recompute()
            for index in mixed:
                grad = grads[index]
                assert grad is not None
                rest[index], subtracted[index] = grad.sub_(before[index]), before[index]
        return rest


def _on_grad(owner: weakref.ref[SharedGradients], index: int, p: Tensor) -> None:
    """The hook of parameter ``index``: does nothing while no pass of its owner runs."""
    grads = owner()
    if grads is None or grads.aside is None:
        return
    if grads._collector is None or not grads._early:
        if p.grad is None:
            grads._refuse_taken(index)
    else:
        grads._arrived.append(index)
        grads._bytes += p.nbytes
        if grads._bytes >= FLUSH_BYTES:  # what has come so far goes to the row, while it is in cache
            grads._collector.add(*grads._take())


def _remove(handles: list[RemovableHandle | None]) -> None:
    for handle in filter(None, handles):
        handle.remove()
