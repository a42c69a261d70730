"""What `import dbmtl_kernels` brings with it, beyond what torch brings."""

import json
import subprocess
import sys

import pytest

OTHERS = ("lightning", "pytorch_lightning", "transformers", "accelerate", "tensorboard", "torchjd")
HEAVY = {*OTHERS, "triton", "sympy", "numpy", "scipy", "matplotlib", "setuptools"}
SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import dbmtl_kernels
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_is_light():
    new = imported()
    assert [name for name in new if name.split(".")[0] in HEAVY] == []
    others = [name for name in new if not name.startswith("dbmtl_kernels")]
    print(f"import dbmtl_kernels: {len(new) - len(others)} modules of its own, {len(others)} others: {others}")
    assert len(others) <= 5
    assert len(new) - len(others) <= 40


@pytest.mark.slow
def test_the_adapter_of_accelerate_imports_nothing_of_the_others():
    code = f"import dbmtl_kernels.integrations.accelerate, sys; print([x for x in {OTHERS} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['accelerate']"
