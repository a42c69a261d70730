"""TorchJD: DB-MTL as an aggregator of its `jac_to_grad`; what its Nash-MTL and GradVac need for `GradientBalancer`.

TorchJD's Gramian weightings (``UPGradWeighting()``, ``CAGradWeighting(c=0.4)``, ...) need nothing from here: they are
given to `GradientBalancer` as they are.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..functional import balance_
from ..ops import arguments
from ..ops.entries import Entry

NEEDED = "0.18"


def _check_version() -> None:
    try:
        found = importlib.metadata.version("torchjd")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    numbers = [tuple(int(n) for n in re.findall(r"\d+", version)[:2]) for version in (found, NEEDED)]
    if numbers[0] < numbers[1]:
        raise ImportError(
            f"dbmtl_kernels.integrations.torchjd needs torchjd >= {NEEDED}, found {found}: "
            f"pip install 'torchjd>={NEEDED}'"
        )


_check_version()

from torchjd import Stateful  # noqa: E402
from torchjd.aggregation import GradVacWeighting, NashMTL, WeightedAggregator, Weighting  # noqa: E402
from torchjd.linalg import Matrix, PSDMatrix  # noqa: E402


class _MovingAverage(Weighting[Matrix], Stateful):
    """From a matrix to the weights of the EMA's rows, which it updates; `DBMTLAggregator` combines them."""

    ema: Tensor | None

    def __init__(
        self,
        beta: float,
        beta_sigma: float,
        eps: float,
        scale: str | float,
        state_dtype: torch.dtype,
        backend: str,
    ) -> None:
        super().__init__()
        self.beta = arguments.check_beta(beta)
        self.beta_sigma = arguments.check_beta_sigma(beta_sigma)
        self.eps = arguments.check_eps(eps)
        self.scale = arguments.check_scale(scale)
        arguments.check_dtype("state_dtype", state_dtype, arguments.STATE_DTYPES)
        self.state_dtype = state_dtype
        self.backend = backend
        self.step = 0
        self.ema = None  # not a buffer: a cast of the module around it must leave its dtype
        self._last: tuple[Tensor, Tensor] | None = None  # weights, and the vector they give

    def forward(self, matrix: Tensor, /) -> Tensor:
        """(m, n) to (m,) weights, float32 (float64 with a float64 EMA)."""
        ema = self._ema_for(matrix)
        grads = matrix.detach().to(torch.float64) if ema.dtype == torch.float64 else matrix.detach()
        step = self.step + 1
        beta = self.beta / step**self.beta_sigma
        vector, norms = balance_(grads, ema, beta, self.eps, self.scale, self.backend)
        self.ema, self.step = ema, step
        weights = reference.weights(norms, self.eps, self.scale)
        self._last = weights, vector.to(matrix.dtype)
        return weights

    def combine(self, weights: Tensor) -> Tensor:
        """(n,) the rows of the EMA, weighted; what was computed already unless a hook returned other weights."""
        assert self._last is not None
        assert self.ema is not None
        (ours, vector), self._last = self._last, None
        if weights is ours:
            return vector
        return ops.combine(self.ema, weights.detach(), vector.dtype, self.backend)

    def reset(self) -> None:
        """Forget everything; the next matrix may have another shape."""
        self.ema, self.step, self._last = None, 0, None

    def get_extra_state(self) -> dict[str, Any]:
        """The EMA and the number of steps."""
        return {"step": self.step, "ema": self.ema}

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave; on the device of the EMA here, if there is one."""
        entry = Entry(state)
        step, ema = entry["step"].count(), entry["ema"].value
        if ema is not None and not (isinstance(ema, Tensor) and ema.dim() == 2):
            raise entry["ema"].error("must be a matrix or None")
        if ema is not None and ema.dtype not in (self.state_dtype, torch.float64):
            raise ValueError(f"the state has an EMA in {ema.dtype}, this aggregator keeps it in {self.state_dtype}")
        if ema is not None:
            ema = ema.detach().to(ema.device if self.ema is None else self.ema.device, copy=True)
        self.ema, self.step, self._last = ema, step, None

    def _ema_for(self, matrix: Tensor) -> Tensor:
        dtype = torch.float64 if matrix.dtype == torch.float64 else self.state_dtype
        if self.ema is None:
            return torch.zeros(matrix.shape, dtype=dtype, device=matrix.device)
        if self.ema.shape != matrix.shape:
            raise ValueError(
                f"the matrix has shape {tuple(matrix.shape)} and the EMA {tuple(self.ema.shape)}: call reset() to "
                "start anew"
            )
        if self.ema.dtype != dtype:
            raise ValueError(
                f"a matrix in {matrix.dtype} needs an EMA in {dtype} and it is in {self.ema.dtype}: call reset() to "
                "start anew"
            )
        return self.ema.to(matrix.device)


class DBMTLAggregator(WeightedAggregator, Stateful):
    """DB-MTL's gradient balancing as a TorchJD aggregator with a state, the EMA of the rows of the matrices it gets.

    It stands between TorchJD's two calls:

        backward([dbk.log_transform(loss) for loss in losses])        # TorchJD's; the logarithm is half of the method
        weights = jac_to_grad(model.parameters(), aggregator)

    In step k an (m, n) matrix J gives:

        ema    = beta_k * ema + (1 - beta_k) * J         beta_k = beta / k ** beta_sigma; zeros at the start
        vector = weights @ ema                           weights = alpha / (norms of the rows of ema + eps)

    The weights are those of the EMA's rows, not of the matrix's. A forward hook on ``aggregator.weighting`` may return
    other weights; one that edits them in place is not seen. One call of `balance_` a step; not differentiable. A
    row that is not finite gets weight 0 and starts afresh. TorchJD holds J twice and the EMA is a third K x P matrix:
    `DBMTL` holds one in all.

    The state goes through ``state_dict`` and ``load_state_dict``, also into an aggregator that has seen no matrix yet,
    and follows the matrix from device to device. As elsewhere in PyTorch the state_dict refers to the live EMA:
    ``copy.deepcopy`` it to keep a snapshot. Under a GradScaler the EMA would keep the scale, which changes: unscale
    before ``jac_to_grad``, or use `DBMTL`.

    Args:
        beta: forgetting rate in [0, 1).
        beta_sigma: decay exponent >= 0; 0 keeps beta constant.
        eps: positive, added to the norms.
        scale: alpha: "max" (the method), "mean", "median", "min" of the norms, or a number.
        state_dtype: dtype of the EMA: float32, bfloat16 or float64. That of float64 matrices is float64.
        backend: "auto", or a backend by name.

    Raises:
        ValueError, TypeError: an argument; called with a matrix of another shape or dtype than before.

    Source: arXiv 2308.12029, Algorithm 1, lines for the task-gradient balancing.
    """

    weighting: _MovingAverage

    def __init__(
        self,
        beta: float = 0.9,
        beta_sigma: float = 0.5,
        eps: float = 1e-8,
        scale: str | float = "max",
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__(_MovingAverage(beta, beta_sigma, eps, scale, state_dtype, backend))

    def forward(self, matrix: Matrix, /) -> Tensor:
        """(m, n) to the balanced (n,) vector, in the dtype of the matrix."""
        return self.weighting.combine(self.weighting(matrix))

    def reset(self) -> None:
        """Forget the EMA and the number of steps; the next matrix may have another shape."""
        self.weighting.reset()

    def __repr__(self) -> str:
        w = self.weighting
        return (
            f"DBMTLAggregator(beta={w.beta}, beta_sigma={w.beta_sigma}, eps={w.eps}, scale={w.scale!r}, "
            f"state_dtype={w.state_dtype}, backend={w.backend!r})"
        )


class OnMatrix(Weighting[PSDMatrix], Stateful):
    """A weighting of a matrix as one of its Gramian, for `GradientBalancer` and TorchJD's autogram.

    It is given a (k, k) square root of the Gramian instead of the (k, n) matrix. Both have the same Gramian, hence the
    same norms, angles and norms of combinations, which is all that methods independent of the basis see.

    Args:
        weighting: from a (k, n) matrix to (k,) weights, for instance ``NashMTL(...).weighting``. Its state_dict is
            part of this one's.

    Raises:
        TypeError: the weighting is not a TorchJD weighting.
    """

    def __init__(self, weighting: Weighting[Matrix]) -> None:
        if not isinstance(weighting, Weighting):
            raise TypeError(f"weighting must be a TorchJD weighting, got {weighting!r}")
        super().__init__()
        self.weighting = weighting

    def forward(self, gramian: Tensor, /) -> Tensor:
        """(k, k) symmetric to (k,) weights."""
        return self.weighting(_square_root(gramian))

    def reset(self) -> None:
        """Reset the weighting, if it has a state."""
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()


class _NashMTL(OnMatrix):
    """Nash-MTL; its state_dict has what TorchJD's lacks."""

    def __init__(self, num_tasks: int, options: dict[str, Any]) -> None:
        super().__init__(NashMTL(num_tasks, **options).weighting)
        self._options = options

    @property
    def num_tasks(self) -> int:
        """K."""
        return int(self._nash.n_tasks)

    @property
    def _nash(self) -> Any:
        return self.weighting

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Tasks that are absent or not finite leave a smaller game, played without memory."""
        tasks = gramian.shape[0]
        if tasks == self.num_tasks:
            return super().forward(gramian)
        return NashMTL(tasks, **self._options).weighting(_square_root(gramian))

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """A game of other players begins anew."""
        self.weighting = NashMTL(len(tasks), **self._options).weighting

    def get_extra_state(self) -> dict[str, Any]:
        """The number of steps and the last weights, from which the next solution starts."""
        weights = torch.tensor(self._nash.prvs_alpha, dtype=torch.float64, device="cpu")
        return {"step": int(self._nash.step), "weights": weights}

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave."""
        nash, entry = self._nash, Entry(state)
        like = torch.empty(nash.n_tasks, dtype=torch.float64, device="meta")
        step, weights = entry["step"].count(), entry["weights"].tensor(like)
        entry["weights"].require(weights.isfinite(), "must be finite")
        nash.reset()
        nash.step, nash.prvs_alpha = float(step), weights.cpu().clone().numpy()
        if nash.step > 0:  # at step 0 it makes the problem itself
            nash._init_optim_problem()


