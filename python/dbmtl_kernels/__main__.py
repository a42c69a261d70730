"""``python -m dbmtl_kernels``: what was found, what will be used, and why not the rest."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import dbmtl_kernels

from . import backends
from .backends import native


def _detail(name: str, device: torch.device) -> str:
    if name == "native":
        return native.isa()
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
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        chosen = backends.resolve("auto", device)
        lines.append(f"tensors on {device}:")
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


def main() -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="python -m dbmtl_kernels", description=__doc__).parse_args()
    print("\n".join(report()))


if __name__ == "__main__":
    main()
