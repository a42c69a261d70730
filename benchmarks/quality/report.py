"""The tables."""

from pathlib import Path


def print_tables(path: Path) -> None:
    """Print."""
