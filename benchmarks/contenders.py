"""What the dense op is measured against, each as (grads, ema) -> balanced gradient, with ema updated in place."""

from __future__ import annotations

from collections.abc import Callable

import dbmtl_kernels as dbk
import torch
from torch import Tensor

BETA, EPS = 0.9, 1e-8
Contender = Callable[[Tensor, Tensor], Tensor]


def ours(grads: Tensor, ema: Tensor) -> Tensor:
    """dbmtl_kernels: one call, (4 K P + P) elements moved."""
    return dbk.balance_(grads, ema, beta=BETA, eps=EPS)[0]


def eager_lerp(grads: Tensor, ema: Tensor) -> Tensor:
    """lerp_, vector_norm, vector-matrix product: (5 K P + P)."""
    ema.lerp_(grads, 1.0 - BETA)
    norms = torch.linalg.vector_norm(ema, dim=1)
    return (norms.max() / (norms + EPS)) @ ema


def eager_addmul(grads: Tensor, ema: Tensor) -> Tensor:
    """The same with mul_ and add_, row by row norms, and mv on the transpose."""
    ema.mul_(BETA).add_(grads, alpha=1.0 - BETA)
    norms = torch.stack([torch.linalg.vector_norm(row) for row in ema])
    return torch.mv(ema.T, norms.max() / (norms + EPS))


def authors(grads: Tensor, ema: Tensor) -> Tensor:
    """The arithmetic of the authors' implementation, tensors already on the device."""
    new = grads + BETA * (ema - grads)
    norms = new.norm(dim=-1)
    alpha = norms.max() / (norms + EPS)
    out = sum(alpha[i] * new[i] for i in range(len(new)))
    ema.copy_(new)
    return out


def all_contenders() -> dict[str, Contender]:
    """By name; compiling happens at the first call."""
    torch.compiler.reset()
    return {
        "dbmtl_kernels": ours,
        "eager (lerp_)": eager_lerp,
        "eager (mul_, add_)": eager_addmul,
        "torch.compile (lerp_)": torch.compile(eager_lerp),
        "torch.compile (mul_, add_)": torch.compile(eager_addmul),
        "authors' arithmetic": authors,
    }
