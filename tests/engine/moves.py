"""What a training loop may do: a table. Each move tells the simulation what it does, or is refused by a named error.

A new fault is a function of (loop, dice) and one line of `MOVES`.
"""

import collections
import copy
import io
import pickle
import re
import sys
from pathlib import Path
from typing import NamedTuple

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from problems import leaf

PACKAGE = str(Path(dbk.__file__).parent)
FACTORS = (1.0, 1.0, 1.0, 0.25, 3.0, 1024.0)
KINDS = ("finite",) * 6 + ("zero", "nan", "overflow")
TAME = ("finite",) * 6 + ("zero", "nan")  # nothing that could put NaN into .grad
RAN = collections.Counter()


class Move(NamedTuple):
    """How often, beside the others."""

    function: object
    weight: int = 2


def refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def some_tasks(loop, dice):
    return dice.sample(range(loop.tasks), dice.randint(1, loop.tasks))


def waiting(loop, what):
    return f"{what} while task.s. {re.escape(str(sorted(loop.model.pending)))}.* wait"


# --- backward ---------------------------------------------------------------------------------------------------


def drawn(loop, dice, kinds=KINDS, form=None):
    """A backward in one of its forms, not yet made: (call, passes, factor)."""
    form = form or dice.choice(("list", "list", "tensor", "named", "tasks=", "None"))
    balancer, factor = loop.balancer, 1.0 if form == "named" else dice.choice(FACTORS)
    if form == "tensor":  # in its one graph a NaN would reach every task
        kinds = ("finite", "finite", "zero")
    tasks = some_tasks(loop, dice) if form in ("tasks=", "None") else range(loop.tasks)
    tasks = sorted(tasks) if form == "None" else tasks
    passes = loop.passes(dice, tasks, kinds)
    losses, named = [one.loss for one in passes], None
    if form == "tensor":
        losses = torch.stack(losses)
    elif form == "tasks=":
        named = list(tasks)
    elif form == "None":
        of = {one.task: one.loss for one in passes}
        losses = [of.get(task) for task in range(loop.tasks)]
    if form == "named":
        return form, lambda: balancer.backward(losses), passes, factor
    return form, lambda: (balancer(losses, tasks=named) * factor).backward(), passes, factor


def backward(loop, dice):
    form, call, passes, factor = drawn(loop, dice)
    if loop.model.pending:
        return refused(call, RuntimeError, waiting(loop, "backward.."))
    copied = loop.model.copied
    RAN[f"backward: {form}"] += 1
    RAN.update(f"a task: {one.kind}" for one in passes)
    call()
    loop.model.passes(passes, factor)
    loop.model.write(loop.attached)
    assert copied in (None, bool(loop.warned("deep copy")))  # FAULT: not said by task()
    loop.model.copied = False
    return None


def task(loop, dice):
    """One task by itself; the last one balances all."""
    one = loop.passes(dice, [dice.randrange(loop.tasks)], KINDS)[0]
    factor, times = dice.choice(FACTORS), dice.choice((1, 1, 2))
    if one.task in loop.model.pending:
        call = loop.balancer.task(one.task).__enter__
        return refused(call, RuntimeError, f"task {one.task} was entered already")
    enter(loop, one, factor, times)
    loop.model.passes([one], factor, times)
    entered(loop, one)
    return None


def enter(loop, one, factor, times=1):
    with loop.balancer.task(one.task, loss_scale=factor):
        for _ in range(times):
            (dbk.log_transform(one.loss) * factor).backward(retain_graph=True)


def entered(loop, one):
    loop.model.pending.add(one.task)
    if len(loop.model.pending) == loop.tasks:
        RAN["balanced at once"] += 1
        loop.model.write(loop.attached)
        loop.model.complete = True


def balance(loop, dice):
    if not loop.model.pending:
        if loop.model.complete:  # once it is a no-op
            RAN["balance: nothing to do"] += 1
            loop.balancer.balance()
            loop.model.complete = False
            return None
        return refused(loop.balancer.balance, RuntimeError, "nothing to balance")
    RAN["balance: partial"] += 1
    loop.balancer.balance()
    loop.model.write(loop.attached)
    return None


