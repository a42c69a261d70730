"""The GPU suite, tried on a CPU: what is checked, how it is timed, what rows say of it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_ops
import gpu_rows
import pytest
import torch
from dbmtl_kernels import ops
from dbmtl_kernels.bench import dense, models, steps, timing

SUITE = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.sh"
interpreted = pytest.mark.skipif(not gpu.CPU, reason="there is a GPU: the suite itself runs there")


def rows_in(folder):
    (path,) = Path(folder).glob("gpu_*.csv")
    return gpu_rows.read(path)


def suite(folder, section="dense", backends=("triton", "cuda")):
    return gpu.Suite(folder, section, backends)


@interpreted
def test_a_case_compares_with_the_best_rival_by_the_devices_clock(tmp_path, monkeypatch):
    def op(seconds, grads, ema):
        return dense.eager_lerp(grads, ema)

    monkeypatch.setattr(gpu.timing, "by_host_twice", lambda call: (call.args[0], 1.0))  # device, host
    tensors = torch.randn(2, 3, 1000)
    seconds = {"triton": 0.03, "cuda": 0.01, "eager (a)": 0.06, "torch.compile (b)": 0.04, "eager (c)": 0.05}
    calls, bare = {name: partial(op, time) for name, time in seconds.items()}, {"bare, let go": partial(op, 0.02)}
    tried = suite(tmp_path)
    targets = [(gpu.BEST, 1.9), (gpu.BEST, 2.1), ("bare", 1.0), ("eager (a)", None)]
    check = partial(dense.check_dense, *tensors)
    tried.case("dense", calls, check, 9, targets, bare=bare, K=3, P=1000)
    found = rows_in(tmp_path)
    medians = {(row["contender"], row["clock"]): row["p50_ms"] for row in found if row["p50_ms"]}
    everyone = {**seconds, "triton, again": 0.03, "bare, let go": 0.02}
    assert medians == {
        **{(name, "device"): f"{1e3 * time:g}" for name, time in everyone.items()},
        **{(name, "host"): "1000" for name in everyone},
    }
    compared = [(r["contender"], r["against"], r["ratio"], r["target"], r["verdict"]) for r in found if r["ratio"]]
    assert compared == [  # with the best eager code in what comes on top of the bare passes
        ("triton", "torch.compile (b)", "2", "1.9", "reached"),
        ("triton", "torch.compile (b)", "2", "2.1", "missed"),
        ("triton", "bare, let go", "0.66667", "1", "missed"),
        ("triton", "eager (a)", "2", "", ""),
        ("triton", "triton, again", "1", "", ""),
        ("cuda", "torch.compile (b)", "-2", "1.9", "unclear"),
        ("cuda", "torch.compile (b)", "-2", "2.1", "unclear"),
        ("cuda", "bare, let go", "2", "1", "reached"),
        ("cuda", "eager (a)", "6", "", ""),
        ("cuda", "triton, again", "3", "", ""),
    ]
    assert tried.faults == 0


@pytest.mark.parametrize("slow", [0, 2], ids=["a fast host", "a slow host"])
def test_the_devices_clock_starts_when_the_device_wakes(monkeypatch, slow):
    """Beside a stand-in for CUDA: the host's clock has the call alone, the device's what lies between two events.

    A call that takes the host longer than the device sleeps is timed again, with a longer sleep.
    """
    done, naps = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def query(self):
            return len(naps) <= slow

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep") or naps.append(cycles))
    monkeypatch.setattr(torch.Tensor, "sum", lambda memory: done.append(memory.nbytes))
    monkeypatch.setattr(timing, "other_memory", lambda: torch.empty(256 << 20, dtype=torch.uint8))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(len(done)))
    assert timing.by_device_and_host(lambda: done.append("call")) == (0.003, 1.0)
    assert done == ["synchronize", 256 << 20, "sleep", "record", "call", "record", "synchronize"] * (1 + slow)
    assert naps == [20_000_000 << n for n in range(1 + slow)]


def nothing(grads, ema):
    return torch.empty_like(grads[0])


def only_the_state(grads, ema):
    ema.lerp_(grads, 1 - dense.BETA)
    return torch.empty_like(grads[0])


def only_the_gradient(grads, ema):
    return dense.eager_lerp(grads, ema.clone())


def raises(grads, ema):
    raise RuntimeError("no kernel image")


class Silent:
    """Right so many times, then it writes nothing."""

    def __init__(self, times):
        self.times = times

    def __call__(self, grads, ema):
        self.times -= 1
        return dense.eager_lerp(grads, ema) if self.times >= 0 else torch.empty_like(grads[0])


@interpreted
@pytest.mark.parametrize("wrong", [nothing, only_the_state, only_the_gradient, raises])
@pytest.mark.parametrize("section", ["dense", "parity"])
def test_what_is_wrong_is_a_fault_and_not_timed(tmp_path, section, wrong):
    tensors = torch.randn(2, 3, 50_000)
    calls = {"eager": dense.eager_lerp, "triton": dense.eager_lerp, "cuda": wrong}
    tried, run = suite(tmp_path, section), lambda call: lambda: call(*tensors)
    check = partial(dense.check_dense, *tensors)
    tried.case("dense", calls, check, 9, [("eager", 1.0), ("cuda", 1.0)], run, K=3, P=50_000)
    assert tried.faults == 1
    found = rows_in(tmp_path)
    (fault,) = (row for row in found if row["contender"] == "cuda")
    assert fault["verdict"].startswith("FAULT RuntimeError: no kernel" if wrong is raises else "FAULT ValueError: the ")
    if section == "parity":
        assert [row["verdict"] for row in found if row["contender"] == "triton"] == ["right"]
    else:
        assert {row["contender"] for row in found if row["p50_ms"]} == {"eager", "triton", "triton, again"}


@interpreted
@pytest.mark.parametrize(("times", "timed"), [(1, False), (3, True)], ids=["at once", "while it is timed"])
@pytest.mark.parametrize("name", ["cuda", "eager (b)"])
def test_what_falls_silent_is_caught_and_its_times_are_left_out(tmp_path, monkeypatch, name, times, timed):
    tensors, clocked = torch.randn(2, 3, 50_000), []
    clock = lambda call: clocked.append(call) or timing.by_host_twice(call)  # noqa: E731
    monkeypatch.setattr(gpu, "timing", SimpleNamespace(**{**vars(timing), "by_host_twice": clock}))
    calls = {"eager (a)": dense.eager_lerp, "triton": dense.eager_lerp, name: Silent(times)}
    tried, check = suite(tmp_path), partial(dense.check_dense, *tensors)
    tried.case("dense", calls, check, 9, [(gpu.BEST, 1.0)], lambda call: partial(call, *tensors), K=3, P=50_000)
    found = rows_in(tmp_path)
    (said,) = (row["verdict"] for row in found if row["contender"] == name)
    assert said.startswith("FAULT ValueError: " if name == "cuda" else "wrong, not timed: ValueError: ")
    assert tried.faults == (name == "cuda")  # a rival's fault is not ours
    assert any(isinstance(call.func, Silent) for call in clocked) == timed
    assert {row["contender"] for row in found if row["p50_ms"]} == {"eager (a)", "triton", "triton, again"}
    assert {row["against"] for row in found} == {"", "eager (a)", "triton, again"}


@interpreted
def test_without_a_copy_nothing_is_compared_with_one(tmp_path, monkeypatch):
    tried, wrong = suite(tmp_path), lambda: torch.zeros(9)
    tried.case("copy", {"torch": wrong}, lambda call: dense.close(call(), torch.ones(9), 0.0, "it"), 9, [], P=9)
    tensors = torch.randn(2, 3, 1000)
    calls, check = {"triton": dense.eager_lerp}, partial(dense.check_dense, *tensors)
    tried.case("dense", calls, check, 9, [("copy", 0.9)], lambda call: partial(call, *tensors), K=3, P=1000)
    assert {row["of_copy"] for row in rows_in(tmp_path)} == {""}
    assert "copy" not in {row["against"] for row in rows_in(tmp_path)}
    assert tried.faults == 0


@interpreted
def test_a_barrier_that_hangs_leaves_out_the_form_that_has_it(monkeypatch):
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", "")
    for _ in range(2):  # a call asks for its form, and leaves nothing behind
        calls = gpu_ops.forms(["triton", "cuda"])
        assert [*calls] == ["triton", "cuda", "triton, two launches"]
        calls["triton, two launches"](*torch.ones(2, 3, 4))
    monkeypatch.setenv("DBMTL_TRITON_LAUNCHES", "2")
    assert [*gpu_ops.forms(["triton", "cuda"])] == ["cuda", "triton, two launches"]
    monkeypatch.setattr(gpu_ops, "ours", lambda *given: os.environ["DBMTL_TRITON_LAUNCHES"])
    assert [call(*torch.ones(2, 3, 4)) for call in gpu_ops.forms(["triton"]).values()] == ["2"]


@interpreted
def test_memory_holds_nan_when_a_contender_is_checked(monkeypatch):
    """After float64, whose result may be freed, and right before the call."""
    order = []
    exact = dense.exact
    for module in (dense, steps):
        monkeypatch.setattr(module, "poison", lambda like, dtype: order.append("poison"))
    for module in (dense, steps):
        monkeypatch.setattr(module, "exact", lambda *tensors: order.append("float64") or exact(*tensors))

    def called(call):
        return lambda *given: order.append("call") or call(*given)

    dense.check_dense(*torch.randn(2, 3, 40), called(dense.eager_lerp))
    steps.check(models.mlp(3, (16, 32, 16), 8), called(partial(steps.ours, backend="eager")))
    assert order == ["float64", "poison", "call", "float64", "float64", "poison", "call"]
    blocks = []
    monkeypatch.undo()
    monkeypatch.setattr(torch, "full", lambda *given, full=torch.full, **how: blocks.append(full(*given, **how)))
    dense.poison(torch.zeros(7), torch.bfloat16)
    assert all(block.dtype == torch.bfloat16 and block.isnan().all() and len(block) == 7 for block in blocks)
    assert len(blocks) == 8


@interpreted
def test_too_little_memory_is_no_fault_and_a_lost_device_ends_the_process(tmp_path):
    tried = suite(tmp_path)

    def fail(error):
        raise error

    assert not tried.passes("dense", "triton", partial(fail, torch.cuda.OutOfMemoryError("no memory")))
    assert tried.faults == 0
    for said in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal", "CUDA: misaligned address"):
        with pytest.raises(SystemExit) as ended:
            tried.passes("dense", "cuda", partial(fail, RuntimeError(said)))
        assert ended.value.code == 3
    skipped, *lost = (row["verdict"] for row in rows_in(tmp_path))
    assert skipped.startswith("skipped: ")
    assert all(verdict.startswith("FAULT RuntimeError: ") for verdict in lost)


OPS = ("accumulate_", "balance_rows_", "combine_out", "gramian")


@interpreted
def test_parity_has_a_case_of_each_kernel_of_both_backends(tmp_path, emulated_cuda):
    assert gpu.main(str(tmp_path), "parity", "triton", "cuda") == 0
    right = {(row["contender"], row["what"].split()[1]) for row in rows_in(tmp_path) if row["verdict"] == "right"}
    kernels = ("dense", "engine", *OPS)
    assert right == {(b, k) for b in ("triton", "cuda") for k in kernels} | {("triton, two launches", "dense")}


@interpreted
@pytest.mark.parametrize("right", [0, 1], ids=["never right", "right once"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_that_writes_nothing_is_caught(tmp_path, monkeypatch, op, right):
    op_itself, calls = getattr(ops, op), []

    def broken(*given):  # float64 is made with the eager backend
        calls.extend([1] * (given[-1] != "eager"))
        return op_itself(*given) if given[-1] == "eager" or len(calls) <= right else torch.full((3, 3), torch.nan)

    monkeypatch.setattr(ops, op, broken)
    tried = suite(tmp_path, "parity", ["native"])
    gpu.alone(tried, 3, [40, 7])
    assert {row["what"].split()[1] for row in rows_in(tmp_path) if row["verdict"].startswith("FAULT")} == {op}


@interpreted
def test_a_step_that_balances_nothing_is_caught():
    problem = models.mlp(3, (16, 32, 16), 8)
    for make in (partial(steps.ours, backend="eager"), *steps.rivals(False).values(), steps.authors):
        for _ in range(2):  # whatever steps went before
            steps.check(problem, make)
            problem.step(make(problem))
    with pytest.raises(ValueError, match="is off by"):
        steps.check(problem, steps.bare)


@pytest.mark.slow
@interpreted
def test_a_dry_run(tmp_path):
    command = ["bash", SUITE, tmp_path, "--first", "--cpu"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = rows_in(tmp_path)
    assert [row["contender"] for row in found if row["what"] == "stage"] == [
        "start", "parity triton", "parity cuda", "first triton cuda"
    ]  # fmt: skip
    assert {row["verdict"][:15] for row in found if (row["what"], row["contender"]) == ("backend", "cuda")} == {
        "skipped: it ser"
    }
    assert {row["verdict"] for row in found if row["target"]} <= {"missed", "unclear"}  # an interpreter is slow
    assert {row["what"] for row in found if row["p50_ms"]} == {"copy", "dense", "engine", "step"}
    times = [row for row in found if row["p50_ms"]]
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in times)
    assert "dense" in gpu_rows.page(tmp_path.glob("gpu_*.csv"))
