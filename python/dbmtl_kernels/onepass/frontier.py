"""The frontier: where the gradient of one task enters the part of the graph that several tasks share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAF = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
SINK = "_DDPSinkBackward"


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
        strangers: parameters that two losses or more reach, and that were not declared shared. Complete only of a walk
            of the whole graph.
        trains: whether any loss reaches a shared parameter. Complete only of a walk of the whole graph.
        walked: how many nodes were looked at.
        hidden: a re-entrant checkpoint was met, whose part of the graph nobody can look into.
    """

    entries: list[Entry]
    at_root: set[int]
    heads: list[Entry]
    strangers: list[Tensor]
    trains: bool
    walked: int
    hidden: bool

    def leaves_of_heads(self) -> Iterator[Tensor]:
        """The parameters of heads."""
        for node, _, places in self.heads:
            yield from (node.next_functions[place][0].variable for place in places)

    def structure(self) -> tuple[Any, ...]:
        """The same for two graphs whose frontiers look alike."""
        return tuple((entry.task, entry.node.name(), entry.places) for entry in self.entries), frozenset(self.at_root)


def find_frontier(losses: Mapping[int, Tensor], shared: set[int], whole: bool, held: Collection[int] = ()) -> Frontier:
    """Walk down from the losses to where their graphs meet.

    Nodes are visited in the order of their sequence numbers, the latest first, so that a node's users come before it,
    and the walk can stop once only nodes are left that several tasks reach: a few dozen nodes, whatever the trunk's
    depth. Nodes made in another thread follow no such order; where one is met the walk is made anew, to the end.

    A loss that was taken out of ``torch.stack(losses)`` begins at what was stacked, unless others use that stack too.

    Args:
        losses: of each task.
        shared: ids of the shared parameters.
        whole: go on to the end, and find strangers.
        held: ids of leaves that an optimizer holds, so that they are parameters whatever their type.
    """
    edges = {task: torch.autograd.graph.get_gradient_edge(loss) for task, loss in losses.items()}
    tops = {task: _through(edge.node, edge.output_nr) for task, edge in edges.items()}
    roots: dict[int, Any] = {task: node for task, (node, _) in tops.items()}
    stacks = set()
    for task, top in tops.items():
        found = _stack_above(*top, losses[task])
        if found is not None:
            stacks.add(found[0])
            following = found[0].next_functions[found[1]]
            roots[task] = None if following[0] is None else _through(*following)[0]
    walk = _Walk(roots, whole)
    if stacks & walk.masks.keys():
        roots = {task: node for task, (node, _) in tops.items()}
        walk = _Walk(roots, whole)
    return walk.frontier(roots, shared, held)


class _Walk:
    """Through the graphs of the losses: which tasks reach each node, as bits."""

    def __init__(self, roots: Mapping[int, Any], whole: bool) -> None:
        self.hidden, self.walked = False, 0
        if whole or not self._run(roots, whole=False):
            self._run(roots, whole=True)

    def _run(self, roots: Mapping[int, Any], whole: bool) -> bool:
        """Whether it came to its end: not if nodes are out of order."""
        self.masks = masks = dict[Any, int]()
        self.leaves = leaves = dict[Any, int]()  # of nodes that accumulate into a leaf
        self.edges = edges = dict[Any, list[tuple[int, Any]]]()  # what was below each node that was visited
        heap: list[tuple[int, int, Any]] = []
        lonely = 0  # nodes in the heap that one task alone reaches
        number = -(1 << 64)  # of the node visited last, negative
        fresh = [(node, 1 << task) for task, node in roots.items() if node is not None]
        while True:
            for node, mask in fresh:
                if node.__class__ is LEAF:
                    leaves[node] = leaves.get(node, 0) | mask
                    continue
                before = masks.get(node, 0)
                after = before | mask
                if before == after:
                    continue
                masks[node] = after
                if before == 0 or whole:  # no order is relied on then: a node goes round again when more reach it
                    key = -node._sequence_nr()
                    if key <= number and not whole:
                        return False
                    heappush(heap, (key, id(node), node))
                    lonely += not after & (after - 1)
                elif node in edges:
                    return False
                elif not before & (before - 1):
                    lonely -= 1
            if not heap or not (whole or lonely):
                break
            number, _, node = heappop(heap)
            mask = masks[node]
            lonely -= not mask & (mask - 1)
            self.walked += 1
            self.hidden = self.hidden or node.__class__.__name__ == "CheckpointFunctionBackward"
            edges[node] = found = _below(node)
            fresh = [(following, mask) for _, following in found]
        # One look further: what is left was reached in order only if what it leads to is.
        return whole or not any(_out_of_order(number, _below(node)) for number, _, node in heap)

    def frontier(self, roots: Mapping[int, Any], shared: set[int], held: Collection[int]) -> Frontier:
        """What was found."""
        masks, leaves = self.masks, self.leaves

        def is_common(node: Any) -> bool:
            if node in leaves:
                mask = leaves[node]
                return id(node.variable) in shared or mask & (mask - 1) != 0
            mask = masks[node]
            return mask & (mask - 1) != 0

        def is_parameter(leaf: Tensor) -> bool:
            return isinstance(leaf, torch.nn.Parameter) or id(leaf) in held

        entries, heads = list[Entry](), list[Entry]()
        for node, edges in self.edges.items():
            mask = masks[node]
            if mask & (mask - 1):
                continue
            into = [place for place, following in edges if is_common(following)]
            own = [place for place, following in edges if place not in into and following in leaves]
            if into:
                entries.append(Entry(node, mask.bit_length() - 1, tuple(into)))
            if own:
                heads.append(Entry(node, mask.bit_length() - 1, tuple(own)))
        at_root = {task for task, node in roots.items() if node is not None and is_common(node)}
        strangers: list[Tensor] = [
            node.variable
            for node, mask in leaves.items()
            if mask & (mask - 1) and id(node.variable) not in shared and is_parameter(node.variable)
        ]
        trains = any(id(node.variable) in shared for node in leaves)
        return Frontier(entries, at_root, heads, strangers, trains, self.walked, self.hidden)


def _below(node: Any) -> list[tuple[int, Any]]:
    """The nodes that gradients of a node go to, and by which of its ``grad_inputs``."""
    return [
        (place, following if following.__class__.__name__ != SINK else _through(following, number)[0])
        for place, (following, number) in enumerate(node.next_functions)
        if following is not None
    ]


def _through(node: Any, number: int) -> tuple[Any, int]:
    """Past the node that DistributedDataParallel puts around all outputs with ``find_unused_parameters``.

    ``next_functions`` counts its inputs that are tensors, ``needs_input_grad`` all: the wrapper, then the outputs.
    """
    while node.__class__.__name__ == SINK:
        rank = sum(node.needs_input_grad[1 : number + 1])
        node, number = [edge for edge in node.next_functions if edge[0] is not None][rank]
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


def _out_of_order(number: int, edges: list[tuple[int, Any]]) -> bool:
    """Whether what a node leads to was made after it, as far as their numbers tell."""
    return any(node.__class__ is not LEAF and -node._sequence_nr() <= number for _, node in edges)
