"""Kernels: which implementation serves a tensor, and the implementations.

In: tensors and numbers that `ops` has checked. Out: tensors updated in place. Knows no parameters, tasks or steps.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import eager, triton
from .arguments import BalanceRows, Coefficients, Gradients
from .c_library import cuda as cuda
from .c_library import native as native

NAMES = ("native", "triton", "cuda", "eager")
# For each type of device, the first that can serve; "auto" says why if it is the last.
CHOICE = {"cpu": ("native", "eager"), "cuda": ("triton", "cuda", "eager")}
ENVIRONMENT = "DBMTL_BACKEND"


class Backend(Protocol):
    """What `ops` calls. Arguments are checked and contiguous by then; sizes and dtypes agree."""

    @staticmethod
    def balance_(
        grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float
    ) -> tuple[Tensor, Tensor]:
        """``ema <- beta * ema + (1 - beta) * grads``; the balanced (P,) gradient, and (K,) norms of the new ema."""

    @staticmethod
    def accumulate_(
        row: Tensor | None,
        sumsq: Tensor,
        grads: Gradients,
        segments: Tensor,
        coefficients: Coefficients,
        loss_scale: Tensor | None,
    ) -> None:
        """``row <- decay * row + gain / loss_scale * grads``, and its sum of squares; None: only the sum."""

    @staticmethod
    def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
        """``out <- [out +] weights @ rows``; rows of weight 0 are left out."""

    @staticmethod
    def balance_rows_(step: BalanceRows) -> None:
        """Sums of squares to weights to the balanced gradient, and which tasks are nonfinite."""

    @staticmethod
    def gramian(rows: Tensor) -> Tensor:
        """``rows @ rows.T``."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why this backend cannot serve tensors on ``device``; None if it can."""

    @staticmethod
    def most_tasks(gramian: bool) -> int | None:
        """How many rows a call, or `gramian`, may have; None for any number."""

    @staticmethod
    def gathers_early(device: torch.device) -> bool:
        """Whether `accumulate_` is best called while a backward pass runs, a few gradients at a time."""


def get(name: str) -> Backend:
    """The backend called ``name``, whether it can serve or not."""
    found: dict[str, Any] = {"native": native, "triton": triton, "cuda": cuda, "eager": eager}
    return cast(Backend, found[name])


def resolve(name: str, device: torch.device, num_tasks: int = 1, gramian: bool = False) -> Backend:
    """The backend called ``name``, or for "auto" the one that ``DBMTL_BACKEND`` or the device asks for.

    Args:
        name: "auto" or a name.
        device: of the tensors.
        num_tasks: how many rows the call has.
        gramian: whether it is `gramian`, of which some backends take fewer.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that does not take so many tasks.
        RuntimeError: a backend asked for by name that cannot serve this device, with the reason.
    """
    asked = os.environ.get(ENVIRONMENT, "auto") if name == "auto" else name
    return _resolve(name, asked, device, num_tasks, gramian)


@cache  # by device, not by its type: a library may have code for one GPU and not for another
def _resolve(argument: str, name: str, device: torch.device, num_tasks: int, gramian: bool) -> Backend:
    if name == "auto":
        return _choose(device, num_tasks, gramian)
    source = f"{ENVIRONMENT}={name}" if argument == "auto" else f"backend={name!r}"
    if name not in NAMES:
        raise ValueError(f"unknown backend: {source}; known: 'auto', {', '.join(map(repr, NAMES))}")
    backend = get(name)
    reason = _missing(name, device)
    if reason is not None:
        raise RuntimeError(f"{source} was asked for but cannot serve tensors on {str(device)!r}: {reason}")
    reason = _too_many(backend, num_tasks, gramian)
    if reason is not None:
        raise ValueError(f"{source} was asked for but {reason}")
    return backend


_able: set[tuple[str, torch.device]] = set()


def _missing(name: str, device: torch.device) -> str | None:
    """Asked until it can, and then not again for another number of tasks."""
    if (name, device) in _able:
        return None
    reason = get(name).missing(device)
    if reason is None:
        _able.add((name, device))
    return reason


def _too_many(backend: Backend, num_tasks: int, gramian: bool) -> str | None:
    most = backend.most_tasks(gramian)
    if most is None or num_tasks <= most:
        return None
    return f"{'its Gramian' if gramian else 'it'} takes at most {most} tasks, got {num_tasks}"


def _choose(device: torch.device, num_tasks: int, gramian: bool) -> Backend:
    *kernels, last = CHOICE.get(device.type, ("eager",))
    reasons = [] if kernels or device.type == "meta" else [f"there are no kernels for {device.type} tensors"]
    for name in kernels:
        backend = get(name)
        reason = _missing(name, device) or _too_many(backend, num_tasks, gramian)
        if reason is None:
            return backend
        reasons.append(f"the {name} backend is not available for {device} tensors ({reason})")
    if reasons:
        warnings.warn(  # once: the choice is cached
            f"dbmtl_kernels: {'; '.join(reasons)}; using the slower {last} backend", RuntimeWarning, stacklevel=2
        )
    return get(last)


def clear_cache() -> None:
    """Forget what was chosen, for tests that change what there is to choose from."""
    _resolve.cache_clear()
    _able.clear()
