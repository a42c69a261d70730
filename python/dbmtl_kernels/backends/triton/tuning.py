"""Block sizes and warps, chosen from a table; nothing is tried out at run time.

``programs`` bounds how many programs a multiprocessor gets in a persistent grid; ``registers`` is the compiler's limit
for a thread, so that they fit there together (65,536 / (32 x warps x registers)) and nothing spills. ``in_flight`` is
what one multiprocessor at least asks of memory, in KB, before it waits for the first of it, with whole tiles on 16
bytes, and of two dtypes the narrower half as wide: some 23 are needed to keep 4.3 TB/s busy for 700 ns, 38 for 8 TB/s.
All three are read from the compiled code (tests/backends/test_codegen.py), for sm_80, 89, 90, 100 and 103. That is
arithmetic; docs/gpu.md has times.
"""

from __future__ import annotations

from typing import NamedTuple


class Tuning(NamedTuple):
    """How one kernel is launched."""

    block: int  # elements of 4 bytes; as many bytes of others
    warps: int
    programs: int
    registers: int
    in_flight: int


class _Line(NamedTuple):
    kernel: str
    capability: tuple[int, int]  # this and above
    largest: int  # elements of a row (for the Gramian: rows) at most
    tuning: Tuning


_ANY = 2**63
TABLE = (
    # A small problem: smaller tiles, so that every multiprocessor gets some.
    _Line("balance", (0, 0), 1 << 20, Tuning(block=2048, warps=4, programs=4, registers=128, in_flight=48)),
    _Line("balance", (0, 0), _ANY, Tuning(block=4096, warps=8, programs=2, registers=128, in_flight=48)),
    # Squares as pairs of fp32 numbers take more registers. B300 (10.3) is short of fp64 even so: larger tiles.
    _Line("balance in pairs", (12, 0), _ANY, Tuning(block=1024, warps=4, programs=5, registers=96, in_flight=20)),
    _Line("balance in pairs", (10, 0), _ANY, Tuning(block=2048, warps=4, programs=4, registers=128, in_flight=24)),
    _Line("balance in pairs", (0, 0), _ANY, Tuning(block=1024, warps=4, programs=5, registers=96, in_flight=20)),
    # Many small programs, as each chunk begins with a look at the tables.
    _Line("accumulate", (10, 0), _ANY, Tuning(block=1024, warps=4, programs=7, registers=72, in_flight=42)),
    _Line("accumulate", (0, 0), _ANY, Tuning(block=1024, warps=4, programs=8, registers=64, in_flight=48)),
    # From 16 bits into 16 bits.
    _Line("accumulate narrow", (10, 0), _ANY, Tuning(block=1024, warps=4, programs=5, registers=96, in_flight=40)),
    _Line("accumulate narrow", (0, 0), _ANY, Tuning(block=1024, warps=4, programs=6, registers=80, in_flight=48)),
    # Without a row.
    _Line("sum in pairs", (0, 0), _ANY, Tuning(block=2048, warps=4, programs=6, registers=80, in_flight=36)),
    _Line("sum", (0, 0), _ANY, Tuning(block=2048, warps=4, programs=6, registers=80, in_flight=48)),
    # Of four rows; of three 48.
    _Line("combine", (0, 0), _ANY, Tuning(block=2048, warps=8, programs=2, registers=128, in_flight=64)),
    # Bound by arithmetic rather than by memory where K is large; smaller tiles where sm_80 would spill.
    _Line("gramian", (0, 0), 32, Tuning(block=64, warps=4, programs=2, registers=255, in_flight=0)),
    _Line("gramian", (9, 0), _ANY, Tuning(block=32, warps=8, programs=1, registers=255, in_flight=0)),
    _Line("gramian", (0, 0), _ANY, Tuning(block=16, warps=8, programs=1, registers=255, in_flight=0)),
)


# fp64 at half of the fp32 rate. Other chips have it at a 32nd or a 64th.
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
