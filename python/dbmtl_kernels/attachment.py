"""Attachment: hooks before and after ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Attachment:
    """A removable handle, as PyTorch's hooks return; also a context manager that removes at its end.

    Args:
        optimizer: whose steps to watch; of Lightning's and Accelerate's wrappers, that which they wrap.
        shared: tensors of which it must hold one at least.
        before: called before each step.
        after: called after each step.
        removed: called once on removal.

    Raises:
        ValueError: the optimizer holds none of ``shared``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shared: Sequence[torch.Tensor],
        before: Callable[[], None],
        after: Callable[[], None],
        removed: Callable[[], None],
    ) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self._optimizer = optimizer
        held = {id(p) for p in self.parameters()}
        if not any(id(p) in held for p in shared):
            raise ValueError(f"{type(optimizer).__name__} holds none of the shared parameters")

        def pre(*_: Any) -> None:
            before()

        def post(*_: Any) -> None:
            after()

        self._handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
        self._removed: Callable[[], None] | None = removed

    def parameters(self) -> list[torch.Tensor]:
        """What the optimizer steps."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def remove(self) -> None:
        """Detach; once is enough, more does no harm."""
        for handle in self._handles:
            handle.remove()
        if self._removed is not None:
            self._removed()
            self._removed = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
