"""Ctrl-C at any line of a step, failures in its middle, two threads: nothing is half done or counted twice."""

import os
import re
import threading
import warnings

import dbmtl_kernels as dbk
import numpy as np
import oracle
import pytest
import torch
from dbmtl_kernels.engine import gradients, losses
from dbmtl_kernels.rows import collect
from lines import Interrupt
from problems import close, flat_gradients, leaf, make, overflowing, quadratics, rows_of, state_of


class Job:
    """A step of two tasks, of which a regulariser was there before; a head that both tasks reach."""

    def __init__(self, attached, before):
        torch.manual_seed(2)
        self.p, self.q, self.head = leaf(4), leaf(3), leaf(2)
        self.params = [self.p, self.q, self.head]
        self.balancer = make(self.p, self.q, beta=0.5)
        self.optimizer = torch.optim.SGD(self.params, lr=0.1)
        if attached:
            self.balancer.attach(self.optimizer)
        self.step()
        if not attached or before != "micro-batch":
            self.optimizer.step()
            self.optimizer.zero_grad()
        if before == "regulariser":
            (self.p.sum() * 3 + self.head.sum()).backward()
        elif before == "micro-batch" and attached:
            (self.p.sum() * 3).backward()

    def losses(self):
        return [loss + self.head.square().sum() * (1 + t) for t, loss in enumerate(quadratics(self.p, self.q))]

    def step(self, how="call"):
        if how == "call":
            self.balancer(self.losses()).backward()
            return
        for task, loss in enumerate(self.losses()):
            with self.balancer.task(task):
                dbk.log_transform(loss).backward()

    def grads(self):
        return [None if p.grad is None else p.grad.clone() for p in self.params]


def same(some, others):
    for a, b in zip(some, others, strict=True):
        if (a is None) != (b is None) or (a is not None and not torch.allclose(a, b, rtol=1e-9, atol=1e-12)):
            return False
    return True


CASES = [("call", a, b) for a in (False, True) for b in ("nothing", "regulariser", "micro-batch") if a or b[0] != "m"]
CASES += [("task", False, "nothing"), ("task", True, "micro-batch")]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "attached", "before"), CASES)
def test_an_interrupt_at_every_line_of_a_step(how, attached, before):
    """.grad is what it was, or the whole result; the step may be made again and then counts once."""
    job = Job(attached, before)
    with Interrupt() as lines:
        job.step(how)
    assert lines.count > 300
    results = {}
    stride = (1 if before == "micro-batch" else 4) if os.environ.get("CI") else 13
    for line in range(1, lines.count + 1, stride):
        job, plain = Job(attached, before), Job(attached, before)
        was, count, rows = job.grads(), job.balancer.step, rows_of(job.balancer)
        plain.step(how)
        interrupted = Interrupt(line)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(KeyboardInterrupt), interrupted:
                job.step(how)
        engine = job.balancer._engine
        assert engine.grads.aside is None, line
        assert losses.shared_log is None, line
        assert not engine.frozen, line
        lost = [t for t in range(2) if any(re.search(rf"\[.*{t}.*\]: these begin", str(w.message)) for w in said)]
        done = same(job.grads(), plain.grads())
        results[line] = done, tuple(lost)
        waiting = sorted(engine.steps.pending)
        if not done and not lost and not waiting:
            assert same(job.grads(), was), (line, job.grads(), was)
        for task, (now, old) in enumerate(zip(rows_of(job.balancer), rows, strict=True)):
            if task in lost:
                assert (now == 0).all(), line
            elif not done and task not in waiting:
                close(now, old)
        # It goes on, whatever happened: the next step is that of the rows as they are.
        if waiting:
            job.balancer.balance()
        job.optimizer.step()
        job.optimizer.zero_grad()
        rows, count = rows_of(job.balancer), job.balancer.step
        grads = flat_gradients(job.losses(), [job.p, job.q])
        expected, ema, _ = oracle.balance(grads, rows, 0.5)
        job.step(how)
        close(rows_of(job.balancer), ema)
        close(torch.cat([job.p.grad, job.q.grad]).numpy(), expected)
        close(job.head.grad.numpy(), flat_gradients(job.losses(), [job.head]).sum(0))
        assert job.balancer.step == count + 1, line
    assert any(done for done, _ in results.values())
    assert any(lost for _, lost in results.values())


