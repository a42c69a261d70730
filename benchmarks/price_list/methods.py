"""The methods of the price list: how each makes its gradients, and what these must be before it is timed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels import EqualWeights, GradientBalancer, GradNorm, IMTLLoss
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor

from .models import Backward, Model

EPS = 1e-8
EW, A, BARE, ONE_ROW, ROWS = "equal weighting", "OnePassDBMTL", "K passes", "DBMTL(beta=0)", "DBMTL"
AUTHORS = "authors' arithmetic"
ADDED = "K passes, added up"
LOGS = "sum of logs"


class Method(NamedTuple):
    """A way to the gradients of a step.

    Attributes:
        make: makes, of a model, what is given the losses.
        weights: from the tasks' gradients to the weights of their sum that must be in the trunk's ``.grad`` after a
            first step.
        passes: backward passes a step: "1" or "K".
        tolerance: of the largest element.
        least: tasks that it needs.
        moves: elements that must be read or written a step beside the backward passes, in units of P, of K tasks.
    """

    make: Callable[[Model], Backward]
    weights: Callable[[Gradients], Tensor]
    passes: str = "K"
    tolerance: float = 1e-4
    least: int = 1
    moves: Callable[[int], int] | None = None


class Gradients:
    """The tasks' gradients of the trunk, from autograd alone, to check the others.

    Attributes:
        losses: (K,) float64.
        rows: (K, P).
    """

    def __init__(self, model: Model) -> None:
        losses = model.losses()
        self.losses = torch.stack(losses).detach().double()
        self.rows = torch.empty(len(losses), sum(p.numel() for p in model.shared))
        for row, loss in zip(self.rows, losses, strict=True):
            found = torch.autograd.grad(loss, model.shared, retain_graph=True)
            torch.cat([grad.reshape(-1) for grad in found], out=row)

    @property
    def by_logs(self) -> Tensor:
        """(K,) what the gradients of the logs are the rows times."""
        return (self.losses + EPS).reciprocal()

    def gramian_of_logs(self) -> Tensor:
        """(K, K), summed in float64."""
        parts = (part.double() for part in self.rows.split(1 << 18, dim=1))
        scale = self.by_logs
        return sum(part @ part.T for part in parts) * scale.outer(scale)

    def combined(self, weights: Tensor) -> Tensor:
        """(P,) their sum with these weights, in float64."""
        out = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for row, weight in zip(self.rows, weights.tolist(), strict=True):
            out.add_(row, alpha=weight)
        return out


def _ones(found: Gradients) -> Tensor:
    return torch.ones_like(found.losses)


def _last(found: Gradients) -> Tensor:
    return (torch.arange(len(found.losses)) == len(found.losses) - 1).double()


def _logs(found: Gradients) -> Tensor:
    return found.by_logs


def _max_norm(found: Gradients, share: float = 1.0) -> Tensor:
    """The weights of the first step of Algorithm 1, whose state is ``share`` times the gradients of the logs."""
    norms = share * found.gramian_of_logs().diagonal().sqrt()
    return norms.max() / (norms + EPS) * share * found.by_logs


def _weighting(make: Callable[[int], Any], found: Gradients) -> Tensor:
    """Those that the weighting itself finds for the Gramian of the logs."""
    torch.manual_seed(1)
    return make(len(found.losses))(found.gramian_of_logs().float()).double() * found.by_logs


def plain_sum(losses: Sequence[Tensor]) -> None:
    torch.stack(list(losses)).sum().backward()


def _sum_of_logs(losses: Sequence[Tensor]) -> None:
    torch.log(torch.stack(list(losses)) + EPS).sum().backward()


def _imtl_l(model: Model) -> Backward:
    imtl = IMTLLoss(model.num_tasks)
    model.optimizer.add_param_group({"params": list(imtl.parameters())})
    return lambda losses: plain_sum([loss for loss in imtl(losses) if loss is not None])


def _passes(let_go: Callable[[], None], losses: Sequence[Tensor]) -> None:
    for task, loss in enumerate(losses):
        let_go()
        loss.backward(retain_graph=task < len(losses) - 1)


def one_pass(model: Model, **options: Any) -> Backward:
    return dbk.OnePassDBMTL(model.shared, model.num_tasks, **options).backward


def _dbmtl(model: Model, **options: Any) -> Backward:
    return dbk.DBMTL(model.shared, model.num_tasks, **options).backward


def _balancer(make: Callable[[int], Any], model: Model, log_transform: bool = True) -> Backward:
    weighting = make(model.num_tasks)
    return GradientBalancer(model.shared, model.num_tasks, weighting=weighting, log_transform=log_transform).backward


def _authors(model: Model) -> Backward:
    """Gradients gathered parameter by parameter into vectors, these balanced as their code does, on the device."""
    state: Tensor | None = None

    def backward(losses: Sequence[Tensor]) -> None:
        nonlocal state
        sizes = [p.numel() for p in model.shared]
        rows = []
        for loss in losses:
            row = torch.zeros(sum(sizes))
            found = torch.autograd.grad(torch.log(loss + EPS), model.shared, retain_graph=True)
            for part, grad in zip(row.split(sizes), found, strict=True):
                part.copy_(grad.reshape(-1))
            rows.append(row)
        torch.stack([torch.log(loss + EPS) for loss in losses]).sum().backward(inputs=model.own)
        grads = torch.stack(rows)
        state = torch.zeros_like(grads) if state is None else state
        state = grads + 0.9 * (state - grads)
        norms = state.norm(dim=-1)
        alpha = norms.max() / (norms + EPS)
        out = sum(alpha[task] * state[task] for task in range(len(rows)))
        for p, part in zip(model.shared, out.split(sizes), strict=True):
            p.grad = part.view_as(p).clone()

    return backward


def by_weighting(make: Callable[[int], Any], tolerance: float = 1e-3) -> Method:
    """A weighting of the Gramian in our balancer; the rows are read once more than by DB-MTL."""
    return Method(
        partial(_balancer, make), partial(_weighting, make), tolerance=tolerance, moves=lambda k: 3 * k + 2 * k + 1
    )


def _torchjd_mtl(make: Callable[[], Any], model: Model, **options: Any) -> Backward:
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = make()

    def backward(losses: Sequence[Tensor]) -> None:
        mtl_backward([dbk.log_transform(loss) for loss in losses], features=model.features)
        jac_to_grad(model.shared, aggregator, **options)

    return backward


def _torchjd_jac(make: Callable[[], Any], model: Model) -> Backward:
    from torchjd.autojac import backward as jacobians
    from torchjd.autojac import jac_to_grad

    aggregator = make()

    def backward(losses: Sequence[Tensor]) -> None:
        logs = [dbk.log_transform(loss) for loss in losses]
        jacobians(logs, inputs=model.shared, retain_graph=True)
        torch.stack(logs).sum().backward(inputs=model.own)
        jac_to_grad(model.shared, aggregator)

    return backward


def _of_torchjd() -> dict[str, Method]:
    """TorchJD's weightings in our balancer, and its own way; none where it is not installed."""
    if importlib.util.find_spec("torchjd") is None:
        return {}
    from dbmtl_kernels.integrations.torchjd import DBMTLAggregator, grad_vac, nash_mtl
    from torchjd import aggregation as jd

    # Their solvers say where they stopped early.
    warnings.filterwarnings("ignore", category=UserWarning, module="torchjd")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="cvxpy")
    upgrad = jd.UPGradWeighting
    plain = ("Mean", "Sum", "Random", "PCGrad", "IMTLG", "AlignedMTL", "MGDA", "UPGrad", "DualProj")
    names = {"IMTLG": "IMTL-G", "AlignedMTL": "Aligned-MTL"}
    of: dict[str, Callable[[int], Any]] = {
        names.get(n, n): partial(_without_tasks, getattr(jd, f"{n}Weighting")) for n in plain
    }
    of |= {
        "Constant": lambda k: jd.ConstantWeighting(torch.full((k,), 1.0 / k)),
        "Krum": lambda k: jd.KrumWeighting(0, 1),
        "CAGrad": lambda k: jd.CAGradWeighting(c=0.4),
        "FairGrad": lambda k: jd.FairGradWeighting(alpha=2.0),
        "GradVac": grad_vac,
        "Nash-MTL": nash_mtl,
    }
    # Iterative solvers end where the last bits of the Gramian lead them.
    loose = {"CAGrad": 1e-2, "FairGrad": 1e-2, "Nash-MTL": 1e-2, "MGDA": 1e-2}
    ours = {name: by_weighting(make, loose.get(name, 1e-3)) for name, make in of.items()}
    ours["Krum"] = ours["Krum"]._replace(least=3)
    expected = partial(_weighting, partial(_without_tasks, upgrad))
    return ours | {
        "TorchJD mtl_backward, UPGrad": Method(partial(_torchjd_mtl, jd.UPGrad), expected, tolerance=1e-3),
        "TorchJD mtl_backward, UPGrad, its Gramian first": Method(
            partial(_torchjd_mtl, jd.UPGrad, optimize_gramian_computation=True), expected, tolerance=1e-3
        ),
        "TorchJD backward, UPGrad": Method(partial(_torchjd_jac, jd.UPGrad), expected, tolerance=1e-3),
        "TorchJD mtl_backward, DBMTLAggregator": Method(partial(_torchjd_mtl, DBMTLAggregator), _first_of_average),
    }


