"""Fused kernels for dual-balancing multi-task learning (DB-MTL), behind one line in a PyTorch training loop."""

from typing import TYPE_CHECKING, Any

from . import reference
from .balancer import GradientBalancer
from .dbmtl import DBMTL
from .engine.graphs import find_shared_parameters
from .functional import balance_, log_transform
from .weightings import EqualWeights, GradNorm, IMTLLoss, MaxNorm

__all__ = [
    "DBMTL",
    "EqualWeights",
    "GradNorm",
    "GradientBalancer",
    "IMTLLoss",
    "MaxNorm",
    "OnePassDBMTL",
    "balance_",
    "find_shared_parameters",
    "log_transform",
    "reference",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .onepass.balancer import OnePassDBMTL


def __getattr__(name: str) -> Any:
    """`OnePassDBMTL`, when it is first asked for: whoever takes another balancer does not wait for it."""
    if name == "OnePassDBMTL":
        from .onepass.balancer import OnePassDBMTL

        return OnePassDBMTL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
