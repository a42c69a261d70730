"""A machine with a GPU, as Triton asks for it, where there is none."""

from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget


def machine(arch, launcher=lambda source, metadata: "launcher"):
    """Stands for the driver of a machine with a GPU of an architecture; every kernel that it loads is function 77."""
    return SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda *args: ("module", 77, 128, 0, 1024)[: 4 if triton.__version__.startswith("3.3") else 5],
            unload_module=lambda module: None,
        ),
    )