def _without_tasks(make: Callable[[], Any], num_tasks: int) -> Any:
    return make()


# beta of the first step is 0.9
_first_of_average = partial(_max_norm, share=0.1)

METHODS: dict[str, Method] = {
    EW: Method(lambda model: plain_sum, _ones, "1"),
    LOGS: Method(lambda model: _sum_of_logs, _logs, "1"),
    "IMTL-L": Method(_imtl_l, _ones, "1"),
    A: Method(one_pass, _max_norm, "1"),
    BARE: Method(lambda model: partial(_passes, model.optimizer.zero_grad), _last),
    ADDED: Method(lambda model: partial(_passes, lambda: None), _ones),
    ONE_ROW: Method(partial(_dbmtl, beta=0.0), _max_norm, moves=lambda k: 4 * k + 1),
    ROWS: Method(_dbmtl, _first_of_average, moves=lambda k: 4 * k + 1),
    AUTHORS: Method(_authors, _first_of_average),
    "EqualWeights": by_weighting(lambda k: EqualWeights()),
    "GradNorm": Method(
        partial(_balancer, GradNorm, log_transform=False), _ones, moves=lambda k: 3 * k + 2 * k + 1
    ),
    **_of_torchjd(),
}  # fmt: skip


class WrongError(BenchError):
    """A method whose gradients are not what they must be; it is not timed."""


def expected(trunk: str, num_tasks: int, names: Sequence[str]) -> dict[str, Tensor]:
    """By method, what a first step must leave in the ``.grad`` of the trunk, in one vector."""
    found = Gradients(Model(trunk, num_tasks))
    return {name: found.combined(METHODS[name].weights(found)).float() for name in names}


def check(name: str, model: Model, wanted: Tensor) -> None:
    """Raise unless the first step of a method has left in the trunk what it must.

    Raises:
        WrongError: it has not.
    """
    given = torch.cat([torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in model.shared])
    error = float((given - wanted).abs().max() / wanted.abs().max())
    if not error <= METHODS[name].tolerance:
        allowed = f"{METHODS[name].tolerance:.0e}"
        raise WrongError(
            f"the gradients of {name} with K={model.num_tasks} are off by {error:.1e}, allowed is {allowed}"
        )
