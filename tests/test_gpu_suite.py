"""The GPU suite, tried on a CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_dry_run_checks_then_times_and_writes_every_row(tmp_path):
    command = ["bash", ROOT / "benchmarks" / "gpu_suite.sh", tmp_path, "--first", "--cpu"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "first.log").read_text()
    assert (tmp_path / "stages.csv").read_text().startswith("first,0,")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    whats = list(dict.fromkeys(row["what"] for row in rows))
    parity = ["parity: dense", "parity: step", "parity: combine_and_gramian"]
    assert whats == [*parity, "copy", "dense", "engine", "step", "launches"]
    # On a CPU nothing is judged.
    assert all(row["verdict"] == ("right" if row["what"] in parity else "") for row in rows)
    timed = [row for row in rows if row["p50_ms"]]
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in timed)
    assert all(row[field] for row in rows for field in ("contender", "device", "torch", "date", "command"))
    compared = {(row["what"], row["against"].split(" ")[0]) for row in rows if row["against"]}
    assert compared >= {
        ("dense", "eager"),
        ("dense", "authors'"),
        ("dense", "copy"),
        ("engine", "eager"),
        ("step", "bare,"),
    }
