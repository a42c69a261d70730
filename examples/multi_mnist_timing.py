"""Time per step: DB-MTL against equal weighting and the authors' arithmetic, on one model and one batch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from multi_mnist_data import Pairs
from multi_mnist_training import DB_MTL, EQUAL_WEIGHTING, NUM_TASKS, MultiTaskNet, make_objective, task_losses
from torch import Tensor
from tqdm import trange

BACKWARD_ONLY = "3 backward passes only"
AUTHORS = "authors' arithmetic"
WARM_UP = 3


class AuthorsArithmetic:
    """DB-MTL in the arithmetic that the authors' code uses, written from its description.

    Each task's gradient is gathered parameter by parameter into a flat vector, the K vectors are stacked to a
    K x P matrix, and average, norms and sum are one eager operation after the other on that matrix. Their
    code also routes every gradient through host memory, which is no detour on a CPU.

    Source: arXiv 2308.12029, Algorithm 1.
    """

    def __init__(
        self, shared_parameters: Iterable[Tensor], num_tasks: int, beta: float = 0.9, beta_sigma: float = 0.5
    ) -> None:
        self.shared = list(shared_parameters)
        self.beta = beta
        self.beta_sigma = beta_sigma
        self.eps = 1e-8
        self.step = 0
        self.ema = torch.zeros(num_tasks, sum(p.numel() for p in self.shared))

    def backward(self, losses: list[Tensor]) -> None:
        """Leave the balanced gradient in the shared parameters' ``.grad``, plain ones in the heads'."""
        self.step += 1
        vectors = []
        for task, loss in enumerate(losses):
            torch.log(loss + self.eps).backward(retain_graph=task < len(losses) - 1)
            vectors.append(self._gather())
        grads = torch.stack(vectors)
        beta = self.beta / self.step**self.beta_sigma
        self.ema = grads + beta * (self.ema - grads)
        norms = self.ema.norm(dim=-1)
        weights = norms.max() / (norms + self.eps)
        self._scatter(sum(weights[task] * self.ema[task] for task in range(len(losses))))

    def _gather(self) -> Tensor:
        """Move the gradients of the shared parameters into a flat vector."""
        vector = torch.zeros(self.ema.shape[1])
        start = 0
        for parameter in self.shared:
            if parameter.grad is not None:
                vector[start : start + parameter.numel()] = parameter.grad.flatten()
                parameter.grad = None
            start += parameter.numel()
        return vector

    def _scatter(self, vector: Tensor) -> None:
        """Give every shared parameter its part of ``vector`` as its gradient."""
        start = 0
        for parameter in self.shared:
            parameter.grad = vector[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def _backward(method: str, model: MultiTaskNet) -> Callable[[list[Tensor]], None]:
    """What ``method`` does between the forward pass and the optimizer's step."""
    if method == AUTHORS:
        return AuthorsArithmetic(model.trunk.parameters(), NUM_TASKS).backward
    if method == BACKWARD_ONLY:

        def backward_only(losses: list[Tensor]) -> None:
            for task, loss in enumerate(losses):
                loss.backward(retain_graph=task < len(losses) - 1)

        return backward_only
    objective = make_objective(method, model)
    return lambda losses: objective(losses).backward()


def time_steps(batch: Pairs, seed: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a whole training step: forward, backward and optimizer.

    Every method starts from the same weights and gets the same batch. One step of each makes a round, so that
    whatever else the machine does meets all of them; the order rotates from round to round.

    Args:
        batch: what to train on, in every step.
        seed: of the weights.
        rounds: number of steps of each method that count.
    """
    torch.manual_seed(seed)
    start = MultiTaskNet()
    methods = (EQUAL_WEIGHTING, BACKWARD_ONLY, DB_MTL, AUTHORS)
    steps: list[Callable[[], None]] = []
    for method in methods:
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        backward = _backward(method, model)

        def step(
            model: MultiTaskNet = model,
            optimizer: torch.optim.Optimizer = optimizer,
            backward: Callable[[list[Tensor]], None] = backward,
        ) -> None:
            losses = task_losses(model, batch)
            optimizer.zero_grad()
            backward(losses)
            optimizer.step()

        steps.append(step)

    times: list[list[float]] = [[] for _ in methods]
    for round_ in trange(-WARM_UP, rounds, desc="time per step", unit="round", mininterval=0.5):
        for turn in range(len(methods)):
            index = (turn + round_) % len(methods)
            begin = time.perf_counter()
            steps[index]()
            if round_ >= 0:
                times[index].append(1e3 * (time.perf_counter() - begin))
    return {method: median(values) for method, values in zip(methods, times, strict=True)}
