"""Moves of `moves.MOVES`: failures and interrupts, checkpoints and copies, and what may change between steps."""

import copy
import io
import pickle
import re
from contextlib import suppress

import dbmtl_kernels as dbk
import numpy as np
import torch
from lines import Interrupt
from problems import leaf
from stepping import FACTORS, KINDS, RAN, drawn, enter, needs_rows, refused, some_tasks, waiting

LOST = "an interrupt came when the .grad of"


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
    if needs_rows(loop, lambda: loop.balancer.backward(losses, tasks=tasks)):
        return
    refused(lambda: loop.balancer.backward(losses, tasks=tasks), ZeroDivisionError, "division by zero")
    counts = [one for one in passes[:at] if one.kind != "nan" and (one.row.any() or not loop.model.absent)]
    fed = sorted(one.task for one in counts)
    loop.model.fail(fed)
    loop.model.copied = False
    assert named_tasks(loop.warned("begin anew")) == (fed if loop.model.step and not loop.one_row else [])


def failure_in_task(loop, dice):
    """Raised by the body of task(): nothing was fed yet."""
    one = loop.passes(dice, [dice.randrange(loop.tasks)])[0]
    if one.task in loop.model.pending or needs_rows(loop, loop.balancer.task(one.task).__enter__):
        return

    def call():
        with loop.balancer.task(one.task):
            dbk.log_transform(one.loss).backward()
            raise ZeroDivisionError("division by zero")

    refused(call, ZeroDivisionError, "division by zero")
    loop.model.fail([])
    assert not loop.warned("begin anew")


def interrupted(call, line):
    """Where KeyboardInterrupt was raised, before the line of the package with this number, counted as they run."""
    with suppress(KeyboardInterrupt), Interrupt(line) as lines:
        call()
    return lines.where


def interrupt(loop, dice):
    """At any line of the package: what comes of it is nothing, or the whole."""
    if needs_rows(loop, loop.balancer.task(0).__enter__):
        return
    stages = [loop.model, copy.deepcopy(loop.model)]
    model, whole = stages
    if model.pending and dice.random() < 0.5:
        what, call = "balance()", loop.balancer.balance
        whole.write(loop.attached)
    elif model.pending or dice.random() < 0.3:
        one, factor = loop.passes(dice, [dice.randrange(loop.tasks)], KINDS)[0], dice.choice(FACTORS)
        if one.task in model.pending:
            return
        what, call = "task()", lambda: enter(loop, one, factor)
        whole.passes([one], factor)
        whole.pending.add(one.task)
        if len(whole.pending) == loop.tasks:  # balanced at once, unless that is what was interrupted
            stages.append(balanced := copy.deepcopy(whole))
            balanced.write(loop.attached)
            balanced.complete = True
    else:
        what, call, passes, factor = drawn(loop, dice)
        whole.passes(passes, factor)
        whole.write(loop.attached)
    line = int(3500 ** dice.random()) if dice.random() < 0.3 else dice.randint(1, 3500)
    where = interrupted(call, line)
    outcomes = stages[-1:] if any("begin anew" in str(one.message) for one in loop.said) else stages[::-1]
    if where is not None:
        RAN[f"interrupted: {what}"] += 1
        outcomes += failed(loop, stages)
    agree(loop, outcomes, where)
    loop.model.copied = loop.model.copied and None


def failed(loop, stages):
    """What may be left of these but the last: without the rows that were fed, and what was lost of .grad."""
    said = " ".join(str(one.message) for one in loop.said)
    names = [loop.balancer._engine.rows.describe(index) for index in range(len(loop.params))]
    gone = [f"{LOST} {name} " in said for name in names]
    fed = named_tasks(loop.warned("begin anew"))
    for stage in stages[:-1]:
        yield (nothing := copy.deepcopy(stage))
        nothing.fail(fed)
        nothing.others = [None if lost else x for lost, x in zip(gone, nothing.others, strict=True)]
        if bad := nothing.nonfinite | nothing.out:  # rows that the next balance clears: one that was half done may have
            yield (cleared := copy.deepcopy(nothing))
            rows = sorted(bad & set(range(len(cleared.rows))))
            cleared.spilled |= {task for task in rows if not np.isfinite(cleared.rows[task]).all()}
            cleared.rows[rows] = 0.0


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


def waits_in_one_row(loop, call):
    """Whether the call is refused, as the gradients of tasks that wait for a balance are not in a state."""
    wanted = loop.one_row and bool(loop.model.pending)
    if wanted:
        refused(call, RuntimeError, "a state_dict while task.s. .* wait needs a row for each task.* keep_rows=True")
    return wanted


def resume(loop, dice):
    """Between steps or within one, in this balancer or in another."""
    how = dice.choice(("deepcopy", "file", "itself"))
    RAN[f"resume: {how}"] += 1
    present = [p.grad is not None for p in loop.params]
    if waits_in_one_row(loop, loop.balancer.state_dict):
        return
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
    if waits_in_one_row(loop, lambda: pickle.dumps((loop.balancer, loop.params))):
        return
    file = pickle.dumps((loop.balancer, loop.params))
    attached = detached(loop)
    loop.balancer, loop.params = pickle.loads(file)
    assert all(mine is p for mine, p in zip(loop.balancer.shared_parameters, loop.params, strict=True))
    loop.model.resume([False] * len(loop.params))
    loop.make_optimizers(dice)
    goes_on(loop, attached)


def copied(loop, dice):
    """With its parameters; it begins with zeros, and says so, unless it is given the state."""
    twin, params = copy.deepcopy((loop.balancer, loop.params))
    assert all(mine is p for mine, p in zip(twin.shared_parameters, params, strict=True))
    present = [p.grad is not None for p in params]
    kept = dice.random() < 0.5 and not waits_in_one_row(loop, loop.balancer.state_dict)
    if kept:
        RAN["copied: state loaded"] += 1
        twin.load_state_dict(loop.balancer.state_dict())
        loop.model.resume(present)
        loop.model.copied = False
    else:
        RAN["copied: zeros"] += 1
        model, fresh = loop.model, copy.deepcopy(loop.model)
        options = model.beta, model.sigma, model.scale, model.propagate_above, model.absent
        fresh.__init__(model.sizes, loop.tasks, *options)
        fresh.frozen, fresh.heads, fresh.copied = model.frozen, model.heads, model.step > 0 and not loop.one_row
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
    call()
    assert bool(loop.warned("no attached optimizer holds")) == loop.attached
    loop.model.copied = None
    loop.params, loop.uses = params, [loop.uses[at] for at in places]
    loop.model.rebind([None if n == which else at for n, at in enumerate(places)], sizes)
    attached = detached(loop)
    loop.make_optimizers(dice)
    if attached:
        loop.attach()
    return None


def freeze(loop, dice):
    """One, or all."""
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
        loop.handle.remove(discard=True)
        loop.model.rows[~np.isfinite(loop.model.rows).all(axis=1)] = 0.0
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
