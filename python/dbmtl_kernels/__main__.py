"""``python -m dbmtl_kernels``: what was found, what will be used and why not the rest, and whether it works here."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable

import torch

import dbmtl_kernels

from . import backends, reference
from .functional import balance_

# What float32 arithmetic may be off by, relative to the largest element.
TOLERANCE = 1e-5
NUM_TASKS = 3
CHECK_PARAMS = 10_007  # no multiple of any tile or vector
MEASURE_BYTES = 256 << 20  # beyond the caches
SECONDS = 0.3


def _detail(name: str, device: torch.device) -> str:
    if name == "native":
        return str(backends.native.isa())
    from .backends.triton.device import launches

    count, reason = launches(device)
    return f"balance_ in {count} launch{'es' if count > 1 else ''}: {reason}"


def report() -> list[str]:
    """The lines that the command prints."""
    lines = [
        f"dbmtl_kernels {dbmtl_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()}",
    ]
    asked = os.environ.get(backends.ENVIRONMENT)
    if asked:
        lines.append(f"{backends.ENVIRONMENT}={asked}")
    for device in _devices():
        lines.append(f"tensors on {device}:")
        chosen, refusal = _chosen(device)
        if chosen is None:
            lines.append(f"  none will be used: {refusal}")
        for name in backends.NAMES:
            backend = backends.get(name)
            reason = backend.missing(device)
            if backend is chosen:
                state = "will be used"
            elif reason is None:
                state = "works, not used unless asked for"
            else:
                state = f"not available: {reason}"
            detail = f" ({_detail(name, device)})" if name != "eager" and reason is None else ""
            lines.append(f"  {name}{detail}: {state}")
    return lines


def check() -> tuple[list[str], bool]:
    """The lines of a check of every backend that works here, and whether all are right; about a second a device."""
    lines, right = [], True
    for device in _devices():
        for name in backends.NAMES:
            if backends.get(name).missing(device) is None and not _interpreted(name, device):
                error = _largest_error(name, device)
                right = right and error <= TOLERANCE
                verdict = "right" if error <= TOLERANCE else "WRONG"
                lines.append(f"  {name} on {device}: {verdict}, off by {error:.1e} of the largest element")
        if _chosen(device)[0] is not None:
            copied, balanced = (x / 1e9 for x in _bandwidths(device))
            lines.append(f"  memory of {device}: copies at {copied:.0f} GB/s, balance_ at {balanced:.0f} GB/s")
    return lines, right


def _chosen(device: torch.device) -> tuple[backends.Backend | None, str]:
    """The backend that will be used; else why what ``DBMTL_BACKEND`` asks for will not."""
    try:
        return backends.resolve("auto", device), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _interpreted(name: str, device: torch.device) -> bool:
    """Triton on a CPU is its interpreter: right, and a thousand times too slow for this."""
    return name == "triton" and device.type == "cpu"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


def _largest_error(backend: str, device: torch.device) -> float:
    """How far two steps of `balance_` are from the reference in float64, relative to the largest element.

    Raises:
        RuntimeError: the backend cannot serve tensors on ``device``.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    ema = torch.zeros(NUM_TASKS, CHECK_PARAMS, dtype=torch.float32, device=device)
    exact = ema.to("cpu", torch.float64)
    lengths = torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.float32, device="cpu")
    error = 0.0
    for beta in (0.9, 0.6):
        grads = torch.randn(ema.shape, generator=generator, dtype=torch.float32, device="cpu") * lengths
        ours, _ = balance_(grads.to(device), ema, beta=beta, backend=backend)
        wanted, exact, _ = reference.balance(grads.double(), exact, beta=beta)
        error = max(error, float((ours.cpu().double() - wanted).abs().max() / wanted.abs().max()))
    return error


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, and of `balance_` by the bytes that it must move: (4 K P + P) elements.

    Medians over some 0.3 s each, on tensors beyond the caches.
    """
    size = MEASURE_BYTES // 4 // (2 * NUM_TASKS)
    grads, ema = (torch.zeros(NUM_TASKS, size, dtype=torch.float32, device=device) for _ in range(2))
    copied = _median_seconds(lambda: ema.copy_(grads), device)
    balanced = _median_seconds(lambda: balance_(grads, ema), device)
    return 2 * grads.nbytes / copied, 4 * size * (4 * NUM_TASKS + 1) / balanced


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # whatever the first call prepares
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Print the report and the check; 1 if a backend computes wrongly. With ``bench`` measure."""
    if sys.argv[1:2] == ["bench"]:
        from .bench.command import main as bench

        return bench(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m dbmtl_kernels",
        description=__doc__,
        epilog="python -m dbmtl_kernels bench [--help] measures what balancing costs here",
    )
    parser.add_argument("--no-check", action="store_true", help="only report; do not compute or measure anything")
    options = parser.parse_args()
    print("\n".join(report()))
    if options.no_check:
        return 0
    lines, right = check()
    print("\n".join(["check and bandwidth:", *lines]))
    return 0 if right else 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # a reader that has seen enough ends this, as it ends other commands
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main())
