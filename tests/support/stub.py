"""A GPU whose launches are ours: Triton compiles for it, and hands what it would launch to a function.

A process of its own (``python stub.py``), as kernels are plain Python once TRITON_INTERPRET is set. It prints as JSON
what `launcher.launch` hands on, and what Triton itself does for the same arguments.
"""

import json
import warnings
from functools import partial

import codegen
import torch
import triton
from dbmtl_kernels import backends
from dbmtl_kernels.backends.triton import launcher, launches
from machine import machine

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


sink = [None]  # what every launch calls, with (hash of what was compiled, whether cooperative, grid, all arguments)


def install(launched, arch=90, resident=4):
    """Triton launches on that machine from now on."""
    sink[0] = launched

    def start(compiled, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        sink[0](compiled.hash, compiled.launch_cooperative_grid, x, args)

    def ask(name, count, *args):
        count._obj.value = resident

    triton.runtime.driver.set_active(machine(arch, lambda source, metadata: partial(start, metadata)))
    driver = launches.driver
    driver.capability, driver.multiprocessors = (lambda device: divmod(arch, 10)), (lambda device: 132)
    driver.launches, driver._call, backends.triton.missing = form, ask, lambda device: None


cooperative = [True]  # whether the machine can launch so


def form(device):
    """As `device.launches` on a GPU: it would take CPU tensors for interpreted."""
    return (2, "") if not cooperative[0] or device in launches.driver._refused else (1, "")


def off(tensor):
    """The same numbers, one element further on: not on 16 bytes."""
    return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].view(tensor.shape)


def dense(grad, state, misaligned=(), at_once=True):
    cooperative[0] = at_once
    tensors = [torch.zeros(3, 1000, dtype=dtype) for dtype in (grad, state)]
    tensors = [off(x) if i in misaligned else x for i, x in enumerate(tensors)]
    launches.balance_(*tensors, 0.9, 1e-8, "max", 0.0)


CASES = {
    "dense": partial(dense, F32, F32),
    "dense, gradients off": partial(dense, F32, F32, [0]),
    "dense, state off": partial(dense, F32, F32, [1]),
    "dense bf16": partial(dense, BF16, F32),
    "dense, no cooperative launch": partial(dense, F32, F32, at_once=False),
    "accumulate": partial(codegen.accumulate, [F32], F32),
    "accumulate bf16": partial(codegen.accumulate, [BF16], F32),
    "accumulate, scaled": partial(codegen.accumulate, [F32], F32, loss_scale=torch.ones(())),
    "combine": partial(codegen.combine, 3, 1000, F32),
    "rows": partial(codegen.balance_rows, 3, [F32]),
    "rows, two dtypes": partial(codegen.balance_rows, 3, [F32, BF16]),
    "gramian": lambda: launches.gramian(torch.zeros(3, 1 << 16, dtype=F32)),
}


def recorded(case, theirs=None):
    """The launches of a case: what, whether cooperative, grid, arguments; of a pointer, how it lies to 16 bytes."""
    seen.clear()
    CASES[case]()
    found = []
    for n, (*what, args) in enumerate(seen):
        pointers = [isinstance(arg, torch.Tensor) for arg in args] if theirs is None else theirs[n][-1]
        arguments = [arg if not at else address(arg) % 16 for arg, at in zip(args, pointers, strict=True)]
        found.append([*what, arguments, pointers])
    return found


def address(arg):
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg


def main():
    cases = {}
    install(lambda *what: seen.append(what))
    for case in CASES:
        launcher.READ = False
        theirs = recorded(case)
        launcher.READ = True
        cases[case] = theirs, [recorded(case, theirs) for _ in range(3)]
    parameters = {
        name: [(p.name, p.do_not_specialize, p.annotation_type, p.do_not_specialize_on_alignment)
               for p in kernel.params if not p.is_constexpr]
        for name, kernel in codegen.KERNELS.items()
    }  # fmt: skip
    print(json.dumps({
        "cases": cases, "parameters": parameters, "direct": len(launcher._compiled),
        "refused": refused(f"Triton Error [CUDA]: {launches.driver.REFUSALS[0]}"), "failed": refused("out of memory"),
    }))  # fmt: skip


seen = []


def refused(error):
    """Launches of three calls where cooperative ones raise, and what was raised and said."""
    launched, told = [], []

    def launch(compiled, cooperative, grid, args):
        launched.append(cooperative)
        if cooperative:
            raise RuntimeError(error)

    sink[0] = launch
    launches.driver._refused.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            try:
                CASES["dense"]()
            except RuntimeError as raised:
                told.append(str(raised))
    return launched, told + [str(w.message) for w in caught if w.category is RuntimeWarning]


if __name__ == "__main__":
    main()
