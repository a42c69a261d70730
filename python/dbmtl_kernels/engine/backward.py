"""The balanced loss: a scalar of which every way of asking for gradients runs `Engine.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from .losses import TaskLosses, loss_scale_or_none
from .step import Engine


def balanced_loss(engine: Engine, losses: TaskLosses, retain_graph: bool) -> Tensor:
    """A scalar whose backward is `Engine.run`; the gradient that arrives at it is the loss scale."""
    value = losses.total()
    # Autograd calls backward only if an input requires grad, and the losses are deliberately none.
    anchor = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=True)
    out: Tensor = _Balance.apply(anchor, value, engine, losses, retain_graph)  # type: ignore[no-untyped-call]
    return out.as_subclass(BalancedLoss)


_BASE_OF_A_VIEW = Tensor._base.__get__  # type: ignore[union-attr]


class BalancedLoss(Tensor):
    """A balanced loss, or what was made of one: a tensor like any other, but that gradients of parameters can be asked
    for by name.

    The parameters are not in its graph, so that ``backward(inputs=...)`` and ``torch.autograd.grad`` would find nothing
    there. Both are served here; a plain ``backward()`` takes no notice of this class.
    """

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function, on plain tensors; the result is a balanced loss as long as it has a graph."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.backward, torch.autograd.backward):
                return _backward(*args, **(kwargs or {}))
            if func is torch.autograd.grad:
                return _grad(*args, **(kwargs or {}))
            out = func(*args, **(kwargs or {}))
        if func == _BASE_OF_A_VIEW:  # the plain one: as another view it would have a base in turn
            return out
        if isinstance(out, tuple | list):  # named ones of torch too
            return type(out)([cls._of(part) for part in out])
        if type(out) is Tensor and args and out is args[0]:  # in place: the tensor itself is of this kind now
            out.__class__ = cls
        return cls._of(out)

    @classmethod
    def _of(cls, out: Any) -> Any:
        return out.as_subclass(cls) if type(out) is Tensor and out.grad_fn is not None else out


_device = attrgetter("device")


class _Balance(torch.autograd.Function):
    """Hands the gradient that arrives to `Engine.run`; the losses' graphs are not part of the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, engine: Engine, losses: TaskLosses, retain_graph: bool
    ) -> Tensor:
        """The value, cut off from the losses."""
        ctx.work = engine, losses, retain_graph
        ctx.anchor = anchor
        ctx.inputs = None  # the leaves asked for; None for all
        ctx.gradients = None  # where to put the gradients of `inputs`; None for their .grad
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Run the backward passes once (more often with retain_graph)."""
        if torch.is_grad_enabled():
            _refuse_create_graph()
        if ctx.work is None:
            raise RuntimeError(
                "backward() through this balanced loss a second time (the first may have failed): its graphs are "
                "freed; compute the losses again, or pass retain_graph=True to balancer(losses)"
            )
        engine, losses, retain_graph = ctx.work
        last = _must_be_last(engine, losses, retain_graph)
        if not retain_graph:
            ctx.work = None
        scale = loss_scale_or_none(grads[0])
        run = partial(_run, engine, losses, scale, retain_graph, ctx.inputs, ctx.gradients)
        if last:
            Variable._execution_engine.queue_callback(run)
        else:
            run()
        return None, None, None, None, None


def _must_be_last(engine: Engine, losses: TaskLosses, retain_graph: bool) -> bool:
    """Whether the passes come when everything else of the outer backward pass is done: with several devices.

    Each device has a thread of its own. What else is in that pass, a regulariser's part, could add to a ``.grad`` while
    all are set aside, and would count as a task's.

    Raises:
        RuntimeError: by then the graph of the losses may be freed.
    """
    device, heads = engine.rows.device, engine.heads.devices
    several = hasattr(engine.rows, "parts") or {*map(_device, losses.losses), *(heads or ())} != {device}
    if not retain_graph or torch._C._autograd._get_current_graph_task_keep_graph():
        unknown = heads is None and device.type == "cuda" and torch.cuda.device_count() > 1
        return several or unknown
    if several:
        raise RuntimeError(
            "with parameters or losses on several devices the balancer's passes come after all else of the backward "
            "pass, which frees the graph: call backward(retain_graph=True)"
        )
    return False


@torch.no_grad()
def _run(
    engine: Engine,
    losses: TaskLosses,
    scale: Tensor | None,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None,
    gradients: list[list[Tensor | None]] | None,
) -> None:
    """The passes; what they find goes to ``.grad``, or to the end of ``gradients``."""
    if gradients is not None:
        assert inputs is not None
        gradients.append(_gradients(engine, losses, scale, retain_graph, inputs))
        return
    if inputs is not None and not engine.frozen:
        _refuse_unnamed(engine, inputs)
    engine.run(losses, scale, retain_graph, inputs)


def _gradients(
    engine: Engine, losses: TaskLosses, loss_scale: Tensor | None, retain_graph: bool, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """What `Engine.run` would add to the ``.grad`` of ``inputs``, as tensors; every ``.grad`` stays as it is. A step.

    Raises:
        RuntimeError: a step is open.
    """
    engine.end_if_dropped()
    if engine.steps.open:
        raise RuntimeError(
            "autograd.grad of a balanced loss in the middle of a step: it would add to the gradients so far. Call "
            "optimizer.step() first, or zero_grad()"
        )
    before = [engine.grads.flat.kept(p.grad) for p in inputs]
    try:
        try:
            for p in inputs:
                p.grad = None
            engine.run(losses, loss_scale, retain_graph, inputs)
            return [None if p.grad is None else p.grad.clone() for p in inputs]
        finally:
            _put_back(engine, inputs, before)
    finally:  # once more, should an interrupt have come just there
        _put_back(engine, inputs, before)


def _put_back(engine: Engine, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    engine.end_step()


def _refuse_unnamed(engine: Engine, inputs: Sequence[Tensor]) -> None:
    """Raise RuntimeError if the balanced gradient so far of a parameter that is not named would be lost."""
    engine.end_if_dropped()
    named = {id(p) for p in inputs}
    for index, (p, left) in enumerate(zip(engine.rows.parameters, engine.grads.left, strict=True)):
        if left and id(p) not in named:
            raise RuntimeError(
                f"backward(inputs=...) within a step, without {engine.rows.describe(index)}, whose .grad has the "
                "balanced gradient so far: name all shared parameters, or call optimizer.step() first"
            )


def _refuse_create_graph() -> None:
    raise RuntimeError(
        "create_graph=True is not supported by a balanced loss: norms and weights are not part of any graph. For "
        "second derivatives use the sum of the losses"
    )


def _nodes(outputs: Sequence[Any]) -> Iterator[Any]:
    """The nodes of balanced losses in the graphs of ``outputs``."""
    seen: set[Any] = set()
    pending = [output.grad_fn if isinstance(output, Tensor) else output.node for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(node, _Balance._backward_cls):
                yield node
            pending.extend(following for following, _ in node.next_functions)


def _backward(
    outputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    **others: Any,
) -> None:
    """`torch.autograd.backward`; ``inputs`` may be leaves of the losses' graphs."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grad_outputs = others.get("gradient", others.get("grad_tensors", grad_outputs))
    if create_graph:
        _refuse_create_graph()
    nodes: list[Any] = []
    if inputs is not None:
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        nodes = list(_nodes(outputs))
    try:
        for node in nodes:
            node.inputs = inputs
        torch.autograd.backward(
            outputs, grad_outputs, retain_graph, inputs=[*inputs, *(node.anchor for node in nodes)] if nodes else inputs
        )
    finally:
        for node in nodes:
            node.inputs = None


def _grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, of leaves of the losses' graphs too."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if create_graph:
        _refuse_create_graph()
    nodes = list(_nodes(outputs))
    if is_grads_batched or not all(isinstance(x, Tensor) and x.is_leaf for x in inputs):
        raise RuntimeError("autograd.grad of a balanced loss takes leaf tensors, and no is_grads_batched")
    parts: list[list[Tensor | None]] = []
    try:
        for node in nodes:
            node.inputs, node.gradients = inputs, parts
        anchors = [node.anchor for node in nodes]
        found = torch.autograd.grad(outputs, [*inputs, *anchors], grad_outputs, retain_graph, allow_unused=True)
    finally:
        for node in nodes:
            node.inputs = node.gradients = None
    result: list[Tensor | None] = []
    for index, x in enumerate(inputs):
        some = [grad for grad in (found[index], *(part[index] for part in parts)) if grad is not None]
        result.append(sum(some[1:], some[0]) if some else torch.zeros_like(x) if materialize_grads else None)
    if None in [None if grad is None else 0 for grad in result] and not allow_unused:
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if "
            "this is the desired behavior."
        )
    return tuple(result)
