"""GradientBalancer: what a user touches. The work is done by `engine.step`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .attachment import Attachment, check_held, watch_optimizers
from .engine.backward import balanced_loss
from .engine.losses import Given, TaskLosses
from .monitor import Monitor
from .ops import arguments
from .recipe import NONFINITE, ZERO_GRADIENTS, Recipe, Shared, copied_attributes, kept_in, pickled
from .weightings import MaxNorm, Weighting, check_weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GradientBalancer:
    """Balances the gradients that K tasks have of shared parameters, by any weighting, in any PyTorch training loop.

    With theta the P shared parameters and K losses, in step k::

        g_t  = grad_theta loss_t                          or of log(loss_t + eps), with log_transform
        m_t  = beta_k * m_t + (1 - beta_k) * g_t          beta_k = beta / k ** beta_sigma; m_t = g_t with beta = 0
        w    = weighting(M M^T)                           M: the K x P matrix of the m_t
        grad = sum_t w_t * m_t

    ``grad`` goes to the shared parameters' ``.grad`` (added to what is there, as autograd would); every other
    parameter gets the plain gradient of the sum of the losses (or log-losses).

    A *step* is one update of the m_t. By itself, each `backward` (each `balance`, with `task`) is a step. After
    ``attach(optimizer)`` everything up to ``optimizer.step()`` is one step, and each backward in it adds to the
    task gradients and leaves the balanced gradient so far in ``.grad``.

    Several ranks (see docs/training.md): the log is of the mean loss, the gradients are those of the mean loss, and
    the rows are sharded: N ranks do what one process would with the whole batch. Every rank must take the same path.

    Args:
        shared_parameters: leaf tensors, dense, each once, requiring grad; P elements in all. Dtypes and devices may
            differ. Those of ``fully_shard`` (DTensors) must be collected before the forward pass. Or a module, for all
            its parameters that require grad: messages then have names, and what is put into it later is noticed.
        num_tasks: K >= 1.
        weighting: a callable from the (K, K) Gramian, on the device, to (K,) weights; see `weightings.Weighting`.
            TorchJD's Gramian weightings are such, as they are. `MaxNorm` needs no Gramian; any other takes a sync to
            leave out tasks whose gradient is not finite, another to check the weights, and one that solves on the host
            a K x K copy besides.
        beta: forgetting rate in [0, 1). With 0 no state outlives a step.
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: > 0, in the logarithm.
        log_transform: balance the logs of the losses given. False takes the losses as they are. With `task` the
            caller runs backward, on a ``log_transform(loss)`` or not.
        state_dtype: dtype of the rows: float32, bfloat16 (rounded to nearest) or float64. Memory held: (K + 1) P
            elements; of N replicas each holds K P / N + 2 P (3 P on a CPU), of a sharded model K + 1 times its shard.
        backend: "auto", or a backend by name.
        process_group: the ranks that hold replicas of these parameters, each with a part of the batch. None: there is
            only this process, or the parameters are DTensors, whose mesh tells. False: leave each rank alone.
        capturable: keep the step count and the coefficients on the device, so that a whole step can be captured in a
            CUDA graph; a few small launches more. With `MaxNorm` only.
        nonfinite: what becomes of a finite loss whose gradient is not finite (a task whose loss is not finite sits out
            in any case). "skip": the task sits out. "propagate": ``.grad`` is NaN. None: it is passed on if the factor
            of the loss is above 1, as that of a GradScaler is, which must see it; else the task sits out.
        zero_gradients: "absent": a task whose gradient is exactly zero over all shared parameters counts as absent from
            the step. "count": as the letter of the algorithm has it, its average is scaled to full length.
        keep_rows: False, with ``beta=0`` and `MaxNorm` only: one row for all tasks, to which each gradient is added,
            divided by its norm, when its pass is over; the same balanced gradient from P numbers, however many tasks
            there are (for half-precision parameters they are float32 and live within a step). A step is then one
            backward pass a task. A second `backward` within one (accumulation after `attach`), the Gramian and what is
            made of it, and another beta raise an error that names ``keep_rows=True``; so does a state_dict while tasks
            wait for a balance.

    Raises:
        ValueError: a value out of range, or parameters that are empty, repeated, not leaf or not requiring grad.
        TypeError: a value or dtype of the wrong kind.
        RuntimeError: a backend asked for by name that cannot serve these parameters; several ranks of which
            ``process_group`` says nothing.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module,
        num_tasks: int,
        *,
        weighting: Weighting,
        beta: float = 0.0,
        beta_sigma: float = 0.0,
        eps: float = 1e-8,
        log_transform: bool = False,
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        capturable: bool = False,
        nonfinite: str | None = None,
        zero_gradients: str = "absent",
        keep_rows: bool = True,
    ) -> None:
        num_tasks = arguments.check_num_tasks(num_tasks)
        self.beta, self.beta_sigma = arguments.check_beta(beta), arguments.check_beta_sigma(beta_sigma)
        self.eps, self.log_transform = arguments.check_eps(eps), log_transform
        check_weighting(weighting, num_tasks, capturable)
        self._recipe = Recipe(
            state_dtype, backend, process_group, capturable, arguments.check_choice("nonfinite", nonfinite, NONFINITE),
            str(arguments.check_choice("zero_gradients", zero_gradients, ZERO_GRADIENTS)), keep_rows,
        )  # fmt: skip
        if not keep_rows and (self.beta > 0.0 or type(weighting) is not MaxNorm):
            what = f"beta={beta}" if self.beta > 0.0 else f"the weighting {type(weighting).__name__}"
            raise ValueError(f"{what} needs a row for each task: keep_rows=True")
        self._begin(Shared.of(shared_parameters), num_tasks, weighting)

    def _begin(self, shared: Shared, num_tasks: int, weighting: Weighting, frozen_ok: bool = False) -> None:
        """Of a new balancer, and of a copy."""
        self._attachment: Attachment | None = None
        self._shared = shared
        self._engine = self._recipe.engine(shared, num_tasks, weighting, (self.beta, self.beta_sigma), frozen_ok)
        watch_optimizers(self._engine)

    # --- a step -----------------------------------------------------------------------------------------------

    def __call__(self, losses: Given, *, tasks: Sequence[int] | None = None, retain_graph: bool = False) -> Tensor:
        """A scalar whose ``backward()`` is the balanced backward.

        Its value is the sum of the log-losses (of several ranks: of the logs of the mean losses). The gradient that
        arrives at it is the factor by which the caller scaled the loss (a GradScaler's scale, 1 / accumulation
        steps): the task gradients are computed with it, the state is kept without it, ``.grad`` comes out with it.
        Under ``torch.no_grad()`` only the value, of this rank's losses.

        Args:
            losses: K scalars, as a sequence or a (K,) tensor, each with a graph; None for a task that is absent.
                Prefer a sequence: in the one graph of a tensor every pass runs through every loss, and a NaN in one
                reaches them all.
            tasks: the tasks that the losses are of, if not all. Absent tasks keep their state and have no say.
            retain_graph: keep the graphs of the losses, for another backward through them.

        Raises:
            ValueError: the number of losses is wrong, or all are None; one is not a scalar; a task is out of range or
                there twice; a loss is <= -eps and has no log (seen on a CPU only: elsewhere it would take a sync, and
                gives NaN, which the state survives).
            TypeError: a loss is not a floating-point tensor.
            RuntimeError: one has no graph; a `task` context is open; several ranks of which the balancer was told
                nothing, or a DistributedDataParallel outside its ``no_sync()``; a collective failed.
        """
        present = self._losses(losses, tasks)
        if not torch.is_grad_enabled():
            present.check_logarithms()
            return present.total()
        self._engine.prepare(present)
        return balanced_loss(self._engine, present, retain_graph)

    def backward(self, losses: Given, *, tasks: Sequence[int] | None = None, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named. Arguments and errors as for `__call__`."""
        present = self._losses(losses, tasks)
        self._engine.prepare(present)
        self._engine.run(present, None, retain_graph)

    def task(self, index: int, *, loss_scale: float | Tensor | None = None) -> AbstractContextManager[None]:
        """Whatever is backpropagated inside counts as the gradient of task ``index``.

        Run ``log_transform(loss).backward()`` inside, once or more, then the next task. When every task was entered the
        balanced gradient is written at once. Otherwise call `balance` after the last: whoever steps before it, attached
        or not, gets an error. Tasks left out of a step keep their state and are left out of the sum.

        Args:
            index: 0 <= index < K.
            loss_scale: the factor by which the losses are scaled (``scaler.get_scale()``); see `__call__`.

        Raises:
            ValueError: the index is out of range.
            RuntimeError: the task was entered already since the last `balance`, another context is open, or another
                thread is within a step.
        """
        return self._engine.task(index, loss_scale, self.log_transform)

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task` to ``.grad``, if not all of them were.

        Ends the step, unless attached: then ``optimizer.step()`` does.

        Raises:
            RuntimeError: no task was entered since the last `balance`, or a `task` context is open.
        """
        self._engine.balance()

    @contextmanager
    def no_update(self) -> Iterator[None]:
        """Inside, a backward is no update: gradients get the weights of the last step, and rows stay as they are.

        For a second gradient within a step, as SAM takes one. With w_t and m_t those of the last step::

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

    def _losses(self, losses: Given, tasks: Sequence[int] | None) -> TaskLosses:
        return TaskLosses(losses, tasks, len(self._engine.steps.seen), self.eps if self.log_transform else None)

    # --- what it tells: copies, that later steps do not change ------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """K."""
        return self._engine.steps.num_tasks

    @property
    def shared_parameters(self) -> list[Tensor]:
        """The parameters that are balanced, in the order given."""
        return list(self._engine.rows.parameters)

    @property
    def weighting(self) -> Weighting:
        """What weighs the task gradients; another takes another balancer."""
        return self._engine.weighting

    @property
    def step(self) -> int:
        """Number of EMA updates begun; reading it is a sync if ``capturable``."""
        return self._engine.steps.count

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the task gradients (their EMA) at the last balance, on the device, without a sync.

        float32, or float64 with a float64 state. Not finite where the gradient was not; 0 where the loss was not, as
        its pass is not run then (on a CPU).
        """
        return self.monitor().norms

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients at the last balance, on the device, without a sync."""
        return self.monitor().weights

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's loss or gradient was not finite."""
        return self.monitor().nonfinite_steps

    def monitor(self) -> Monitor:
        """Norms, weights, cosines and conflicts of the tasks, for a logger; see `Monitor`."""
        return Monitor(self._engine)

    # --- what may change between steps ------------------------------------------------------------------------

    def add_task(self) -> int:
        """Make room for one task more, with a row of zeros; the others keep theirs. Returns its index, the last.

        Raises:
            RuntimeError: within a step.
        """
        self._engine.reindex_tasks([*range(self.num_tasks), None])
        return self.num_tasks - 1

    def remove_task(self, index: int) -> None:
        """Forget a task; those after it move up by one, all keep their rows.

        Raises:
            RuntimeError: within a step.
            ValueError: the index is out of range, or it is the last task.
        """
        index = arguments.check_task(index, self.num_tasks)
        arguments.check_num_tasks(self.num_tasks - 1)
        self._engine.reindex_tasks([task for task in range(self.num_tasks) if task != index])

    def rebind(self, shared_parameters: Iterable[Tensor] | nn.Module) -> None:
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

    def set_beta(self, beta: float, beta_sigma: float) -> None:
        """Change the forgetting rate and its decay from the next step on; the count of steps goes on.

        Raises:
            ValueError: as for the class; a beta above 0 where there is one row for all tasks.
        """
        beta, beta_sigma = arguments.check_beta(beta), arguments.check_beta_sigma(beta_sigma)
        if beta > 0.0 and not self._recipe.keep_rows:
            raise ValueError(f"beta={beta} needs a row for each task: make the balancer with keep_rows=True")
        self.beta, self.beta_sigma = beta, beta_sigma
        self._engine.steps.set_beta(self.beta, self.beta_sigma)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit. Tensors are references, as in PyTorch.

        Of several ranks the rows are DTensors: ``torch.distributed.checkpoint`` saves and loads them with any number.
        """
        return checkpoint.state_of(self._engine)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, copying into this balancer's tensors.

        Raises:
            ValueError: a state of another version, of other parameters (number, dtypes, shapes, memory order), number
                of tasks or state dtype, or an incomplete one. Nothing is changed then.
            RuntimeError: the context of a `task` is open.
        """
        self._engine.turns.refuse_inside("load_state_dict()")
        checkpoint.load(state, self._engine)
        self._engine.copied = False

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle goes on with, where this balancer is now; but it is not attached."""
        return pickled(self.__dict__, self._engine)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it anew."""
        self.__dict__.update(state["attributes"])
        weighting, kept = kept_in(state)
        self._begin(Shared.restored(state), state["num_tasks"], weighting, frozen_ok=True)
        if kept is not None:
            checkpoint.load(kept, self._engine)
        self._engine.copied = state["copied"]

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBalancer:
        """One of the copied parameters, not attached, whose averages begin with zeros and cost nothing until it trains.

        ``copy.load_state_dict(original.state_dict())`` gives it those of the original.
        """
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copied_attributes(self.__dict__, memo))
        twin._begin(self._shared.copied(memo), self.num_tasks, copy.deepcopy(self.weighting, memo), frozen_ok=True)
        twin._engine.copied = self.step > 0 and self._recipe.keep_rows
        return twin