def nash_mtl(num_tasks: int, **options: Any) -> OnMatrix:
    """TorchJD's Nash-MTL as a weighting for `GradientBalancer`, which goes on where a checkpoint left it.

    Args:
        num_tasks: K.
        options: ``max_norm``, ``update_weights_every``, ``optim_niter``, as for TorchJD's ``NashMTL``.

    Raises:
        ImportError: cvxpy or ecos is missing (``pip install 'torchjd[nash_mtl]'``).
        ValueError: an option out of range.

    Source: Navon et al., arXiv 2202.01017, Algorithm 1, as TorchJD has it.
    """
    return _NashMTL(arguments.check_num_tasks(num_tasks), options)


class _GradVac(Weighting[PSDMatrix], Stateful):
    """TorchJD's GradVac, with targets for all pairs of tasks, of which it uses those that are there."""

    targets: Tensor

    def __init__(self, num_tasks: int, beta: float, eps: float) -> None:
        super().__init__()
        self._torchjds = [GradVacWeighting(beta, eps)]  # in a list, for it not to be part of the state_dict
        self._tasks: list[int] | None = None
        targets = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device="cpu")
        self.register_buffer("targets", targets)

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.targets.shape[0]

    def begin(self, tasks: Sequence[int], losses: Mapping[int, Tensor], again: bool) -> None:
        """Learn which tasks the Gramian to come is of."""
        self._tasks = list(tasks)

    def reindex_tasks(self, tasks: Sequence[int | None]) -> None:
        """The targets of a new task are zero, as all are at first."""
        old, self.targets = self.targets, self.targets.new_zeros(len(tasks), len(tasks))
        stayed = [(new, before) for new, before in enumerate(tasks) if before is not None]
        for i, a in stayed:
            for j, b in stayed:
                self.targets[i, j] = old[a, b]

    def forward(self, gramian: Tensor, /) -> Tensor:
        """(k, k) Gramian of the tasks last seen, by default of all, to (k,) weights."""
        tasks, self._tasks = self._tasks, None
        known = range(self.num_tasks) if tasks is None else tasks
        index = torch.tensor(known, dtype=torch.int64, device="cpu")
        if len(index) != gramian.shape[0]:
            raise ValueError(f"a Gramian of {gramian.shape[0]} tasks, and {len(index)} are known")
        theirs: Any = self._torchjds[0]
        mine = index[:, None], index
        theirs._phi_t = self.targets[mine].to("cpu", gramian.dtype)
        theirs._state_key = len(index), gramian.dtype
        weights: Tensor = theirs(gramian)
        self.targets[mine] = theirs._phi_t.to(self.targets)
        return weights

    def reset(self) -> None:
        """Forget the targets."""
        self.targets.zero_()


