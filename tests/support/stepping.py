"""Moves of `moves.MOVES`: backward in its forms, and what a loop does with .grad between two of them."""

import collections
import re

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch

FACTORS = (1.0, 1.0, 1.0, 0.25, 3.0, 1024.0)
KINDS = ("finite",) * 6 + ("zero", "nan", "overflow")
RAN = collections.Counter()


def refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def some_tasks(loop, dice):
    return dice.sample(range(loop.tasks), dice.randint(1, loop.tasks))


def waiting(loop, what):
    return f"{what} while task.s. {re.escape(str(sorted(loop.model.pending)))}.* wait"


def needs_rows(loop, call):
    """Whether the call is refused, as one row for all tasks takes no second gradient in a step."""
    model = loop.model
    wanted = loop.one_row and model.open and model.balanced_once
    if wanted and not (model.seen - model.out) and all(part is None for part in model.ours):
        model.end()  # nothing came of it: the next backward begins another
        return False
    if wanted:
        RAN["refused: one row"] += 1
        refused(call, RuntimeError, "a second backward within a step .* keep_rows=True")
    return wanted


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
    if needs_rows(loop, call):
        return None
    RAN[f"backward: {form}"] += 1
    RAN.update(f"a task: {one.kind}" for one in passes)
    call()
    loop.model.passes(passes, factor)
    loop.model.write(loop.attached)
    trained(loop)
    return None


def trained(loop):
    """A copy without its averages says so, once."""
    said = bool(loop.warned("deep copy"))
    assert loop.model.copied in (None, said), "said of a deep copy"
    loop.model.copied = False


def task(loop, dice):
    """One task by itself; the last one balances all."""
    one = loop.passes(dice, [dice.randrange(loop.tasks)], KINDS)[0]
    factor, times = dice.choice(FACTORS), dice.choice((1, 1, 2))
    if one.task in loop.model.pending:
        call = loop.balancer.task(one.task).__enter__
        return refused(call, RuntimeError, f"task {one.task} was entered already")
    if needs_rows(loop, loop.balancer.task(one.task).__enter__):
        return None
    enter(loop, one, factor, times)
    loop.model.passes([one], factor, times)
    trained(loop)
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
        return
    left = [(ours, cold) for ours, cold in zip(loop.model.ours, loop.model.frozen, strict=True) if ours is not None]
    if any(cold for _, cold in left) and not any(ours.any() for ours, _ in left):
        return  # zeros added to zeros: whether that is a change of what is frozen besides depends on who owns it
    form, call, passes, factor = drawn(loop, dice)
    with loop.balancer.no_update():
        if loop.model.pending:
            refused(call, RuntimeError, waiting(loop, "backward.."))
        elif not loop.model.step:
            refused(call, RuntimeError, "there was none yet")
        elif dice.random() < 0.7:
            RAN[f"no_update: {form}"] += 1
            call()
            loop.model.evaluate(passes, factor)
        else:
            RAN["no_update: task()"] += 1
            enter(loop, passes[0], factor)
            loop.model.evaluate(passes[:1], factor, by_task=True)


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
        return
    size, largest = 0.0, 10.0 ** dice.randint(-2, 2)
    grads = [p.grad for p in loop.params if p.grad is not None]
    if grads and not is_nan(loop):
        size = float(torch.nn.utils.clip_grad_norm_(loop.params, largest))
        if loop.model.written:
            loop.optimizers[0].step()
            loop.model.end()
        share = min(1.0, largest / (size + 1e-6))
        loop.model.others = [None if x is None else x * share for x in loop.model.others]


# --- closures -----------------------------------------------------------------------------------------------------


def closure(loop, dice, calls=1):
    """Called once, or several times: attached, the later calls are no update."""
    optimizer, none = loop.optimizers[0], dice.random() < 0.7
    cold = all(not p.requires_grad for p, use in zip(loop.params, loop.uses, strict=True) if use != "none")
    if cold:
        return None
    fed = again = False

    def call():
        nonlocal fed, again
        loop.zero_grad(none)
        again = (fed and loop.attached) or again
        _, make, passes, factor = drawn(loop, dice, form="list")
        if not again and needs_rows(loop, make):  # nothing that zero_grad took was ours: the step is still open
            return passes[0].loss
        make()
        if again:
            loop.model.evaluate(passes, factor)
        else:
            loop.model.passes(passes, factor)
            loop.model.write(loop.attached)
            trained(loop)
            fed = bool(loop.model.seen - loop.model.out)
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
