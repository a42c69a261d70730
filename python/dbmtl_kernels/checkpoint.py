"""The state_dict of a balancer: what is in it, whether one fits, and taking it over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .engine.bookkeeping import SavedSteps
from .engine.step import Engine
from .rows import dtensors
from .rows.one_row import NO_ROWS
from .weightings import load_weighting, state_of_weighting

VERSION = 3
MOST = 2**53  # of a count: exact in float64, and no run gets there
OTHER_ROWS = (
    "(saved of replicas, of a sharded model, or the other way? of one row for all tasks, as beta=0 has without "
    "keep_rows=True?)"
)
STATS = ("norms", "weights", "sumsq", "broken", "nonfinite_steps")
AT_A_TIME = 2**20  # elements measured at once
T = TypeVar("T")


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


class Entry:
    """A value in a state, and the path to it. Each method gives a plain value of one kind.

    All raise ValueError, which names the path, where the value is of another kind or out of range.
    """

    def __init__(self, value: Any, path: str = "state_dict") -> None:
        self.value, self.path = value, path

    def error(self, why: str) -> ValueError:
        """To be raised."""
        return ValueError(f"{self.path}: {why}")

    def mapping(self) -> Mapping[Any, Any]:
        """A dict."""
        found: Mapping[Any, Any] = self._expect("a dict", isinstance(self.value, Mapping))
        return found

    def has(self, key: str) -> bool:
        """Whether a dict has the key."""
        return key in self.mapping()

    def get(self, key: Any, hint: str = "") -> Entry:
        """The entry of a dict; ``hint`` tells why it may be missing."""
        if not self.has(key):
            raise ValueError(f"{self.path}[{key!r}] is missing{hint and ' ' + hint}")
        return Entry(self.value[key], f"{self.path}[{key!r}]")

    __getitem__ = get

    def optional(self, key: str, read: Callable[[Entry], T]) -> T | None:
        """What ``read`` gives of an entry that a state may lack; None if it does."""
        return read(self[key]) if self.has(key) else None

    def entries(self, count: int | None = None) -> list[Entry]:
        """Those of a list, of so many."""
        found = self._expect("a list", isinstance(self.value, (list, tuple)))
        if count is not None and len(found) != count:
            raise self.error(f"{len(found)} entries, not {count}")
        return [Entry(value, f"{self.path}[{index}]") for index, value in enumerate(found)]

    def flag(self) -> bool:
        """True or False, or 1 or 0."""
        return bool(self._expect("a bool", isinstance(self.value, int) and self.value in (0, 1)))

    def flags(self, count: int) -> list[bool]:
        """A list of so many."""
        return [entry.flag() for entry in self.entries(count)]

    def count(self) -> int:
        """An integer >= 0."""
        whole = int(self._expect("an integer", isinstance(self.value, Integral) and not isinstance(self.value, bool)))
        if not 0 <= whole <= MOST:
            raise self.error(f"must be from 0 to {MOST}, got {_shown(whole)}")
        return whole

    def number(self) -> float:
        """A finite number."""
        value = self._expect("a number", isinstance(self.value, Real) and not isinstance(self.value, bool))
        if not abs(value) <= sys.float_info.max:
            raise self.error(f"must be finite, got {_shown(value)}")
        return float(value)

    def text(self) -> str:
        """A str."""
        return str(self._expect("a str", isinstance(self.value, str)))

    def tasks(self, num_tasks: int) -> set[int]:
        """A list of tasks."""
        found = {entry.count(): entry for entry in self.entries()}
        for task, entry in found.items():
            if task >= num_tasks:
                raise entry.error(f"task {task}, there are {num_tasks}")
        return set(found)

    def version(self, mine: int | str) -> None:
        """Raise unless it is this one."""
        if type(self.value) is not type(mine) or self.value != mine:
            raise self.error(f"version {_shown(self.value)}, this is version {mine!r}")

    def tensor(self, like: Tensor, dtype: bool = True) -> Tensor:
        """A tensor of the shape of another, and of its ``dtype``, or else of any floating one."""
        value = self._expect("a tensor", isinstance(self.value, Tensor))
        if value.is_nested or value.layout is not torch.strided or value.is_meta:
            raise self.error(
                f"must be a dense tensor that holds data, got one of layout {value.layout}, {value.device}"
            )
        if value.dtype != like.dtype if dtype else not value.is_floating_point():
            raise self.error(f"in {value.dtype}, here in {like.dtype}")
        if value.shape != like.shape:
            raise self.error(f"of shape {tuple(value.shape)}, here of shape {tuple(like.shape)} (other num_tasks?)")
        return value  # type: ignore[no-any-return]

    def require(self, good: Tensor, what: str) -> None:
        """Raise unless it is so of every task: ``good`` is (K,) bool."""
        if not bool(good.all()):
            raise self.error(f"{what}; not so of task(s) {(~good).nonzero().flatten().tolist()}")

    def _expect(self, kind: str, right: bool) -> Any:
        if not right:
            raise self.error(f"must be {kind}, got {_shown(self.value)}")
        return self.value


def _shown(value: Any) -> str:
    """A value in a message, if it is a short one; else its type."""
    if isinstance(value, str):
        return repr(value[:40])
    short = value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 64)
    return repr(value) if short else f"a value of type {type(value).__name__}"


class Saved(NamedTuple):
    """What a state tells, read and checked: nothing is left to refuse."""

    steps: SavedSteps
    touched: list[bool]
    left: list[bool] | None
    buffer: dict[str, Any]
    weighting: Entry


@torch.no_grad()
def load(state: dict[str, Any] | Entry, engine: Engine) -> None:
    """Copy a state into the live objects, if it is of the kind of theirs. Of several ranks all must call it.

    All is read and checked before anything is written: types, ranges, dtypes, shapes, what numbers must have to do with
    each other. The weighting, whose loading is its own affair, comes before the rest, and is put back if it raises.
    Entries that nobody here knows are ignored: they may be of another release. So are rows that the state has and this
    balancer does not keep, as beta = 0 reads none of an earlier step.

    Raises:
        ValueError: the state does not fit; the message begins with the path of the entry. Nothing is changed then, on
            any rank.
    """
    engine.rows.settle()  # what is under way would be added to what is loaded
    with ExitStack() as undo:
        with agreed(engine):
            saved = _read(state if isinstance(state, Entry) else Entry(state), engine)
            try:
                undo.callback(load_weighting(engine.weighting, dict(saved.weighting.value)))
            except ValueError as error:
                raise saved.weighting.error(str(error)) from error
        undo.pop_all()
    engine.rows.load(saved.buffer)
    engine.steps.load(saved.steps, engine.rows.device)
    gone = engine.grads.resume(saved.touched, saved.left)
    if gone and not engine.steps.pending:  # saved after a step that a GradScaler skipped, say
        engine.steps.end()


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
    try:
        engine.steps.coefficients_of(steps.step + 1)
    except OverflowError as error:
        raise entry["steps"]["step"].error("no step can follow, its decay is beyond any float") from error
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
    return Saved(steps, touched, left if written else None, buffer, weighting)


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
        waits = torch.tensor([task in pending for task in range(len(sums))], device=sums.device)
        over = ~sums.isfinite() & (waits | ~norms.isfinite() | (norms == 0))
        entry["sumsq"].require(near | over, "must be the sum of squares of the row")
    return out


def _like(entry: Entry, own: Any) -> Any:
    """What an entry holds, if it has the keys, and its tensors the dtypes and shapes, of our own."""
    if isinstance(own, dict):
        hint = OTHER_ROWS if entry.path.endswith("['rows']") else ""
        return {key: _like(entry.get(key, hint), value) for key, value in own.items()}
    return entry.tensor(own) if isinstance(own, Tensor) else entry.value


def _norms(rows: Iterable[Tensor]) -> Tensor:
    """(K,) float64 norms of the rows, of which each tensor, (K, ...), has a part."""
    totals = []
    for part in rows:
        wide = torch.float32 if part.device.type == "mps" else torch.float64
        chunks = [row.reshape(-1).split(AT_A_TIME) for row in part]
        sums = [torch.stack([chunk.to(wide).square().sum() for chunk in some]).sum() for some in chunks]
        totals.append(torch.stack(sums).cpu().double())
    return torch.stack(totals).sum(dim=0).sqrt()