def no_update(loop, dice):
    """A second gradient of a step, as SAM takes one."""
    if loop.model.blind:  # see zero_grad
        return None
    form, call, passes, factor = drawn(loop, dice, TAME)
    with loop.balancer.no_update():
        if loop.model.pending:
            refused(call, RuntimeError, waiting(loop, "backward.."))
        elif not loop.model.step:
            refused(call, RuntimeError, "there was none yet")
        elif dice.random() < 0.7:
            RAN[f"no_update: {form}"] += 1
            call()
            loop.model.copied = loop.model.copied and None
            loop.model.evaluate(passes, factor)
        else:
            RAN["no_update: task()"] += 1
            enter(loop, passes[0], factor)
            loop.model.evaluate(passes[:1], factor, by_task=True)
    return None


# --- what others put into .grad, or take from it ------------------------------------------------------------------


def regularise(loop, dice):
    warm = [(i, p) for i, p in enumerate(loop.params) if p.requires_grad and loop.uses[i] != "none"]
    if loop.model.blind or not warm:  # see zero_grad
        return
    weight = dice.randint(1, 3)
    (weight * sum(p.sum() for _, p in warm)).backward()
    for index, p in warm:
        loop.model.add(index, np.full(p.numel(), float(weight)))


def zero_grad(loop, dice):
    """Both ways. In place it is not noticed if something is added before the balancer looks: nothing is added then."""
    none = dice.random() < 0.5
    RAN[f"zero_grad: {'None' if none else 'in place'}"] += 1
    loop.zero_grad(none)


def is_nan(loop):
    """A GradScaler, and a loop that looks, do without such a step."""
    return any(grad is not None and not np.isfinite(grad).all() for grad in loop.model.grads())


def step(loop, dice):
    """Of several optimizers, any one, or all."""
    if is_nan(loop):
        return loop.zero_grad(True)
    chosen = loop.optimizers if dice.random() < 0.5 else [dice.choice(loop.optimizers)]
    if loop.model.pending:
        return refused(chosen[0].step, RuntimeError, waiting(loop, r"step\(\)"))
    for optimizer in chosen:
        optimizer.step()
    if loop.attached:
        loop.model.end()
    return None


def clip(loop, dice):
    """In place. Within a step it is defined only where the step ends at once: no further balanced gradient follows."""
    if loop.model.written and (loop.model.pending or is_nan(loop)):
        return None
    size, largest = 0.0, 10.0 ** dice.randint(-2, 2)
    grads = [p.grad for p in loop.params if p.grad is not None]
    if grads and not is_nan(loop):
        size = float(torch.nn.utils.clip_grad_norm_(loop.params, largest))
        if loop.model.written:
            loop.optimizers[0].step()
            loop.model.end()
        share = min(1.0, largest / (size + 1e-6))
        loop.model.others = [None if x is None else x * share for x in loop.model.others]
    return None


# --- closures -----------------------------------------------------------------------------------------------------


def closure(loop, dice, calls=1):
    """Called once, or several times: attached, the later calls are no update."""
    optimizer, none = loop.optimizers[0], dice.random() < 0.7
    cold = all(not p.requires_grad for p, use in zip(loop.params, loop.uses, strict=True) if use != "none")
    if cold:
        return None
    if loop.model.open and not loop.model.pending and all(ours is None for ours in loop.model.ours):
        return None  # FAULT: a first call that joins an open step does not count as one, and the second is an update
    fed = again = False

    def call():
        nonlocal fed, again
        again = (loop.zero_grad(none) and fed and loop.attached) or again
        _, make, passes, factor = drawn(loop, dice, TAME, "list")
        make()
        loop.model.copied = loop.model.copied and None
        if again:
            loop.model.evaluate(passes, factor)
        else:
            loop.model.passes(passes, factor)
            loop.model.write(loop.attached)
            fed = True
        loop.check()
        return passes[0].loss

    if loop.model.pending:
        return refused(lambda: optimizer.step(call), RuntimeError, waiting(loop, r"step\(\)"))
    optimizer.calls = calls
    try:
        optimizer.step(call)
    finally:
        optimizer.calls = 1
    if loop.attached:
        loop.model.end()
    return None


