"""A damaged state_dict: it loads and training goes on, or a ValueError names the key and all is as it was."""

import copy
import functools
import re
from collections import Counter

import pytest
import torch
from balancers import KINDS, Training, bits, everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK, ALL = 8, 150  # examples of each of the 15 kinds
WRONG = {
    "None": None, "a text": "abc", "negative": -7, "huge": 2**70, "too huge for a float": 10**400, "half": 0.5,
    "nan": float("nan"), "inf": float("inf"), "True": True, "one": 1, "a task that is not there": [99],
    "an empty list": [], "an empty dict": {}, "a dict": {"0": 1}, "bytes": b"", "an object": object(),
    "a tensor": torch.ones(2), "a number in a tensor": torch.tensor(1),
}  # fmt: skip
# What becomes of a tensor.
CHANGES = {
    "shorter": lambda x: x[..., :-1],
    "a dimension more": lambda x: x[None],
    "whole numbers": lambda x: x.to(torch.int32),
    "half precision": lambda x: x.to(torch.float16),
    "wide": lambda x: x.to(torch.complex128),
    "a hole": lambda x: _with(x, "nan"),
    "an infinity": lambda x: _with(x, "inf"),
    "a negative number": lambda x: _with(x, -3),
    "a huge number": lambda x: _with(x, 1e30),
    "zeros": torch.zeros_like,
    "sparse": lambda x: x.to_sparse(),
    "without data": lambda x: x.to("meta"),
    "with a graph": lambda x: (x + torch.zeros((), requires_grad=True)) if x.is_floating_point() else x.clone(),
    "nested": lambda x: torch.nested.nested_tensor([x.reshape(-1)]) if x.is_floating_point() else x[:0],
}
# What some entries may become: without these few states would be taken.
MILD = (
    "one", "True", "half", "negative", "an empty list", "an unknown key", "a huge number", "with a graph", "a hole",
    "zeros", "gone",
)  # fmt: skip


def _with(x, number):
    """With this in the place of one element, if the dtype has it."""
    out = x.clone().reshape(-1)
    if x.is_floating_point() or (x.dtype == torch.int64 and number == -3):
        out[out.numel() // 2] = float(number)
    else:
        out[0] = ~out[0] if x.dtype == torch.bool else 2**62
    return out.view(x.shape)


@functools.cache
def saved(kind):
    """The state after some steps, and all that may be done to it."""
    state = copy.deepcopy(Training(kind, 3).balancer.state_dict())
    return state, damages(state)


@functools.cache
def expected(kind):
    """The gradients of the next step, where nothing was loaded."""
    return bits(Training(kind, 1).step())


def damages(state, path=()):
    """All (path, what becomes of the entry there)."""
    found = [(path, name) for name in WRONG]
    if isinstance(state, torch.Tensor):
        found += [(path, name) for name in CHANGES]
    elif isinstance(state, dict):
        found += [(path, "an unknown key"), (path, "a list of its keys")]
        for key, value in state.items():
            found += [((*path, key), "gone"), *damages(value, (*path, key))]
    elif isinstance(state, list):
        found += [(path, "longer")]
        found += [(path, "truncated")] if state else []
        for index, value in enumerate(state):
            found += damages(value, (*path, index))
    return found


def damaged(state, path, how):
    """A copy with this done to it; the same where another damage left nothing to do it to."""
    if path:
        key, *rest = path
        if not (key in state if isinstance(state, dict) else isinstance(state, list) and key in range(len(state))):
            return state
        out = copy.copy(state)
        if not rest and how == "gone":
            del out[key]
        else:
            out[key] = damaged(state[key], rest, how)
        return out
    if how in WRONG:
        return WRONG[how]
    if isinstance(state, torch.Tensor) and how in CHANGES and state.layout is torch.strided and not state.is_nested:
        return CHANGES[how](state) if state.numel() and not state.is_meta else state
    if isinstance(state, dict):
        return {"an unknown key": {**state, "unknown": 1}, "a list of its keys": list(state)}.get(how, state)
    if isinstance(state, list):
        return {"longer": [*state, 1], "truncated": state[:-1]}.get(how, state)
    return state


def try_to_load(kind, several):
    """Into a balancer that has trained less; "loaded" or "refused"."""
    state, training = saved(kind)[0], Training(kind, 1)
    for path, how in several:
        state = damaged(state, path, how)
    balancer, before = training.balancer, everything(training.balancer)
    message = refusal(balancer, state)
    if message is not None:
        assert names_one_of(message, [path for path, _ in several]), message
        assert everything(balancer) == before
        assert bits(training.step()) == expected(kind)
        return "refused"
    waits = training.end_waiting()
    if (
        not waits and "one" not in kind
    ):  # a second backward: what .grad holds of the open step, if one is, is subtracted
        training.backward()
        assert all(p.grad.isfinite().all() for p in training.shared)
    training.end()
    number = balancer.step
    assert all(grad.isfinite().all() for grad in training.step())
    assert balancer.step == number + 1
    return "loaded"


def refusal(balancer, state):
    """What the ValueError says that refuses a state; None if it is taken."""
    try:
        balancer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return None


def names_one_of(message, paths):
    """Whether the path in the message is of the damaged entry, or of one that does not go with it."""
    found = re.match(r"state_dict((?:\[[^]]*\])*)(: | is missing)", message)
    if found is None:
        return False
    named = re.findall(r"\[([^]]*)\]", found[1])
    damaged = [[repr(key) for key in path] for path in paths]
    if any(named == path[: len(named)] or path == named[: len(path)] for path in damaged):
        return True
    together = [{repr(key) for key in keys} for keys in TOGETHER]
    return any(named and path and named[-1] in some and set(path) & some for path in damaged for some in together)


# One is judged by the other.
TOGETHER = [("step", "open", "pending", "written"), ("rows", "sumsq", "whole", "pending"), ("norms", "broken")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_damaged_state_loads_or_is_refused_whole(kind, examples):
    outcomes, all_damages = Counter(), saved(kind)[1]
    mild = [damage for damage in all_damages if damage[1] in MILD and len(damage[0]) > 1]
    any_damage = st.sampled_from(all_damages) | st.sampled_from(mild)
    several_or_one_mild = st.lists(any_damage, min_size=1, max_size=2) | st.lists(
        st.sampled_from(mild), min_size=1, max_size=1
    )

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(several_or_one_mild)
    def load(several):
        outcomes[try_to_load(kind, several)] += 1

    load()
    assert outcomes.total() >= examples
    assert examples == QUICK or min(outcomes["loaded"], outcomes["refused"]) > examples // 20, outcomes
