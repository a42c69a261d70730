"""The state_dict of a balancer: what is in it, whether one fits, and taking it over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .engine.step import Engine
from .rows import dtensors
from .rows.one_row import NO_ROWS

VERSION = 3
# What version 3 has had since later, and a state may lack.
OPTIONAL = {"steps.sitting_out", "left"}


def state_of(engine: Engine) -> dict[str, Any]:
    """Tensors are references to the live ones. Nothing in it depends on the number of ranks but how DTensors lie.

    Raises:
        RuntimeError: tasks wait for a balance, their gradients being in one row.
    """
    if engine.steps.pending and engine.parts.balanced.one is not None:
        raise RuntimeError(NO_ROWS.format(what=f"a state_dict while task(s) {sorted(engine.steps.pending)} wait"))
    return _state(engine)


def _state(engine: Engine) -> dict[str, Any]:
    engine.rows.settle()
    if engine.rows.local:  # of several ranks one alone may ask for its state
        engine.end_if_dropped()  # told by what is in .grad, which is not part of the state
    return {
        "version": VERSION,
        "parameters": engine.rows.signature(),
        "steps": engine.steps.state(),
        "touched": [int(x) for x in engine.grads.touched],
        "written": engine.grads.written,
        "left": engine.grads.left,
        "buffer": engine.rows.state(),
        "weighting": _state_of_weighting(engine.weighting),
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
            whole = torch.empty(value.shape, dtype=value.dtype, device="cpu") if keep else None
            for task, row in enumerate(dtensors.whole_rows(value)):
                if whole is not None:
                    whole[task].copy_(row)
            if whole is not None:
                out[key] = whole
    return out


def load(state: dict[str, Any], engine: Engine) -> None:
    """Copy a state into the live objects, if it is of the kind of theirs.

    Compared are the version, the entries, the shared parameters, and the dtypes and shapes of all tensors. Rows
    that the state has and this balancer does not keep are left out, as beta = 0 reads none of an earlier step.

    Raises:
        ValueError: it is not. Nothing is changed then.
    """
    _check(state, _state(engine), engine.rows.signature())
    if state["steps"]["pending"] and engine.parts.balanced.one is not None:
        raise ValueError(
            NO_ROWS.format(what=f"a state in which task(s) {state['steps']['pending']} wait for a balance")
        )
    _load_weighting(engine.weighting, state["weighting"])
    engine.rows.load(state["buffer"])
    engine.steps.load(state["steps"], engine.rows.device)
    touched = [bool(x) for x in state["touched"]]
    gone = engine.grads.resume(touched, [bool(x) for x in state.get("left", touched)] if state["written"] else None)
    if gone and not engine.steps.pending:  # saved after a step that a GradScaler skipped, say
        engine.steps.end()


def _check(state: dict[str, Any], own: dict[str, Any], signature: list[list[Any]]) -> None:
    if state.get("version") != own["version"]:
        raise ValueError(f"state_dict has version {state.get('version')!r}, this is version {own['version']}")
    kept = state.get("weighting", {})  # what one that has not run lacks, one that has must not ask for
    own = {**own, "weighting": {key: value for key, value in own["weighting"].items() if key in kept}}
    _check_present(state, own, "")
    check_signature(signature, state["parameters"])
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
    missing = sorted({prefix + str(key) for key in set(own) - set(state)} - OPTIONAL)
    if missing and not prefix.endswith(".rows."):  # their number follows from the parameters, which are checked next
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
    for key, mine in own.items():
        if isinstance(mine, dict) and key in state:
            _check_present(state[key], mine, f"{prefix}{key}.")


def _check_tensors(state: dict[str, Any], own: dict[str, Any], prefix: str) -> None:
    for key, mine in own.items():
        name = f"{prefix}{key}"
        if key not in state:
            if name in OPTIONAL:
                continue
            raise ValueError(
                f"state_dict lacks {name} (saved of replicas, of a sharded model, or the other way? of one row for all "
                "tasks, as beta=0 has without keep_rows=True?)"
            )
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


def _state_of_weighting(weighting: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a weighting: the state_dict of one that has any."""
    return dict(weighting.state_dict()) if hasattr(weighting, "state_dict") else {}


def _load_weighting(weighting: Any, state: dict[str, Any]) -> None:
    """Take over what `_state_of_weighting` gave, also into one that has not run yet.

    Raises:
        ValueError: it is of another weighting. Nothing is changed then.
    """
    if not hasattr(weighting, "load_state_dict"):
        if state:
            raise ValueError(f"the state is of a weighting that keeps {sorted(state)}, {_name(weighting)} keeps none")
        return
    before = copy.deepcopy(_state_of_weighting(weighting))
    try:
        _load_into(weighting, state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        _load_into(weighting, before)
        raise ValueError(f"the state is not one of {_name(weighting)}: {error}") from error


def _load_into(weighting: Any, state: dict[str, Any]) -> None:
    if isinstance(weighting, nn.Module):
        reset = getattr(weighting, "reset", None)
        if callable(reset):
            reset()
        for name, value in state.items():
            _make_room(weighting, name, value)
    weighting.load_state_dict(state)


def _make_room(module: nn.Module, name: str, value: Any) -> None:
    """For a buffer that a module makes when it first runs, as several of TorchJD's do."""
    path, _, buffer = name.rpartition(".")
    owner = dict(module.named_modules()).get(path)
    if owner is not None and getattr(owner, buffer, value) is None:
        setattr(owner, buffer, torch.empty_like(value))


def _name(weighting: Any) -> str:
    return type(weighting).__name__
