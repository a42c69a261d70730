"""What bounds each GPU kernel on each chip, from its compiled code: arithmetic, not a measurement.

``python tools/bounds.py`` compiles the main kernels for the chips below, with no GPU but with nvcc, and writes the
tables into docs/backends.md, between their marks: two to four minutes on two cores. A kernel takes as long as the
slowest of three: its bytes at the memory's rate, its instructions at four a clock and multiprocessor for 32 threads
each, its fp64 instructions and conversions at the lower rate of the two. What lies outside the loop over elements is
left out; clocks are the highest that the chip has.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "backends.md", "<!-- tools/bounds.py -->\n", "<!-- end -->"


class Chip(NamedTuple):
    """Multiprocessors, boost MHz, GB/s and fp32 TFLOP/s are of NVIDIA's data sheets (SXM where there is a choice).

    ``slow``: results a clock and multiprocessor, the lower of fp64 and of conversions from and to 64 bits, of the CUDA
    programming guide's table by compute capability; of B300, whose fp64 is 1.2 TFLOP/s, from the data sheet.
    """

    arch: int
    multiprocessors: int
    mhz: int
    bandwidth: int
    slow: int
    fp32: float

    def seconds(self, moved: float, instructions: float, slow: float) -> dict[str, float]:
        """Of an element, by what would bound it."""
        clocks = self.multiprocessors * self.mhz * 1e6
        memory = moved / (self.bandwidth * 1e9)
        return {"memory": memory, "issue": instructions / (clocks * 128), "fp64": slow / (clocks * self.slow)}


CHIPS = {
    "A100": Chip(80, 108, 1410, 2039, 16, 19.5),
    "H100": Chip(90, 132, 1980, 3350, 16, 67.0),
    "H200": Chip(90, 132, 1980, 4800, 16, 67.0),
    "B200": Chip(100, 148, 1965, 8000, 16, 75.0),
    "B300": Chip(103, 148, 1965, 8000, 2, 75.0),
    "RTX 4090": Chip(89, 128, 2520, 1008, 2, 82.6),
    "A10": Chip(86, 72, 1695, 600, 2, 31.2),
    "L4": Chip(89, 58, 2040, 300, 2, 30.3),
}
# A case of tests/support/codegen.py or a kernel of csrc/cuda, its kind of loop, bytes of an element of one task (with
# K = 3, a third of the result's). For CUDA C++ also how many of them are loaded, and threads on a multiprocessor
# (tests/backends/test_cuda_code.py holds these).
TRITON = {
    "`balance_`, phase one": ("dense", "update", 12.0),
    "`balance_`, phase two": ("dense", "combine", 4 + 4 / 3),
    "`balance_` bf16, phase one": ("dense bf16, bf16 state", "update", 6.0),
    "`accumulate_`": ("accumulate fp32", "update", 12.0),
    "`accumulate_` bf16": ("accumulate bf16, bf16 state", "update", 6.0),
    "`accumulate_`, no row": ("sum fp32", "update", 4.0),
    "`balance_rows_`": ("rows fp32", "combine", 4 + 4 / 3),
    "`combine_out`": ("combine fp32", "combine", 4 + 4 / 3),
}
CUDA = {
    "`balance_`, phase one, `cuda`": ("balance_kernelIff", "update", 12.0, 8, 512),
    "`balance_`, phase two, `cuda`": ("balance_kernelIff", "combine", 4 + 4 / 3, 4, 512),
    "`accumulate_`, `cuda`": ("accumulate_kernelIf", "update", 12.0, 8, 768),
    "`balance_rows_`, `cuda`": ("rows_kernelIf", "combine", 4 + 4 / 3, 4, 512),
}
KERNELS = {**TRITON, **CUDA}
ARCHS = sorted({chip.arch for chip in CHIPS.values()})
Counts = dict[tuple[str, int], tuple[float, float, int]]


def counted_triton() -> Counts:
    """Instructions and slow ones an element, KB in flight, by kernel and architecture: of two such loops the longer."""
    import codegen

    codegen.launches.driver._call = lambda name, count, *given: setattr(count._obj, "value", 2)
    found: Counts = {}
    for arch in ARCHS:
        reports = codegen.compile_cases(arch, sorted({case for case, _, _ in TRITON.values()}))
        for name, (case, kind, _) in TRITON.items():
            found[name, arch] = max(
                (loop["instructions"], loop["slow"], loop["in_flight"] * report["threads"] >> 10)
                for report in reports
                if report["case"] == case
                for loop in report["loops"]
                if loop["kind"] == kind
            )
    return found


def counted_cuda() -> Counts:
    """The same of CUDA C++: of the loops that load nothing but 16 bytes at a time, the shortest."""
    import emulator
    import sass

    library = emulator.nvcc_library([str(arch) for arch in ARCHS])
    if library is None:
        raise SystemExit("tools/bounds.py needs nvcc")
    found: Counts = {}
    for code in re.split(r"(?=Fatbin elf code)", sass.dump("-sass", library)):
        arch = int((re.findall(r"arch = sm_(\d+)", code) or ["0"])[0])
        for function in code.split("Function : ")[1:]:
            kernel = function.split("\n")[0]
            loops = [
                loop
                for loop in sass.loops(sass.parse(function))
                if all(one.loads >= 16 for one in loop.body if one.loads)
            ]
            for name, (part, kind, _, loaded, threads) in CUDA.items():
                those = [loop for loop in loops if (kind == "update") == (loop.count("STG") > 0)]
                if part in kernel and those:
                    shortest = min(those, key=lambda loop: len(loop.body) / sum(one.loads for one in loop.body))
                    elements = sum(one.loads for one in shortest.body) / loaded
                    flight = shortest.in_flight([one for one in shortest.body if one.loads]) * threads >> 10
                    found[name, arch] = len(shortest.body) / elements, shortest.slow / elements, flight
    return found


def cell(chip: Chip, moved: float, instructions: float, slow: float) -> str:
    """What bounds, and how long the others take of that, in percent."""
    seconds = chip.seconds(moved, instructions, slow)
    first, *rest = sorted(seconds, key=seconds.__getitem__, reverse=True)
    return f"{first}; " + ", ".join(f"{name} {100 * seconds[name] / seconds[first]:.0f}" for name in rest)


def tables(counts: Counts) -> str:
    """Markdown: the counts (KB in flight are those of a multiprocessor), and what bounds."""
    lines = [["instructions, slow ones an element; KB in flight", "bytes", *(f"sm_{arch}" for arch in ARCHS)]]
    other = [["bound by; the others, % of its time", *CHIPS]]
    for name, (_, _, moved, *_) in KERNELS.items():
        lines.append([name, f"{moved:.3g}", *("{:.3g}, {:.2g}; {}".format(*counts[name, arch]) for arch in ARCHS)])
        other.append([name, *(cell(chip, moved, *counts[name, chip.arch][:2]) for chip in CHIPS.values())])
    text = ""
    for head, *rest in (lines, other):
        text += "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rest)) + "\n"
    return text


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "support")]
    made = tables(counted_triton() | counted_cuda())
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + made + END + rest.split(END, 1)[1])
    print(made)
