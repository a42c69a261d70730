"""A foreign default device and a float64 default dtype, as the code of the package meets them.

`torch.set_default_device` and `torch.set_default_dtype` change every call, also the tests' own.
`foreign_to_the_package` changes those that the package makes: a tensor made without a device lands on "meta", where
whoever needs its numbers fails.
"""

import ast
import sys
from contextlib import contextmanager
from pathlib import Path

import dbmtl_kernels
import torch
from torch.overrides import TorchFunctionMode

PACKAGE = Path(dbmtl_kernels.__file__).parent
# Functions of torch that make a tensor, on the default device if none is named.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "frombuffer", "full"),
    *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros"),
}
FOREIGN = "meta"


def without_defaults(source):
    """Of Python code, each call of a factory that names no device or no dtype: (line, code)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        named = {keyword.arg for keyword in node.keywords}
        owner, name = ast.unparse(node.func.value), node.func.attr
        if owner == "torch" and (name in FACTORIES or name.startswith("sparse_")):
            missing = not {"device", "dtype"} <= named
        elif owner == "torch" and name == "where":  # of two numbers: in the default dtype
            missing = all(isinstance(part, ast.Constant) or _is_number(part) for part in node.args[1:])
        else:
            missing = owner == "torch" and name == "Generator" and not (node.args or named)
        if missing:
            found.append((node.lineno, ast.unparse(node)))
    return found


def _is_number(node):
    return isinstance(node, ast.Attribute) and node.attr in {"nan", "inf"}


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Dynamo traces this function too, and knows of no frames.
        if torch.compiler.is_compiling() or not _called_by_package(sys._getframe(1)):
            return func(*args, **kwargs)
        if getattr(func, "__name__", None) in FACTORIES and kwargs.get("device") is None and not _of_tensor(args):
            kwargs = {**kwargs, "device": FOREIGN}
        with default_dtype(torch.float64):
            return func(*args, **kwargs)


@contextmanager
def foreign_to_the_package():
    """Within it the package's own calls of torch have other defaults; tests, models and other libraries keep theirs.

    Backward passes run under it too, where PyTorch's own default device does not reach.
    """
    run = torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with _Mode():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    try:
        with _Mode():
            yield
    finally:
        torch.autograd._engine_run_backward = run


def _of_tensor(args):
    """As as_tensor may be, which then stays where that is."""
    return bool(args) and isinstance(args[0], torch.Tensor)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_ours: dict[str, bool | None] = {}


def _called_by_package(frame):
    """Whether the innermost code that is not torch's is the package's."""
    while frame is not None:
        name = frame.f_code.co_filename
        ours = _ours.get(name, ...)
        if ours is ...:
            torchs = name.startswith("<") or Path(torch.__file__).parent in Path(name).parents
            ours = _ours[name] = None if torchs else PACKAGE in Path(name).parents
        if ours is not None:
            return ours
        frame = frame.f_back
    return False
