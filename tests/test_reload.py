"""Modules loaded again, as a notebook does: with ``importlib.reload`` and ``%autoreload``, or by a fresh import."""

import re
import subprocess
import sys
from pathlib import Path

REIMPORT = """
import gc, sys
import torch
import dbmtl_kernels

def operate():
    ema = torch.zeros(2, 4)
    return torch.ops.dbmtl_kernels.balance_(torch.ones(2, 4), ema, 0.5, 1e-8, "max", 0.0, "auto")[0]

wanted = operate()
for name in [name for name in sys.modules if name.startswith("dbmtl_kernels")]:
    del sys.modules[name]
del dbmtl_kernels
import dbmtl_kernels as dbk
from dbmtl_kernels import ops
gc.collect()
assert torch.equal(operate(), wanted)
torch.compile(dbk.balance_, fullgraph=True, backend="aot_eager")(torch.ones(2, 4), torch.zeros(2, 4))
calls, real = [], ops._balance
ops._balance = lambda *args: calls.append(args) or real(*args)
operate()
assert len(calls) == 1  # the op calls the module that is there now
"""


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_balancers_made_before_each_reload_train_on_and_new_ones_can_be_made():
    out = run(str(Path(__file__).parent / "reloading.py"))
    assert re.fullmatch(r"\d\d modules\n", out), out


def test_a_fresh_import_beside_the_old_one_has_its_op():
    run("-c", REIMPORT)
