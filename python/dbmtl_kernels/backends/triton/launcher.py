"""How a kernel is launched, once Triton has compiled it for the kinds of its arguments: past Triton's own bookkeeping.

`JITFunction.run` looks at every argument again to find what it compiled, some 16 us of the host. What can differ is
less: dtypes and alignment of pointers, None, constants; numbers are never specialised on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from .dense import balance_kernel
from .tuning import Tuning

# Under TRITON_INTERPRET=1 kernels are plain Python, and their programs run one after another.
INTERPRETED = not isinstance(balance_kernel, triton.runtime.JITFunction)
# In these, what a compiled kernel gives for a grid takes all arguments, constants too, and pointers as numbers.
READ = (3, 3) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 10)

_compiled: dict[Any, Callable[..., Any]] = {}


def options(tuning: Tuning, cooperative: bool = False) -> dict[str, Any]:
    """For the compiler. Products and sums are not fused, so that state has the bits of the CPU kernels."""
    given = {"num_warps": tuning.warps, "maxnreg": tuning.registers, "enable_fp_fusion": False}
    return {**given, "launch_cooperative_grid": True} if cooperative else given


def launch(
    kernel: Any, grid: int, *args: Any, tuning: Tuning, cooperative: bool = False, **meta: Any
) -> Callable[..., Any] | None:
    """Launch on the current device and stream.

    Args:
        kernel: none of its numbers is specialised on.
        grid: how many programs.
        *args: all arguments but constants, in order. Whether memory lies on the device, nobody looks.
        tuning: warps and registers.
        cooperative: all programs are resident at once.
        **meta: the constants.

    Returns:
        what launches it again, with other ``args`` of the same kinds, addresses in place of tensors; or None.
    """
    if INTERPRETED:
        kernel[(grid,)](*args, **meta)
        return None
    values: list[Any] = []
    kinds: list[Any] = [kernel.__name__, grid, triton.runtime.driver.active.get_current_device(), tuning, cooperative]
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            values.append(address)
            kinds += (arg.dtype, address % 16 == 0)
        else:
            values.append(arg)
            if arg is None:
                kinds.append(None)
    key = (*kinds, *meta, *meta.values())
    run = _compiled.get(key)
    if run is None:
        compiled = kernel.warmup(*args, grid=(grid,), **meta, **options(tuning, cooperative)) if READ else None
        if compiled is None or not hasattr(type(compiled), "__getitem__"):  # or a hook of Triton's keeps it to itself
            kernel[(grid,)](*args, **meta, **options(tuning, cooperative))
            return None
        run = _compiled[key] = _again(compiled[(grid, 1, 1)], [meta[name] for name in kernel.arg_names[len(args) :]])
    run(*values)
    return run


def _again(run: Callable[..., Any], constants: list[Any]) -> Callable[..., Any]:
    return lambda *args: run(*args, *constants)
