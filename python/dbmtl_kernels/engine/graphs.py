"""What can be read off the graphs of the losses: which parameters they reach, and which of them are shared."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reached(NamedTuple):
    """What a walk through the graphs of losses came by.

    Attributes:
        leaves: the leaf tensors, each once, in an order that depends on the graphs alone.
        hidden: whether there may be more, inside a re-entrant checkpoint.
        compiled: the nodes that stand for a whole compiled graph.
    """

    leaves: list[Tensor]
    hidden: bool
    compiled: set[Any]


def walk(losses: Sequence[Tensor]) -> Reached:
    """Through the graphs of the losses, without running them."""
    found: dict[int, Tensor] = {}
    hidden = False
    compiled: set[Any] = set()
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn for loss in reversed(losses)]
    for loss in losses:
        if loss.grad_fn is None and loss.requires_grad:
            found[id(loss)] = loss
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__  # a custom function's node has whatever attributes its author gave it
        if kind == "AccumulateGrad":
            found[id(node.variable)] = node.variable
        elif kind == "CheckpointFunctionBackward":
            hidden = True
        elif kind == "CompiledFunctionBackward":
            compiled.add(node)
        pending.extend(previous for previous, _ in reversed(node.next_functions))
    return Reached(list(found.values()), hidden, compiled)


def may_be_cached(losses: Sequence[Tensor], passes: int) -> bool:
    """Whether several passes, so many from each loss, go through one compiled graph that may be of the cache on disk.

    Inductor's cache does not ask what a backward was compiled for (torch 2.13): one for a single pass overwrites what
    the next needs. A tag in its keys keeps such graphs apart.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or torch.compiler.config.cache_key_tag:
        return False
    hits = dynamo.counters["inductor"]["fxgraph_cache_hit"] + dynamo.counters["aot_autograd"]["autograd_cache_hit"]
    times = Counter(node for loss in losses for node in walk([loss]).compiled) if hits else Counter[Any]()
    return any(passes * count > 1 for count in times.values())


class Meeting(NamedTuple):
    """What `meet` came by.

    Attributes:
        leaves: leaf tensors that are not shared parameters, each once.
        tasks: of each, the index of the loss that alone was seen to reach it; None if several were.
        common: those of them that two losses or more reach.
        below: those of ``common`` that are reached through nodes which shared parameters go into: parts of the trunk.
    """

    leaves: list[Tensor]
    tasks: list[int | None]
    common: list[Tensor]
    below: list[Tensor]


def meet(losses: Sequence[Tensor], shared: set[int], whole: bool) -> Meeting:
    """From the losses down to where their graphs meet: that far a node is reached from one loss alone.

    Nodes are visited in the order of their sequence numbers, the latest first, so that a node's users come before it
    and the walk can stop once only common nodes are left. That takes a few dozen nodes, whatever the trunk's depth.

    Args:
        losses: scalars with a graph.
        shared: ids of the shared parameters.
        whole: go on to the end; otherwise `Meeting.common` and ``below`` are not complete.
    """
    below = 1 << len(losses)  # the bit of what lies below a node that a shared parameter goes into
    tasks, alone = below - 1, {1 << index for index in range(len(losses))}
    masks: dict[Any, int] = {}  # by node: which losses reach it
    leaves: dict[int, tuple[Tensor, int]] = {}
    heap: list[tuple[int, int, Any]] = []
    private = 0  # nodes in the heap that one loss alone reaches
    fresh: list[tuple[Any, int]] = []
    for index, loss in enumerate(losses):
        if loss.grad_fn is not None:
            fresh.append((loss.grad_fn, 1 << index))
        elif loss.requires_grad:
            leaves[id(loss)] = loss, 1 << index
    while fresh or (heap and (whole or private)):
        if fresh:
            following, mask = fresh.pop()
            before = masks.get(following, 0)
            masks[following] = after = before | mask
            if before == 0:
                heappush(heap, (-following._sequence_nr(), len(masks), following))
            else:
                private -= (before & tasks) in alone
            private += (after & tasks) in alone
            continue
        node = heappop(heap)[2]
        mask = masks[node]
        private -= (mask & tasks) in alone
        inner, uses = [], 0
        for following, _ in node.next_functions:
            if following is None:
                continue
            if type(following).__name__ != "AccumulateGrad":
                inner.append(following)
            elif id(p := following.variable) in shared:
                uses = below
            else:
                leaves[id(p)] = p, mask | leaves.get(id(p), (p, 0))[1]
        for following in inner:
            fresh.append((following, mask | uses))
    found = Meeting([], [], [], [])
    for p, mask in leaves.values():
        found.leaves.append(p)
        found.tasks.append(mask.bit_length() - 1 if mask in alone else None)
        if mask & tasks not in alone:
            found.common.append(p)
            if mask & below:
                found.below.append(p)
    return found


