"""Fused kernels for dual-balancing multi-task learning (DB-MTL), behind one line in a PyTorch training loop."""

from . import reference
from .balancer import DBMTL
from .buffer import TaskGradientBuffer
from .functional import balance_, log_transform
from .layout import ParameterLayout

__all__ = ["DBMTL", "ParameterLayout", "TaskGradientBuffer", "balance_", "log_transform", "reference"]
__version__ = "0.1.0"
