"""LibMTL: its weighting ``DB_MTL`` with our engine beneath. Importable without LibMTL, which only `register` needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..dbmtl import DBMTL

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "DB_MTL"


class DB_MTL(nn.Module):  # noqa: N801 - LibMTL looks it up by this name
    """LibMTL's weighting ``DB_MTL``: the same arguments, the same gradients, one K x P matrix instead of three.

    To be inherited together with an architecture, as LibMTL's trainer does, which supplies ``get_share_params()`` and
    ``task_num``. The engine is made at the first `backward`, when the model is on its device: all shared parameters,
    frozen ones included, whose rows count as zeros.

    Other than the authors' code:

    - a task whose gradient is not finite sits out the step and starts afresh; theirs stays NaN for ever. (The trainer
      gives its losses as one tensor, in whose one graph a NaN reaches all tasks: then the step's gradient is zero.)
    - on a CPU a loss <= 0 raises; theirs gives NaN;
    - a shared ``.grad`` that is not zero beforehand is added to; theirs counts it as the first task's;
    - the ``.grad`` of a parameter that was trained and then frozen is left alone; theirs goes on writing its average.

    The moving averages are float32, float64 where a shared parameter is. As in the authors' code they are not in the
    model's ``state_dict``; ``model.balancer.state_dict()`` has them.

    Attributes:
        balancer: the `DBMTL`, None before the first `backward`.

    Source: arXiv 2308.12029, Algorithm 1.
    """

    task_num: int
    get_share_params: Callable[[], Iterable[Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self.balancer: DBMTL | None = None

    def init_param(self) -> None:
        """Called by LibMTL before the model goes to its device: too early for the engine. Starts anew."""
        self.balancer = None

    def backward(self, losses: Tensor, *, DB_beta: float, DB_beta_sigma: float, **_: Any) -> NDArray[np.float64]:
        """Leave the balanced gradient in the shared ``.grad``, and the heads' own of the log-losses in theirs.

        Args:
            losses: (K,) positive, with a graph.
            DB_beta: forgetting rate in [0, 1); may change from step to step.
            DB_beta_sigma: decay exponent >= 0: in step k the rate is ``DB_beta / k ** DB_beta_sigma``.

        Returns:
            (K,) ones: what LibMTL records as the weights of the losses.

        Raises:
            ValueError: ``rep_grad=True``; an argument out of range; not K losses; see `DBMTL` for the rest.
            RuntimeError: the shared parameters are others than in the first call.
        """
        if getattr(self, "rep_grad", False):
            raise ValueError("DB_MTL balances gradients of shared parameters: rep_grad=True is not supported")
        shared = list(self.get_share_params())
        if self.balancer is None:
            self.balancer = _engine(shared, self.task_num)
        elif [id(p) for p in _trainable(shared)] != [id(p) for p in self.balancer.shared_parameters]:
            raise RuntimeError("the shared parameters are others than in the first backward: call init_param()")
        self.balancer.beta, self.balancer.beta_sigma = DB_beta, DB_beta_sigma
        self.balancer.backward(losses)
        return np.ones(self.task_num)


def _engine(shared: list[Tensor], num_tasks: int) -> DBMTL:
    parameters = _trainable(shared)
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:  # they may be thawed later: the engine must know them
            p.requires_grad_(True)
        return DBMTL(parameters, num_tasks, zero_gradients="count")  # as LibMTL does
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _trainable(shared: list[Tensor]) -> list[Tensor]:
    """All but those whose dtype can have no gradient (quantised ones)."""
    return [p for p in shared if p.is_floating_point()]


def register() -> None:
    """Put `DB_MTL` into ``LibMTL.weighting``, in the place of LibMTL's own where there is one.

    From then on ``--weighting DB_MTL`` and ``LibMTL.weighting.DB_MTL`` mean ours.

    Raises:
        ImportError: LibMTL is not installed.
    """
    try:
        weighting = importlib.import_module("LibMTL.weighting")
    except ImportError as error:
        raise ImportError(f"register() needs LibMTL, which cannot be imported: {error}") from error
    setattr(weighting, NAME, DB_MTL)
    exported = list(getattr(weighting, "__all__", []))
    if NAME not in exported:
        weighting.__dict__["__all__"] = [*exported, NAME]
