"""The op on a K x P matrix: what it is measured against, and float64, which every result must equal before it is timed.

A contender is (grads, ema) -> balanced gradient, with ema updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dbmtl_kernels as dbk

BETA, EPS = 0.9, 1e-8
FRESH = 64 << 20
Call = Callable[..., Any]


def ours(grads: Tensor, ema: Tensor, backend: str = "auto") -> Tensor:
    """dbmtl_kernels: one call, (4 K P + P) elements moved."""
    return dbk.balance_(grads, ema, beta=BETA, eps=EPS, backend=backend)[0]


def eager_lerp(grads: Tensor, ema: Tensor) -> Tensor:
    """lerp_, vector_norm, vector-matrix product: (5 K P + P)."""
    ema.lerp_(grads, 1.0 - BETA)
    return combine(ema)


def combine(ema: Tensor) -> Tensor:
    """The balanced gradient of K rows."""
    norms = torch.linalg.vector_norm(ema, dim=1)
    out: Tensor = (norms.max() / (norms + EPS)) @ ema
    return out


def eager_addmul(grads: Tensor, ema: Tensor) -> Tensor:
    """The same with mul_ and add_, row by row norms, and mv on the transpose."""
    ema.mul_(BETA).add_(grads, alpha=1.0 - BETA)
    norms = torch.stack([torch.linalg.vector_norm(row) for row in ema])
    return torch.mv(ema.T, norms.max() / (norms + EPS))


def eager_foreach(grads: Tensor, ema: Tensor) -> Tensor:
    """The same with `_foreach_lerp_` and `_foreach_norm`."""
    rows = ema.unbind()
    torch._foreach_lerp_(rows, grads.unbind(), 1.0 - BETA)
    norms = torch.stack(torch._foreach_norm(rows))
    out: Tensor = (norms.max() / (norms + EPS)) @ ema
    return out


def authors(grads: Tensor, ema: Tensor) -> Tensor:
    """The arithmetic of the authors' implementation, tensors already on the device."""
    new = grads + BETA * (ema - grads)
    norms = new.norm(dim=-1)
    alpha = norms.max() / (norms + EPS)
    out = sum((alpha[i] * new[i] for i in range(len(new))), torch.zeros_like(new[0]))
    ema.copy_(new)
    return out


def rivals(compiled: bool = True, **options: Any) -> dict[str, Call]:
    """What our dense op is measured against, by name; compiling, with ``options``, happens at the first call."""
    eager = {"lerp_": eager_lerp, "mul_, add_": eager_addmul, "foreach": eager_foreach}
    found: dict[str, Call] = {f"eager ({name})": call for name, call in eager.items()}
    if compiled:
        torch.compiler.reset()
        found |= {f"torch.compile ({name})": torch.compile(call, **options) for name, call in eager.items()}
    return {**found, "authors' arithmetic": authors}


def equal_weighting(grads: Tensor, ema: Tensor) -> Tensor:
    """The sum over the tasks; nothing is balanced."""
    return grads.sum(0)


def exact(grads: Tensor, ema: Tensor, beta: float = BETA) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2308.12029 in float64: the balanced gradient, the new state."""
    new = ema.to(torch.float64, copy=True).mul_(beta).add_(grads, alpha=1.0 - beta)
    norms = torch.linalg.vector_norm(new, dim=1)
    return (norms.max() / (norms + EPS)) @ new, new


def error_of(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest element; row by row, to save memory."""
    rows = zip(torch.atleast_2d(actual), torch.atleast_2d(expected), strict=True)
    errors = torch.stack([torch.linalg.vector_norm(row.double() - wanted, torch.inf) for row, wanted in rows])
    return float(errors.max() / torch.linalg.vector_norm(expected, torch.inf))


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise unless the largest error is within ``tolerance`` times the largest element."""
    if not torch.isfinite(expected).all():
        raise ValueError(f"float64 has no {what}: the reference is not finite")
    error = error_of(actual, expected)
    if not error <= tolerance:  # NaN is wrong
        raise ValueError(f"{what} is off by {error:.1e}, allowed is {tolerance:.1e}")


def poison(like: Tensor, dtype: torch.dtype) -> None:
    """NaN where what is allocated next lies, as large as ``like``: who writes nothing has no earlier result to show.

    Large memory of a CPU is fresh from the system, and zero, each time.
    """
    if like.device.type == "cpu" and like.nbytes > FRESH:
        return
    torch.cuda.empty_cache()
    blocks = [torch.full(like.shape, torch.nan, dtype=dtype, device=like.device) for _ in range(8)]
    del blocks


def check_dense(grads: Tensor, ema: Tensor, call: Call, expected: tuple[Tensor, Tensor] | None = None) -> None:
    """Raise unless ``call`` gives what float64 gives, which may be known; ``ema`` stays as it is."""
    gradient, state = {2: (2.0**-5, 2.0**-6), 4: (2e-5, 1e-6), 8: (1e-12, 1e-12)}[ema.element_size()]
    balanced, new = expected or exact(grads, ema)
    mine = ema.clone()
    poison(balanced, ema.dtype)
    close(call(grads, mine), balanced, gradient, "the balanced gradient")
    close(mine, new, state, "the state")
