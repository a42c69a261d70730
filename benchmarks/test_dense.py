"""The dense op against the best eager code, torch.compile of it, and the authors' arithmetic."""

import contenders
import dbmtl_kernels as dbk
import pytest
import timing
import torch

SIZES = [(3, 20_000_000), (11, 10_000_000)]
# Contender family -> how many times faster we must be
TARGETS = {"eager": 1.5, "torch.compile": 1.5, "authors": 4.0}


def problem(num_tasks, num_params):
    return torch.randn(num_tasks, num_params), torch.randn(num_tasks, num_params)


def all_contenders():
    return {"dbmtl_kernels": contenders.ours, **contenders.rivals()}


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"K{s[0]}-P{s[1]}")
def test_ratios_interleaved(size, save, rounds):
    grads, ema = problem(*size)
    for call in all_contenders().values():  # a time is never reported of a result that is wrong
        contenders.check_dense(grads[:, :100_000].contiguous(), ema[:, :100_000].contiguous(), call)
    calls = all_contenders()
    times = timing.interleaved({name: lambda c=call: c(grads, ema) for name, call in calls.items()}, rounds)
    moved = (4 * size[0] + 1) * size[1] * 4
    rows = []
    for name in times:
        row = {"contender": name, "K": size[0], "P": size[1], **timing.summary(times[name])}
        row["times_slower"] = timing.ratio(times, name, "dbmtl_kernels")
        row["GB_per_s_of_ours"] = moved / row["p50_ms"] / 1e6
        rows.append(row)
        print(f"{name:28s} K={size[0]:<3d} {row['p50_ms']:8.1f} ms   {row['times_slower']:5.2f}")
    timing.record(f"dense_K{size[0]}_P{size[1]}", rows, save)
    for family, target in TARGETS.items():
        best = min(row["times_slower"] for row in rows if row["contender"].startswith(family))
        assert best >= target, f"{best:.2f} times faster than {family}, wanted {target}"


@pytest.mark.parametrize("name", ["dbmtl_kernels", "eager (lerp_)", "authors' arithmetic"])
@pytest.mark.parametrize("size", [(3, 1000), (3, 100_000), (3, 1_000_000), (11, 1_000_000)], ids=str)
def test_sizes(benchmark, name, size):
    benchmark.group = f"K={size[0]} P={size[1]}"
    grads, ema = problem(*size)
    call = all_contenders()[name]
    contenders.check_dense(grads, ema, call)
    benchmark(call, grads, ema)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(benchmark, dtype, state):
    benchmark.group = "dtypes (grads, ema), K=3 P=4M"
    grads, ema = problem(3, 4_000_000)
    benchmark(dbk.balance_, grads.to(dtype), ema.to(state))
