"""The state_dict of a balancer: what is in it, whether one fits, and taking it over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .engine.bookkeeping import SavedSteps
from .engine.step import Engine
from .ops.arguments import check_beta, check_beta_sigma, check_eps, check_scale
from .ops.entries import MOST, Entry
from .ops.tasks import TaskNames, check_task_weights
from .rows import dtensors
from .rows.one_row import NO_ROWS
from .weightings import is_max_norm, load_weighting, state_of_weighting

VERSION = 3
OTHER_ROWS = (
    "(saved of replicas, of a sharded model, or the other way? of one row for all tasks, as beta=0 has without "
    "keep_rows=True?)"
)
STATS = ("norms", "weights", "sumsq", "broken", "nonfinite_steps")
AT_A_TIME = 2**20  # elements measured at once


def state_of(engine: Engine) -> dict[str, Any]:
    """Tensors are references to the live ones. Nothing in it depends on the number of ranks but how DTensors lie.

    Raises:
        RuntimeError: tasks wait for a balance, their gradients being in one row.
    """
    if engine.steps.pending and engine.parts.balanced.one is not None:
        raise RuntimeError(NO_ROWS.format(what=f"a state_dict while task(s) {sorted(engine.steps.pending)} wait"))
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
        "weighting": state_of_weighting(engine.weighting),
        "settings": _settings_of(engine),
    }


def _settings_of(engine: Engine) -> dict[str, Any]:
    settings, weighting = engine.steps.settings, engine.weighting
    state: dict[str, Any] = {
        "names": engine.steps.tasks.names, "beta": settings.beta, "beta_sigma": settings.beta_sigma,
        "eps": settings.eps,
    }  # fmt: skip
    if is_max_norm(weighting):
        state |= {"scale": weighting.scale, "norm_eps": weighting.eps}
    if not callable(settings.task_weights):
        state["task_weights"] = settings.task_weights
    return state


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


class SavedSettings(NamedTuple):
    """What may be set between steps; `load` leaves alone what is not in ``settings`` and ``rule``."""

    names: list[str] | None
    settings: dict[str, Any]
    rule: dict[str, Any]


class Saved(NamedTuple):
    """What a state tells, read and checked: nothing is left to refuse."""

    steps: SavedSteps
    touched: list[bool]
    left: list[bool] | None
    buffer: dict[str, Any]
    weighting: Entry
    settings: SavedSettings


@torch.no_grad()
def load(state: dict[str, Any] | Entry, engine: Engine) -> list[int] | None:
    """Copy a state into the live objects, if it is of the kind of theirs. Of several ranks all must call it.

    All is read and checked before anything is written: types, ranges, dtypes, shapes, what numbers must have to do with
    each other. The weighting, whose loading is its own affair, comes before the rest, and is put back if it raises.
    Entries that nobody here knows are ignored: they may be of another release. So are rows that the state has and this
    balancer does not keep, as beta = 0 reads none of an earlier step; its beta stays 0.

    Returns:
        where the tasks have other places in the state: for each that is here its place there. They have those places
        now, until `Engine.reindex_tasks` puts them right.

    Raises:
        ValueError: the state does not fit; the message begins with the path of the entry. Nothing is changed then, on
            any rank.
    """
    engine.rows.settle()  # what is under way would be added to what is loaded
    with ExitStack() as undo:
        with agreed(engine):
            saved = _read(Entry.of(state), engine)
            try:
                undo.callback(load_weighting(engine.weighting, dict(saved.weighting.value)))
            except ValueError as error:
                raise saved.weighting.error(str(error)) from error
        undo.pop_all()
    order = _apply(saved.settings, engine)
    engine.rows.load(saved.buffer)
    engine.steps.load(saved.steps, engine.rows.device)
    gone = engine.grads.resume(saved.touched, saved.left)
    if gone and not engine.steps.pending:  # saved after a step that a GradScaler skipped, say
        engine.steps.end()
    return order


def _apply(saved: SavedSettings, engine: Engine) -> list[int] | None:
    tasks, order = engine.steps.tasks, None
    if saved.names is not None:
        if tasks.names not in (None, saved.names):
            order = [saved.names.index(name) for name in tasks.names or ()]
            engine.steps.turn_factors(order)  # they will be put right again, if none are loaded
        tasks.names = saved.names
    for target, values in ((engine.steps.settings, saved.settings), (engine.weighting, saved.rule)):
        for name, value in values.items():
            setattr(target, name, value)
    return order


@contextmanager
def agreed(engine: Engine) -> Iterator[None]:
    """If what is inside raises ValueError on any rank, it does on every one. A collective if there are several."""
    error: ValueError | None = None
    try:
        yield
    except ValueError as caught:
        error = caught
    if engine.ranks.size > 1:
        refused = torch.full((1,), error is not None, dtype=torch.float32, device=engine.rows.device)
        if bool(engine.ranks.sum(refused, "whether a state fits") > 0) and error is None:
            error = ValueError("state_dict: refused on another rank, whose error says why")
    if error is not None:
        raise error


def _read(entry: Entry, engine: Engine) -> Saved:
    """What a state tells.

    Raises:
        ValueError: it does not fit.
    """
    entry["version"].version(VERSION)
    rows, number = engine.rows, len(engine.rows.parameters)
    _check_parameters(entry["parameters"], rows.signature())
    steps = _read_steps(entry["steps"], engine.steps.num_tasks)
    if steps.pending and engine.parts.balanced.one is not None:
        what = f"a state in which task(s) {sorted(steps.pending)} wait for a balance"
        raise entry["steps"]["pending"].error(NO_ROWS.format(what=what))
    touched = entry["touched"].flags(number)
    left = entry.optional("left", lambda given: given.flags(number)) or touched
    written = entry["written"].flag()
    if written and not steps.open:
        raise entry["written"].error("a balanced gradient of the open step, and none is open")
    weighting = entry["weighting"]
    weighting.mapping()
    for key, own in state_of_weighting(engine.weighting).items():
        if weighting.has(key):  # what one that has not run lacks, one that has must not ask for
            _like(weighting[key], own)
    buffer = _read_buffer(entry["buffer"], rows.state(), steps.pending, torch.finfo(rows.narrow).max)
    settings = entry.optional("settings", lambda given: _read_settings(given, engine, steps.open))
    settings = settings or SavedSettings(None, {}, {})
    return Saved(steps, touched, left if written else None, buffer, weighting, settings)


def _read_settings(entry: Entry, engine: Engine, is_open: bool) -> SavedSettings:
    names, own, num_tasks = entry["names"], engine.steps.tasks.names, engine.steps.num_tasks
    given: list[str] | None = None
    if names.value is not None:
        given = [name.text() for name in names.entries(num_tasks)]
        names.passes(TaskNames, given)
        if own is not None and set(own) != set(given):
            raise names.error(f"the tasks are {given}, here {own}")
        moved = own is not None and own != given
        if moved and (is_open or not (is_max_norm(engine.weighting) or hasattr(engine.weighting, "reindex_tasks"))):
            raise names.error(
                f"the tasks are in another order, {given}, here {own}, within a step or of such a weighting"
            )
    settings: dict[str, Any] = {
        "beta": entry["beta"].passes(check_beta, entry["beta"].number()),
        "beta_sigma": entry["beta_sigma"].passes(check_beta_sigma, entry["beta_sigma"].number()),
        "eps": entry["eps"].passes(check_eps, entry["eps"].number()),
    }
    if engine.parts.balanced.one is not None:
        settings["beta"] = 0.0
    if entry.has("task_weights") and not callable(engine.steps.settings.task_weights):
        given_factors, factors = entry["task_weights"], None
        if given_factors.value is not None:
            factors = [factor.number() for factor in given_factors.entries(num_tasks)]
            given_factors.passes(check_task_weights, factors, num_tasks, engine.steps.capturable)
        settings["task_weights"] = factors
    rule: dict[str, Any] = {}
    if is_max_norm(engine.weighting) and entry.has("scale"):
        scale, eps = entry["scale"], entry["norm_eps"]
        rule["scale"] = scale.passes(check_scale, scale.value if isinstance(scale.value, str) else scale.number())
        rule["eps"] = eps.passes(check_eps, eps.number())
    return SavedSettings(given, settings, rule)


def _read_steps(entry: Entry, num_tasks: int) -> SavedSteps:
    known = entry["known"].tasks(num_tasks)
    losses = entry["losses"].tensor(torch.empty(num_tasks, dtype=torch.float64, device="meta"))
    saved = SavedSteps(
        step=entry["step"].count(),
        open=entry["open"].flag(),
        fresh=entry["fresh"].flag(),
        seen=entry["seen"].flags(num_tasks),
        pending=entry["pending"].tasks(num_tasks),
        sitting_out=entry.optional("sitting_out", lambda given: given.tasks(num_tasks)) or set(),
        losses={task: losses[task] for task in known},
        loss_scale=None if entry["loss_scale"].value is None else entry["loss_scale"].number(),
    )
    if saved.open and saved.step == 0:
        raise entry["step"].error("a step is open, and none has begun")
    if saved.pending and not saved.open:
        raise entry["pending"].error(f"task(s) {sorted(saved.pending)} wait for a balance, and no step is open")
    return saved


def _check_parameters(entry: Entry, mine: list[list[Any]]) -> None:
    """Raise ValueError unless the state is of parameters with this `ParameterLayout.signature`."""
    theirs = entry.entries()
    if len(theirs) != len(mine):
        raise entry.error(f"the state is of {len(theirs)} shared parameters, there are {len(mine)} here")
    for index, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        dtype, *dims = there.entries(3)
        saved = [dtype.text(), *([dim.count() for dim in some.entries()] for some in dims)]
        if here[:2] != saved[:2]:
            raise there.error(
                f"shared parameter {index} is {here[0]} {here[1]} here and {saved[0]} {saved[1]} in the state"
            )
        if here != saved:
            raise there.error(
                f"shared parameter {index} has its dimensions in memory order {here[2]} here and {saved[2]} in the "
                "state (another memory_format?)"
            )


def _read_buffer(entry: Entry, own: dict[str, Any], pending: set[int], largest: float) -> dict[str, Any]:
    """What `load` of the rows takes; ``largest``: no weight is larger."""
    if "rows" not in own:  # in parts
        return {key: _read_buffer(entry[key], part, pending, largest) for key, part in own.items()}
    out: dict[str, Any] = _like(entry, own)
    out["whole"] = entry["whole"].flag()
    try:
        dtensors.check_owner(own["owner"], out["owner"])
    except ValueError as error:
        raise entry["owner"].error(str(error)) from error
    for name in STATS:
        if dtensors.is_dtensor(out[name]):
            raise entry[name].error("must be a plain tensor, got a DTensor")
    norms, weights, sums, broken, steps = (out[name].cpu() for name in STATS)
    unknown = norms.isnan() if not own["rows"] else broken  # of tasks that `OnePassDBMTL` has not measured
    entry["norms"].require(broken | unknown | (norms.isfinite() & (norms >= 0)), "must be finite and >= 0")
    entry["weights"].require(weights.abs() <= largest, f"must be finite and at most {largest}")
    entry["sumsq"].require(~(sums < 0), "must be >= 0")
    entry["nonfinite_steps"].require((steps >= 0) & (steps <= MOST), f"must be from 0 to {MOST}")
    if own["rows"] and own["whole"] and out["whole"]:  # else they are measured when they have been loaded
        norms = _norms(dtensors.local(rows) for rows in out["rows"].values())
        near = torch.isclose(sums.double().sqrt(), norms, rtol=1e-3, atol=1e-15)  # some chips lose squares below 1e-38
        # What overflowed stays so until the next balance; where one was interrupted its row is zero.
        waits = torch.tensor([task in pending for task in range(len(sums))], dtype=torch.bool, device=sums.device)
        over = ~sums.isfinite() & (waits | ~norms.isfinite() | (norms == 0))
        entry["sumsq"].require(near | over, "must be the sum of squares of the row")
    return out


def _like(entry: Entry, own: Any) -> Any:
    """What an entry holds, if it has the keys, and its tensors the dtypes and shapes, of our own."""
    if isinstance(own, dict):
        hint = OTHER_ROWS if entry.path.endswith("['rows']") else ""
        return {key: _like(entry.get(key, hint), value) for key, value in own.items()}
    return entry.tensor(own) if isinstance(own, Tensor) else entry.value


@ops.one_thread_if_forked()
def _norms(rows: Iterable[Tensor]) -> Tensor:
    """(K,) float64 norms of the rows, of which each tensor, (K, ...), has a part."""
    totals = []
    for part in rows:
        wide = torch.float32 if part.device.type == "mps" else torch.float64
        chunks = [row.reshape(-1).split(AT_A_TIME) for row in part]
        sums = [torch.stack([chunk.to(wide).square().sum() for chunk in some]).sum() for some in chunks]
        totals.append(torch.stack(sums).cpu().double())
    return torch.stack(totals).sum(dim=0).sqrt()
