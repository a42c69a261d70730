"""Fused kernels for dual-balancing multi-task learning (DB-MTL), behind one line in a PyTorch training loop."""

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from .balancer import GradientBalancer
from .dbmtl import DBMTL
from .engine.graphs import find_shared_parameters
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
    "plot",
    "reference",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .functional import balance_, log_transform
    from .monitor.plotting import plot
    from .onepass.balancer import OnePassDBMTL

_LATER = {
    "OnePassDBMTL": "onepass.balancer",
    "balance_": "functional",
    "log_transform": "functional",
    "plot": "monitor.plotting",
}


def __getattr__(name: str) -> Any:
    """What not everybody takes, when it is first asked for."""
    if name in _LATER:
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
