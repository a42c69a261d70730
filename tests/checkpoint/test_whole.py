"""A state is taken over whole, or refused by the path of what is wrong with nothing changed: a case of each cause."""

import copy
import io
import pickle
import warnings

import dbmtl_kernels as dbk
import pytest
import torch
from balancers import K, Remembering, Training, bits, everything
from dbmtl_kernels.checkpoint import Entry
from dbmtl_kernels.ops.entries import MOST
from problems import assert_same_state, leaf, quadratics
from torch import nn


def state_of(kind, steps=3):
    return copy.deepcopy(Training(kind, steps).balancer.state_dict())


def changed(state, value, *path):
    """A copy with another value there."""
    out = copy.copy(state)
    out[path[0]] = changed(state[path[0]], value, *path[1:]) if len(path) > 1 else value
    return out


def one_off(x, number, index=1):
    out = x.clone()
    out.view(-1)[index] = number
    return out


def nested(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x])


NAN = float("nan")
WIDE = torch.float64
ROWS = ("buffer", "rows", "0")
SECOND = ("buffer", "part1")
CASES = {
    "not a dict": ("rows", (), None, r"state_dict: must be a dict, got None"),
    "count": ("rows", ("steps", "step"), -7, r"\['steps'\]\['step'\]: must be from 0 to \d+, got -7"),
    "open before the first": ("rows, within a step", ("steps", "step"), 0, r"\['steps'\]\['step'\]: a step is open"),
    "task": ("rows", ("steps", "pending"), [99], r"\['steps'\]\['pending'\]\[0\]: task 99, there are 3"),
    "nobody can wait": ("rows", ("steps", "pending"), [1], r"\['pending'\]: task\(s\) \[1\] wait .* no step is open"),
    "a list": ("rows", ("steps", "seen"), None, r"\['steps'\]\['seen'\]: must be a list, got None"),
    "scale": ("rows", ("steps", "loss_scale"), NAN, r"\['loss_scale'\]: must be finite, got nan"),
    "written": ("rows", ("written",), True, r"\['written'\]: a balanced gradient of the open step, and none is open"),
    "left": ("rows", ("left",), [1], r"\['left'\]: 1 entries, not 2"),
    "signature": ("rows", ("parameters",), [1, 2], r"\['parameters'\]\[0\]: must be a list, got 1"),
    "rows": ("rows", ROWS, [0.0], r"\['buffer'\]\['rows'\]\['0'\]: must be a tensor, got a value of type list"),
    "sparse": ("rows", ROWS, torch.eye(3).to_sparse(), r"\['0'\]: must be a dense tensor that holds data"),
    "no data": ("rows", ROWS, torch.empty(3, 4, 32, device="meta"), r"\['0'\]: must be a dense tensor that holds data"),
    "nested": ("rows", ROWS, nested(torch.ones(2)), r"\['0'\]: must be a dense tensor that holds data"),
    "weighting": ("rows", ("weighting",), None, r"state_dict\['weighting'\]: must be a dict, got None"),
    "norms": ("rows", ("buffer", "norms"), torch.tensor([1, NAN, 1], dtype=WIDE), r"\['norms'\]: must .*\[1\]"),
    "weights": ("rows", ("buffer", "weights"), torch.full((3,), 1e300, dtype=WIDE), r"\['weights'\]: .* \[0, 1, 2\]"),
    "second part": ("split", (*SECOND, "sumsq"), torch.ones(3, dtype=WIDE), r"\['part1'\]\['sumsq'\]: .* of the row"),
    "second owner": ("split", (*SECOND, "owner"), None, r"\['part1'\]\['owner'\]: must be a tensor, got None"),
    "levels": ("one pass", ("levels", "counts"), [1, -1, 1], r"\['levels'\]\['counts'\]\[1\]: must be from 0"),
    "turn": ("one pass", ("levels", "turn"), 3, r"\['levels'\]\['turn'\]: task 3, there are 3"),
    "levels' norms": ("one pass", ("levels", "norms"), torch.tensor([1, 0, NAN]), r"\['norms'\]: must .* \[1\]"),
    "errors": ("one pass", ("levels", "errors"), torch.full((3, 32), -1.0), r"\['errors'\]: must .* \[0, 1, 2\]"),
    "engine": ("one pass", ("engine", "touched"), 7, r"state_dict\['engine'\]\['touched'\]: must be a list, got 7"),
    "first losses": (
        "GradNorm", ("weighting", "start"), torch.tensor([-1, 1, 1], dtype=WIDE),
        r"\['weighting'\]: the state is not one of GradNorm: ValueError: start must be finite and positive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named_by_its_path(name):
    kind, path, value, message = CASES[name]
    state = changed(state_of(kind), value, *path) if path else value
    training = Training(kind, 1)
    before = everything(training.balancer)
    with pytest.raises(ValueError, match=rf"^(?=state_dict).*{message}"):
        training.balancer.load_state_dict(state)
    assert everything(training.balancer) == before


@pytest.mark.parametrize("number", [NAN, float("inf"), 1e30, 0.25])
def test_rows_and_their_sums_of_squares_must_agree(number):
    """So that a row with a NaN, or one that lost some of its bytes, is not averaged on."""
    state, balancer = state_of("rows"), Training("rows", 1).balancer
    with pytest.raises(
        ValueError, match=r"\['sumsq'\]: must be the sum of squares of the row; not so of task\(s\) \[0\]"
    ):
        balancer.load_state_dict(changed(state, one_off(state["buffer"]["rows"]["0"], number), *ROWS))
    with pytest.raises(ValueError, match=r"\['sumsq'\]: .* of task\(s\) \[1\]"):
        balancer.load_state_dict(changed(state, one_off(state["buffer"]["sumsq"], number), "buffer", "sumsq"))


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("row", ["finite", "zero", "the same"])
@pytest.mark.parametrize("kind", ["rows", "rows, a task waits"])
def test_a_sum_that_overflowed_is_taken_where_one_may_be(kind, row, number):
    """A chip may sum in float32; a balance that was interrupted had set the row to zero; another rank had failed."""
    state, training = state_of(kind), Training(kind, 1)
    state["buffer"]["sumsq"][0] = number
    if row != "finite":
        state["buffer"]["rows"]["0"][0] = 0.0 if row == "zero" else number
    if kind == "rows" and row == "finite":
        with pytest.raises(ValueError, match=r"\['sumsq'\]"):
            training.balancer.load_state_dict(state)
        return
    training.balancer.load_state_dict(state)
    before = training.balancer.nonfinite_steps
    assert all(grad.isfinite().all() for grad in training.step())
    assert (training.balancer.nonfinite_steps - before).tolist()[1:] == [0, 0]


@pytest.mark.parametrize("number", [NAN, float("inf")])
def test_a_gradient_that_overflowed_may_wait_for_its_balance(number):
    p = leaf(4)
    first, second = dbk.DBMTL([p], 2), dbk.DBMTL([p], 2)
    with first.task(0):
        (p * number).sum().backward()
    state = copy.deepcopy(first.state_dict())
    assert not state["buffer"]["rows"]["0"].isfinite().all()
    second.load_state_dict(state)
    assert_same_state(
        {"sumsq": second.state_dict()["buffer"]["sumsq"].isfinite()}, {"sumsq": torch.tensor([False, True])}
    )
    with second.task(1):
        dbk.log_transform(quadratics(p)[1]).backward()
    assert p.grad.isfinite().all()
    assert second.nonfinite_steps.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["rows", "one pass", "GradNorm"])
def test_keys_that_nobody_knows_are_ignored_and_optional_ones_may_be_missing(kind):
    straight, other = Training(kind, 3), Training(kind, 1)
    other.number = straight.number
    state = copy.deepcopy(straight.balancer.state_dict())
    inner = state.get("engine", state)
    for each in (state, inner, inner["steps"], inner["buffer"], inner["buffer"]["rows"]):
        each["of a later release"] = object()
    del inner["left"], inner["steps"]["sitting_out"]
    other.balancer.load_state_dict(state)
    assert bits(straight.balancer.state_dict()) == bits(other.balancer.state_dict())
    assert bits(straight.step()) == bits(other.step())


@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_norms_that_one_pass_has_not_measured_are_kept(how):
    p = leaf(4)
    first, second = (dbk.OnePassDBMTL([p], K) for _ in range(2))
    first([quadratics(p)[0]], tasks=[0]).backward()
    state = copy.deepcopy(first.state_dict())
    assert state["engine"]["buffer"]["norms"].isnan().tolist() == [False, True, True]
    if how == "pickle":
        second, p = pickle.loads(pickle.dumps((first, p)))
    else:
        second.load_state_dict(state)
    assert bits(second.state_dict()) == bits(state)


def test_a_norm_that_is_not_known_does_not_spoil_a_second_gradient():
    training, state = Training("one row", 1), state_of("one row")
    training.balancer.load_state_dict(changed(state, torch.full((K,), NAN, dtype=WIDE), "buffer", "norms"))
    with training.balancer.no_update():
        training.backward()
    assert all(p.grad.isfinite().all() for p in training.shared)
    assert any(p.grad.any() for p in training.shared)


def test_any_count_and_decay_can_be_followed_by_a_step():
    training = Training("rows", 1)
    state = changed(changed(state_of("rows"), MOST, "steps", "step"), 10.0, "settings", "beta_sigma")
    training.balancer.load_state_dict(state)
    training.step()
    assert training.balancer.beta_sigma == 10.0


def test_factors_are_refused_by_a_balancer_that_is_capturable():
    p = torch.ones(3, dtype=torch.float64).requires_grad_()
    state = dbk.DBMTL([p], 2, task_weights=[1.0, 2.0]).state_dict()
    with pytest.raises(ValueError, match=r"^state_dict\['settings'\]\['task_weights'\]: .*capturable"):
        dbk.DBMTL([p], 2, capturable=True).load_state_dict(state)


def test_rows_under_way_arrive_before_others_are_loaded(monkeypatch):
    training, state, calls = Training("rows", 1), state_of("rows"), []
    for name in ("settle", "load"):
        monkeypatch.setattr(training.balancer._engine.rows, name, lambda *_, name=name: calls.append(name))
    training.balancer.load_state_dict(state)
    assert calls == ["settle", "load"]


def test_an_optional_entry_takes_one_line():
    entry = Entry({"beta": 0.5, "names": "x"})
    assert entry.optional("beta", Entry.number) == 0.5
    assert entry.optional("eps", Entry.number) is None
    with pytest.raises(ValueError, match=r"^state_dict\['names'\]: must be a list, got 'x'$"):
        entry.optional("names", Entry.entries)


def test_nothing_is_shared_with_a_state_that_was_loaded():
    training = Training("rows, within a step", 1)
    state = state_of("rows, within a step")
    for name in ("norms", "weights"):
        state["buffer"][name].requires_grad_()
    training.balancer.load_state_dict(state)
    after = copy.deepcopy(training.balancer.state_dict())
    assert not any(x.requires_grad for x in after["buffer"].values() if isinstance(x, torch.Tensor))
    with torch.no_grad():
        for x in (*state["buffer"]["rows"].values(), state["buffer"]["norms"], state["steps"]["losses"]):
            x.fill_(7)
    assert_same_state(training.balancer.state_dict(), after)


# --- weightings -------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A user's module: submodules, a buffer made late, a reset, lists and arrays; it checks last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("late", None)
        self.seen, self.array, self.helper = [1, [2]], torch.ones(2).numpy(), {"a": {3}}

    def reset(self):
        self.late, self.extra = None, "reset"
        self.seen[1].append(5)

    def forward(self, gramian):
        self.late = gramian.diagonal().clone()
        return torch.ones_like(self.late)

    def get_extra_state(self):
        return {"right": True}

    def set_extra_state(self, state):
        self.array[0], self.norm.training, self.layer.bias = 9.0, False, None
        self.helper["a"].add(4)
        if not state["right"]:
            raise self.kind("wrong")


def parts_of(module):
    tensors = [dict(module.named_parameters()), dict(module.named_buffers()), module._buffers]
    rest = [
        module.seen,
        module.array.tolist(),
        sorted(module.helper["a"]),
        module.norm.training,
        hasattr(module, "extra"),
    ]
    return bits([tensors, rest])


@pytest.mark.parametrize("kind", [KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError])
def test_a_module_that_raises_while_it_loads_is_put_back(kind):
    p = leaf(4)
    balancer = dbk.GradientBalancer([p], 2, weighting=Layers(), beta=0.5)
    module = balancer.weighting
    module.kind = kind
    state = copy.deepcopy(balancer.state_dict())
    for key, value in state["weighting"].items():
        if isinstance(value, torch.Tensor):
            state["weighting"][key] = value + 1
    state["weighting"]["_extra_state"] = {"right": False}
    balancer.backward(quadratics(p))  # makes the late buffer
    tensors = [*module.parameters(), *module.buffers()]
    before, all_before = parts_of(module), bits(balancer.state_dict())
    with pytest.raises(
        ValueError, match=rf"^state_dict\['weighting'\]: the state is not one of Layers: {kind.__name__}"
    ):
        balancer.load_state_dict(state)
    assert parts_of(module) == before
    assert bits(balancer.state_dict()) == all_before
    after = [*module.parameters(), *module.buffers()]
    assert all(x is y for x, y in zip(tensors, after, strict=True))  # an optimizer may hold them


def test_an_interrupt_while_a_weighting_loads_leaves_it_as_it_was(monkeypatch):
    training, state = Training("a user's weighting", 1), state_of("a user's weighting")
    before, load = everything(training.balancer), Remembering.load_state_dict

    def interrupted(self, state):
        load(self, state)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Remembering, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.balancer.load_state_dict(state)
    assert everything(training.balancer) == before


def test_a_weighting_that_never_loads_is_put_back_all_the_same(monkeypatch):
    training, state = Training("a user's weighting", 1), state_of("a user's weighting")
    before = everything(training.balancer)

    def fails(self, state):
        self.calls = state
        self.mean.fill_(7.0)
        self.history.append("spoilt")
        raise LookupError("never")

    monkeypatch.setattr(Remembering, "load_state_dict", fails)
    with pytest.raises(ValueError, match=r"not one of Remembering: LookupError: never"):
        training.balancer.load_state_dict(state)
    assert everything(training.balancer) == before


def test_a_weighting_is_put_back_where_another_rank_refuses(monkeypatch):
    training, state = Training("a user's weighting", 1), state_of("a user's weighting")
    before, ranks = everything(training.balancer), training.balancer._engine.ranks
    monkeypatch.setattr(ranks, "size", 2)
    monkeypatch.setattr(ranks, "sum", lambda x, what: x + 1)
    with pytest.raises(ValueError, match="refused on another rank"):
        training.balancer.load_state_dict(state)
    monkeypatch.undo()
    assert everything(training.balancer) == before
    assert everything(training.balancer) != bits(state)


@pytest.mark.parametrize("name", ["weights", "used", "start"])
@pytest.mark.parametrize("number", [NAN, float("inf"), 0.0, -1.0])
def test_gradnorm_takes_no_numbers_that_it_cannot_go_on_from(name, number):
    learnt = dbk.GradNorm(K)
    state = {key: one_off(value, number) for key, value in learnt.state_dict().items() if key == name}
    before = copy.deepcopy(learnt.state_dict())
    if name == "start" and number != number:  # a task that had no loss yet
        learnt.load_state_dict({**before, **state})
        return
    with pytest.raises(ValueError, match=f"{name} must be finite and positive"):
        learnt.load_state_dict({**before, **state})
    assert bits(dict(learnt.state_dict())) == bits(dict(before))


# --- pickles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "GradNorm", "one pass"])
def test_a_pickle_with_a_damaged_state_is_refused_by_name(kind):
    balancer = Training(kind, 2).balancer
    pickled = balancer.__getstate__()
    weighting, kept = torch.load(io.BytesIO(pickled["kept"]), weights_only=False)
    kept["steps"]["seen"] = [1]
    torch.save((weighting, kept), file := io.BytesIO())
    twin = type(balancer).__new__(type(balancer))
    with pytest.raises(ValueError, match=r"state_dict\['steps'\]\['seen'\]: 1 entries, not 3"):
        twin.__setstate__({**pickled, "kept": file.getvalue()})


@pytest.mark.parametrize(("state", "message"), [({}, r"\['balancer'\] is missing"), (None, "must be a dict")])
def test_a_state_of_lightnings_callback_without_one_of_a_balancer(state, message):
    callback = pytest.importorskip("dbmtl_kernels.integrations.lightning").GradientBalancing("trunk", 2)
    with pytest.raises(ValueError, match=f"^state_dict.*{message}"):
        callback.load_state_dict(state)


def test_a_refused_load_does_not_end_a_step_that_is_open():
    training = Training("rows, within a step", 2)
    training.optimizer.zero_grad()  # thrown away: the next backward, or a state_dict, ends the step
    steps = training.balancer._engine.steps
    with pytest.raises(ValueError, match="version"):
        training.balancer.load_state_dict({"version": 99})
    assert steps.open
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.balancer.load_state_dict(state_of("rows"))
    assert not steps.open
