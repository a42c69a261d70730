"""GradientBalancer and DBMTL: what a user touches. The work is done by `engine.step`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint
from .engine.bookkeeping import Steps
from .engine.graphs import check_shared_parameters, find_shared_parameters
from .engine.losses import Given, TaskLosses
from .engine.step import Engine
from .monitor import Monitor
from .ops import arguments
from .rows import placement
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
        state_dtype: dtype of the rows: float32, bfloat16 (rounded to nearest) or float64. Memory held: (K + 1) P
            elements; of N replicas each holds K P / N + 2 P (3 P on a CPU), of a sharded model K + 1 times its shard.
        backend: "auto", or a backend by name.
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
        process_group: ProcessGroup | bool | None = None,
        capturable: bool = False,
    ) -> None:
        num_tasks = arguments.check_num_tasks(num_tasks)
        self.beta, self.beta_sigma = arguments.check_beta(beta), arguments.check_beta_sigma(beta_sigma)
        self.eps = arguments.check_eps(eps)
        self.log_transform = log_transform
        check_weighting(weighting, num_tasks, capturable)
        rows, ranks = placement.place(shared_parameters, num_tasks, state_dtype, backend, process_group)
        steps = Steps(num_tasks, self.beta, self.beta_sigma, rows.device if capturable else None)
        unnamed = process_group is None and not placement.is_distributed(rows.parameters)
        self._engine = Engine(rows, ranks, steps, weighting, unnamed)

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
        return self._engine.balanced_loss(present, retain_graph)

    def backward(self, losses: Given, *, tasks: Sequence[int] | None = None, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named. Arguments and errors as for `__call__`."""
        present = self._losses(losses, tasks)
        self._engine.prepare(present)
        self._engine.run(present, None, retain_graph)

    def task(self, index: int, *, loss_scale: float | Tensor | None = None) -> AbstractContextManager[None]:
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
        return self._engine.task(index, loss_scale, self.log_transform)

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task` to ``.grad``.

        Ends the step, unless attached: then ``optimizer.step()`` does (and calls this itself where need be).

        Raises:
            RuntimeError: no task was entered since the last `balance`, or a `task` context is open.
        """
        self._engine.balance()

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
        if self._engine.attached is not None:
            raise RuntimeError("already attached to an optimizer; call remove() on the handle that attach() returned")
        return Attachment(self, optimizer)

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

        float32, or float64 with a float64 state. Not finite where the gradient was not.
        """
        return self.monitor().norms

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients at the last balance, on the device, without a sync."""
        return self.monitor().weights

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's gradient was not finite."""
        return self.monitor().nonfinite_steps

    def monitor(self) -> Monitor:
        """Norms, weights, cosines and conflicts of the tasks, for a logger; see `Monitor`."""
        return Monitor(self._engine.rows, self._engine.steps)

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

    def set_beta(self, beta: float, beta_sigma: float) -> None:
        """Change the forgetting rate and its decay from the next step on; the count of steps goes on.

        Raises:
            ValueError: as for the class.
        """
        self.beta, self.beta_sigma = arguments.check_beta(beta), arguments.check_beta_sigma(beta_sigma)
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
        """
        checkpoint.load(state, self._engine)


class DBMTL(GradientBalancer):
    """Dual-balancing multi-task learning (DB-MTL) for any PyTorch training loop.

    In step k, with theta the P shared parameters and K losses::

        g_t  = grad_theta log(loss_t + eps)
        m_t  = beta_k * m_t + (1 - beta_k) * g_t          beta_k = beta / k ** beta_sigma, m_t = 0 at the start
        grad = alpha * sum_t m_t / (||m_t|| + eps)        alpha = max_t ||m_t||

    It is the `GradientBalancer` of the log-losses whose weighting is `MaxNorm`; see there for what a step is, for
    several ranks, and for what happens to ``.grad`` and to other parameters.

    Args:
        shared_parameters: leaf tensors, dense, each once, requiring grad; P elements in all. Dtypes and devices may
            differ. Those of ``fully_shard`` (DTensors) must be collected before the forward pass.
        num_tasks: K >= 1.
        beta: forgetting rate in [0, 1).
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: > 0, in the logarithm and added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min", or a number.
        log_transform: balance the logs of the losses given; False takes the losses as they are.
        state_dtype: dtype of the EMA: float32, bfloat16 or float64.
        backend: "auto", or a backend by name.
        process_group: the ranks that hold replicas of these parameters; None or False as for `GradientBalancer`.
        capturable: keep the step count and the coefficients on the device, for a CUDA graph.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradientBalancer`.

    Source: arXiv 2308.12029, Algorithm 1.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor],
        num_tasks: int,
        *,
        beta: float = 0.9,
        beta_sigma: float = 0.5,
        eps: float = 1e-8,
        scale: str | float = "max",
        log_transform: bool = True,
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        process_group: ProcessGroup | bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            shared_parameters,
            num_tasks,
            weighting=MaxNorm(scale, eps),
            beta=beta,
            beta_sigma=beta_sigma,
            eps=eps,
            log_transform=log_transform,
            state_dtype=state_dtype,
            backend=backend,
            process_group=process_group,
            capturable=capturable,
        )
        self.scale = scale

    @classmethod
    def from_losses(
        cls, losses: Sequence[Tensor], shared_parameters: Iterable[Tensor] | None = None, **options: Any
    ) -> DBMTL:
        """A balancer of what the losses of a first forward pass share; their graphs stay as they are.

        Args:
            losses: K scalars with a graph.
            shared_parameters: by default those that `graphs.find_shared_parameters` finds; if given, the losses must
                depend on each.
            options: as for the class.

        Raises:
            ValueError: the losses share nothing, or do not depend on a parameter that was given.
            ValueError, TypeError, RuntimeError: losses that `graphs.find_shared_parameters` refuses.

        Warns:
            UserWarning: a parameter that was given is reached from a single loss; see also there.
        """
        if shared_parameters is None:
            return cls(find_shared_parameters(losses, stacklevel=3), len(losses), **options)
        return cls(check_shared_parameters(losses, shared_parameters, stacklevel=3), len(losses), **options)


class Attachment:
    """What `GradientBalancer.attach` returns: ``remove()`` detaches, and so does leaving it as a context manager."""

    def __init__(self, balancer: GradientBalancer, optimizer: torch.optim.Optimizer) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # of Lightning's and Accelerate's wrappers, that which they wrap
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in balancer.shared_parameters):
            raise ValueError(f"{type(optimizer).__name__} holds none of the shared parameters")
        self._balancer = balancer
        engine = balancer._engine
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: engine.before_optimizer()),
            optimizer.register_step_post_hook(lambda *_: engine.end_step()),
        ]
        engine.attached = optimizer

    def remove(self) -> None:
        """Detach; once is enough, more does no harm."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._handles = []
            self._balancer._engine.attached = None
            self._balancer._engine.end_step()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
