"""The losses of a step: what they must be, and where each backward pass starts."""

from __future__ import annotations

import math
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.arguments import check_tasks
from ..ops.tasks import TaskNames
from ..rows.ranks import Ranks

# What PyTorch must be told of a compiled model that several backward passes go through. The tag, any word, is a part of
# the cache for such models alone: what was compiled for one pass is never taken from it.
SEVERAL_PASSES = (
    'torch._functorch.config.donated_buffer = False and torch.compiler.config.cache_key_tag = "several passes"'
)
# What PyTorch says of several backward passes over one graph, and what helps.
ADVICE = {
    "donated buffer": "the model was compiled for a single backward pass over each graph, and several tasks need one "
    f"each: set {SEVERAL_PASSES} before the first call of the compiled model",
    "mark a variable ready only once": "DistributedDataParallel was about to reduce the gradients of a single pass: "
    "name it, process_group=model, or run its forward pass (and the backward) inside `with model.no_sync():`; DBMTL "
    "averages the gradients itself. If one is named, call that one and none around the same parameters",
}
FSDP = "FSDP failed, as the error above says; if in one of its collectives: has another rank stopped?"

TOO_STEEP = (
    "1 / loss does not fit into float16, the dtype of a loss, and its gradient will be inf: compute losses in float32, "
    "as autocast does"
)
NOBODY = "every loss is None or a zero without a graph: a step needs at least one task"
NARROW = (torch.float16, torch.bfloat16)

# A loss, and the losses of a step, as people hold them; see `GradientBalancer.__call__`.
Loss = Tensor | float | None
Given = Mapping[str, Loss] | Iterable[Loss] | Tensor


# The rows of the balancer that each loss was backpropagated by, as long as it lives.
_claims: Any = WeakIdKeyDictionary()


