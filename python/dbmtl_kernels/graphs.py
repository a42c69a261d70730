"""What can be read off the graphs of the losses: which parameters they reach, and which of them are shared."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def leaves(losses: Sequence[Tensor]) -> list[Tensor] | None:
    """The leaf tensors in the graphs of the losses, in an order that depends on the graphs alone.

    None if some are hidden from view, inside a re-entrant checkpoint.
    """
    found: dict[int, Tensor] = {}
    hidden = False
    seen: set[Any] = set()
    pending = [loss.grad_fn for loss in reversed(losses)]
    for loss in losses:
        if loss.grad_fn is None and loss.requires_grad:
            found[id(loss)] = loss
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        hidden = hidden or "CheckpointFunction" in node.name()
        pending.extend(previous for previous, _ in reversed(node.next_functions))
    return None if hidden else list(found.values())


def find_shared_parameters(losses: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that two losses or more depend on: what a balancer should be given.

    Walks the graphs of the losses, without running them; each stays as it is. Parameters reached from one loss only
    belong to that task. Inputs that require grad are leaves like parameters, and are found too.

    Args:
        losses: K >= 2 scalars with a graph, of one forward pass.

    Returns:
        leaf tensors, each once, in an order that depends on the graphs alone.

    Raises:
        ValueError: fewer than two losses, or no parameter is shared.
        RuntimeError: a loss has no graph, or hides parameters in a re-entrant checkpoint.
    """
    reached = _reached(losses)
    if len(reached) < 2:
        raise ValueError(f"sharing takes two losses or more, got {len(reached)}")
    counts: dict[int, int] = {}
    parameters: dict[int, Tensor] = {}
    for found in reached:
        for p in found:
            counts[id(p)] = counts.get(id(p), 0) + 1
            parameters[id(p)] = p
    shared = [p for key, p in parameters.items() if counts[key] > 1]
    if not shared:
        raise ValueError(f"the {len(reached)} losses share no parameter: there is nothing to balance")
    return shared


def check_shared_parameters(losses: Iterable[Tensor], parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list, if the losses of one forward pass depend on each of them.

    Raises:
        ValueError: no loss depends on one of them.
        RuntimeError: see `find_shared_parameters`.

    Warns:
        UserWarning: one of them is reached from a single loss, and would better be left to its task.
    """
    given = list(parameters)
    counts = {id(p): 0 for p in given}
    reached = _reached(losses)
    for found in reached:
        for p in found:
            if id(p) in counts:
                counts[id(p)] += 1
    for index, p in enumerate(given):
        if counts[id(p)] == 0:
            raise ValueError(
                f"no loss depends on shared parameter {index} of shape {tuple(p.shape)} (unused, detached, or of "
                "another model?)"
            )
    single = [index for index, p in enumerate(given) if counts[id(p)] == 1]
    if single and len(reached) > 1:
        warnings.warn(
            f"shared parameter(s) {', '.join(map(str, single))} are reached from one loss only: they belong to that "
            "task, and would better not be balanced",
            UserWarning,
            stacklevel=2,
        )
    return given


def _reached(losses: Iterable[Tensor]) -> list[list[Tensor]]:
    """The leaves of each loss."""
    reached = []
    for task, loss in enumerate(losses):
        if not loss.requires_grad:
            raise RuntimeError(f"the loss of task {task} has no graph: it does not require grad")
        found = leaves([loss])
        if found is None:
            raise RuntimeError(
                f"the loss of task {task} goes through a re-entrant checkpoint, which hides its parameters: use "
                "checkpoint(..., use_reentrant=False)"
            )
        reached.append(found)
    return reached
