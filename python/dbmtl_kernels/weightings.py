"""Weightings: from the K x K Gramian of the task gradients to K weights. Ours, and what any other must be."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import checks
from .weighting import max_norm_weights


class Weighting(Protocol):
    """Any callable from a Gramian to weights; TorchJD's weightings are such.

    It sees the tasks that have a finite gradient in the step, in the order of their indices. Of several ranks each
    calls it, and the weights of the first count, so that random ones agree.
    """

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """(k, k) symmetric, float32 (float64 of a float64 state), on the device of the gradients, to (k,) weights.

        The balanced gradient is ``sum_t weights[t] * gradient[t]``.
        """


@runtime_checkable
class UsesLosses(Protocol):
    """A weighting that wants to see the losses of a step before its Gramian; `DBMTL.task` cannot give them."""

    def observe(self, losses: Tensor, tasks: Sequence[int], again: bool) -> None:
        """Called before each Gramian, of which it tells the tasks and their losses.

        Args:
            losses: (k,) without a graph, means over the ranks, no logarithm taken; in a step of several backward
                passes each task's last.
            tasks: their indices, ascending.
            again: the step was weighed before and has more gradients now; what was learnt from fewer should not stay.
        """


@runtime_checkable
class SeesTasks(Protocol):
    """A weighting that wants to know of which tasks its Gramian is."""

    def see(self, tasks: Sequence[int]) -> None:
        """Called before each Gramian with the indices of its tasks, ascending."""


@runtime_checkable
class KeepsTasks(Protocol):
    """A weighting with something to remember of each task, that must know when tasks come and go."""

    def keep(self, tasks: Sequence[int | None]) -> None:
        """Let the tasks be these of the former ones, in this order, None being a new one."""


class MaxNorm:
    """The weights of DB-MTL: ``alpha / (||g_t|| + eps)``. The engine computes them in its kernels, without a Gramian.

    Args:
        scale: alpha: "max" (the method), "mean", "median", "min" of the norms, or a number.
        eps: > 0.

    Source: arXiv 2308.12029, Algorithm 1 and the ablation of alpha.
    """

    def __init__(self, scale: str | float = "max", eps: float = 1e-8) -> None:
        self.scale = checks.check_scale(scale)
        self.eps = checks.check_eps(eps)

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """See `Weighting`."""
        return max_norm_weights(gramian.diagonal().clamp(min=0.0).sqrt(), self.eps, self.scale)


class EqualWeights:
    """Every task counts the same.

    Args:
        total: the sum of the weights; by default the number of tasks, so that gradients are summed.

    Raises:
        ValueError: total is not finite.
    """

    def __init__(self, total: float | None = None) -> None:
        self.total = None if total is None else _finite("total", total)

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """See `Weighting`."""
        k = gramian.shape[0]
        return gramian.new_full((k,), 1.0 if self.total is None else self.total / k)


class GradNorm(nn.Module):
    """GradNorm: task weights learnt so that all weighted gradients have norms that fit their training rates.

    With ``G_t = w_t ||g_t||``, ``G`` their mean, and ``r_t`` the inverse training rate ``loss_t / loss_t at the start``
    divided by its mean, a step weighs with the w it finds and leaves for the next one the w of one step of gradient
    descent on ``sum_t |G_t - G r_t ** alpha|`` (the targets held fixed), not below 1e-6, scaled to the sum it had (K in
    all). Norms come from the Gramian's diagonal, so no second backward pass is needed. Where that is not finite (all
    losses zero, or negative ones) the weights stay as they are.

    Args:
        num_tasks: K.
        alpha: strength of the pull towards equal training rates.
        lr: of the weights.

    Attributes:
        weights: (K,) float64, of all tasks, for the next step.
        used: (K,) float64, those of the last step.
        start: (K,) float64, the first losses that are finite and positive; NaN for tasks that had none yet.

    Raises:
        ValueError, TypeError: an argument.

    Source: Chen et al., arXiv 1711.02257, Algorithm 1.
    """

    weights: Tensor
    used: Tensor
    start: Tensor

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        num_tasks = checks.check_num_tasks(num_tasks)
        self.alpha, self.lr = _finite("alpha", alpha), _finite("lr", lr)
        if not lr > 0.0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.register_buffer("weights", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("used", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("start", torch.full((num_tasks,), torch.nan, dtype=torch.float64))
        self._seen: tuple[Tensor, Tensor] | None = None  # tasks and losses of the Gramian to come

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.weights.numel()

    def observe(self, losses: Tensor, tasks: Sequence[int], again: bool) -> None:
        """See `UsesLosses`."""
        if again:
            self.weights.copy_(self.used)
        else:
            self.used.copy_(self.weights)
        index = torch.as_tensor(list(tasks), device=self.start.device)
        values = losses.to(self.start.device, torch.float64)
        first = self.start[index]
        usable = values.isfinite() & (values > 0.0)
        self.start[index] = torch.where(first.isnan() & usable, values, first)
        self._seen = index, values

    def keep(self, tasks: Sequence[int | None]) -> None:
        """See `KeepsTasks`. A new task begins with weight 1; then all are scaled to the sum K."""
        for name, new in (("weights", 1.0), ("used", 1.0), ("start", torch.nan)):
            old = getattr(self, name)
            setattr(self, name, torch.stack([old.new_tensor(new) if t is None else old[t] for t in tasks]))
        self.weights *= len(tasks) / self.weights.sum()

    def forward(self, gramian: Tensor, /) -> Tensor:
        """See `Weighting`."""
        if self._seen is None:
            raise RuntimeError("GradNorm must observe the losses before it weighs")
        (index, losses), self._seen = self._seen, None
        norms = gramian.diagonal().clamp(min=0.0).sqrt().to(self.used.device, torch.float64)
        weights = self.used[index]
        rates = losses / self.start[index]
        targets = (weights * norms).mean() * (rates / rates.mean()) ** self.alpha
        updated = (weights - self.lr * torch.sign(weights * norms - targets) * norms).clamp(min=1e-6)
        updated = updated * weights.sum() / updated.sum()
        self.weights[index] = torch.where(targets.isfinite().all(), updated, weights)
        return weights.to(gramian.device, gramian.dtype)


def check_weighting(weighting: Weighting, num_tasks: int, capturable: bool) -> Weighting:
    """Return the weighting, if it serves so many tasks.

    Raises:
        TypeError: it cannot be called.
        ValueError: it was made for another number of tasks, or cannot be captured.
    """
    if not callable(weighting) or isinstance(weighting, type):
        raise TypeError(f"weighting must be a callable from a Gramian to weights, got {weighting!r}")
    made_for = getattr(weighting, "num_tasks", num_tasks)
    if isinstance(made_for, int) and made_for != num_tasks:
        raise ValueError(f"{type(weighting).__name__} is for {made_for} tasks, the balancer for {num_tasks}")
    if capturable and type(weighting) is not MaxNorm:
        raise ValueError(f"capturable=True needs MaxNorm: {type(weighting).__name__} is called with a sync")
    return weighting


def state_of_weighting(weighting: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a weighting: the state_dict of one that has any."""
    return dict(weighting.state_dict()) if hasattr(weighting, "state_dict") else {}


