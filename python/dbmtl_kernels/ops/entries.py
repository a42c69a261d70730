"""A state_dict as it is read: each value checked, and an error that names the path to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 2**53  # of a count: exact in float64, and no run gets there
T = TypeVar("T")


class Entry:
    """A value in a state, and the path to it. Each method gives a plain value of one kind.

    All raise ValueError, which names the path, where the value is of another kind or out of range.
    """

    def __init__(self, value: Any, path: str = "state_dict") -> None:
        self.value, self.path = value, path

    @classmethod
    def of(cls, state: Any) -> Entry:
        """The state itself, if it is not one already (also of a module that was reloaded since)."""
        same = (type(state).__module__, type(state).__qualname__) == (cls.__module__, cls.__qualname__)
        return state if same else cls(state)

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

    def passes(self, check: Callable[..., T], *values: Any) -> T:
        """What a check gives of values, if it does not refuse them."""
        try:
            return check(*values)
        except (TypeError, ValueError) as error:
            raise self.error(str(error)) from error

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
            remedy = ""
            if self.path.count("['rows']") and value.dtype.is_floating_point:
                remedy = f": make the balancer with state_dtype={value.dtype}"
            raise self.error(f"in {value.dtype}, here in {like.dtype}{remedy}")
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
