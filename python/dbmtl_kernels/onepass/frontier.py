"""The frontier: where the gradient of one task enters the part of the graph that several tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """Some of the gradients that a node passes on.

    Attributes:
        node: of the graph.
        task: whose it is.
        places: which of its ``grad_inputs``.
    """

    node: Any
    task: int
    places: tuple[int, ...]


class Frontier(NamedTuple):
    """What `find_frontier` found.

    Attributes:
        entries: where gradients are weighted: nodes that one task alone reaches, and what they pass on to what several
            tasks share.
        at_root: tasks whose loss is itself a node that another loss reaches too, or a shared parameter.
        heads: nodes above parameters that one task alone reaches and that are not shared.
        stacked: by node of a ``torch.stack`` that losses were taken out of: the tasks of each place that any was.
        strangers: parameters that two losses or more reach, and that were not declared shared. Complete only of a walk
            of the whole graph.
        trains: whether any loss reaches a shared parameter. Complete only of a walk of the whole graph.
        walked: how many nodes were looked at.
        hidden: a re-entrant checkpoint was met, whose part of the graph nobody can look into.
    """

    entries: list[Entry]
    at_root: set[int]
    heads: list[Entry]
    stacked: dict[Any, dict[int, list[int]]]
    strangers: list[Tensor]
    trains: bool
    walked: int
    hidden: bool

    def structure(self) -> tuple[Any, ...]:
        """The same for two graphs whose frontiers look alike."""
        return tuple((entry.task, entry.node.name(), entry.places) for entry in self.entries), frozenset(self.at_root)


def find_frontier(losses: Mapping[int, Tensor], shared: set[int], whole: bool) -> Frontier:
    """Walk down from the losses to where their graphs meet.

    Nodes are visited in the order of their sequence numbers, the latest first, so that a node's users come before it,
    and the walk can stop once only nodes are left that several tasks reach: a few dozen nodes, whatever the trunk's
    depth. Nodes made in another thread follow no such order; where one is met the walk is made anew, to the end.

    A loss that was taken out of ``torch.stack(losses)`` begins at what was stacked, unless others use that stack too.

    Args:
        losses: of each task.
        shared: ids of the shared parameters.
        whole: go on to the end, and find strangers.
    """
    edges = {task: torch.autograd.graph.get_gradient_edge(loss) for task, loss in losses.items()}
    tops = {task: _through(edge.node, edge.output_nr) for task, edge in edges.items()}
    roots: dict[int, Any] = {task: node for task, (node, _) in tops.items()}
    stacked: dict[Any, dict[int, list[int]]] = {}
    for task, top in tops.items():
        found = _stack_above(*top, losses[task])
        if found is not None:
            stack, place = found
            stacked.setdefault(stack, {}).setdefault(place, []).append(task)
            following = stack.next_functions[place]
            roots[task] = None if following[0] is None else _through(*following)[0]
    walk = _Walk(roots, whole)
    if any(stack in walk.masks for stack in stacked):
        roots, stacked = {task: node for task, (node, _) in tops.items()}, {}
        walk = _Walk(roots, whole)
    return walk.frontier(roots, shared, stacked)


class _Walk:
    """Through the graphs of the losses: which tasks reach each node, as bits."""

    def __init__(self, roots: Mapping[int, Any], whole: bool) -> None:
        self.hidden, self.walked = False, 0
        if whole or not self._run(roots, whole=False):
            self._run(roots, whole=True)

    def _run(self, roots: Mapping[int, Any], whole: bool) -> bool:
        """Whether it came to its end: not if nodes are out of order."""
        self.masks: dict[Any, int] = {}
        self.leaves: dict[Any, int] = {}  # of nodes that accumulate into a leaf
        self._heap: list[tuple[int, int, Any]] = []
        self._lonely, self._whole = 0, whole  # nodes in the heap that one task alone reaches
        heap = self._heap
        for task, node in roots.items():
            if node is not None:
                self._reach(node, 1 << task)
        while heap and (whole or self._lonely):
            number, _, node = heappop(heap)
            mask = self.masks[node]
            self._lonely -= _alone(mask)
            self.walked += 1
            self.hidden = self.hidden or type(node).__name__ == "CheckpointFunctionBackward"
            for _, following in below(node):
                if not whole and _out_of_order(number, following):
                    return False
                self._reach(following, mask)
        # One look further: what is left was reached in order only if what it leads to is.
        return whole or not any(_out_of_order(n, following) for n, _, node in heap for _, following in below(node))

    def _reach(self, node: Any, mask: int) -> None:
        if type(node).__name__ == "AccumulateGrad":
            self.leaves[node] = self.leaves.get(node, 0) | mask
            return
        before = self.masks.get(node, 0)
        self.masks[node] = after = before | mask
        if before == after:
            return
        if before == 0 or self._whole:  # no order is relied on then: it goes round again when more tasks reach it
            heappush(self._heap, (-node._sequence_nr(), id(node), node))
            self._lonely += _alone(after)
        elif _alone(before):
            self._lonely -= 1

    def frontier(
        self, roots: Mapping[int, Any], shared: set[int], stacked: dict[Any, dict[int, list[int]]]
    ) -> Frontier:
        """What was found."""
        masks, leaves = self.masks, self.leaves

        def is_common(node: Any) -> bool:
            if node in leaves:
                return id(node.variable) in shared or not _alone(leaves[node])
            return not _alone(masks[node])

        entries, heads = list[Entry](), list[Entry]()
        for node, mask in masks.items():
            if not _alone(mask):
                continue
            into, own = list[int](), list[int]()
            for place, following in below(node):
                if is_common(following):
                    into.append(place)
                elif following in leaves:
                    own.append(place)
            if into:
                entries.append(Entry(node, mask.bit_length() - 1, tuple(into)))
            if own:
                heads.append(Entry(node, mask.bit_length() - 1, tuple(own)))

        at_root = {task for task, node in roots.items() if node is not None and is_common(node)}
        strangers: list[Tensor] = [
            node.variable
            for node, mask in leaves.items()
            if not _alone(mask) and id(node.variable) not in shared and isinstance(node.variable, torch.nn.Parameter)
        ]
        trains = any(id(node.variable) in shared for node in leaves)
        return Frontier(entries, at_root, heads, stacked, strangers, trains, self.walked, self.hidden)


def below(node: Any) -> Iterator[tuple[int, Any]]:
    """The nodes that gradients of a node go to, and by which of its ``grad_inputs``."""
    for place, (following, number) in enumerate(node.next_functions):
        if following is not None:
            yield place, _through(following, number)[0]


def _through(node: Any, number: int) -> tuple[Any, int]:
    """Past the node that DistributedDataParallel puts around all outputs with ``find_unused_parameters``."""
    while type(node).__name__ == "_DDPSinkBackward":
        node, number = node.next_functions[number]
    return node, number


def _stack_above(node: Any, number: int, loss: Tensor) -> tuple[Any, int] | None:
    """The ``torch.stack`` of scalars that a loss was taken out of, by ``unbind`` or an index, and its place there."""
    stack = node.next_functions[0][0] if node.next_functions else None
    if loss.dim() != 0 or stack is None or stack.name() != "StackBackward0":
        return None
    if node.name() == "UnbindBackward0":
        return stack, number
    if node.name() == "SelectBackward0":
        count, index = len(stack.next_functions), node._saved_index
        return stack, index if index < count else index - 2**64 + count
    return None


def _out_of_order(number: int, following: Any) -> bool:
    return bool(-following._sequence_nr() <= number) and type(following).__name__ != "AccumulateGrad"


def _alone(mask: int) -> bool:
    return mask & (mask - 1) == 0
