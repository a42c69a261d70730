"""GradientBalancer: what a user touches. Runs the K backward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint, checks, placement
from . import losses as loss_values
from .attachment import Attachment
from .balanced import BalancedGradient
from .changes import Changes
from .gradients import Kept, SharedGradients
from .heads import HeadGradients
from .losses import Given, TaskLosses
from .readings import Readings
from .steps import Steps
from .updates import Update
from .weightings import Weighting, check_weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GradientBalancer(Changes, Readings):
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
            differ. Those of ``fully_shard`` (DTensors) must be collected before the forward pass.
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
        state_dtype: dtype of the rows: float32, bfloat16 or float64. Memory held: (K + 1) P elements; of N replicas
            each holds K P / N + 2 P (3 P on a CPU), of a sharded model K + 1 times its shard.
        backend: "auto", or a backend by name.
        seed: of the stochastic rounding of a bfloat16 state (`rounding`); None rounds it to nearest.
        process_group: the ranks that hold replicas of these parameters, each with a part of the batch. None: there is
            only this process, or the parameters are DTensors, whose mesh tells. False: leave each rank alone.
        capturable: keep the step count and the coefficients on the device, so that a whole step can be captured in a
            CUDA graph; a few small launches more. With `MaxNorm` only.

    Raises:
        ValueError: a value out of range, or parameters that are empty, repeated, not leaf or not requiring grad.
        TypeError: a value or dtype of the wrong kind.
        RuntimeError: a backend asked for by name that cannot serve these parameters; several ranks of which
            ``process_group`` says nothing.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor],
        num_tasks: int,
        *,
        weighting: Weighting,
        beta: float = 0.0,
        beta_sigma: float = 0.0,
        eps: float = 1e-8,
        log_transform: bool = False,
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        seed: int | None = 0,
        process_group: ProcessGroup | bool | None = None,
        capturable: bool = False,
    ) -> None:
        self.num_tasks = checks.check_num_tasks(num_tasks)
        self.beta = checks.check_beta(beta)
        self.beta_sigma = checks.check_beta_sigma(beta_sigma)
        self.eps = checks.check_eps(eps)
        self._weighting = check_weighting(weighting, self.num_tasks, capturable)
        self.log_transform = log_transform
        checks.check_seed(seed)
        self.seed = seed if state_dtype == torch.bfloat16 else None
        self.buffer, self._world = placement.place(
            shared_parameters, self.num_tasks, state_dtype, backend, process_group
        )
        self._alone = process_group is None and not placement.is_distributed(self.buffer.parameters)
        device = self.buffer.device if capturable else None
        self._steps = Steps(self.num_tasks, self.beta, self.beta_sigma, self.seed, device)
        balanced = BalancedGradient(self.buffer, self._steps, self._weighting, self._world)
        self._grads = SharedGradients(self.buffer, balanced, self._world)
        self._heads = HeadGradients(self.buffer.parameters, self._world, self.buffer.device)
        self._attachment: Attachment | None = None
        self._reported = torch.float64 if state_dtype == torch.float64 else torch.float32

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
        present = TaskLosses(losses, tasks, self.num_tasks, self.eps if self.log_transform else None)
        if not torch.is_grad_enabled():
            present.check_logarithms()
            return present.total()
        self._share(present)
        value = present.total()
        anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)

        def run(factor: Tensor) -> None:
            self._run(present, loss_values.factor_or_none(factor), retain_graph)

        out: Tensor = loss_values.BalancedLoss.apply(anchor, value, run, retain_graph)  # type: ignore[no-untyped-call]
        return out

    def backward(self, losses: Given, *, tasks: Sequence[int] | None = None, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named. Arguments and errors as for `__call__`."""
        present = TaskLosses(losses, tasks, self.num_tasks, self.eps if self.log_transform else None)
        self._share(present)
        self._run(present, None, retain_graph)

    @contextmanager
    def task(self, index: int, *, loss_scale: float | Tensor | None = None) -> Iterator[None]:
        """Whatever is backpropagated inside counts as the gradient of task ``index``.

        Run ``log_transform(loss).backward()`` inside, once or more, then the next task; then `balance` (or
        ``optimizer.step()``, when attached). Tasks left out of a step keep their state and are left out of the sum.

        Args:
            index: 0 <= index < K.
            loss_scale: the factor by which the losses are scaled (``scaler.get_scale()``); see `__call__`. With it,
                `balance` must come before ``scaler.unscale_`` and ``scaler.step``.

        Raises:
            ValueError: the index is out of range.
            RuntimeError: the task was entered already since the last `balance`, or another context is open.
        """
        index = checks.check_task(index, self.num_tasks)
        self._steps.refuse_inside("task()")
        self._steps.refuse_entered(index)
        if self._alone:
            placement.refuse_unnamed_group()
        self._world.check_same(f"task {index}", self.buffer.device, f"the ranks are not all in task({index})")
        scale = None if loss_scale is None else loss_values.factor_on(self.buffer.device, loss_scale)
        update = self._update(index, None if scale is None else loss_values.factor_or_none(scale))
        kept, balanced = self._take()
        self._steps.inside = index
        try:
            touched = self._grads.touched
            with self._heads.averaging(touched, self._candidates()):
                with self._heads.sharing_logs(index, self.log_transform):
                    yield
                self._finish(index, update)
                self._steps.losses.pop(index, None)  # what is known is not that of this gradient
            self._steps.pending.add(index)
        except BaseException:
            with torch.no_grad():
                update.abandon()
            self._give_back(kept, balanced)
            raise
        else:
            self._grads.put_back(kept)
        finally:
            self._steps.inside = None

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task` to ``.grad``.

        Ends the step, unless attached: then ``optimizer.step()`` does (and calls this itself where need be).

        Raises:
            RuntimeError: no task was entered since the last `balance`, or a `task` context is open.
        """
        self._steps.refuse_inside("balance()")
        if not self._steps.pending:
            raise RuntimeError("balance() has nothing to balance: no task() was entered since the last step")
        kept, _ = self._take()
        self._write(kept)

    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Let ``optimizer.step()`` end a step, for gradient accumulation and for `task` without `balance`.

        A step that never comes (a GradScaler skipped it) is noticed when the gradients have been thrown away
        (``zero_grad``) by the next backward.

        Args:
            optimizer: any, also one that Lightning or Accelerate has wrapped.

        Returns:
            a handle; its ``remove()`` detaches.

        Raises:
            RuntimeError: attached already.
            ValueError: the optimizer holds none of the shared parameters.
        """
        if self._attachment is not None:
            raise RuntimeError("already attached to an optimizer; call remove() on the handle that attach() returned")
        hooks = (self._before_optimizer, self._end_step, self._detached)
        self._attachment = Attachment(optimizer, self.buffer.parameters, *hooks)
        return self._attachment

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit. Tensors are references, as in PyTorch.

        Of several ranks the rows are DTensors: ``torch.distributed.checkpoint`` saves and loads them with any number.
        """
        self.buffer.settle()
        if self.buffer.local:  # of several ranks one alone may ask for its state
            self._end_if_thrown_away()  # told by what is in .grad, which is not part of the state
        return checkpoint.state_of(self.buffer, self._steps, self._grads, self.weighting)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, copying into this balancer's tensors.

        Raises:
            ValueError: a state of another version, of other parameters (number, dtypes, shapes, memory order), number
                of tasks or state dtype, or an incomplete one. Nothing is changed then.
        """
        checkpoint.check(state, self.state_dict(), self.buffer)
        checkpoint.load(state, self.buffer, self._steps, self._grads, self._weighting)

    def _share(self, present: TaskLosses) -> None:
        """Check losses that will be backpropagated; those of several ranks become the means."""
        present.check_graphs()
        self._check_ranks()
        present.share(self._world, self.buffer.device)
        present.check_logarithms()

    def _check_ranks(self) -> None:
        if self._alone:
            placement.refuse_unnamed_group()
        elif self._world.size > 1:
            self._heads.refuse_synchronising_wrapper()

    def _candidates(self) -> list[Tensor]:
        """Parameters that an attached optimizer would step."""
        return [] if self._attachment is None else self._attachment.parameters()

    def _run(self, present: TaskLosses, factor: Tensor | None, retain_graph: bool) -> None:
        """A backward pass for each task, gathered into its row before the next, then the balanced gradient."""
        self._steps.refuse_inside("backward()")
        self._steps.refuse_pending()
        kept, balanced = self._take()
        last = len(present.tasks) - 1
        update = self._update(present.tasks[0], factor)
        try:
            touched = self._grads.touched
            with (
                self._grads.handing_over() as follow,
                self._heads.averaging(touched, self._candidates(), present.losses),
            ):
                for place, task in enumerate(present.tasks):
                    update = self._update(task, factor)
                    follow(update)
                    present.backward(place, factor, retain_graph or place < last)
                    self._finish(task, update)
                    self._steps.losses[task] = present.values[place]
                self._grads.check_released(len(present.tasks) == self.num_tasks)
        except BaseException:
            with torch.no_grad():
                update.abandon()
            self._give_back(kept, balanced)
            raise
        self._write(kept)

    @torch.no_grad()
    def _take(self) -> tuple[Kept, bool]:
        """Take every shared ``.grad`` away; a step whose gradients were thrown away ends here.

        Returns:
            what must be added to, and whether ``.grad`` held a balanced gradient of this step besides.
        """
        self.buffer.check_unchanged()
        balanced = self._grads.written
        kept, dropped = self._grads.take()
        if dropped:
            self._end_step()
        return kept, balanced and not dropped

    @torch.no_grad()
    def _give_back(self, kept: Kept, balanced: bool) -> None:
        """After a failure: ``.grad`` as it was, as far as the rows still allow.

        Rows that were fed before the failure stay fed. A step with nothing else in it ends, so that nothing counts
        twice; in a longer one ``.grad`` is balanced anew. Not with several ranks, as the others may not have failed and
        would not answer: there the step ends, and ``.grad`` has what others put there.
        """
        if balanced and self.buffer.local:
            self._grads.put_back([None] * len(kept))
            self._write(kept)
        else:
            self._grads.put_back(kept)
            if not (self._steps.pending and self.buffer.local):
                self._end_step()

    def _update(self, task: int, factor: Tensor | None) -> Update:
        """The EMA update of one row; begins the step when the first gradient has come."""
        return self.buffer.update(task, lambda: self._steps.coefficients(task, factor))

    @torch.no_grad()
    def _finish(self, task: int, update: Update) -> None:
        self._grads.hand_over(update)
        self._steps.seen[task] = True

    @torch.no_grad()
    def _write(self, kept: Kept) -> None:
        """Norms, weights, the balanced gradient, ``.grad``.

        Should the weighting raise, what was kept is put back and the step ends, as its rows are fed and would count
        again.
        """
        self.buffer.settle()
        try:
            self._grads.write(kept)
        except BaseException:
            self._grads.put_back(kept)
            self._end_step()
            raise
        self._steps.balanced()
        if self._attachment is None:
            self._end_step()

    def _end_if_thrown_away(self) -> None:
        if self._steps.open and self._grads.dropped():
            self._end_step()

    def _end_step(self) -> None:
        self._steps.end()
        self._grads.let_go()

    def _before_optimizer(self) -> None:
        if self._steps.pending:
            self._steps.refuse_scaled()
            self.balance()

    def _detached(self) -> None:
        self._attachment = None
        self._end_step()
