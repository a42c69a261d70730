"""Fused kernels for dual-balancing multi-task learning (DB-MTL), behind one line in a PyTorch training loop."""

from . import reference
from .balancer import GradientBalancer
from .buffer import TaskGradientBuffer
from .dbmtl import DBMTL
from .functional import balance_, log_transform
from .graphs import find_shared_parameters
from .imtl import IMTLLoss
from .layout import ParameterLayout
from .weightings import EqualWeights, GradNorm, MaxNorm

__all__ = [
    "DBMTL",
    "EqualWeights",
    "GradNorm",
    "GradientBalancer",
    "IMTLLoss",
    "MaxNorm",
    "ParameterLayout",
    "TaskGradientBuffer",
    "balance_",
    "find_shared_parameters",
    "log_transform",
    "reference",
]
__version__ = "0.1.0"
