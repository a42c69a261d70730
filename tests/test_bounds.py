"""The arithmetic of tools/bounds.py, and that docs/backends.md has its tables."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOUNDS = runpy.run_path(str(ROOT / "tools" / "bounds.py"), run_name="bounds")
CHIPS, KERNELS = BOUNDS["CHIPS"], BOUNDS["KERNELS"]


@pytest.mark.parametrize("name", CHIPS)
def test_the_rates_of_a_chip_agree(name):
    """Its fp32 rate on the data sheet is that of its multiprocessors at its clock."""
    chip = CHIPS[name]
    lanes = 64 if chip.arch == 80 else 128
    assert chip.fp32 == pytest.approx(chip.multiprocessors * lanes * 2 * chip.mhz / 1e6, rel=0.02)


def test_what_bounds():
    chip = BOUNDS["Chip"](arch=99, multiprocessors=10, mhz=1000, bandwidth=100, slow=2, fp32=0.0)
    # 12 bytes at 100 GB/s, 256 instructions at 1280 a ns, 1 slow one at 20 a ns.
    assert chip.seconds(12, 256, 1) == pytest.approx({"memory": 0.12e-9, "issue": 0.2e-9, "fp64": 0.05e-9})
    assert BOUNDS["cell"](chip, 12, 256, 1) == "issue; memory 60, fp64 25"
    assert BOUNDS["cell"](chip, 12, 64, 4) == "fp64; memory 60, issue 25"


def test_the_page_has_every_kernel_and_chip():
    text = (ROOT / "docs" / "backends.md").read_text()
    table = text.split(BOUNDS["BEGIN"])[1].split(BOUNDS["END"])[0]
    counts, bound = table.strip().split("\n\n")
    for part, columns in ((counts, {chip.arch for chip in CHIPS.values()}), (bound, CHIPS)):
        rows = [line.strip("| ").split(" | ") for line in part.splitlines()]
        assert [row[0] for row in rows[2:]] == list(KERNELS)
        assert all(len(row) == len(columns) + (2 if part is counts else 1) for row in rows)