def meet_at_once(losses: Sequence[Tensor]) -> bool:
    """Whether the losses were taken out of one tensor, so that no node is reached from one of them alone."""
    nodes = {loss.grad_fn for loss in losses}
    above = {node.next_functions[0][0] for node in nodes if node is not None and node.next_functions}
    return len(losses) > 1 and (len(nodes) == 1 or len(above) == 1)


def find_shared_parameters(losses: Sequence[Tensor], *, stacklevel: int = 2) -> list[Tensor]:
    """The parameters that two losses or more depend on: what a balancer should be given.

    Walks the graphs of the losses, without running them; each stays as it is. Parameters reached from one loss only
    belong to that task. Inputs that require grad are leaves like parameters, and are found too.

    The graph tells what goes into a node, not which part of it comes out where: of predictions that were concatenated
    before the losses took their slices, each loss depends on all, heads included.

    Args:
        losses: K >= 2 scalars with a graph, of one forward pass.
        stacklevel: whose line a warning names.

    Returns:
        leaf tensors, each once, in an order that depends on the graphs alone.

    Raises:
        ValueError: fewer than two losses, or no parameter is shared; losses in one tensor, in whose graph all of them
            depend on everything.
        TypeError: a loss is not a tensor.
        RuntimeError: a loss has no graph, or hides parameters in a re-entrant checkpoint.

    Warns:
        UserWarning: losses come out of one compiled graph, all parameters of which count as shared.
    """
    reached = _reached(losses)
    if len(reached) < 2:
        raise ValueError(f"sharing takes two losses or more, got {len(reached)}")
    compiled = [node for found in reached for node in found.compiled]
    if len(compiled) > len(set(compiled)):
        warnings.warn(
            "two losses come out of one compiled graph: all of its parameters count as shared. If heads were compiled "
            "too, find the shared parameters with the model that is not",
            UserWarning,
            stacklevel=stacklevel,
        )
    counts: dict[int, int] = {}
    parameters: dict[int, Tensor] = {}
    for found in reached:
        for p in found.leaves:
            counts[id(p)] = counts.get(id(p), 0) + 1
            parameters[id(p)] = p
    shared = [p for key, p in parameters.items() if counts[key] > 1]
    if not shared:
        raise ValueError(f"the {len(reached)} losses share no parameter: there is nothing to balance")
    return shared


def check_shared_parameters(
    losses: Sequence[Tensor], parameters: Iterable[Tensor], stacklevel: int = 2
) -> list[Tensor]:
    """The parameters as a list, if the losses of one forward pass depend on each of them.

    Args:
        losses: as for `find_shared_parameters`.
        parameters: leaf tensors.
        stacklevel: whose line the warning names.

    Raises:
        ValueError: no loss depends on one of them, or it is frozen.
        ValueError, TypeError, RuntimeError: see `find_shared_parameters`.

    Warns:
        UserWarning: one of them is reached from a single loss, and would better be left to its task.
    """
    given = list(parameters)
    counts = {id(p): 0 for p in given}
    reached = _reached(losses)
    for found in reached:
        for p in found.leaves:
            if id(p) in counts:
                counts[id(p)] += 1
    for index, p in enumerate(given):
        if counts[id(p)] == 0:
            why = "unused, detached, or of another model?" if p.requires_grad else "it is frozen: requires_grad=False"
            raise ValueError(f"no loss depends on shared parameter {index} of shape {tuple(p.shape)} ({why})")
    single = [index for index, p in enumerate(given) if counts[id(p)] == 1]
    if single and len(reached) > 1:
        warnings.warn(
            f"shared parameter(s) {', '.join(map(str, single))} are reached from one loss only: they belong to that "
            "task, and would better not be balanced",
            UserWarning,
            stacklevel=stacklevel,
        )
    return given


def _reached(losses: Sequence[Tensor]) -> list[Reached]:
    """What each loss reaches."""
    if isinstance(losses, Tensor):
        raise ValueError(
            "the losses must be a sequence of scalars: in the one graph of a tensor each depends on every parameter"
        )
    reached = []
    for task, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss of task {task} must be a tensor, got {type(loss).__name__}")
        if not loss.requires_grad:
            raise RuntimeError(f"the loss of task {task} has no graph: it does not require grad")
        found = walk([loss])
        if found.hidden:
            raise RuntimeError(
                f"the loss of task {task} goes through a re-entrant checkpoint, which hides its parameters: use "
                "checkpoint(..., use_reentrant=False)"
            )
        reached.append(found)
    return reached
