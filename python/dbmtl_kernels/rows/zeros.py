"""A pass whose gradients are all exactly zero does not count: who finds out, and how it is then left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops import Coefficients
from .ranks import Ranks

# So many elements of a gradient are looked at first: of most passes nothing else is.
PREFIX = 64


class Zeros:
    """Whether all gradients of one pass are exactly zero; NaN is not. One for all parts of a split row.

    On a CPU gradients are looked at as they come, until one is not zero. On other devices that is done when the pass
    ends, and the answer stays on the device.

    Args:
        ranks: those to agree with, one after the other: a pass is empty if it is empty on all.
        device: where the answer is needed.
        deferred: it must not be known on the host.
        backend: "auto" or a name.
    """

    def __init__(self, ranks: Sequence[Ranks], device: torch.device, deferred: bool, backend: str = "auto") -> None:
        self.deferred = deferred
        self._backend = backend
        self._ranks = ranks
        self._device = device
        self._found = deferred
        self._answer: bool | Tensor | None = None

    def look(self, grads: Iterable[Tensor | None]) -> bool:
        """Whether any gradient so far was not zero; always True if deferred."""
        self._found = self._found or _any_nonzero(grads)
        return self._found

    def decide(self, grads: Sequence[Tensor | None]) -> bool | Tensor:
        """Whether the pass counts, ``grads`` being its last: a bool, or if deferred (1,) bool on the device.

        A collective with several ranks. Asked again it gives the same answer, whatever ``grads`` are.
        """
        if self._answer is None:
            if self.deferred:
                self._answer = any_nonzero(grads, self._device, self._backend)
            else:
                self._answer = self._found or _any_nonzero(grads)
            if self._ranks:
                flag = torch.ones(1, dtype=torch.float32, device=self._device) * self._answer
                for ranks in self._ranks:
                    flag = ranks.sum(flag, "whether any gradient is not zero")
                self._answer = flag > 0 if self.deferred else bool(flag > 0)
        return self._answer


def any_nonzero(grads: Iterable[Tensor | None], device: torch.device, backend: str) -> Tensor:
    """(1,) bool on the device, without a sync: whether any element is not zero; NaN is not."""
    some: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad is not None and grad.numel():
            some.setdefault(grad.device, []).append(grad)
    found = [ops.any_nonzero(those, backend).to(device) for those in some.values()]
    if len(found) == 1:
        return found[0]
    return torch.cat(found).any().reshape(1) if found else torch.zeros(1, dtype=torch.bool, device=device)


def continued(coefficients: Coefficients) -> Coefficients:
    """Those of a further gradient in a step, from those of the first: the row has had its decay."""
    if isinstance(coefficients, Tensor):
        gain = coefficients[1:]
        return torch.cat([torch.ones_like(gain), gain])
    return 1.0, coefficients[1]


def deferred_coefficients(
    coefficients: Coefficients, nonzero: Tensor, again: bool, fed: Tensor, like: Tensor
) -> Coefficients:
    """Decay and gain of a pass of which only the device knows whether it counts: 1 and 0 if it does not.

    Args:
        coefficients: those of the first gradient of the step.
        nonzero: (1,) bool, whether it counts.
        again: whether the task had a pass in this step before.
        fed: (1,) bool, whether one of those counted; updated.
        like: (1,) of the dtype and on the device wanted.

    Returns:
        (2,), see `ops.accumulate_`.
    """
    if not isinstance(coefficients, Tensor):
        coefficients = ops.upload(coefficients, like.dtype, like.device)
    if again:
        further = continued(coefficients)
        assert isinstance(further, Tensor)
        coefficients = torch.where(fed, further, coefficients)
        fed.logical_or_(nonzero)
    else:
        fed.copy_(nonzero)
    return torch.where(nonzero, coefficients, ops.upload((1.0, 0.0), like.dtype, like.device))


def _any_nonzero(grads: Iterable[Tensor | None]) -> bool:
    """On the host; of most gradients a prefix tells."""
    for grad in grads:
        if grad is not None:
            if grad.numel() > PREFIX and grad.is_contiguous() and bool(grad.view(-1)[:PREFIX].any()):
                return True
            if bool(grad.any()):
                return True
    return False
