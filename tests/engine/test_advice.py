"""What PyTorch says of a failed pass is explained; what anybody else says is not touched."""

import pytest
import torch
from problems import leaf, make

WORDS = (
    "NCCL is not what my model needs",
    "gloo went missing",
    "Expected to mark a variable ready only once.",
    "my donated buffer is gone",
)


def losses(p, hook):
    out = [(p - t).square().sum() for t in range(2)]
    out[0].register_hook(hook)
    return out


def raising(words, kind=RuntimeError, modules=(__name__,)):
    """A hook that raises, through functions that are of these modules, as their frames tell."""
    call = None
    for module in reversed(modules):
        names = {"__name__": module, "inner": call, "error": kind(words)}
        exec(f"def call(grad):\n    {'raise error' if call is None else 'return inner(grad)'}", names)
        call = names["call"]
    return call


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError])
def test_an_error_of_the_users_code_is_passed_on(words, kind):
    p = leaf(3)
    with pytest.raises(RuntimeError) as error:
        make(p).backward(losses(p, raising(words, kind)))
    assert type(error.value) is kind
    assert str(error.value) == words


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError, torch.distributed.DistNetworkError])
def test_that_of_a_collective_of_fsdp_is_explained(kind):
    p = leaf(3)
    hook = raising("Connection closed by peer", kind, ["torch.distributed.fsdp.made_up", "torch.distributed.made_up"])
    with pytest.raises(RuntimeError, match=r"backward pass of task 0: FSDP failed, as the error above says") as error:
        make(p).backward(losses(p, hook))
    assert isinstance(error.value.__cause__, kind)


def test_that_of_a_collective_that_the_user_called_is_passed_on():
    p = leaf(3)
    hook = raising("Connection closed by peer", modules=["my.model", "torch.distributed.distributed_c10d"])
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer"):
        make(p).backward(losses(p, hook))