def test_hooks_of_an_interrupted_step_are_idle():
    job = Job(False, "nothing")
    with pytest.raises(KeyboardInterrupt), Interrupt(200):
        job.step()
    for p in job.params:
        p.grad = None
    rows = rows_of(job.balancer)
    sum(job.losses()).backward()
    expected = torch.autograd.grad(sum(job.losses()), job.params)
    assert same(job.grads(), expected)
    assert (rows_of(job.balancer) == rows).all()


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["after the pass", "one by one"])
def flushed(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(gradients, "FLUSH_BYTES", 1)
        monkeypatch.setattr(collect, "FLUSH_BYTES", 1)
    return request.param


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_a_step_that_fails_half_way_may_be_made_again(failing, where, flushed):
    """As after an OOM that is caught. Rows that it fed begin anew, which is said; nothing counts twice."""
    p, q, head = leaf(4), leaf(3), leaf(2)
    balancer = make(p, q, num_tasks=3, beta=0.5)
    balancer(quadratics(p, q, num_tasks=3)).backward()
    before, count = rows_of(balancer), balancer.step
    p.grad, q.grad, head.grad = torch.ones_like(p), None, torch.ones_like(head)

    def task_losses():
        return [loss + head.square().sum() for loss in quadratics(p, q, num_tasks=3)]

    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    bad = task_losses()
    passes = []
    handle = (bad[failing] if where == "loss" else p).register_hook(
        fail if where == "loss" else lambda g: passes.append(0) or (fail(g) if len(passes) > failing else None)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(torch.OutOfMemoryError):
            balancer(bad).backward()
    handle.remove()
    fed = list(range(failing + (where == "parameter" and flushed == "one by one")))
    assert [str(w.message) for w in said] == (
        [f"a backward failed after it had fed the moving average of task(s) {fed}: these begin anew"] if fed else []
    )
    assert (p.grad == 1).all()
    assert q.grad is None
    assert (head.grad == 1).all()
    assert balancer.step == count
    rows = rows_of(balancer)
    close(rows, np.where(np.isin(range(3), fed)[:, None], 0.0, before))
    p.grad = head.grad = None
    expected, ema, _ = oracle.balance(flat_gradients(task_losses(), [p, q]), rows, 0.5)
    balancer(task_losses()).backward()
    close(rows_of(balancer), ema)
    close(torch.cat([p.grad, q.grad]).numpy(), expected)
    close(head.grad.numpy(), flat_gradients(task_losses(), [head]).sum(0))
    assert balancer.step == count + 1


def test_a_failing_micro_batch_of_an_attached_step():
    """The tasks that it fed are lost from the step, whose balanced gradient is computed anew without them."""
    p = leaf(4)
    balancer, optimizer = make(p, num_tasks=3, beta=0.5), torch.optim.SGD([p], lr=0.1)
    balancer.attach(optimizer)
    balancer(quadratics(p, num_tasks=3)).backward()
    optimizer.step()
    optimizer.zero_grad()
    balancer(quadratics(p, num_tasks=3)).backward()
    rows = rows_of(balancer)
    losses = quadratics(p, num_tasks=3)
    losses[1].register_hook(lambda _: 1 / 0)
    with pytest.warns(RuntimeWarning, match=r"of task\(s\) \[0\]"), pytest.raises(ZeroDivisionError):
        balancer(losses).backward()
    rows[0] = 0.0
    close(rows_of(balancer), rows)
    norms = np.linalg.norm(rows[1:], axis=1)
    close(p.grad.numpy(), (norms.max() / (norms + 1e-8)) @ rows[1:])
    assert balancer.step == 2
    balancer([quadratics(p)[0], None, None]).backward()
    optimizer.step()


def test_a_weighting_that_raises_ends_the_step():
    p, head = leaf(4), leaf(2)

    class Raises(dbk.EqualWeights):
        def __call__(self, gramian):
            raise ArithmeticError("no solution")

    balancer = dbk.GradientBalancer([p], 2, weighting=Raises(), state_dtype=torch.float64)
    p.grad, head.grad = torch.ones_like(p), torch.ones_like(head)
    with pytest.raises(ArithmeticError):
        balancer([loss + head.square().sum() for loss in quadratics(p)]).backward()
    assert (p.grad == 1).all()
    assert (head.grad == 1).all()
    assert (rows_of(balancer) != 0).all()
    assert balancer.step == 1


# --- two at a time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["call", "task"])
def test_a_second_thread_is_refused_in_words(how):
    p = leaf(4)
    balancer, inside, go, errors = make(p), threading.Event(), threading.Event(), []

    def run():
        losses = quadratics(p)

        def wait(_):
            inside.set()
            go.wait(10)

        if how == "call":
            losses[1].register_hook(wait)
            balancer(losses).backward()
        else:
            with balancer.task(0):
                wait(None)
                losses[0].log().backward()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    for call in (
        lambda: balancer.backward(quadratics(leaf(4))),
        lambda: balancer.task(1).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="another thread is within a step of this balancer"):
            call()
        errors.append(1)
    go.set()
    thread.join()
    assert len(errors) == 2
    if how == "task":
        balancer.balance()
    assert p.grad is not None
    assert balancer.step == 1
    balancer(quadratics(p)).backward()


def test_a_backward_in_a_hook_of_its_own_is_refused():
    p = leaf(4)
    balancer, losses = make(p), quadratics(p)

    def again(_):
        with torch.enable_grad():
            balancer(quadratics(p)).backward()

    losses[1].register_hook(again)
    with pytest.raises(RuntimeError, match=r"backward\(\) within a backward of the same balancer"):
        balancer(losses).backward()
    balancer(quadratics(p)).backward()
    assert balancer.step == 1
    assert state_of(balancer).rows.isfinite().all()
    assert overflowing(quadratics(p)[0]).isfinite()