class TaskLosses:
    """The losses of the tasks present in a step.

    Args:
        losses: K scalars: any iterable, a (K,) tensor, or a mapping from names; None or the number 0 where a task is
            absent. With ``tasks`` as many as those.
        tasks: the tasks they are of, by index or name; by default all.
        names: of the tasks; learnt from the first mapping.
        log_eps: the eps of the log transformation, None without it.

    Attributes:
        tasks: indices of those present.
        losses: their losses.
        log_eps: see above.
        half: whether any is narrower than float32.
        zeros: indices of those that count as absent because their loss is a zero without a graph.
        values: their values, float32 at least, without a graph: those that the logarithm is taken of.

    Raises:
        TypeError: not an iterable, or one without an order; a loss is not a floating-point tensor; a task is not an
            int or a name.
        ValueError: the number of losses is wrong; one is not a scalar; none is present; a task is out of range or
            there twice; a mapping has other names.
    """

    def __init__(
        self, losses: Given, tasks: Sequence[int | str] | None, names: TaskNames, log_eps: float | None
    ) -> None:
        self.log_eps, self._names = log_eps, names
        known = names.names
        try:
            indices, given = _in_order(losses, tasks, names)
            self._whole = losses if isinstance(losses, Tensor) else None
            self.zeros: list[int] = []
            self.half = False
            self.tasks: list[int] = []
            self.losses: list[Tensor] = []
            self.values: list[Tensor] = []
            for task, loss in zip(indices, given, strict=True):
                if loss is None:
                    continue
                if isinstance(loss, Real) and not isinstance(loss, bool) and loss == 0:
                    self.zeros.append(task)
                    continue
                if not isinstance(loss, Tensor):
                    raise TypeError(f"the loss of {names.describe(task)} must be a tensor, got {type(loss).__name__}")
                if loss.numel() != 1:
                    raise ValueError(
                        f"the loss of {names.describe(task)} must be a scalar, got shape {tuple(loss.shape)}"
                    )
                if not loss.is_floating_point():
                    raise TypeError(f"the loss of {names.describe(task)} must be floating point, got {loss.dtype}")
                self.tasks.append(task)
                self.losses.append(loss)
                value = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
                if value.dtype in NARROW:
                    value, self.half = value.float(), True
                self.values.append(value)
            if not self.tasks:
                raise ValueError(NOBODY)
        except BaseException:
            names.names = known  # those of a call that is refused are not learnt
            raise
        if not torch.is_grad_enabled():  # nor those of an evaluation
            names.names = known

    def share(self, ranks: Ranks, device: torch.device) -> None:
        """Make ``values`` the means over the ranks; one all-reduce on ``device``, no sync."""
        self.values = ranks.mean_losses(self.values, self.tasks, self._names.num_tasks, device)

    def check_logarithms(self) -> None:
        """Raise ValueError naming the first task whose loss has no logarithm (seen on a CPU only)."""
        eps = self.log_eps
        for task, value in zip(self.tasks, self.values, strict=True):
            if eps is not None and value.device.type == "cpu" and float(value) + eps <= 0.0:
                raise ValueError(
                    f"the loss of {self._names.describe(task)} is {float(value)}: a loss must be positive to have a "
                    "logarithm (log_transform=False takes losses as they are)"
                )

    def check_graphs(self, absent: Callable[[list[str]], None]) -> None:
        """Of losses that nothing can be backpropagated from, let those that are 0 count as absent, and tell which.

        Raises:
            RuntimeError: one is something else.
            ValueError: none is left.
        """
        missing = [index for index, loss in enumerate(self.losses) if not loss.requires_grad]
        for index in reversed(missing):
            task = self.tasks[index]
            if float(self.values[index]) != 0.0:  # a sync, in a rare case
                raise RuntimeError(f"the loss of {self._names.describe(task)} has no graph: it does not require grad")
            del self.tasks[index], self.losses[index], self.values[index]
            self.zeros.append(task)
        if missing and not self.tasks:
            raise ValueError(NOBODY)
        if self.zeros:
            absent([self._names.describe(task) for task in self.zeros])

    @torch.no_grad()
    def total(self) -> Tensor:
        """The sum of the losses, or of their logs, as a scalar without a graph; float32 at least."""
        eps, device = self.log_eps, self.values[0].device
        values = torch.stack([value.to(device) for value in self.values])
        return values.sum() if eps is None else torch.log(values + eps).sum()

    def claim(self, rows: Any) -> None:
        """These losses are backpropagated into these rows, and into all other leaves.

        Raises:
            RuntimeError: another balancer, of other parameters, was given the same.
        """
        for loss in self.losses if self._whole is None else [self._whole]:
            ref = _claims.get(loss)
            other = None if ref is None else ref()
            if other is not None and {id(p) for p in other.parameters} != {id(p) for p in rows.parameters}:
                raise RuntimeError(
                    "another balancer, of other parameters, was given the same losses: each would give the heads and "
                    "the other's parameters the plain gradient once more. Give all shared parameters to one balancer"
                )
            _claims[loss] = weakref.ref(rows)

    def plain(self, ranks: Ranks, once: Callable[[str, str], None]) -> Tensor:
        """The sum of the losses, or of their logs, with its graph; of several ranks the logs are of the means.

        ``values`` are those of the ranks together by then; ``once`` warns where a float16 loss is too small.
        """
        if self.half and any(map(self.overflows, range(len(self.tasks)))):
            once("half", TOO_STEEP)
        terms: list[Tensor] = []
        for loss, mean in zip(self.losses, self.values, strict=True):
            term = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
            if self.log_eps is not None and ranks.size > 1:
                term = LogOfMean.apply(term, mean.to(term), self.log_eps)  # type: ignore[no-untyped-call]
            elif self.log_eps is not None:
                term = torch.log(term + self.log_eps)
            terms.append(term.to(self.values[0].device))
        return torch.stack(terms).sum()

    def finite(self) -> list[bool | None]:
        """Whether each loss is finite; None off a CPU, where it would take a sync to know."""
        return [math.isfinite(float(x)) if x.device.type == "cpu" else None for x in self.values]

    @torch.no_grad()
    def smaller(self, index: int, loss_scale: Tensor | None) -> Tensor | None:
        """A power of two that the slope of a loss must carry to fit into the loss's dtype, float16; None if none.

        float16 ends at 65504: a loss of 1e-5 has a slope of 1e5.
        """
        if self.losses[index].dtype != torch.float16:
            return None
        value = self.values[index]
        slope = torch.ones_like(value) if self.log_eps is None else (value + self.log_eps).reciprocal()
        slope = slope if loss_scale is None else slope * loss_scale.to(slope.device)
        found = torch.ldexp(torch.ones_like(slope), -(torch.frexp(slope).exponent - 15).clamp(min=0))
        return None if found.device.type == "cpu" and float(found) == 1.0 else found

    def factors(self, finite: Sequence[bool | None], loss_scale: Tensor | None) -> list[Tensor | None] | None:
        """`smaller` of each loss that is not known to be not finite; None if none needs one."""
        found = [None if ok is False else self.smaller(index, loss_scale) for index, ok in enumerate(finite)]
        return None if all(factor is None for factor in found) else found

    def overflows(self, index: int, loss_scale: Tensor | None = None) -> bool:
        """Whether that is so, as far as the host knows."""
        return self.values[index].device.type == "cpu" and self.smaller(index, loss_scale) is not None

    def backward(
        self,
        index: int,
        loss_scale: Tensor | None,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,
        smaller: Tensor | None = None,
    ) -> None:
        """Backpropagate ``loss * slope``, with slope = loss_scale / (loss + eps), or loss_scale without the log.

        Under ``torch.no_grad()``.

        Into all leaves, or into ``inputs`` alone; times ``smaller``.

        ``backward(gradient=slope)`` would make torch import sympy: 40 MB and 0.4 s. What PyTorch says of a compiled
        graph that was run through once already is explained.
        """
        loss, value = self.losses[index], self.values[index]
        slope = torch.ones_like(value) if self.log_eps is None else (value + self.log_eps).reciprocal_()
        if loss_scale is not None:
            slope = slope * loss_scale.to(slope.device)
        slope = (slope if smaller is None else slope * smaller).to(loss.dtype)
        with torch.enable_grad():
            root = loss * slope
            root = root.reshape(()) if root.dim() else root
        try:
            root.backward(retain_graph=retain_graph, inputs=inputs)
        except RuntimeError as error:
            advice = _advice(error)
            if advice is None or "DBMTL" in str(error):  # collecting early, one of our own collectives may have failed
                raise
            raise RuntimeError(f"backward pass of task {self.tasks[index]}: {advice}") from error


