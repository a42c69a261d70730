"""What `import dbmtl_kernels` brings with it, and how long it takes."""

import json
import subprocess
import sys

import pytest

OTHERS = ("lightning", "pytorch_lightning", "transformers", "accelerate", "tensorboard", "torchjd")
SCRIPT = f"""
import json, sys, time
import torch
start = time.process_time()
import dbmtl_kernels
seconds = time.process_time() - start
loaded = [name for name in {OTHERS} if name in sys.modules]
print(json.dumps([seconds, loaded]))
"""


def run():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_other_library_is_imported():
    assert run()[1] == []


@pytest.mark.performance
def test_importing_takes_no_time():
    """Seconds of this process's own, of which others on the machine can only make more: the least of five."""
    seconds = min(run()[0] for _ in range(5))
    print(f"import dbmtl_kernels: {seconds:.3f} s beyond torch")
    assert seconds < 0.1


@pytest.mark.parametrize(("name", "others"), [("lightning", OTHERS), ("accelerate", ("lightning", "torchjd"))])
def test_an_adapter_imports_nothing_of_the_others(name, others):
    """That of Lightning not even Lightning: it waits to see which of its two packages is used."""
    code = f"import dbmtl_kernels.integrations.{name}, sys; print([x for x in {others} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
