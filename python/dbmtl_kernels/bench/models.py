"""What is measured: shapes of well-known trunks, numbers of parameters as people write them, and a user's own model."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import dbmtl_kernels as dbk

from .results import BenchError
from .steps import Problem

Shapes = list[tuple[int, ...]]
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
TENSORS = 16  # that a plain number of parameters is divided into
CLASSES = 10


class Size(NamedTuple):
    """P, and the tensors it is divided into.

    Attributes:
        name: as it was asked for: "resnet50", "20M".
        shapes: of the parameters.
        known: whether the shapes are those of a network.
    """

    name: str
    shapes: Shapes
    known: bool

    @property
    def num_params(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes)


def _residual(blocks: Sequence[int], bottleneck: bool) -> Shapes:
    """Of a ResNet's trunk, without the classifier."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inside, wider = 64, 4 if bottleneck else 1
    for index, count in enumerate(blocks):
        width = 64 << index
        for block in range(count):
            outside = wider * width
            if bottleneck:
                convolutions = [(width, inside, 1, 1), (width, width, 3, 3), (outside, width, 1, 1)]
            else:
                convolutions = [(width, inside, 3, 3), (width, width, 3, 3)]
            if block == 0 and (index > 0 or inside != outside):
                convolutions.append((outside, inside, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inside = outside
    return shapes


def _vision_transformer(width: int, depth: int, patch: int = 16, tokens: int = 197) -> Shapes:
    """Of a ViT's trunk, without the classifier."""
    shapes: Shapes = [(width, 3, patch, patch), (width,), (1, 1, width), (1, tokens, width)]
    for _ in range(depth):
        for out, into in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            shapes += [(out, into), (out,)]
        shapes += [(width,)] * 4  # two layer norms
    return [*shapes, (width,), (width,)]


NAMED: dict[str, Callable[[], Shapes]] = {
    "resnet18": lambda: _residual((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: _residual((3, 4, 6, 3), bottleneck=True),
    "vit-b": lambda: _vision_transformer(768, 12),
    "vit-l": lambda: _vision_transformer(1024, 24),
}


def size(text: str) -> Size:
    """Of "resnet50", "300M", "20e6", "1000".

    Raises:
        BenchError: it is neither a network's name nor a number of parameters.
    """
    if text.lower() in NAMED:
        return Size(text.lower(), NAMED[text.lower()](), True)
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d+)?)([kmb]?)", text.lower())
    count = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not found or not 1 <= count < 2**53 or count != int(count):
        raise BenchError(
            f"--params {text}: neither a number of parameters, as 1000, 20e6 or 300M, nor one of {', '.join(NAMED)}"
        )
    P, parts = int(count), min(TENSORS, int(count))
    return Size(text, [(P // parts + (index < P % parts),) for index in range(parts)], False)


def mlp(
    num_tasks: int = 3,
    widths: Sequence[int] = (1000, 2000, 2000, 1000),
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Problem:
    """An MLP trunk, of 8 M parameters by default, a head of ten classes for each task, and AdamW."""
    kind: dict[str, Any] = {"device": device, "dtype": torch.float32}
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, **kind), nn.ReLU()]
    trunk = nn.Sequential(*layers)
    heads = nn.ModuleList(nn.Linear(widths[-1], CLASSES, **kind) for _ in range(num_tasks))
    x = torch.randn(batch, widths[0], dtype=torch.float32, device=device)
    y = torch.randint(0, CLASSES, (num_tasks, batch), device=device, dtype=torch.int64)

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [functional.cross_entropy(head(z), target) for head, target in zip(heads, y, strict=True)]

    shared, own = list(trunk.parameters()), list(heads.parameters())
    return Problem(losses, shared, own, num_tasks, torch.optim.AdamW([*shared, *own], lr=1e-5, fused=True))


def widths_of(num_params: int) -> tuple[int, ...]:
    """Of an MLP trunk of about so many parameters."""
    width = max(1, round(math.sqrt(num_params / 8)))
    return width, 2 * width, 2 * width, width


def load(name: str) -> Callable[[], Problem]:
    """The user's "module:factory", imported; each call makes the model anew.

    ``factory()`` returns ``losses``, or ``(losses, shared)``, or ``(losses, shared, optimizer)``. ``losses()`` runs a
    forward pass of one and the same batch and returns the K losses: a list, a dict, or a 1-D tensor. ``shared`` are
    the shared parameters, or None to find those that two losses or more reach. Without an optimizer a step ends with
    its gradients.

    Raises:
        BenchError: there is no such module or factory. From a call of what is returned: it fails, gives something
            else, losses that share nothing, or others at each call.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise BenchError(f"--model {name}: write module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as ``python -m`` of a module in this folder would
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BenchError(f"--model {name}: {error}") from error
    if not callable(factory):
        raise BenchError(f"--model {name}: {attribute} is no function")
    return lambda: _problem(name, factory)


def _problem(name: str, factory: Callable[[], Any]) -> Problem:
    try:
        made = factory()
        given, shared, optimizer, *more = (*(made if isinstance(made, tuple) else (made,)), None, None)
    except Exception as error:
        raise BenchError(f"--model {name}: it raised {type(error).__name__}: {error}") from error
    if not callable(given) or len(more) > 2 or not isinstance(optimizer, torch.optim.Optimizer | None):
        raise BenchError(
            f"--model {name}: it must return losses, or (losses, shared), or (losses, shared, optimizer), where "
            f"losses() gives the K losses; it returned {type(made).__name__}"
        )

    def losses() -> list[Tensor]:
        torch.manual_seed(0)  # the same dropout for everybody
        found = given()
        found = list(found.values()) if isinstance(found, dict) else list(found)
        if not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in found):
            raise BenchError(f"--model {name}: losses() must give K scalars")
        return [loss.reshape(()) for loss in found]

    try:
        first, again = losses(), losses()
        if not all(torch.allclose(a.detach(), b.detach(), rtol=1e-3) for a, b in zip(first, again, strict=True)):
            values = [[loss.item() for loss in found] for found in (first, again)]
            raise BenchError(
                f"--model {name}: losses() gives other losses when it is called again, {values[0]} and {values[1]}: it "
                "must use one and the same batch"
            )
        found = dbk.find_shared_parameters(first)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BenchError(f"--model {name}: {error}") from error
    parameters = list(shared) if shared is not None else found
    known = {id(p) for p in parameters}
    if not known & {id(p) for p in found}:
        raise BenchError(f"--model {name}: the losses have none of the shared parameters that it gives in common")
    own = [p for p in _leaves(first) if id(p) not in known]
    return Problem(losses, parameters, own, len(first), optimizer)


def _leaves(losses: Sequence[Tensor]) -> list[Tensor]:
    """Leaves that the losses reach, each once."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn for loss in losses]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable
        pending += [following for following, _ in node.next_functions]
    return list(found.values())
