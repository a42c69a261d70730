"""The frontier: where the gradient of one task enters the part of the graph that several tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """A node that one task alone reaches, some of whose gradients go on into what several tasks share.

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
        entries: where gradients are weighted.
        at_root: tasks whose loss is itself a node that another loss reaches too, or a shared parameter.
        heads: entries of parameters that one task alone reaches and that are not shared.
        strangers: parameters that two losses or more reach, and that were not declared shared. Complete only of a walk
            of the whole graph.
        walked: how many nodes were looked at.
        hidden: a re-entrant checkpoint was met, whose part of the graph nobody can look into.
    """

    entries: list[Entry]
    at_root: set[int]
    heads: list[Entry]
    strangers: list[Tensor]
    walked: int
    hidden: bool

    def structure(self) -> tuple[Any, ...]:
        """The same for two graphs whose frontiers look alike."""
        return tuple((entry.task, entry.node.name(), entry.places) for entry in self.entries), frozenset(self.at_root)


def root_of(loss: Tensor) -> Any:
    """The node where a loss begins to be its own: looks through ``torch.stack(losses)`` and what takes one out."""
    edge = torch.autograd.graph.get_gradient_edge(loss)
    node, number = _through(edge.node, edge.output_nr)
    stack = node.next_functions[0][0] if node.next_functions else None
    if stack is not None and stack.name() == "StackBackward0":
        count = len(stack.next_functions)
        if node.name() == "UnbindBackward0":
            return stack.next_functions[number][0]
        if node.name() == "SelectBackward0":
            index = node._saved_index
            return stack.next_functions[index if index < count else index - 2**64][0]
    return node


def find_frontier(roots: Mapping[int, Any], shared: set[int], whole: bool) -> Frontier:
    """Walk down from the losses to where their graphs meet.

    Nodes are visited in the order of their sequence numbers, the latest first, so that a node's users come before it,
    and the walk can stop once only nodes are left that several tasks reach: a few dozen nodes, whatever the trunk's
    depth. Nodes made in another thread follow no such order; where one is met the walk is made anew, to the end.

    Args:
        roots: the node of each task's loss.
        shared: ids of the shared parameters.
        whole: go on to the end, and find strangers.
    """
    masks: dict[Any, int] = {}  # which tasks reach a node
    leaves: dict[Any, int] = {}  # the same of nodes that accumulate into a leaf
    heap: list[tuple[int, int, Any]] = []
    lonely = walked = 0  # nodes in the heap that one task alone reaches
    hidden = False

    def reach(node: Any, mask: int) -> None:
        nonlocal lonely
        if type(node).__name__ == "AccumulateGrad":
            leaves[node] = leaves.get(node, 0) | mask
            return
        before = masks.get(node, 0)
        masks[node] = after = before | mask
        if before == after:
            return
        if before == 0 or whole:  # no order is relied on then: a node goes round again when more tasks reach it
            heappush(heap, (-node._sequence_nr(), id(node), node))
            lonely += _alone(after)
        elif _alone(before):
            lonely -= 1

    for task, node in roots.items():
        reach(node, 1 << task)
    while heap and (whole or lonely):
        number, _, node = heappop(heap)
        mask = masks[node]
        lonely -= _alone(mask)
        walked += 1
        hidden = hidden or type(node).__name__ == "CheckpointFunctionBackward"
        for _, following in _below(node):
            if not whole and -following._sequence_nr() <= number and type(following).__name__ != "AccumulateGrad":
                return find_frontier(roots, shared, whole=True)
            reach(following, mask)
    entries, heads = list[Entry](), list[Entry]()
    for node, mask in masks.items():
        if not _alone(mask):
            continue
        into, own = list[int](), list[int]()
        for place, following in _below(node):
            if following in leaves:
                is_shared = id(following.variable) in shared or not _alone(leaves[following])
                (into if is_shared else own).append(place)
            elif not _alone(masks[following]):
                into.append(place)
        if into:
            entries.append(Entry(node, mask.bit_length() - 1, tuple(into)))
        if own:
            heads.append(Entry(node, mask.bit_length() - 1, tuple(own)))
    at_root = {
        task
        for task, node in roots.items()
        if (id(node.variable) in shared or not _alone(leaves[node]) if node in leaves else not _alone(masks[node]))
    }
    strangers: list[Tensor] = [
        node.variable
        for node, mask in leaves.items()
        if not _alone(mask) and id(node.variable) not in shared and isinstance(node.variable, torch.nn.Parameter)
    ]
    return Frontier(entries, at_root, heads, strangers, walked, hidden)


def _below(node: Any) -> Iterator[tuple[int, Any]]:
    """The nodes that gradients of a node go to, and by which of its ``grad_inputs``.

    DistributedDataParallel with ``find_unused_parameters`` lets all outputs pass through one node, each unchanged.
    """
    for place, (following, number) in enumerate(node.next_functions):
        if following is not None:
            yield place, _through(following, number)[0]


def _through(node: Any, number: int) -> tuple[Any, int]:
    while type(node).__name__ == "_DDPSinkBackward":
        node, number = node.next_functions[number]
    return node, number


def _alone(mask: int) -> bool:
    return mask & (mask - 1) == 0


class Weighing:
    """What the hooks of one graph share. They weigh in one backward pass, and leave others through the graph alone.

    Args:
        weights: (K,) what the gradient of each task is multiplied with, on the device.
        propagate_above: gradients that are not finite pass under factors above this; otherwise zeros do.

    Attributes:
        flags: (K,) bool, whose loss or gradient was not finite.
    """

    def __init__(self, weights: Tensor, propagate_above: float) -> None:
        self.weights, self._above = weights, propagate_above
        self.on_host = weights.device.type == "cpu"
        self.flags = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        self._finite: Tensor | None = None
        self._passes: Any = False
        self._pass: int | None = None

    def watch(self, frontier: Frontier) -> None:
        """Put hooks on the graph."""
        for node, task, places in frontier.entries:
            node.register_hook(_Hook(self, task, places, self._weigh))
        if not self.on_host:  # there nothing is run of a loss that is not finite
            for node, task, places in frontier.heads:
                node.register_hook(_Hook(self, task, places, self._clear))

    def arm(self, factor: Tensor, finite: Tensor | None) -> None:
        """Weigh in the backward pass that runs now.

        Args:
            factor: of the balanced loss.
            finite: (K,) bool, whose loss is, where only the device knows.
        """
        passes = factor.abs() > self._above
        self._passes, self._finite = bool(passes) if self.on_host else passes, finite
        self._pass = torch._C._current_graph_task_id()

    @property
    def armed(self) -> bool:
        """Whether the pass that runs now is the one to weigh."""
        return self._pass == torch._C._current_graph_task_id()

    def _weigh(self, grad: Tensor, task: int) -> Tensor:
        """The gradient of a task times its weight; zeros where it is not finite, unless that must be passed on."""
        weight = self.weights[task].to(grad.device, grad.dtype)
        fine = grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).isfinite()
        if self.on_host:
            if not bool(fine):
                self.flags[task] = True
            return grad * weight if self._passes or bool(fine) else torch.zeros_like(grad)
        self.flags[task] |= ~fine.to(self.flags.device)
        keep = fine | self._passes.to(fine.device)
        if self._finite is not None:
            keep = keep & self._finite[task].to(fine.device)
        return torch.where(keep, grad * weight, 0.0)

    def _clear(self, grad: Tensor, task: int) -> Tensor:
        """The gradient of a head; zeros if the loss of its task is not finite."""
        return grad if self._finite is None else torch.where(self._finite[task].to(grad.device), grad, 0.0)


class _Hook(NamedTuple):
    """Replaces gradients on their way from a node to those below it."""

    weighing: Weighing
    task: int
    places: Sequence[int]
    change: Callable[[Tensor, int], Tensor]

    def __call__(self, grad_inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
        if not self.weighing.armed:
            return None
        out = list(grad_inputs)
        for place in self.places:
            grad = out[place]
            if grad is not None:
                out[place] = self.change(grad, self.task)
        return tuple(out)