def load_weighting(weighting: Any, state: dict[str, Any]) -> None:
    """Take over what `state_of_weighting` gave, also into one that has not run yet.

    Raises:
        ValueError: it is of another weighting. Nothing is changed then.
    """
    if not hasattr(weighting, "load_state_dict"):
        if state:
            raise ValueError(f"the state is of a weighting that keeps {sorted(state)}, {_name(weighting)} keeps none")
        return
    before = copy.deepcopy(state_of_weighting(weighting))
    try:
        _load(weighting, state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        _load(weighting, before)
        raise ValueError(f"the state is not one of {_name(weighting)}: {error}") from error


def _load(weighting: Any, state: dict[str, Any]) -> None:
    if isinstance(weighting, nn.Module):
        reset = getattr(weighting, "reset", None)
        if callable(reset):
            reset()
        for name, value in state.items():
            _make_room(weighting, name, value)
    weighting.load_state_dict(state)


def _make_room(module: nn.Module, name: str, value: Any) -> None:
    """For a buffer that a module makes when it first runs, as several of TorchJD's do."""
    path, _, buffer = name.rpartition(".")
    owner = dict(module.named_modules()).get(path)
    if owner is not None and buffer in owner._buffers and owner._buffers[buffer] is None:
        setattr(owner, buffer, torch.empty_like(value))


def _name(weighting: Any) -> str:
    return type(weighting).__name__


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
