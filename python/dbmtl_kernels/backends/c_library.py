"""The two C libraries."""

from . import cuda, native

__all__ = ["cuda", "native"]