def closure_often(loop, dice):
    return closure(loop, dice, dice.randint(2, 4))


# --- failures -----------------------------------------------------------------------------------------------------


def named_tasks(messages):
    """The tasks that begin anew, as the warning tells them."""
    return [int(t) for message in messages for t in re.search(r"task\(s\) \[(.*?)\]", message)[1].split(",")]


def failure(loop, dice):
    """A pass raises: as if the backward had not been made, but that rows it fed begin anew."""
    if loop.model.pending:
        return
    tasks = some_tasks(loop, dice)
    passes = loop.passes(dice, tasks, KINDS)
    at = dice.randrange(len(passes))
    if passes[at].kind == "nan":  # its pass is not run
        return
    passes[at].loss.register_hook(lambda _: 1 / 0)
    losses = [one.loss for one in passes]
    refused(lambda: loop.balancer.backward(losses, tasks=tasks), ZeroDivisionError, "division by zero")
    counts = [one for one in passes[:at] if one.kind != "nan" and (one.row.any() or not loop.model.absent)]
    fed = sorted(one.task for one in counts)
    loop.model.fail(fed)
    loop.model.complete = False  # FAULT: balance() after it is refused, as if the step before had not been whole
    loop.model.copied = False
    assert named_tasks(loop.warned("begin anew")) == (fed if loop.model.step else [])


def failure_in_task(loop, dice):
    """Raised by the body of task(): nothing was fed yet."""
    one = loop.passes(dice, [dice.randrange(loop.tasks)])[0]
    if one.task in loop.model.pending:
        return

    def call():
        with loop.balancer.task(one.task):
            dbk.log_transform(one.loss).backward()
            raise ZeroDivisionError("division by zero")

    refused(call, ZeroDivisionError, "division by zero")
    loop.model.fail([])
    assert not loop.warned("begin anew")


def interrupted(call, line):
    """Whether KeyboardInterrupt was raised before the line of the package with this number, counted as they run."""
    count, where, inside = 0, None, False

    def trace(frame, event, _):
        nonlocal count, where, inside
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # FAULT: in `_compute` a step ends, its rows fed, and .grad may be what it was or have the balanced gradient
        # added; in `_sitting_out` rows are dropped and counted that nothing gives back.
        if frame.f_code.co_name in ("_compute", "_sitting_out"):
            inside = event != "return"
        if event == "line" and not inside:
            count += 1
            if count == line:
                where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return where


def interrupt(loop, dice):
    """At any line of the package: what comes of it is nothing, or the whole."""
    form = None if loop.attached else "list"  # FAULT: heads of losses in one tensor are found only if attached
    _, call, passes, factor = drawn(loop, dice, form=form)
    if loop.model.pending:
        return
    line = dice.randint(1, 1500)
    where = interrupted(call, line)
    if where is None:
        RAN["not interrupted"] += 1
    fed = named_tasks(loop.warned("begin anew"))
    nothing, whole = copy.deepcopy(loop.model), copy.deepcopy(loop.model)
    nothing.fail(fed)
    whole.passes(passes, factor)
    whole.write(loop.attached)
    agree(loop, [whole] if where is None else [nothing, whole], where)
    loop.model.complete = loop.balancer._engine.steps.complete  # FAULT: a failure undoes it
    loop.model.copied = None


def agree(loop, models, where):
    """The one of several simulations that what can be read agrees with is the one that goes on."""
    errors = []
    for model in models:
        try:
            loop.check(model)
        except AssertionError as error:
            errors.append(str(error))
        else:
            loop.model = model
            return
    raise AssertionError(f"interrupted at {where}, none of {len(models)} outcomes: " + "\n---\n".join(errors))


# --- checkpoints, pickles, copies ---------------------------------------------------------------------------------


def thawed(parameters):
    """Whether none is frozen, and a balancer can be made of them."""
    return all(p.requires_grad for p in parameters)


