"""DBMTL: the method of the paper, as a balancer of the log-losses by their largest norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .balancer import GradientBalancer
from .engine.graphs import check_shared_parameters, find_shared_parameters
from .ops import arguments
from .ops.tasks import TaskWeights
from .recipe import Parameters, Shared
from .weightings import MaxNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


class DBMTL(GradientBalancer):
    """Dual-balancing multi-task learning (DB-MTL) for any PyTorch training loop.

    In step k, with theta the P shared parameters and K losses:

        g_t  = grad_theta log(loss_t + eps)
        m_t  = beta_k * m_t + (1 - beta_k) * g_t          beta_k = beta / k ** beta_sigma, m_t = 0 at the start
        grad = alpha * sum_t m_t / (||m_t|| + eps)        alpha = max_t ||m_t||

    It is the `GradientBalancer` of the log-losses whose weighting is `MaxNorm`; see there for what a step is, for
    several ranks, and for what happens to ``.grad`` and to other parameters.

    Args:
        shared_parameters: as for `GradientBalancer`: leaf tensors, or a module; P elements in all.
        num_tasks: K >= 1, or the K names of the tasks.
        beta: forgetting rate in [0, 1).
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: positive, in the logarithm and added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min", or a number.
        task_weights: K numbers >= 0, or a function from the step to them; see `GradientBalancer`.
        log_transform: balance the logs of the losses given; False takes the losses as they are.
        state_dtype: dtype of the EMA: float32, bfloat16 or float64; None as for `GradientBalancer`.
        backend: "auto", or a backend by name.
        process_group: the ranks that hold replicas of these parameters; None or False as for `GradientBalancer`.
        capturable: keep the step count and the coefficients on the device, for a CUDA graph.
        nonfinite: as for `GradientBalancer`.
        zero_gradients: as for `GradientBalancer`.
        keep_rows: with ``beta=0`` keep a row for each task all the same: K P numbers more; see `GradientBalancer`.
            With another beta they are kept in any case.

    Raises:
        ValueError, TypeError, RuntimeError: as `GradientBalancer`.

    Source: arXiv 2308.12029, Algorithm 1.
    """

    def __init__(
        self,
        shared_parameters: Parameters,
        num_tasks: int | Collection[str],
        *,
        beta: float = 0.9,
        beta_sigma: float = 0.5,
        eps: float = 1e-8,
        scale: str | float = "max",
        task_weights: TaskWeights | None = None,
        log_transform: bool = True,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
        process_group: ProcessGroup | DistributedDataParallel | bool | None = None,
        capturable: bool = False,
        nonfinite: str | None = None,
        zero_gradients: str = "absent",
        keep_rows: bool = False,
    ) -> None:
        super().__init__(
            shared_parameters,
            num_tasks,
            weighting=MaxNorm(scale, eps),
            beta=beta,
            beta_sigma=beta_sigma,
            eps=eps,
            task_weights=task_weights,
            log_transform=log_transform,
            state_dtype=state_dtype,
            backend=backend,
            process_group=process_group,
            capturable=capturable,
            nonfinite=nonfinite,
            zero_gradients=zero_gradients,
            keep_rows=keep_rows or arguments.check_beta(beta) > 0.0,
        )

    @property
    def scale(self) -> str | float:
        """Alpha. To set it raises ValueError or TypeError as the class does; in force from the next balance on."""
        return cast(MaxNorm, self.weighting).scale

    @scale.setter
    def scale(self, scale: str | float) -> None:
        cast(MaxNorm, self.weighting).scale = scale

    @property
    def eps(self) -> float:
        """> 0, in the logarithm and added to the norms. To set it raises ValueError as the class does."""
        return self._settings.eps

    @eps.setter
    def eps(self, eps: float) -> None:
        cast(MaxNorm, self.weighting).eps = self._settings.eps = arguments.check_eps(eps)

    def _described(self) -> dict[str, Any]:
        return {**super()._described(), "scale": self.scale}

    @classmethod
    def from_losses(
        cls,
        losses: Mapping[str, Tensor] | Iterable[Tensor],
        shared_parameters: Parameters | None = None,
        **options: Any,
    ) -> DBMTL:
        """A balancer of what the losses of a first forward pass share; their graphs stay as they are.

        Args:
            losses: K scalars with a graph, or a dict of names to them, which the tasks then have; None or 0.0 for one
                that is absent.
            shared_parameters: by default those that `graphs.find_shared_parameters` finds; if given, the losses must
                depend on each.
            options: as for the class.

        Raises:
            ValueError: the losses share nothing, or do not depend on a parameter that was given.
            ValueError, TypeError, RuntimeError: losses that `graphs.find_shared_parameters` refuses.

        Warns:
            UserWarning: a parameter that was given is reached from a single loss; see also there.
        """
        tasks: int | list[str]
        found: Any = losses
        if not isinstance(losses, Tensor):
            found = list(losses.values() if isinstance(losses, Mapping) else losses)
        tasks = list(losses) if isinstance(losses, Mapping) else len(found)
        if not isinstance(losses, Tensor):  # of those that are absent nothing is known
            found = [x for x in found if not (x is None or (isinstance(x, Real) and x == 0))]
        if shared_parameters is None:
            return cls(find_shared_parameters(found, stacklevel=3), tasks, **options)
        shared = Shared.of(shared_parameters)
        check_shared_parameters(found, shared.parameters, stacklevel=3)
        return cls(shared, tasks, **options)  # type: ignore[arg-type]
