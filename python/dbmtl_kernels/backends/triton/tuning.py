"""Block sizes and warps, chosen from a table; nothing is tried out at run time.

``programs`` bounds how many programs a multiprocessor gets in a persistent grid; ``registers`` is the compiler's limit
for a thread, so that they fit there together (65,536 / (32 x warps x registers)) and nothing spills on sm_80, 90 or 100
(tests/backends/test_codegen.py). "in flight" is what one multiprocessor then asks for at once, in fp32: some 23 kB are
needed to keep 4.3 TB/s busy for 700 ns. That is arithmetic on the compiler's report; times are not yet measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Tuning(NamedTuple):
    """How one kernel is launched."""

    block: int
    warps: int
    programs: int
    registers: int
    unroll: int = 1


class _Line(NamedTuple):
    kernel: str
    capability: tuple[int, int]  # this and above
    largest: int  # elements of a row (for the Gramian: rows) at most
    tuning: Tuning


_ANY = 2**63
TABLE = (
    # A small problem: smaller tiles, so that every multiprocessor gets some. In flight: 4 x 128 x 64 B = 33 kB.
    _Line("balance", (0, 0), 1 << 20, Tuning(block=1024, warps=4, programs=4, registers=128, unroll=4)),
    # In flight: 2 x 256 x 128 B = 66 kB in phase one, as much in phase two.
    _Line("balance", (0, 0), _ANY, Tuning(block=4096, warps=8, programs=2, registers=128, unroll=4)),
    # In flight: 4 x 128 x 64 B = 33 kB. Many small programs, as each chunk begins with a look at the tables.
    _Line("accumulate", (0, 0), _ANY, Tuning(block=1024, warps=4, programs=4, registers=128)),
    # In flight: 2 x 256 x 128 B = 66 kB, with four rows unrolled.
    _Line("combine", (0, 0), _ANY, Tuning(block=2048, warps=8, programs=2, registers=96, unroll=4)),
    # Bound by arithmetic rather than by memory where K is large; smaller tiles where sm_80 would spill.
    _Line("gramian", (0, 0), 32, Tuning(block=64, warps=4, programs=2, registers=255)),
    _Line("gramian", (9, 0), _ANY, Tuning(block=32, warps=8, programs=1, registers=255)),
    _Line("gramian", (0, 0), _ANY, Tuning(block=16, warps=8, programs=1, registers=255)),
)


# Of fp64 a half of the fp32 rate, or a third of it; other chips have a 32nd or a 64th.
_FAST_FP64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def fast_fp64(capability: tuple[int, int]) -> bool:
    """Whether squares are summed in fp64 (`squares.add_squares`); the interpreter has (0, 0)."""
    return capability in _FAST_FP64 or capability == (0, 0)


def choose(kernel: str, capability: tuple[int, int], size: int) -> Tuning:
    """The first line of the table that fits."""
    for line in TABLE:
        if line.kernel == kernel and capability >= line.capability and size <= line.largest:
            return line.tuning
    raise LookupError(f"no tuning for {kernel}")