def goes_on(loop, attached):
    """Another balancer is in the place of the former one."""
    loop.model.complete = False
    loop.handle = None
    if attached:
        loop.attach()


def detached(loop):
    """Whether it was attached; its step goes on in another balancer."""
    was = loop.attached
    if was:
        loop.handle.remove(discard=True)
        loop.handle = None
    return was


def lost_in_state(loop):
    """FAULT: in the middle of a step a state may forget that a task sits out; and whoever loads it takes what others
    have put into the .grad of a parameter that was frozen (or not yet touched) at the last balance for the balanced
    gradient, and subtracts that.
    """
    model = loop.model
    each = zip(model.touched, model.ours, model.others, strict=True)
    taken = model.written and any(seen and ours is None and others is not None for seen, ours, others in each)
    return taken or (model.open and model.out)


def resume(loop, dice):
    """Between steps or within one, in this balancer or in another."""
    if lost_in_state(loop):
        return
    how = dice.choice(("deepcopy", "file", "itself"))
    RAN[f"resume: {how}"] += 1
    present = [p.grad is not None for p in loop.params]
    state = loop.balancer.state_dict()
    if how == "itself":
        loop.balancer.load_state_dict(state)
        loop.model.resume(present)
        loop.model.copied = False
        return
    if how == "file":
        torch.save(state, file := io.BytesIO())
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    else:
        state = copy.deepcopy(state)
    attached = detached(loop)
    cold = [p for p in loop.params if not p.requires_grad]
    if cold:
        refused(lambda: dbk.DBMTL(loop.params, loop.tasks, **loop.options), ValueError, "does not require grad")
    for p in cold:
        p.requires_grad_(True)
    loop.balancer = dbk.DBMTL(loop.params, loop.tasks, **loop.options)
    for p in cold:
        p.requires_grad_(False)
    loop.balancer.load_state_dict(state)
    loop.model.resume(present)
    loop.model.copied = False
    goes_on(loop, attached)


def pickled(loop, dice):
    """With its parameters, whose .grad a pickle does not keep."""
    if lost_in_state(loop):
        return
    file = pickle.dumps((loop.balancer, loop.params))
    attached = detached(loop)
    loop.balancer, loop.params = pickle.loads(file)
    assert all(mine is p for mine, p in zip(loop.balancer.shared_parameters, loop.params, strict=True))
    loop.model.resume([False] * len(loop.params))
    loop.model.copied = loop.model.copied and None  # FAULT: not in the pickle
    loop.make_optimizers(dice)
    goes_on(loop, attached)


def copied(loop, dice):
    """With its parameters; it begins with zeros, and says so, unless it is given the state."""
    twin, params = copy.deepcopy((loop.balancer, loop.params))
    assert all(mine is p for mine, p in zip(twin.shared_parameters, params, strict=True))
    present = [p.grad is not None for p in params]
    kept = dice.random() < 0.5 and not lost_in_state(loop)
    if kept:
        RAN["copied: state loaded"] += 1
        twin.load_state_dict(loop.balancer.state_dict())
        loop.model.resume(present)
        loop.model.copied = False
    else:
        RAN["copied: zeros"] += 1
        model, fresh = loop.model, copy.deepcopy(loop.model)
        fresh.__init__(model.sizes, loop.tasks, model.beta, model.sigma, model.scale, model.propagate_above, model.absent)
        fresh.frozen, fresh.heads, fresh.copied = model.frozen, model.heads, model.step > 0
        fresh.others = [grad if has else None for grad, has in zip(model.grads(), present, strict=True)]
        loop.model = fresh
    attached = detached(loop)
    loop.balancer, loop.params = twin, params
    loop.make_optimizers(dice)
    goes_on(loop, attached)


# --- what may change between steps --------------------------------------------------------------------------------


def change_tasks(loop, dice):
    count, add = loop.tasks, dice.random() < 0.5
    gone = dice.randrange(count)
    call = loop.balancer.add_task if add else lambda: loop.balancer.remove_task(gone)
    if not add and count == 1:
        return refused(call, ValueError, "at least 1, got 0")
    if loop.model.open:
        return refused(call, RuntimeError, "within a step")
    if not add or count < 5:
        RAN["added" if add else "removed"] += 1
        assert call() == (count if add else None)
        loop.model.reindex([*range(count), None] if add else [t for t in range(count) if t != gone])
    return None


