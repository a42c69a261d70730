"""Whatever a training loop may do, in any order, against the oracle. The moves are a table: tests/support/moves.py."""

import os
import random
import warnings

import mishaps
import moves
import pytest
import stepping
from dbmtl_kernels.engine import gradients
from dbmtl_kernels.rows import collect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loop import Loop

CI = bool(os.environ.get("CI"))
NAMES = [name for name, move in moves.MOVES.items() for _ in range(move.weight)]
KINDS = 57  # of moves and their forms, at least, in `stepping.RAN`
DICE = st.integers(0, 9999)  # what a move draws from: random.Random(dice)


def play(backend, start, sequence, one_row=False):
    """A loop, and these moves: (name, dice) each. To look at one that failed, call this with what is printed."""
    loop = Loop(random.Random(start), backend, one_row)
    with warnings.catch_warnings(record=True) as loop.said:
        warnings.simplefilter("always")
        for name, dice in sequence:
            moves.make(loop, name, random.Random(dice))


@pytest.mark.parametrize("early", [False, True], ids=["after the pass", "as they come"])
@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one row"])
@pytest.mark.parametrize(
    ("backend", "examples", "steps"),
    [("native", 500 if CI else 60, 40)]
    + [pytest.param(name, 5, 15, marks=pytest.mark.slow) for name in ("eager", "triton", "cuda")],
)
def test_any_sequence(backend, examples, steps, one_row, early, monkeypatch):
    """Gradients go to their rows after a pass, or each as it comes, as large ones do."""
    if early:
        monkeypatch.setattr(gradients, "FLUSH_BYTES", 1)
        monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    stepping.RAN.clear()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    sequences = st.lists(st.tuples(st.sampled_from(NAMES), DICE), min_size=steps // 2, max_size=steps)

    @settings(
        max_examples=examples, derandomize=not os.environ.get("FUZZ_ANEW"), deadline=None, database=None,
        report_multiple_bugs=False, suppress_health_check=checks,
    )  # fmt: skip
    @given(DICE, sequences)
    def any_sequence(start, sequence):
        play(backend, start, sequence, one_row)

    any_sequence()
    if backend == "native":  # each was really tried
        assert min(stepping.RAN[name] for name in moves.MOVES) >= (50 if CI else 1)
        assert not CI or len(stepping.RAN) >= KINDS
        assert bool(stepping.RAN["refused: one row"]) == one_row


@pytest.mark.slow
def test_a_task_that_is_not_finite_interrupted_at_any_line(monkeypatch):
    """A balance cut off may have cleared its row; the next tells of it all the same."""
    monkeypatch.setattr(gradients, "FLUSH_BYTES", 1)
    monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    interrupted, stops = mishaps.interrupted, []
    monkeypatch.setattr(
        mishaps, "interrupted", lambda call, _: stops.append(interrupted(call, len(stops) + 1)) or stops[-1]
    )
    while not stops or stops[-1] is not None:
        play("native", 1975, [("backward", 0), ("interrupt", 80), ("balance", 0)])
    assert len(stops) > 1000
    assert any("c_library.py" in line for line in stops[:-1])
