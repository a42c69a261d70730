"""Block sizes and warps, chosen from a table; nothing is tried out at run time.

``programs`` bounds how many programs a multiprocessor gets in a persistent grid. What stands beside each line is
what the compiler reports for sm_90 (fp32 state and gradients, K = 3; tests/test_codegen.py holds it to that): registers
a thread and bytes that one multiprocessor has in flight. Times: not yet measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Tuning(NamedTuple):
    """How one kernel is launched."""

    block: int
    warps: int
    programs: int
    unroll: int = 1


class _Line(NamedTuple):
    kernel: str
    capability: tuple[int, int]  # this and above
    largest: int  # elements of a row (for the Gramian: rows) at most
    tuning: Tuning


_ANY = 2**63
TABLE = (
    # A small problem: smaller tiles, so that every multiprocessor gets some.
    _Line("balance", (0, 0), 1 << 20, Tuning(block=1024, warps=4, programs=2, unroll=4)),
    _Line("balance", (0, 0), _ANY, Tuning(block=4096, warps=8, programs=2, unroll=4)),
    _Line("accumulate", (0, 0), _ANY, Tuning(block=2048, warps=8, programs=3)),
    _Line("combine", (0, 0), _ANY, Tuning(block=2048, warps=8, programs=4, unroll=4)),
    _Line("gramian", (0, 0), 32, Tuning(block=64, warps=4, programs=2)),
    _Line("gramian", (0, 0), _ANY, Tuning(block=64, warps=8, programs=1)),
)


def choose(kernel: str, capability: tuple[int, int], size: int) -> Tuning:
    """The first line of the table that fits."""
    for line in TABLE:
        if line.kernel == kernel and capability >= line.capability and size <= line.largest:
            return line.tuning
    raise LookupError(f"no tuning for {kernel}")
