"""What the numbers given to a balancer or an op must be; each check names the value it refuses."""

from __future__ import annotations

import operator
from typing import SupportsIndex

SCALES = ("max", "mean", "median", "min")


def check_beta(beta: float) -> float:
    """Return the forgetting rate; raise ValueError unless it is in [0, 1)."""
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    return beta


def check_beta_sigma(beta_sigma: float) -> float:
    """Return the decay exponent; raise ValueError unless it is finite and not negative."""
    if not 0.0 <= beta_sigma < float("inf"):
        raise ValueError(f"beta_sigma must be finite and not negative, got {beta_sigma}")
    return beta_sigma


def check_eps(eps: float) -> float:
    """Return eps; raise ValueError unless it is positive and finite."""
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return eps


def check_seed(seed: int | None) -> int | None:
    """Return the seed; raise TypeError unless it is an int or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
    return seed


def check_num_tasks(num_tasks: SupportsIndex) -> int:
    """Return K as an int; raise TypeError or ValueError unless it is an integer (NumPy's too) >= 1."""
    count = _int("num_tasks", num_tasks)
    if count < 1:
        raise ValueError(f"num_tasks must be at least 1, got {count}")
    return count


def check_task(index: SupportsIndex, num_tasks: int) -> int:
    """Return the index as an int; raise TypeError or ValueError unless it is an integer in [0, num_tasks)."""
    task = _int("the task index", index)
    if not 0 <= task < num_tasks:
        raise ValueError(f"task index {task} is out of range for {num_tasks} tasks")
    return task


def _int(name: str, value: SupportsIndex) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return operator.index(value)


def check_scale(scale: str | float) -> str | float:
    """Return ``scale`` if it is one of `SCALES` or a finite number >= 0.

    Raises:
        ValueError: otherwise.
        TypeError: neither a string nor a number.
    """
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))} or a number, got {scale!r}")
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a string or a number, got {type(scale).__name__}")
    if not 0.0 <= scale < float("inf"):
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    return float(scale)
