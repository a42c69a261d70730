"""``python -m dbmtl_kernels``: what was found, what will be used, and why not the rest."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import dbmtl_kernels

from . import backends
from .backends import native


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
        devices.append(torch.device("cuda"))
    for device in devices:
        chosen = backends.resolve("auto", device)
        lines.append(f"tensors on {device.type}:")
        for name in backends.NAMES:
            backend = backends.get(name)
            reason = backend.missing(device)
            if backend is chosen:
                state = "will be used"
            elif reason is None:
                state = "works, not used unless asked for"
            else:
                state = f"not available: {reason}"
            detail = f" ({native.isa()})" if name == "native" and reason is None else ""
            lines.append(f"  {name}{detail}: {state}")
    return lines


def main() -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="python -m dbmtl_kernels", description=__doc__).parse_args()
    print("\n".join(report()))


if __name__ == "__main__":
    main()
