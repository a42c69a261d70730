"""DB-MTL in NumPy float64, written from Algorithm 1 of arXiv 2308.12029; imports nothing of ours."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def alpha(norms: Array, scale: str | float) -> float:
    """The paper's alpha strategies."""
    if not isinstance(scale, str):
        return float(scale)
    return float({"max": np.max, "mean": np.mean, "median": np.median, "min": np.min}[scale](norms))


def balance(
    grads: Array, ema: Array, beta: float = 0.9, eps: float = 1e-8, scale: str | float = "max"
) -> tuple[Array, Array, Array]:
    """One step on K x P matrices: (balanced gradient, new ema, norms), all float64.

    With one task the balanced gradient is the EMA itself (alpha and the norm cancel).
    """
    new = beta * ema.astype(np.float64) + (1.0 - beta) * grads.astype(np.float64)
    norms = np.sqrt((new * new).sum(axis=1))
    if len(norms) == 1 and isinstance(scale, str):
        return new[0].copy(), new, norms
    weights = alpha(norms, scale) / (norms + eps)
    out = np.zeros(new.shape[1])
    for weight, row in zip(weights, new, strict=True):
        out += weight * row
    return out, new, norms
