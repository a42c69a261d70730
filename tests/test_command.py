"""``python -m dbmtl_kernels`` finds a backend that computes wrongly."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from dbmtl_kernels import __main__ as command
from dbmtl_kernels.backends import eager


def run(monkeypatch, *arguments):
    monkeypatch.setattr(command, "MEASURE_BYTES", 1 << 20)
    monkeypatch.setattr(command, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["dbmtl_kernels", *arguments])
    return command.main()


def test_all_right(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(r"native on cpu: right, off by \d\.\de-0[78] ", out)
    assert "eager on cpu: right" in out
    assert re.search(r"memory of cpu: copies at \d+ GB/s, balance_ at \d+ GB/s", out)


def test_a_wrong_backend_is_named(monkeypatch, capsys):
    right = eager.balance_

    def wrong(grads, *rest):
        out, norms = right(grads, *rest)
        out[-1] *= 1.1
        return out, norms

    monkeypatch.setattr(eager, "balance_", wrong)
    assert run(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "native on cpu: right" in out
    assert "eager on cpu: WRONG, off by " in out


def test_without_the_check(monkeypatch, capsys):
    monkeypatch.setattr(torch, "randn", None)  # nothing is computed
    assert run(monkeypatch, "--no-check") == 0
    assert "tensors on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"), [("cuda", "it serves CUDA tensors only"), ("fast", "unknown backend: DBMTL_BACKEND=fast")]
)
def test_a_backend_asked_for_that_cannot_serve(asked, message, monkeypatch, capsys):
    monkeypatch.setenv("DBMTL_BACKEND", asked)
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(f"none will be used: .*{message}", out)
    assert "native on cpu: right" in out
    assert "memory of cpu" not in out


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")
@pytest.mark.parametrize("arguments", [["--no-check"], ["--help"]])
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(arguments):
    """As ``| head -0`` does."""
    command = [sys.executable, "-m", "dbmtl_kernels", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == -signal.SIGPIPE  # 141 in a shell, as cat gives
