"""GradientBalancer: what a user touches. The work is done by `engine.step`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from . import recipe
from .attachment import Attachment, check_held, watch_optimizers
from .engine.backward import balanced_loss
from .engine.bookkeeping import Settings
from .engine.losses import Given, TaskLosses
from .monitor import Watched
from .ops import arguments
from .ops.tasks import TaskNames, TaskWeights
from .recipe import Adjustable, Parameters, Recipe, Shared
from .weightings import Weighting, check_weighting, is_max_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """`torch.compiler.disable`, which is imported only where a compiler is: it takes 40 MB and 0.4 s."""
    disabled: list[Any] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(Function, call)


class GradientBalancer(Adjustable, Watched):
    """Balances the gradients that K tasks have of shared parameters, by any weighting, in any PyTorch training loop.

    With theta the P shared parameters and K losses, in step k:

        g_t  = grad_theta loss_t                          or of log(loss_t + eps), with log_transform
        m_t  = beta_k * m_t + (1 - beta_k) * g_t          beta_k = beta / k ** beta_sigma; m_t = g_t with beta = 0
        w    = weighting(M M^T)                           M: the K x P matrix of the m_t
        grad = sum_t w_t * m_t

    ``grad`` goes to the shared parameters' ``.grad`` (added to what is there, as autograd would); every other
    parameter gets the plain gradient of the sum of the losses (or log-losses).

    A *step* is one update of the m_t. By itself, each `backward` (each `balance`, with `task`) is a step. After
    ``attach(optimizer)`` everything up to ``optimizer.step()`` is one step, and each backward in it adds to the
    task gradients and leaves the balanced gradient so far in ``.grad``.

    Several ranks do what one process would with the whole batch (docs/training.md). Every rank must take the same path.

    Args:
        shared_parameters: leaf tensors, dense, each once, requiring grad; P elements in all. Dtypes and devices may
            differ. Those of ``fully_shard`` (DTensors) must be collected before the forward pass. Or a module, for all
            its parameters that require grad: what is put into it later is noticed; or a single tensor; or pairs of name
            and tensor (``named_parameters()``), or a dict. Where there are names messages have them.
        num_tasks: K >= 1, or the K names of the tasks. The first dict of losses gives them names too.
        weighting: a callable from the (K, K) Gramian, on the device, to (K,) weights; see `weightings.Weighting`.
            TorchJD's Gramian weightings are such, as they are. `MaxNorm` needs no Gramian; any other takes a sync to
            leave out tasks whose gradient is not finite, another to check the weights, and one that solves on the host
            a K x K copy besides.
        beta: forgetting rate in [0, 1). With 0 no state outlives a step.
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: positive, in the logarithm.
        task_weights: K numbers >= 0 that the weights are multiplied by, or a function from the step, counted from 1, to
            them. (A constant factor of a loss cancels in its log.) Heads are left alone. Takes a sync on a GPU.
        log_transform: balance the logs of the losses given. False takes the losses as they are. With `task` the
            caller runs backward, on a ``log_transform(loss)`` or not.
        state_dtype: dtype of the rows: float32, bfloat16 (rounded to nearest) or float64. None: float64 if any shared
            parameter is, else float32. Memory held: (K + 1) P elements; of N replicas each holds K P / N + 2 P (3 P on
            a CPU), of a sharded model K + 1 times its shard.
        backend: "auto", or a backend by name.
        process_group: the ranks that hold replicas of these parameters, each with a part of the batch, or the model's
            DistributedDataParallel. None: there is only this process, or the parameters are DTensors, whose mesh tells.
            False: leave each rank alone.
        capturable: keep the step count and the coefficients on the device, for a CUDA graph of a step; `MaxNorm` only.
        nonfinite: what becomes of a finite loss whose gradient is not finite (a task whose loss is not finite sits out
            in any case). "skip": the task sits out. "propagate": ``.grad`` is NaN. None: it is passed on if the factor
            of the loss is above 1, as that of a GradScaler is, which must see it; else the task sits out.
        zero_gradients: "absent": a task whose gradient is exactly zero over all shared parameters counts as absent from
            the step. "count": as the letter of the algorithm has it, its average is scaled to full length.
        keep_rows: False, with ``beta=0`` and `MaxNorm` only: one row for all tasks, to which each gradient is added,
            divided by its norm, when its pass is over; the same balanced gradient from P numbers. A step is then one
            backward pass a task. A second `backward` within one (accumulation after `attach`), the Gramian, another
            beta, and a state_dict while tasks wait raise an error that names ``keep_rows=True``.

    Raises:
        ValueError: a value out of range, or parameters that are empty, repeated, not leaf or not requiring grad.
        TypeError: a value or dtype of the wrong kind.
        RuntimeError: a backend asked for by name that cannot serve these parameters; several ranks of which
            ``process_group`` says nothing.
    """

    def __init__(
        self,
        shared_parameters: Parameters,
        num_tasks: int | Collection[str],
        *,
        weighting: Weighting,
        beta: float = 0.0,
        beta_sigma: float = 0.0,
        eps: float = 1e-8,
        task_weights: TaskWeights | None = None,
        log_transform: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
        process_group: ProcessGroup | DistributedDataParallel | bool | None = None,
        capturable: bool = False,
        nonfinite: str | None = None,
        zero_gradients: str = "absent",
        keep_rows: bool = True,
    ) -> None:
        tasks = TaskNames(num_tasks)
        self._settings = Settings(
            arguments.check_beta(beta), arguments.check_beta_sigma(beta_sigma), arguments.check_eps(eps)
        )
        check_weighting(weighting, tasks.num_tasks, capturable)
        self._recipe = Recipe(
            state_dtype, backend, process_group, capturable,
            arguments.check_choice("nonfinite", nonfinite, recipe.NONFINITE),
            str(arguments.check_choice("zero_gradients", zero_gradients, recipe.ZERO_GRADIENTS)), keep_rows,
        )  # fmt: skip
        if not keep_rows and (beta > 0.0 or not is_max_norm(weighting)):
            what = f"beta={beta}" if beta > 0.0 else f"the weighting {type(weighting).__name__}"
            raise ValueError(f"{what} needs a row for each task: keep_rows=True")
        self._begin(Shared.of(shared_parameters), tasks, weighting)
        self.task_weights, self.log_transform = task_weights, log_transform

    def _begin(self, shared: Shared, tasks: TaskNames, weighting: Weighting, frozen_ok: bool = False) -> None:
        """Of a new balancer, and of a copy."""
        self._attachment: Attachment | None = None
        self._shared = shared
        self._engine = self._recipe.engine(shared, tasks, weighting, self._settings, frozen_ok)
        watch_optimizers(self._engine)

    # --- a step -----------------------------------------------------------------------------------------------

    @uncompiled
    def __call__(
        self, losses: Given, *, tasks: Sequence[int | str] | None = None, retain_graph: bool = False
    ) -> Tensor:
        """A scalar whose ``backward()`` is the balanced backward.

        Its value is the sum of the log-losses (of several ranks: of the logs of the mean losses). The gradient that
        arrives at it is the factor by which the caller scaled the loss (a GradScaler's scale, 1 / accumulation
        steps): the task gradients are computed with it, the state is kept without it, ``.grad`` comes out with it.
        Under ``torch.no_grad()`` only the value, of this rank's losses.

        Args:
            losses: K scalars with a graph: a dict from the tasks' names (in any order; what is missing is absent), any
                sequence or iterable, or a (K,) tensor. None for a task that is absent, as 0.0 and a zero without a
                graph are. Prefer scalars to a tensor: in its one graph every pass runs through every loss, and a NaN in
                one reaches them all.
            tasks: the tasks that the losses are of, by index or name, if not all. Absent tasks keep their state and
                have no say.
            retain_graph: keep the graphs of the losses, for another backward through them.

        Raises:
            ValueError: the number of losses is wrong, or all are None; one is not a scalar; a task is out of range or
                there twice; a dict has other names than the tasks; a loss is <= -eps and has no log (seen on a CPU
                only: elsewhere it would take a sync, and gives NaN, which the state survives).
            TypeError: a loss is not a floating-point tensor.
            RuntimeError: one that is not 0 has no graph; another balancer, of other parameters, was given these losses
                (heads would count twice: give all shared parameters to one); a `task` context is open; several ranks of
                which the balancer was told nothing, or a DistributedDataParallel outside its ``no_sync()``; a
                collective failed.
        """
        settings, steps = self._settings, self._engine.steps
        present = TaskLosses(losses, tasks, steps.tasks, settings.eps if settings.log_transform else None)
        if not torch.is_grad_enabled():
            present.check_logarithms()
            return present.total()
        if not self._settings.enabled:
            return self._engine.plain(present)
        self._engine.prepare(present)
        return balanced_loss(self._engine, present, retain_graph)

    @uncompiled
    def backward(self, losses: Given, *, tasks: Sequence[int | str] | None = None, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named. Arguments and errors as for `__call__`."""
        settings, steps = self._settings, self._engine.steps
        present = TaskLosses(losses, tasks, steps.tasks, settings.eps if settings.log_transform else None)
        if not settings.enabled:
            self._engine.plain(present).backward(retain_graph=retain_graph)
            return
        self._engine.prepare(present)
        self._engine.run(present, None, retain_graph)

    def task(self, index: int | str, *, loss_scale: float | Tensor | None = None) -> AbstractContextManager[None]:
        """Whatever is backpropagated inside counts as the gradient of task ``index``.

        Run ``log_transform(loss).backward()`` inside, once or more, then the next task. When every task was entered the
        balanced gradient is written at once. Otherwise call `balance` after the last: whoever steps before it, attached
        or not, gets an error. Tasks left out of a step keep their state and are left out of the sum.

        Args:
            index: 0 <= index < K, or the task's name.
            loss_scale: the factor by which the losses are scaled (``scaler.get_scale()``); see `__call__`.

        Raises:
            ValueError: the index is out of range.
            RuntimeError: the task was entered already since the last `balance`, another context is open, or another
                thread is within a step.
        """
        task = self._engine.steps.tasks.index(index)
        if not (self._settings.enabled or self._engine.steps.pending):
            self._engine.heads.refuse_without_average(self._engine.rows.parameters)
            return nullcontext()
        return self._engine.task(task, loss_scale, self._settings.log_transform)

    @uncompiled
    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task` to ``.grad``, if not all of them were.

        Ends the step, unless attached: then ``optimizer.step()`` does.

        Raises:
            RuntimeError: no task was entered since the last `balance`, or a `task` context is open.
        """
        if self._settings.enabled or self._engine.steps.pending:
            self._engine.balance()

    @contextmanager
    def no_update(self) -> Iterator[None]:
        """Inside, a backward is no update: gradients get the weights of the last step, and rows stay as they are.

        For a second gradient within a step, as SAM takes one. With w_t and m_t those of the last step:

            grad = sum_t w_t * ||m_t|| / ||g_t|| * g_t        g_t: of the new point; its norm that of the first such one
            grad = sum_t w_t * g_t                            with beta = 0

        so that every task has the share that it had in the step. It is added to ``.grad``. Of a closure that an
        attached optimizer calls more than once in a step (LBFGS), all calls but the first are such by themselves.
        """
        before = self._engine.frozen
        try:
            try:
                self._engine.frozen = True
                yield
            finally:
                self._engine.frozen = before
        finally:  # once more, should an interrupt have come just there
            self._engine.frozen = before

    def attach(self, *optimizers: torch.optim.Optimizer, closures_update: bool = False) -> Attachment:
        """Let ``optimizer.step()`` end a step, for gradient accumulation.

        A step that never comes (a GradScaler skipped it) is noticed when the gradients have been thrown away
        (``zero_grad``) by the next backward. Of several optimizers the first to step ends the step.

        Args:
            optimizers: those that together hold the shared parameters, also wrapped by Lightning or Accelerate.
            closures_update: every call of a closure in ``step(closure)`` is an update; see `no_update`.

        Returns:
            a handle; its ``remove()`` is `detach`.

        Raises:
            RuntimeError: attached already.
            ValueError: one of the optimizers holds none of the shared parameters.

        Warns:
            UserWarning: shared parameters that none of them holds; another balancer of the same parameters is attached
                to one of them.
        """
        self._attachment = Attachment(self._engine, optimizers, closures_update)
        return self._attachment

    def detach(self, discard: bool = False) -> None:
        """Undo `attach`; the step is over. Does nothing if not attached.

        Args:
            discard: throw away what tasks wait for a balance.

        Raises:
            RuntimeError: tasks wait for a balance.
        """
        if self._attachment is not None:
            self._attachment.remove(discard)

    # --- what may change between steps ------------------------------------------------------------------------

    def add_task(self, name: str | None = None) -> int:
        """Make room for one task more, with a row of zeros; the others keep theirs. Returns its index, the last.

        Args:
            name: of the task, where tasks have names.

        Raises:
            RuntimeError: within a step.
            TypeError, ValueError: no name where the others have one, or one that another has.
        """
        self._engine.reindex_tasks([*range(self.num_tasks), None], name)
        return self.num_tasks - 1

    def remove_task(self, index: int | str) -> None:
        """Forget a task, by index or name; those after it move up by one, all keep their rows.

        Raises:
            RuntimeError: within a step.
            ValueError: there is no such task, or it is the last one.
        """
        index = self._engine.steps.tasks.index(index)
        arguments.check_num_tasks(self.num_tasks - 1)
        self._engine.reindex_tasks([task for task in range(self.num_tasks) if task != index])

    def rebind(self, shared_parameters: Parameters) -> None:
        """Go on with other parameters: a layer was replaced, added, thawed or resized.

        Those that stay (the same tensors) keep their part of every task's average; new ones begin with zeros. Of
        several ranks all must call it.

        Args:
            shared_parameters: as for the class.

        Raises:
            RuntimeError: within a step.
            ValueError, TypeError: as for the class.

        Warns:
            UserWarning: shared parameters that no attached optimizer holds.
        """
        shared = Shared.of(shared_parameters)
        self._recipe.rebind(self._engine, shared, self.num_tasks)
        self._shared = shared
        if self._engine.attached:
            check_held(self._engine, self._engine.attached)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit. Tensors are references, as in PyTorch.

        Of several ranks the rows are DTensors: ``torch.distributed.checkpoint`` saves and loads them with any number.
        """
        from . import checkpoint

        return checkpoint.state_of(self._engine)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, copying into this balancer's tensors.

        That includes ``beta`` and what else may be set. Tasks that have names are told by them, in whatever order. Of
        several ranks all must call it, and if one refuses all do.

        Raises:
            ValueError: the state does not fit, or is damaged; the message begins with the path of the entry. Nothing is
                changed then.
            RuntimeError: the context of a `task` is open.
        """
        from . import checkpoint

        self._engine.turns.refuse_inside("load_state_dict()")
        order = checkpoint.load(state, self._engine)
        if order is not None:
            self._engine.reindex_tasks(list(order))
        self._engine.copied = False

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle goes on with, where this balancer is now; but it is not attached."""
        return recipe.pickled(self.__dict__, self._engine)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it anew."""
        self.__dict__.update(state["attributes"])
        weighting, kept = recipe.kept_in(state)
        self._begin(Shared.restored(state), state["tasks"], weighting, frozen_ok=True)
        if kept is not None:
            from . import checkpoint

            checkpoint.load(kept, self._engine)
        self._engine.copied = state["copied"]

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBalancer:
        """One of the copied parameters, not attached, whose averages begin with zeros and cost nothing until it trains.

        ``copy.load_state_dict(original.state_dict())`` gives it those of the original.
        """
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(recipe.copied_attributes(self.__dict__, memo))
        tasks, weighting = copy.deepcopy((self._engine.steps.tasks, self.weighting), memo)
        twin._begin(self._shared.copied(memo), tasks, weighting, frozen_ok=True)
        twin._engine.copied = self.step > 0 and self._recipe.keep_rows
        return twin
