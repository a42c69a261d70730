"""Which implementation serves a tensor. A backend is a module with the functions of `Backend`."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from . import cuda, eager, native, triton
from .engine_step import EngineStep

NAMES = ("native", "triton", "cuda", "eager")
# For each type of device, the first that can serve; "auto" says why if it is the last.
CHOICE = {"cpu": ("native", "eager"), "cuda": ("triton", "cuda", "eager")}
ENVIRONMENT = "DBMTL_BACKEND"


class Backend(Protocol):
    """What `ops` calls. Arguments are checked and contiguous by then; sizes and dtypes agree."""

    @staticmethod
    def balance_(
        grads: Tensor, ema: Tensor, beta: float, eps: float, scale: str, constant: float, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """See `functional.balance_`."""

    @staticmethod
    def accumulate_(
        row: Tensor,
        sumsq: Tensor,
        grads: list[Tensor | None],
        segments: Tensor,
        decay: float,
        gain: float,
        loss_scale: Tensor | None,
        seed: int | None,
    ) -> None:
        """See `ops.accumulate_`."""

    @staticmethod
    def combine_out(rows: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
        """See `ops.combine_out`."""

    @staticmethod
    def balance_rows_(step: EngineStep) -> None:
        """See `ops.balance_rows_`."""

    @staticmethod
    def gramian(rows: Tensor) -> Tensor:
        """See `ops.gramian`."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why this backend cannot serve tensors on ``device``; None if it can."""

    @staticmethod
    def gathers_early(device: torch.device) -> bool:
        """Whether `accumulate_` is best called while a backward pass runs, a few gradients at a time."""


def get(name: str) -> Backend:
    """The backend called ``name``, whether it can serve or not."""
    modules: dict[str, ModuleType] = {"native": native, "triton": triton, "cuda": cuda, "eager": eager}
    return cast(Backend, modules[name])


def resolve(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or for "auto" the one that ``DBMTL_BACKEND`` or the device asks for.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot serve this device, with the reason.
    """
    return _resolve(name, os.environ.get(ENVIRONMENT, "auto") if name == "auto" else name, device.type)


@cache
def _resolve(argument: str, name: str, device_type: str) -> Backend:
    device = torch.device(device_type)
    if name == "auto":
        return _choose(device)
    source = f"{ENVIRONMENT}={name}" if argument == "auto" else f"backend={name!r}"
    if name not in NAMES:
        raise ValueError(f"unknown backend: {source}; known: 'auto', {', '.join(map(repr, NAMES))}")
    backend = get(name)
    reason = backend.missing(device)
    if reason is not None:
        raise RuntimeError(f"{source} was asked for but cannot serve tensors on {device_type!r}: {reason}")
    return backend


def _choose(device: torch.device) -> Backend:
    *kernels, last = CHOICE.get(device.type, ("eager",))
    reasons = []
    for name in kernels:
        reason = get(name).missing(device)
        if reason is None:
            return get(name)
        reasons.append(f"the {name} backend is not available for {device.type} tensors ({reason})")
    if reasons:
        warnings.warn(  # once: the choice is cached
            f"dbmtl_kernels: {'; '.join(reasons)}; using the slower {last} backend", RuntimeWarning, stacklevel=2
        )
    return get(last)


def clear_cache() -> None:
    """Forget what was chosen, for tests that change what there is to choose from."""
    _resolve.cache_clear()
