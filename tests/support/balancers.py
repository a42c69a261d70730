"""A balancer of each kind in training, between steps or within one, and all that it goes on from, to compare."""

import contextlib
import struct
from collections import OrderedDict

import dbmtl_kernels as dbk
import torch
from dbmtl_kernels.rows import dtensors

K = 3


class Best:
    norm = 0.0


class Remembering:
    """A user's weighting: learns in attributes, a tensor, a list and an object, and loads them one by one."""

    def __init__(self):
        self.calls, self.mean, self.history, self.best = 0, torch.zeros(K, dtype=torch.float64), [], Best()

    def __call__(self, gramian):
        self.calls += 1
        norms = gramian.diagonal().sqrt()
        self.history.append(float(norms.sum()))
        self.best.norm = max(self.best.norm, self.history[-1])
        if len(norms) == K:
            self.mean.lerp_(norms.to(torch.float64), 0.5)
        return 1.0 / (norms + 1e-3)

    def state_dict(self):
        return {"calls": self.calls, "mean": self.mean, "history": self.history, "best": {"norm": self.best.norm}}

    def load_state_dict(self, state):
        self.calls = state["calls"]
        self.mean.copy_(state["mean"])
        self.best.norm = state["best"]["norm"]
        self.history[:] = state["history"]
        float(self.calls + sum(self.history) + self.best.norm)  # raises unless they are numbers


def gradient_balancer(weighting):
    return lambda shared: dbk.GradientBalancer(shared, K, weighting=weighting(), beta=0.5, log_transform=True)


def dbmtl(**options):
    return lambda shared: dbk.DBMTL(shared, K, **options)


# By name: how a balancer is made, whether its parameters count as on two devices, and after which of the tasks of its
# last step the state is taken: None after the step, K after a whole backward that no optimizer has stepped on.
KINDS = OrderedDict(
    {
        "rows": (dbmtl(), False, None),
        "rows, within a step": (dbmtl(beta=0.5), False, K),
        "rows, named tasks": (lambda shared: dbk.DBMTL(shared, ["a", "b", "c"], task_weights=[1, 2, 3]), False, None),
        "rows, a task waits": (dbmtl(beta=0.5), False, 1),
        "float64 rows": (dbmtl(state_dtype=torch.float64), False, K),
        "bfloat16 rows": (dbmtl(state_dtype=torch.bfloat16), False, None),
        "count on the device": (dbmtl(capturable=True), False, K),
        "one row": (dbmtl(beta=0.0), False, None),
        "one row, within a step": (dbmtl(beta=0.0), False, K),
        "split": (dbmtl(beta=0.5), True, K),
        "split, a task waits": (dbmtl(beta=0.5), True, 2),
        "split, one row": (dbmtl(beta=0.0), True, None),
        "GradNorm": (gradient_balancer(lambda: dbk.GradNorm(K)), False, K),
        "a user's weighting": (gradient_balancer(Remembering), False, K),
        "one pass": (lambda shared: dbk.OnePassDBMTL(shared, K, measure_every=2), False, None),
    }
)


@contextlib.contextmanager
def two_devices(parameters):
    """Every other parameter counts as one on another device, while a balancer is made."""
    places, key = {id(p): index % 2 for index, p in enumerate(parameters)}, dtensors.placement_key
    dtensors.placement_key = lambda p: places[id(p)]
    try:
        yield
    finally:
        dtensors.placement_key = key


class Training:
    """A balancer of a kind, attached, after some steps; the learning rate is 0, so that parameters stay finite."""

    def __init__(self, kind, steps):
        make, split, tasks = KINDS[kind]
        generator = torch.Generator().manual_seed(7)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.shared = [draw(4, 3).requires_grad_(), draw(4).requires_grad_()]
        self.x, self.heads = draw(5, 3), [draw(4) for _ in range(K)]
        with two_devices(self.shared) if split else contextlib.nullcontext():
            self.balancer = make(self.shared)
        self.optimizer = torch.optim.SGD(self.shared, lr=0.0)
        self.balancer.attach(self.optimizer)
        self.number = 0
        for _ in range(steps):
            self.backward()
            self.end()
        if tasks == K:
            self.backward()
        elif tasks is not None:
            for task in range(tasks):
                with self.balancer.task(task):
                    dbk.log_transform(self.losses()[task]).backward()

    def losses(self):
        z = self.x @ self.shared[0].T + self.shared[1]
        return [(z @ head - self.number - 1).square().mean() + 0.1 for head in self.heads]

    def backward(self):
        self.number += 1
        self.balancer.backward(self.losses())

    def end(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end_waiting(self):
        """Balance the tasks that wait, if any do; whether they did."""
        waits = bool(self.balancer._engine.steps.pending)
        if waits:
            self.balancer.balance()
        return waits

    def step(self):
        """End what is open, and take a step; its gradients."""
        self.end_waiting()
        self.end()
        self.backward()
        grads = [p.grad.clone() for p in self.shared]
        self.end()
        return grads


def bits(value):
    """Something to compare: equal just if it is the same, bit for bit."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().view(-1).view(torch.uint8)
        return value.dtype, value.shape, value.requires_grad, whole.tolist()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [bits(each) for each in value]
    return type(value), struct.pack("d", value) if isinstance(value, float) else value


def everything(balancer):
    """What a balancer goes on from."""
    steps = {key: value for key, value in vars(balancer._engine.steps).items() if key != "changes"}
    grads = [p.grad for p in balancer.shared_parameters]
    return bits([balancer.state_dict(), grads, steps, vars(balancer.weighting)])
