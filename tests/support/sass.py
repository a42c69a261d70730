"""Reads SASS, what ptxas made of a kernel, as `cuobjdump -sass` prints it: loops, loads in flight, instructions.

`loops` finds the innermost loops that load from global memory. `Loop.in_flight` is how many bytes of such loads a
thread has issued at most before the first use of any that it waits for: what memory can be busy with meanwhile.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SLOW = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\.F64\.|F2F\.\w+\.F64|MUFU\.\w*64H|I2F\.F64|F2I\S*\.F64")


class Instruction(NamedTuple):
    """One, at an address; a predicate may keep it from being executed."""

    at: int
    predicate: str
    name: str  # with its modifiers
    operands: tuple[str, ...]

    @property
    def loads(self) -> int:
        """Bytes of global memory that a thread loads."""
        return num_bytes(self.name) if self.name.startswith("LDG.") else 0

    @property
    def slow(self) -> bool:
        """fp64, or a conversion from or to it: some chips have a 64th as many units for these."""
        return SLOW.match(self.name) is not None

    @property
    def target(self) -> int | None:
        """Where it branches to."""
        if not self.name.startswith("BRA"):
            return None
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1])
        return None if found is None else int(found[1], 16)

    def written(self) -> set[int]:
        """Registers of a load's result."""
        count, found = max(1, self.loads // 4), set()
        operands = self.operands[:2] if count > 4 else self.operands[:1]  # 256 bits have two
        for operand in operands:
            if match := re.fullmatch(r"R(\d+)(\.\w+)*", operand):
                found |= {int(match[1]) + i for i in range(min(count, 4))}
        return found

    def touched(self) -> set[int]:
        """Registers that it reads or writes: it waits for those that a load is still to fill."""
        found = set()
        for index, operand in enumerate(self.operands):
            for match in re.finditer(r"\bR(\d+)(\.64)?", operand):
                found |= {int(match[1]) + i for i in range(self._width(index, bool(match[2])))}
        return found

    def _width(self, index: int, pair: bool) -> int:
        """Registers of an operand."""
        name = self.name
        if pair or re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|F(ADD|MUL|FMA)2\b", name):
            return 2
        if re.match(r"F2F\.F64\.F32|I2F\.F64|IMAD\.WIDE", name):
            return 2 if index == 0 or (index == 3 and name.startswith("IMAD")) else 1
        if name.startswith("F2F.F32.F64"):
            return 2 if index == 1 else 1
        if name.startswith(("STG.", "STS.")) and index > 0:
            return max(1, min(4, num_bytes(name) // 4))
        if name.startswith(("LDG.", "LDS.")) and index == 0:
            return max(1, min(4, num_bytes(name) // 4))
        return 1


def num_bytes(name: str) -> int:
    """Bytes that a load or a store moves."""
    for bits in (256, 128, 64):
        if f".{bits}" in name:
            return bits // 8
    return 2 if ".U16" in name or ".S16" in name else 1 if ".U8" in name or ".S8" in name else 4


class Loop(NamedTuple):
    """A loop without another that loads inside it: its instructions, once around."""

    body: list[Instruction]

    def in_flight(self, loads: Collection[Instruction]) -> int:
        """Bytes that a thread has asked of global memory at most before it waits for the first of them.

        ``loads``: of the loop, those that count; weights and tables may be left out.
        """
        most = 0
        waited: list[tuple[set[int], int]] = []  # for whose results: registers, bytes
        for one in self.body * 2:  # what is asked for in one round may be used in the next
            touched = one.touched()
            # Results come in order: with one, those that were asked for before it.
            used = max((i + 1 for i, (registers, _) in enumerate(waited) if registers & touched), default=0)
            del waited[:used]
            if one in loads:
                waited.append((one.written(), one.loads))
                most = max(most, sum(size for _, size in waited))
        return most

    def count(self, what: str) -> int:
        """Instructions whose name matches."""
        return sum(re.match(what, one.name) is not None for one in self.body)

    @property
    def slow(self) -> int:
        """See `Instruction.slow`."""
        return sum(one.slow for one in self.body)


def parse(text: str) -> list[Instruction]:
    """The instructions of one function."""
    found = []
    for at, predicate, name, operands in LINE.findall(text):
        parts = tuple(part.strip() for part in operands.split(",")) if operands.strip() else ()
        found.append(Instruction(int(at, 16), predicate.strip(), name, parts))
    return found


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Those that load from global memory and have no such loop within, in the order of their ends."""
    index = {one.at: i for i, one in enumerate(instructions)}
    ends: dict[int, int] = {}  # of loops by where they begin; several jumps back are one loop
    for i, one in enumerate(instructions):
        if one.target is not None and one.target < one.at:  # a jump to itself ends a kernel
            begin = index[one.target]
            ends[begin] = max(i, ends.get(begin, 0))
    spans = [(a, b) for a, b in ends.items() if any(one.loads for one in instructions[a : b + 1])]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [Loop(instructions[a : b + 1]) for a, b in sorted(inner, key=lambda span: span[1])]


def dump(option: str, path: str | Path) -> str:
    """What cuobjdump prints of a library or cubin."""
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def names(instructions: list[Instruction]) -> Counter[str]:
    """How often each instruction is there, without modifiers."""
    return Counter(one.name.split(".")[0] for one in instructions)
