"""Fused kernels for dual-balancing multi-task learning (DB-MTL), behind one line in a PyTorch training loop."""

from . import reference
from .balancer import GradientBalancer
from .dbmtl import DBMTL
from .engine.graphs import find_shared_parameters
from .functional import balance_, log_transform
from .onepass.balancer import OnePassDBMTL
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