def grad_vac(num_tasks: int, beta: float = 0.5, eps: float = 1e-8) -> Weighting[PSDMatrix]:
    """TorchJD's GradVac as a weighting for `GradientBalancer`, which goes on where a checkpoint left it.

    TorchJD's own forgets its targets when they are loaded, and mixes up those of different tasks where some are absent.

    Args:
        num_tasks: K.
        beta: decay of the targets, in [0, 1].
        eps: at least 0, added to denominators.

    Raises:
        ValueError, TypeError: an argument.

    Source: Wang et al., arXiv 2010.05874, Algorithm 1, as TorchJD has it.
    """
    return _GradVac(arguments.check_num_tasks(num_tasks), beta, eps)


def _square_root(gramian: Tensor) -> Tensor:
    """A square R with R R^T = gramian; eigenvalues below zero (rounding) count as zero.

    The rows are scaled to norm 1 for it, so that each has the precision of its own norm, not of the largest.
    """
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1]:
        raise ValueError(f"a Gramian is square, got shape {tuple(gramian.shape)}")
    wide = gramian.detach().to("cpu", torch.float64)  # not all devices have float64
    norms = wide.diagonal().clamp(min=0.0).sqrt()
    divisors = norms.where(norms > 0.0, 1.0)
    values, vectors = torch.linalg.eigh(wide / divisors.outer(divisors))
    root: Tensor = norms[:, None] * ((vectors * values.clamp(min=0.0).sqrt()) @ vectors.T)
    return root.to(gramian.device, gramian.dtype)
