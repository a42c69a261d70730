"""The demo, run as a program."""

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "multi_mnist.py"


def demo(*arguments):
    return subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True)


def test_quick_run_trains_and_draws(tmp_path):
    out = tmp_path / "deep" / "picture.png"
    run = demo("--quick", "--out", str(out))
    assert run.returncode == 0, run.stderr
    for word in ("single-task", "equal weighting", "log only", "max-norm only", "DB-MTL", "authors' arithmetic"):
        assert word in run.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_did_not_train_fails(tmp_path):
    run = demo("--quick", "--train-size", "64", "--out", str(tmp_path / "x.png"))
    assert run.returncode == 1
    assert "DB-MTL" in run.stdout + run.stderr


def test_help_explains_every_option():
    run = demo("--help")
    assert run.returncode == 0
    for option in ("--epochs", "--train-size", "--seeds", "--lr", "--batch-size", "--out", "--threads", "--quick"):
        assert option in run.stdout
