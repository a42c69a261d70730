"""The state_dict of a balancer: what is in it, whether one fits, and taking it over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dtensors
from .gradients import SharedGradients
from .placement import Buffer
from .steps import Steps
from .weightings import Weighting, load_weighting, state_of_weighting

VERSION = 3


def state_of(buffer: Buffer, steps: Steps, grads: SharedGradients, weighting: Weighting) -> dict[str, Any]:
    """Tensors are references to the live ones. Nothing in it depends on the number of ranks but how DTensors lie."""
    return {
        "version": VERSION,
        "parameters": buffer.signature(),
        "steps": steps.state(),
        "touched": [int(x) for x in grads.touched],
        "written": grads.written,
        "buffer": buffer.state(),
        "weighting": state_of_weighting(weighting),
    }


@torch.no_grad()
def gathered(state: dict[str, Any], keep: bool = True) -> dict[str, Any]:
    """A state with its DTensors gathered into plain tensors on the host, for trainers that save from one rank.

    A collective if there are any: each task's row in turn, so that P elements are in transit.

    Args:
        state: what `state_of` gave.
        keep: whether this rank wants it; the others take part and get what there was besides.
    """
    out: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out[key] = gathered(value, keep)
        elif not dtensors.is_dtensor(value):
            out[key] = value
        else:
            whole = torch.empty(value.shape, dtype=value.dtype) if keep else None
            for task, row in enumerate(dtensors.whole_rows(value)):
                if whole is not None:
                    whole[task].copy_(row)
            if whole is not None:
                out[key] = whole
    return out


def load(state: dict[str, Any], buffer: Buffer, steps: Steps, grads: SharedGradients, weighting: Weighting) -> None:
    """Copy a checked state into the live objects."""
    load_weighting(weighting, state["weighting"])
    buffer.load(state["buffer"])
    steps.load(state["steps"], buffer.device)
    gone = grads.resume([bool(x) for x in state["touched"]], bool(state["written"]))
    if gone and not steps.pending:  # saved after a step that a GradScaler skipped, say
        steps.end()


def check(state: dict[str, Any], own: dict[str, Any], buffer: Buffer) -> None:
    """Raise ValueError unless ``state`` is of the kind of ``own``, the balancer's own state_dict.

    Compared are the version, the entries, the shared parameters, and the dtypes and shapes of all tensors.
    """
    if state.get("version") != own["version"]:
        raise ValueError(f"state_dict has version {state.get('version')!r}, this is version {own['version']}")
    kept = state.get("weighting", {})  # what one that has not run lacks, one that has must not ask for
    own = {**own, "weighting": {key: value for key, value in own["weighting"].items() if key in kept}}
    _check_present(state, own, "")
    check_signature(buffer.signature(), state["parameters"])
    _check_tensors(state, own, "")
    if len(state["touched"]) != len(own["touched"]):
        raise ValueError(f"state_dict has {len(state['touched'])} entries of touched, not {len(own['touched'])}")
    seen, expected = state["steps"]["seen"], own["steps"]["seen"]
    if len(seen) != len(expected):
        raise ValueError(f"state_dict has {len(seen)} entries of seen, not {len(expected)} (other num_tasks?)")


def check_signature(mine: list[list[Any]], theirs: list[list[Any]]) -> None:
    """Raise ValueError unless two `ParameterLayout.signature` are the same."""
    if len(theirs) != len(mine):
        raise ValueError(f"the state is of {len(theirs)} shared parameters, there are {len(mine)} here")
    for index, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here[:2] != list(there)[:2]:
            raise ValueError(
                f"shared parameter {index} is {here[0]} {here[1]} here and {there[0]} {there[1]} in the state"
            )
        if here != list(there):
            raise ValueError(
                f"shared parameter {index} has its dimensions in memory order {here[2]} here and {there[2]} in "
                "the state (another memory_format?)"
            )


def _check_present(state: dict[str, Any], own: dict[str, Any], prefix: str) -> None:
    missing = sorted(prefix + str(key) for key in set(own) - set(state))
    if missing and prefix != "buffer.rows.":  # their number follows from the parameters, which are checked next
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
    for key, mine in own.items():
        if isinstance(mine, dict) and key in state:
            _check_present(state[key], mine, f"{prefix}{key}.")


def _check_tensors(state: dict[str, Any], own: dict[str, Any], prefix: str) -> None:
    for key, mine in own.items():
        name = f"{prefix}{key}"
        if key not in state:
            raise ValueError(f"state_dict lacks {name} (saved of replicas, of a sharded model, or the other way?)")
        theirs = state[key]
        if isinstance(mine, dict):
            _check_tensors(theirs, mine, f"{name}.")
        elif isinstance(mine, Tensor):
            if theirs.dtype != mine.dtype:
                raise ValueError(f"state_dict has {name} in {theirs.dtype}, this balancer in {mine.dtype}")
            if theirs.shape != mine.shape:
                raise ValueError(
                    f"state_dict has {name} of shape {tuple(theirs.shape)}, this balancer of {tuple(mine.shape)} "
                    "(other num_tasks?)"
                )
