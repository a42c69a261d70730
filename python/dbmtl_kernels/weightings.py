"""Weightings: from the K x K Gramian of the task gradients to K weights. Ours, and what any other must be.

A weighting is any callable from a Gramian to weights; ten lines make one:

    class InverseNorms:  # every task gradient counts with length 1
        def __call__(self, gramian):
            return 1.0 / gramian.diagonal().sqrt()

    balancer = GradientBalancer(parameters, num_tasks=3, weighting=InverseNorms())
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from . import reference
from .ops.arguments import check_eps, check_finite, check_num_tasks, check_scale


class Weighting(Protocol):
    """Any callable from a Gramian to weights; TorchJD's weightings are such.

    It sees the tasks that have a finite gradient in the step, in the order of their indices. Of several ranks each
    calls it, and the weights of the first count, so that random ones agree. It may have besides:

    - ``begin(tasks, losses, again)``, called before each Gramian with what it is of: the indices of the tasks,
      ascending; a mapping from task to its last loss in the step (a scalar without a graph, a mean over the ranks, no
      logarithm taken; `GradientBalancer.task` knows none); and whether the step was weighed before and has more
      gradients now, so that what was learnt from fewer should not stay.
    - ``reindex_tasks(tasks)``, called when tasks come and go: the tasks now are these of the former ones, in this
      order, None being a new one.
    - ``num_tasks``, an int: the only number of tasks it serves.
    - ``state_dict()`` and ``load_state_dict(state)``: what goes into a checkpoint. If loading raises, the weighting is
      put back as it was and the checkpoint refused; values that would spoil later steps are for it to find.
    """

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """(k, k) symmetric, float32 (float64 of a float64 state), on the device of the gradients, to (k,) weights.

        The balanced gradient is ``sum_t weights[t] * gradient[t]``.
        """


class MaxNorm:
    """The weights of DB-MTL: ``alpha / (||g_t|| + eps)``. The engine computes them in its kernels, without a Gramian.

    Args:
        scale: alpha: "max" (the method), "mean", "median", "min" of the norms, or a number.
        eps: positive.

    Source: arXiv 2308.12029, Algorithm 1 and the ablation of alpha.
    """

    def __init__(self, scale: str | float = "max", eps: float = 1e-8) -> None:
        self.scale: str | float = scale
        self.eps: float = eps

    def __setattr__(self, name: str, value: Any) -> None:
        """Checked: both may be changed between steps, and are read in every one."""
        check = {"scale": check_scale, "eps": check_eps}.get(name)
        super().__setattr__(name, value if check is None else check(value))

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """(k, k) Gramian to (k,) weights."""
        return reference.weights(gramian.diagonal().clamp(min=0.0).sqrt(), self.eps, self.scale)


def is_max_norm(weighting: object) -> TypeGuard[MaxNorm]:
    """Whether it is a `MaxNorm`, and not a subclass, which may weigh otherwise.

    By its name: a reload of this module makes another class, and those of the class before are none the less.
    """
    kind = type(weighting)
    return (kind.__module__, kind.__qualname__) == (__name__, "MaxNorm")


class EqualWeights:
    """Every task counts the same.

    Args:
        total: the sum of the weights; by default the number of tasks, so that gradients are summed.

    Raises:
        ValueError: total is not finite.
    """

    def __init__(self, total: float | None = None) -> None:
        self.total = None if total is None else check_finite("total", total)

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """(k, k) Gramian to (k,) weights."""
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
        num_tasks = check_num_tasks(num_tasks)
        self.alpha, self.lr = check_finite("alpha", alpha), check_finite("lr", lr)
        if not lr > 0.0:
            raise ValueError(f"lr must be positive, got {lr}")
        for name, value in (("weights", 1.0), ("used", 1.0), ("start", torch.nan)):
            self.register_buffer(name, torch.full((num_tasks,), value, dtype=torch.float64, device="cpu"))
        self._seen: tuple[Tensor, Tensor] | None = None  # tasks and losses of the Gramian to come

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.weights.numel()

    def begin(self, tasks: Sequence[int], losses: Mapping[int, Tensor], again: bool) -> None:
        """Learn of the tasks and losses of the Gramian to come.

        Raises:
            RuntimeError: the loss of a task is not known.
        """
        missing = [task for task in tasks if task not in losses]
        if missing:
            raise RuntimeError(
                f"the weighting GradNorm needs the losses, and those of task(s) {missing} are not known: use "
                "balancer(losses) instead of task()"
            )
        if again:
            self.weights.copy_(self.used)
        else:
            self.used.copy_(self.weights)
        device = self.start.device
        index = torch.tensor(list(tasks), dtype=torch.int64, device=device)
        values = torch.stack([losses[task].to(device, torch.float64) for task in tasks])
        first = self.start[index]
        usable = values.isfinite() & (values > 0.0)
        self.start[index] = torch.where(first.isnan() & usable, values, first)
        self._seen = index, values

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """A new task begins with weight 1; then all are scaled to the sum K."""
        for name, new in (("weights", 1.0), ("used", 1.0), ("start", torch.nan)):
            old = getattr(self, name)
            setattr(self, name, torch.stack([old.new_tensor(new) if t is None else old[t] for t in tasks]))
        self.weights *= len(tasks) / self.weights.sum()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As that of any module.

        Raises:
            ValueError: weights that are not finite and positive, or first losses that are not, nor NaN.
        """
        for name, unknown in (("weights", False), ("used", False), ("start", True)):
            numbers = state_dict.get(name)
            if isinstance(numbers, Tensor):
                good = (numbers > 0) & numbers.isfinite() | (numbers.isnan() & unknown)
                if not bool(good.all()):
                    raise ValueError(f"{name} must be finite and positive, got {numbers.tolist()}")
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """(k, k) Gramian to the (k,) weights found; leaves those of the next step."""
        if self._seen is None:
            raise RuntimeError("GradNorm must see the losses (begin) before it weighs")
        (index, losses), self._seen = self._seen, None
        norms = gramian.diagonal().clamp(min=0.0).sqrt().to(self.used.device, torch.float64)
        weights = self.used[index]
        rates = losses / self.start[index]
        targets = (weights * norms).mean() * (rates / rates.mean()) ** self.alpha
        updated = (weights - self.lr * torch.sign(weights * norms - targets) * norms).clamp(min=1e-6)
        updated = updated * weights.sum() / updated.sum()
        self.weights[index] = torch.where(targets.isfinite().all(), updated, weights)
        return weights.to(gramian.device, gramian.dtype)


