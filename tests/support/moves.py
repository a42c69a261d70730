"""What a training loop may do: a table. Each move tells the simulation what it does, or is refused by a named error.

A new fault is a function of (loop, dice) and one line of `MOVES`.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import mishaps
import stepping
from loop import Loop


class Move(NamedTuple):
    """What is done, and how often beside the others."""

    function: Callable[[Loop, Random], None]
    weight: int = 2


MOVES = {
    "backward": Move(stepping.backward, 8),
    "task": Move(stepping.task, 6),
    "balance": Move(stepping.balance, 3),
    "no_update": Move(stepping.no_update),
    "regularise": Move(stepping.regularise),
    "zero_grad": Move(stepping.zero_grad, 3),
    "step": Move(stepping.step, 4),
    "clip": Move(stepping.clip, 1),
    "closure": Move(stepping.closure, 1),
    "closure called often": Move(stepping.closure_often),
    "failure": Move(mishaps.failure),
    "failure in task": Move(mishaps.failure_in_task, 1),
    "interrupt": Move(mishaps.interrupt),
    "resume": Move(mishaps.resume),
    "pickle": Move(mishaps.pickled, 1),
    "copy": Move(mishaps.copied, 1),
    "add or remove a task": Move(mishaps.change_tasks),
    "replace": Move(mishaps.replace, 1),
    "freeze": Move(mishaps.freeze, 1),
    "thaw": Move(mishaps.thaw, 1),
    "attach or detach": Move(mishaps.attach_or_detach, 1),
    "nothing": Move(mishaps.nothing, 1),
}


def make(loop, name, dice):
    """One move, and a look at everything."""
    stepping.RAN[name] += 1
    loop.said.clear()
    MOVES[name].function(loop, dice)
    loop.check()
    assert not loop.balancer._engine.frozen
