"""DBMTL: what a user touches. Runs the K backward passes and keeps the books of steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import backends, checkpoint, checks
from . import losses as loss_values
from .attachment import Attachment
from .buffer import Coefficients, RowUpdate, TaskGradientBuffer
from .gradients import Flats, Kept, SharedGradients
from .layout import ParameterLayout
from .rounding import update_seed

STATE_VERSION = 2


class DBMTL:
    """Dual-balancing multi-task learning (DB-MTL) for any PyTorch training loop.

    In step k, with theta the P shared parameters and K losses::

        g_t  = grad_theta log(loss_t + eps)
        m_t  = beta_k * m_t + (1 - beta_k) * g_t          beta_k = beta / k ** beta_sigma, m_t = 0 at the start
        grad = alpha * sum_t m_t / (||m_t|| + eps)        alpha = max_t ||m_t||

    ``grad`` goes to the shared parameters' ``.grad`` (added to what is there, as autograd would); every other
    parameter gets the plain gradient of the sum of the log-losses. Source: arXiv 2308.12029, Algorithm 1.

    A *step* is one update of the EMA. By itself, each `backward` (each `balance`, with `task`) is a step. After
    ``attach(optimizer)`` everything up to ``optimizer.step()`` is one step, and each backward in it adds to the
    task gradients and leaves the balanced gradient so far in ``.grad``.

    Args:
        shared_parameters: leaf tensors on one device, dense, each once, requiring grad; P elements in all. Dtypes
            may differ.
        num_tasks: K >= 1.
        beta: forgetting rate in [0, 1).
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: > 0, in the logarithm and added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min", or a number.
        log_transform: balance the logs of the losses given. False takes the losses as they are. Does not concern
            `task`, where the caller runs backward.
        state_dtype: dtype of the EMA: float32, bfloat16 or float64. Memory held: (K + 1) P elements.
        backend: "auto", or a backend by name.
        seed: of the stochastic rounding of a bfloat16 state (`rounding`); None rounds it to nearest.

    Raises:
        ValueError: a value out of range, or parameters that are empty, repeated, not leaf or not requiring grad.
        TypeError: a value or dtype of the wrong kind.
        RuntimeError: a backend asked for by name that cannot serve these parameters.
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
        seed: int | None = 0,
    ) -> None:
        self.num_tasks = checks.check_num_tasks(num_tasks)
        self.beta = checks.check_beta(beta)
        self.beta_sigma = checks.check_beta_sigma(beta_sigma)
        self.eps = checks.check_eps(eps)
        self.scale = checks.check_scale(scale)
        self.log_transform = log_transform
        layout = ParameterLayout(shared_parameters, state_dtype)
        backends.resolve(backend, layout.device)
        self.buffer = TaskGradientBuffer(layout, num_tasks, backend)
        self._grads = SharedGradients(self.buffer)
        self._attachment: Attachment | None = None
        self._inside: int | None = None  # the task whose context is open

        self._step = 0
        self._open = False  # a step has begun and not ended
        self._seen = [False] * num_tasks  # tasks that have a gradient in this step
        self._pending: set[int] = set()  # tasks entered since the last balance
        self._loss_scale: Tensor | None = None  # the factor that this step's gradients carry
        self._reported = torch.float64 if state_dtype == torch.float64 else torch.float32
        checks.check_seed(seed)
        self.seed = seed if state_dtype == torch.bfloat16 else None
        self._updates = 0  # of any row, each with random numbers of its own
        self._fresh = True  # nothing was balanced yet in this step

    @property
    def step(self) -> int:
        """Number of EMA updates begun."""
        return self._step

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the task gradients (their EMA) at the last balance, on the device, without a sync.

        float32, or float64 with a float64 state. Not finite where the gradient was not.
        """
        return self.buffer.norms.to(self._reported, copy=True)

    @property
    def weights(self) -> Tensor:
        """(K,) weights of the task gradients at the last balance, on the device, without a sync."""
        return self.buffer.weights.to(self._reported, copy=True)

    @property
    def nonfinite_steps(self) -> Tensor:
        """(K,) int64: in how many steps each task's gradient was not finite."""
        return self.buffer.nonfinite_steps

    def __call__(self, losses: Sequence[Tensor] | Tensor, *, retain_graph: bool = False) -> Tensor:
        """A scalar whose ``backward()`` is the balanced backward.

        Its value is the sum of the log-losses. The gradient that arrives at it is the factor by which the caller
        scaled the loss (a GradScaler's scale, 1 / accumulation steps): the task gradients are computed with it,
        the state is kept without it, ``.grad`` comes out with it. Under ``torch.no_grad()`` only the value.

        Args:
            losses: K scalars, as a sequence or a (K,) tensor, each with a graph. Prefer a sequence: in the one graph
                of a tensor every pass runs through every loss, and a NaN in one reaches them all.
            retain_graph: keep the graphs of the losses, for another backward through them.

        Raises:
            ValueError: the number of losses is not K; one is not a scalar; one is <= -eps and has no log (seen on a
                CPU only: elsewhere it would take a sync, and gives NaN, which the state survives).
            TypeError: one is not a floating-point tensor.
            RuntimeError: one has no graph; a `task` context is open.
        """
        scalars = loss_values.check(losses, self.num_tasks, self.eps if self.log_transform else None)
        value = loss_values.total(scalars, self.eps if self.log_transform else None)
        if not torch.is_grad_enabled():
            return value
        loss_values.check_graphs(scalars)
        anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)

        def run(factor: Tensor) -> None:
            self._run(scalars, loss_values.factor_or_none(factor), retain_graph)

        out: Tensor = loss_values.BalancedLoss.apply(anchor, value, run, retain_graph)  # type: ignore[no-untyped-call]
        return out

    def backward(self, losses: Sequence[Tensor] | Tensor, *, retain_graph: bool = False) -> None:
        """``balancer(losses).backward()``, named. Arguments and errors as for `__call__`."""
        scalars = loss_values.check(losses, self.num_tasks, self.eps if self.log_transform else None)
        loss_values.check_graphs(scalars)
        self._run(scalars, None, retain_graph)

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
        checks.check_task(index, self.num_tasks)
        self._refuse_inside("task()")
        if index in self._pending:
            raise RuntimeError(f"task {index} was entered already in this step; call balance() (or optimizer.step())")
        kept, balanced = self._take()
        self._inside = index
        try:
            yield
            scale = None if loss_scale is None else loss_values.factor_on(self.buffer.rows.device, loss_scale)
            self._finish(index, self._update(index, None if scale is None else loss_values.factor_or_none(scale)))
            self._pending.add(index)
        except BaseException:
            self._give_back(kept, balanced)
            raise
        else:
            self._grads.put_back(kept)
        finally:
            self._inside = None

    def balance(self) -> None:
        """Write the balanced gradient of the tasks entered with `task` to ``.grad``.

        Ends the step, unless attached: then ``optimizer.step()`` does (and calls this itself where need be).

        Raises:
            RuntimeError: no task was entered since the last `balance`, or a `task` context is open.
        """
        self._refuse_inside("balance()")
        if not self._pending:
            raise RuntimeError("balance() has nothing to balance: no task() was entered since the last step")
        kept, _ = self._take()
        self._write(kept)

    def attach(self, optimizer: torch.optim.Optimizer) -> Attachment:
        """Let ``optimizer.step()`` end a step, for gradient accumulation and for `task` without `balance`.

        A step that never comes (a GradScaler skipped it) is noticed when the gradients have been thrown away
        (``zero_grad``) by the next backward.

        Returns:
            a handle; its ``remove()`` detaches.

        Raises:
            RuntimeError: attached already.
            ValueError: the optimizer holds none of the shared parameters.
        """
        if self._attachment is not None:
            raise RuntimeError("already attached to an optimizer; call remove() on the handle that attach() returned")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self.buffer.layout.parameters):
            raise ValueError(f"{type(optimizer).__name__} holds none of the shared parameters")
        self._attachment = Attachment(optimizer, self._before_optimizer, self._end_step, self._detached)
        return self._attachment

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit. Tensors are references, as in PyTorch."""
        return {
            "version": STATE_VERSION,
            "parameters": self.buffer.layout.signature(),
            "step": self._step,
            "open": self._open,
            "seen": list(self._seen),
            "pending": sorted(self._pending),
            "updates": self._updates,
            "fresh": self._fresh,
            "loss_scale": self._loss_scale,
            "touched": list(self._grads.touched),
            "written": self._grads.written,
            **self._state_tensors(),
        }

    def _state_tensors(self) -> dict[str, Tensor]:
        names = ("rows", "sumsq", "broken", "norms", "weights", "nonfinite_steps")
        return {name: getattr(self.buffer, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, copying into this balancer's tensors.

        Raises:
            ValueError: a state of another version, of other parameters (number, dtypes, shapes, memory order), number
                of tasks or state dtype, or an incomplete one. Nothing is changed then.
        """
        checkpoint.check(state, self.state_dict(), self.buffer.layout)
        for name, tensor in self._state_tensors().items():
            tensor.copy_(state[name])
        self._step = int(state["step"])
        self._open = bool(state["open"])
        self._seen = [bool(x) for x in state["seen"]]
        self._pending = {int(x) for x in state["pending"]}
        self._updates = int(state["updates"])
        self._fresh = bool(state["fresh"])
        scale = state["loss_scale"]
        self._loss_scale = None if scale is None else scale.to(self.buffer.rows.device)
        self._grads.resume([bool(x) for x in state["touched"]], bool(state["written"]))

    def _run(self, losses: list[Tensor], factor: Tensor | None, retain_graph: bool) -> None:
        """K backward passes, each gathered into its row before the next, then the balanced gradient."""
        self._refuse_inside("backward()")
        if self._pending:
            raise RuntimeError(f"backward() while task(s) {sorted(self._pending)} wait for balance(); call it first")
        kept, balanced = self._take()
        last = self.num_tasks - 1
        update = self._update(0, factor)
        try:
            with self._grads.handing_over() as follow:
                for index, loss in enumerate(losses):
                    root = loss_values.scaled(loss, self.eps if self.log_transform else None, factor)
                    update = self._update(index, factor)
                    follow(update)
                    root.backward(retain_graph=retain_graph or index < last)
                    self._finish(index, update)
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
        self.buffer.layout.check_unchanged()
        balanced = self._grads.written
        kept, dropped = self._grads.take(self._fill, lambda: bool(self._overflow().any()))
        if dropped:
            self._end_step()
        return kept, balanced and not dropped

    @torch.no_grad()
    def _give_back(self, kept: Kept, balanced: bool) -> None:
        """After a failure: ``.grad`` as it was, as far as the rows still allow.

        Rows that were fed before the failure stay fed. A step with nothing else in it ends, so that nothing counts
        twice; in a longer one ``.grad`` is balanced anew.
        """
        if balanced:
            self._grads.put_back([None] * len(kept))
            self._write(kept)
        else:
            self._grads.put_back(kept)
            if not self._pending:
                self._end_step()

    def _update(self, task: int, factor: Tensor | None) -> RowUpdate:
        """The EMA update of one row; begins the step when the first gradient has come."""

        def begin() -> Coefficients:
            if not self._open:
                self._begin_step(factor)
            elif self._loss_scale is not None and loss_values.is_zero(self._loss_scale):
                self._loss_scale = factor  # nothing counted so far
            beta = self.beta / self._step**self.beta_sigma
            self._updates += 1
            seed = None if self.seed is None else update_seed(self.seed, self._updates)
            return Coefficients(1.0 if self._seen[task] else beta, 1.0 - beta, self._loss_scale, seed)

        return RowUpdate(self.buffer, task, begin)

    @torch.no_grad()
    def _finish(self, task: int, update: RowUpdate) -> None:
        self._grads.hand_over(update)
        self._seen[task] = True

    @torch.no_grad()
    def _write(self, kept: Kept) -> None:
        """Norms, weights, the balanced gradient, ``.grad``."""
        self._grads.write(kept, self._balance_into)
        self._pending.clear()
        if self._attachment is None:
            self._end_step()

    def _balance_into(self, flats: Flats, accumulate: bool) -> None:
        self.buffer.balance(
            flats, self.eps, self.scale, active=self._seen, loss_scale=self._loss_scale, fresh=self._fresh,
            accumulate=accumulate,
        )  # fmt: skip
        self._fresh = False

    def _fill(self, flats: Flats, accumulate: bool) -> None:
        """The balanced gradient once more, from the last weights, carrying the loss scale."""
        weights = self.buffer.weights
        if self._loss_scale is not None:
            weights = torch.where(self._overflow(), torch.nan, weights * self._loss_scale.to(weights.dtype))
        self.buffer.combine(weights, flats, accumulate)

    def _overflow(self) -> Tensor:
        """(K,) bool: tasks whose overflow a GradScaler must see.

        Factors up to 1 are those of accumulation, where nobody looks for it.
        """
        if self._loss_scale is None:
            return torch.zeros_like(self.buffer.broken)
        return self.buffer.broken & (self._loss_scale > 1)

    def _begin_step(self, factor: Tensor | None) -> None:
        self._open = True
        self._step += 1
        self._seen = [False] * self.num_tasks
        self._loss_scale = factor
        self._fresh = True

    def _end_step(self) -> None:
        self._open = False
        self._pending.clear()
        self._grads.let_go()

    def _before_optimizer(self) -> None:
        if not self._pending:
            return
        if self._loss_scale is not None:
            raise RuntimeError(
                "optimizer.step() would see gradients that carry the loss scale: with a GradScaler, call "
                "balancer.balance() before scaler.unscale_() and scaler.step()"
            )
        self.balance()

    def _detached(self) -> None:
        self._attachment = None
        self._end_step()

    def _refuse_inside(self, what: str) -> None:
        if self._inside is not None:
            raise RuntimeError(f"{what} inside the context of task({self._inside}); leave it first")
