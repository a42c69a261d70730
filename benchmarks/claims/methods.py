"""The methods: each makes, of the trunk's parameters and K, what turns K losses into a scalar to call backward() on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor, nn
from vision.methods import FAMO, Uncertainty  # of examples/

Objective = Callable[[Sequence[Tensor]], Tensor]  # a Module's parameters go to the optimizer
Make = Callable[[list[nn.Parameter], int], Objective]


class IMTLL(nn.Module):
    """The sum of the losses that `dbmtl_kernels.IMTLLoss` makes."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.scaled = dbk.weightings.IMTLLoss(num_tasks)

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.stack([x for x in self.scaled(losses) if x is not None]).sum()


def _equal(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return lambda losses: torch.stack(list(losses)).sum()


def _log_only(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return lambda losses: torch.stack([dbk.log_transform(loss) for loss in losses]).sum()


def _gls(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    # geometric mean of the losses: Chennupati et al., arXiv 1904.08492
    return lambda losses: torch.stack(list(losses)).log().mean().exp()


def _module(kind: type[nn.Module], trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return kind(num_tasks).to(trunk[0].device)


def _famo(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return FAMO(num_tasks, trunk[0].device)


def _one_pass(trunk: list[nn.Parameter], num_tasks: int, measure_every: int = 10) -> Objective:
    # strict: the exact form may not take its place
    return dbk.OnePassDBMTL(trunk, num_tasks, measure_every=measure_every, strict=True)


def _dbmtl(trunk: list[nn.Parameter], num_tasks: int, **options: Any) -> Objective:
    return dbk.DBMTL(trunk, num_tasks, **options)


def _one_over_k(trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return dbk.DBMTL(trunk, num_tasks, scale=1.0 / num_tasks)


def _gramian(name: str, log: bool, trunk: list[nn.Parameter], num_tasks: int) -> Objective:
    return dbk.GradientBalancer(trunk, num_tasks, weighting=_weighting(name, num_tasks), log_transform=log)


def _weighting(name: str, num_tasks: int) -> Any:
    from dbmtl_kernels.integrations import torchjd
    from torchjd import aggregation

    made: dict[str, Callable[[], Any]] = {
        "PCGrad": aggregation.PCGradWeighting,
        "GradVac": lambda: torchjd.grad_vac(num_tasks),
        "IMTL-G": aggregation.IMTLGWeighting,
        "CAGrad": lambda: aggregation.CAGradWeighting(c=0.4),  # its authors' on NYUv2
        "Nash-MTL": lambda: torchjd.nash_mtl(num_tasks),
        "Aligned-MTL": aggregation.AlignedMTLWeighting,
    }
    return made[name]()


STL, EW, LOG, MAX_NORM = "STL", "EW", "log only", "max-norm only"
DB_MTL, ONE_PASS = "DB-MTL", "one pass"
BETA, ALPHA, WITH_LOG = "beta ", "alpha ", " + log"
ROOT = "/sqrt(k)"
SIX = ("PCGrad", "GradVac", "IMTL-G", "CAGrad", "Nash-MTL", "Aligned-MTL")
CONSTANT_BETAS = (BETA + "0.1", BETA + "0.5", BETA + "0.9")
DECAYED_BETAS = (BETA + "0.1" + ROOT, BETA + "0.5" + ROOT)  # 0.9 over the root is `DB_MTL` itself
ALPHAS = ("mean", "median", "min")
CONSTANTS = (0.01, 1.0, 10.0)


def _all() -> dict[str, Make]:
    found: dict[str, Make] = {
        EW: _equal,
        "GLS": _gls,
        "UW": partial(_module, Uncertainty),
        "IMTL-L": partial(_module, IMTLL),
        "FAMO": _famo,
        LOG: _log_only,
        MAX_NORM: partial(_dbmtl, log_transform=False, beta=0.0),
        DB_MTL: _dbmtl,
        ONE_PASS: _one_pass,
        BETA + "0": partial(_dbmtl, beta=0.0),
    }
    found |= {name: partial(_dbmtl, beta=float(name[-3:]), beta_sigma=0.0) for name in CONSTANT_BETAS}
    found |= {name: partial(_dbmtl, beta=float(name[len(BETA) :][:3])) for name in DECAYED_BETAS}
    found |= {ALPHA + name: partial(_dbmtl, scale=name) for name in ALPHAS}
    found |= {ALPHA + "1/K": _one_over_k}
    found |= {f"{ALPHA}{value:g}": partial(_dbmtl, scale=value) for value in CONSTANTS}
    found |= {name + end: partial(_gramian, name, bool(end)) for name in SIX for end in ("", WITH_LOG)}
    return found


MULTI_TASK = _all()
METHODS = (STL, *MULTI_TASK)
# not run unless named
EXTRA: dict[str, Make] = {
    "one pass, every step": partial(_one_pass, measure_every=1),
    "one pass, every 50 steps": partial(_one_pass, measure_every=50),
}
MAKE = MULTI_TASK | EXTRA
FORMS = (DB_MTL, ONE_PASS, BETA + "0", EW, LOG, "FAMO")


def check(names: Iterable[str]) -> list[str]:
    """The names.

    Raises:
        BenchError: one is not known, or its library is not installed.
    """
    names = list(names)
    for name in names:
        if name != STL and name not in MAKE:
            raise BenchError(f"no method {name!r}: it is one of {', '.join(map(repr, (STL, *MAKE)))}")
        if name.removesuffix(WITH_LOG) in SIX:
            try:
                _weighting(name.removesuffix(WITH_LOG), 2)
            except ImportError as error:
                raise BenchError(f"{name}: {error}. Needed: pip install 'dbmtl-kernels[torchjd]'") from error
    return names