def _in_order(losses: Given, tasks: Sequence[int | str] | None, names: TaskNames) -> tuple[list[int], list[Loss]]:
    """Tasks and their losses, as many of each; those of a mapping in the order of the tasks."""
    if isinstance(losses, tuple) and hasattr(losses, "_asdict"):  # a named tuple
        losses = losses._asdict() if tasks is None else losses
    if isinstance(losses, Mapping):
        if tasks is not None:
            raise TypeError("tasks= beside a mapping of names to losses, whose names tell the tasks")
        found = dict(zip(names.indices(losses.keys()), losses.values(), strict=True))
        return sorted(found), [found[task] for task in sorted(found)]
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                f"losses given as a tensor must have shape ({names.num_tasks},), got {tuple(losses.shape)}"
            )
        given: list[Loss] = list(losses.unbind())
    elif isinstance(losses, Iterable) and not isinstance(losses, (str, bytes, Set)):
        given = list(losses)
    else:
        raise TypeError(
            "losses must be scalars in an order, a 1-D tensor, or a mapping from names to scalars, got "
            f"{type(losses).__name__}"
        )
    return check_tasks(
        None if tasks is None else [names.index(task) for task in tasks], len(given), names.num_tasks
    ), given


def _advice(error: RuntimeError) -> str | None:
    """What helps against an error of PyTorch's own; None for any other, whatever it says.

    The frames that it came through tell: the last is that of who raised it.
    """
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if modules[-1].split(".")[0] != "torch":
        return None
    if modules[-1].startswith("torch.distributed.") and any(
        name.startswith("torch.distributed.fsdp.") for name in modules
    ):
        return FSDP
    return next((advice for words, advice in ADVICE.items() if words in str(error)), None)


def loss_scale_or_none(scale: Tensor) -> Tensor | None:
    """The factor by which a loss was scaled; one of exactly 1 is none (off a CPU it would take a sync to know)."""
    return None if scale.device.type == "cpu" and float(scale) == 1.0 else scale.detach().clone()


def loss_scale_on(device: torch.device, scale: float | Tensor) -> Tensor:
    """The factor as a tensor on the device; a number gets there without a wait."""
    if isinstance(scale, Tensor):
        return scale.to(device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((), float(scale), dtype=wide, device=device)


class SharedLog(NamedTuple):
    """What `functional.log_transform` does with a widened loss and eps; ``several``: the ranks must all do it."""

    call: Callable[[Tensor, float], Tensor]
    several: bool


# Inside the context of a `task`. A plain variable, as torch.compile cannot read a ContextVar.
shared_log: SharedLog | None = None


class LogOfMean(torch.autograd.Function):
    """log(mean + eps), where mean is that of ``loss`` over the ranks; its gradient is that of this rank's share.

    The average of those gradients over the ranks is the gradient of the log of the mean.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, mean: Tensor, eps: float) -> Tensor:
        """The same on every rank."""
        ctx.save_for_backward(mean + eps)
        return torch.log(mean + eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """1 / (mean + eps)."""
        (denominator,) = ctx.saved_tensors
        return grads[0] / denominator, None, None
