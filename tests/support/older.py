"""Marks for what an older torch lacks, which docs/install.md says under "Versions"."""

import inspect

import pytest
import torch

keys = torch._C._dispatch_keys
sets_compare = pytest.mark.skipif(
    keys(torch.ones(2)) != keys(torch.empty(0)), reason="torch 2.7: equal sets of dispatch keys are not equal"
)
function_sees_losses = pytest.mark.skipif(
    "has_torch_function" not in inspect.getsource(torch.autograd.backward),
    reason="before torch 2.11 at least: the function backward sees no subclass of Tensor",
)
compiled_is_seen = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="torch 2.7, 2.8: no word about a compiled model"
)