def replace(loop, dice):
    """One parameter makes room for another, of another size; the order changes too."""
    places = dice.sample(range(len(loop.params)), len(loop.params))
    which = dice.randrange(len(places))
    params, sizes = [loop.params[at] for at in places], [loop.model.sizes[at] for at in places]
    sizes[which] = dice.choice((sizes[which], 5, 17))
    params[which] = leaf(sizes[which])
    call = lambda: loop.balancer.rebind(params)  # noqa: E731
    if loop.model.open:
        return refused(call, RuntimeError, "within a step")
    if not thawed(params):
        return refused(call, ValueError, "does not require grad")
    RAN["replaced"] += 1
    attached = False
    if len(loop.optimizers) > 1:  # FAULT: raises when all is done, if one of the optimizers holds none any more
        attached = detached(loop)
    call()
    assert bool(loop.warned("no attached optimizer holds")) == loop.attached
    loop.model.copied = None
    loop.params, loop.uses = params, [loop.uses[at] for at in places]
    loop.model.rebind([None if n == which else at for n, at in enumerate(places)], sizes)
    attached = detached(loop) or attached
    loop.make_optimizers(dice)
    if attached:
        loop.attach()
    return None


def freeze(loop, dice):
    """One, or all."""
    if loop.model.written:  # FAULT: within a step the next backward takes the balanced gradient out of its .grad
        return
    which = range(len(loop.params)) if dice.random() < 0.15 else [dice.randrange(len(loop.params))]
    for index in which:
        loop.params[index].requires_grad_(False)
        loop.model.frozen[index] = True


def thaw(loop, dice):
    for index, p in enumerate(loop.params):
        p.requires_grad_(True)
        loop.model.frozen[index] = False


def attach_or_detach(loop, dice):
    if not loop.attached:
        return loop.attach()
    refused(loop.attach, RuntimeError, "already attached")
    loop.handle = loop.balancer._attachment
    if loop.model.pending:
        refused(loop.handle.remove, RuntimeError, waiting(loop, "detach.."))
        if loop.model.nonfinite:  # FAULT: their rows stay infinite
            return None
        loop.handle.remove(discard=True)
    else:
        loop.balancer.detach()
    loop.model.end()
    loop.handle = None
    return None


def nothing(loop, dice):
    """What is made and never backpropagated, and what is refused, changes nothing."""
    losses, count = [one.loss for one in loop.passes(dice)], loop.tasks
    loop.balancer(losses)
    with torch.no_grad():
        loop.balancer(losses)
    refused(lambda: loop.balancer([None] * count), ValueError, "every loss is None")
    refused(lambda: loop.balancer([*losses, losses[0]]), ValueError, f"expected {count} losses")
    refused(lambda: loop.balancer(losses[:1], tasks=[count]), ValueError, "out of range")


MOVES = {
    "backward": Move(backward, 8),
    "task": Move(task, 6),
    "balance": Move(balance, 3),
    "no_update": Move(no_update),
    "regularise": Move(regularise),
    "zero_grad": Move(zero_grad, 3),
    "step": Move(step, 4),
    "clip": Move(clip, 1),
    "closure": Move(closure, 1),
    "closure called often": Move(closure_often),
    "failure": Move(failure),
    "failure in task": Move(failure_in_task, 1),
    "interrupt": Move(interrupt),
    "resume": Move(resume),
    "pickle": Move(pickled, 1),
    "copy": Move(copied, 1),
    "add or remove a task": Move(change_tasks),
    "replace": Move(replace, 1),
    "freeze": Move(freeze, 1),
    "thaw": Move(thaw, 1),
    "attach or detach": Move(attach_or_detach, 1),
    "nothing": Move(nothing, 1),
}


def make(loop, name, dice):
    """One move, and a look at everything."""
    RAN[name] += 1
    loop.said.clear()
    MOVES[name].function(loop, dice)
    loop.check()