class IMTLLoss(nn.Module):
    """Impartial multi-task learning, the loss side (IMTL-L): ``exp(s_t) * loss_t - s_t`` with learnable s_t.

    Give the results to a balancer with ``log_transform=False``, and ``parameters()`` to the optimizer. The minimiser is
    ``s_t = -log(loss_t)``, where the gradient of the shared parameters is that of ``log(loss_t)``: the log
    transformation is this method with s_t at its best in every step. The constant -1 makes the minimum itself
    ``log(loss_t)``.

    Args:
        num_tasks: K.

    Attributes:
        scales: (K,) float32, the s_t; zeros at the start.

    Source: Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), section 3.2; arXiv 2308.12029, section on
    the equivalence.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        device = torch.get_default_device()  # as for the parameters of any module
        self.scales = nn.Parameter(torch.zeros(check_num_tasks(num_tasks), dtype=torch.float32, device=device))

    def forward(self, losses: Sequence[Tensor | None]) -> list[Tensor | None]:
        """K scalars, or None where a task is absent, to as many, in float32 at least.

        Raises:
            ValueError: the number of losses is not K.
        """
        if len(losses) != self.scales.numel():
            raise ValueError(f"expected {self.scales.numel()} losses, got {len(losses)}")
        return [
            None if loss is None else torch.exp(s) * loss.to(torch.promote_types(loss.dtype, s.dtype)) - s - 1.0
            for loss, s in zip(losses, self.scales, strict=True)
        ]


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
    if capturable and not is_max_norm(weighting):
        raise ValueError(f"capturable=True needs MaxNorm: {type(weighting).__name__} is called with a sync")
    return weighting


def state_of_weighting(weighting: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a weighting: the state_dict of one that has any."""
    return dict(weighting.state_dict()) if hasattr(weighting, "state_dict") else {}


def load_weighting(weighting: Any, state: dict[str, Any]) -> Callable[[], None]:
    """Take over what `state_of_weighting` gave, also into one that has not run yet.

    Returns:
        what puts it back as it was.

    Raises:
        ValueError: it is of another weighting. Nothing is changed then.
    """
    name = type(weighting).__name__
    if not hasattr(weighting, "load_state_dict"):
        if state:
            raise ValueError(f"the state is of a weighting that keeps {sorted(map(str, state))}, {name} keeps none")
        return lambda: None
    before, put_back = copy.deepcopy(state_of_weighting(weighting)), _snapshot(weighting)

    def undo() -> None:
        with suppress(Exception):
            weighting.load_state_dict(before)  # what it keeps in other objects than `_snapshot` knows
        put_back()

    try:
        _make_room(weighting, state)
        weighting.load_state_dict(state)
    except Exception as error:
        undo()
        raise ValueError(f"the state is not one of {name}: {type(error).__name__}: {error}") from error
    except BaseException:
        undo()
        raise
    return undo


def _make_room(weighting: Any, state: dict[str, Any]) -> None:
    """For buffers that a module makes when it first runs, as several of TorchJD's do."""
    if not isinstance(weighting, nn.Module):
        return
    reset = getattr(weighting, "reset", None)
    if callable(reset):
        reset()
    modules = dict(weighting.named_modules())
    for name, value in state.items():
        path, _, buffer = name.rpartition(".")
        if isinstance(value, Tensor) and path in modules and getattr(modules[path], buffer, value) is None:
            setattr(modules[path], buffer, torch.empty_like(value))


def _snapshot(root: Any) -> Callable[[], None]:
    """Note what an object is made of; what is returned puts it back, in place.

    That is its attributes, those of modules in it, and what is in lists, dicts, sets, tensors and arrays there.
    """
    seen: dict[int, tuple[Any, Any]] = {}  # with a reference, so that no id is used again
    todo = [root]
    while todo:
        x = todo.pop()
        if x is root or isinstance(x, nn.Module):
            x = getattr(x, "__dict__", None)
        if id(x) in seen:
            continue
        if isinstance(x, Tensor):
            seen[id(x)] = x, x.detach().clone()
        elif isinstance(x, np.ndarray):
            seen[id(x)] = x, x.copy()
        elif isinstance(x, (dict, list, set, deque, tuple)):
            seen[id(x)] = x, copy.copy(x)
            todo.extend(x.values() if isinstance(x, dict) else x)

    @torch.no_grad()
    def put_back() -> None:
        for x, content in seen.values():
            if isinstance(x, Tensor):
                if x.shape != content.shape or x.dtype != content.dtype:
                    x.data = content
                elif not torch.equal(x, content):
                    x.copy_(content)
            elif isinstance(x, np.ndarray):
                x[...] = content
            elif not isinstance(x, tuple):
                x.clear()
                x.extend(content) if isinstance(x, (list, deque)) else x.update(content)

    return put_back
